"""Runs: their identity, the schedule of rates, batch plans, refused numbers."""

import dataclasses
import math

import pytest

from experiments.paper import conditions
from experiments.paper.conditions import Condition
from experiments.paper.protocol import VERSION, Data, Protocol, Run, runs_of

_RUN = Run(
  condition=Condition(rule='uSF', batch_manhattan=1),
  dataset=Data('MNIST', 'd1', 'mnist.npz'),
  protocol=Protocol(),
  rate=1.0,
)
# Another value for every field: a new field needs one too.
_OTHERS = {
  Protocol: {
    'epochs': 64,
    'train_size': 100,
    'holdout': 0.2,
    'base_rate': 1e-3,
    'momentum': 0.5,
    'weight_decay': 0.0,
    'initial_std': 0.05,
    'input_scale': 1 / 255,
    'reduction': 'sum',
    'batch_norm_epsilon': 1e-5,
    'batch_norm_groups': 4,
    'calibration_batches': 10,
    'layer_metrics': True,
  },
  Condition: {
    'rule': 'NuSF',
    'batch_manhattan': 2,
    'batch_norm': 'plain',
    'batch_plan': conditions.THEN_500,
    'frozen': 'last layer',
    'adam': True,
  },
  Data: {'name': 'CIFAR', 'digest': 'd2'},
  Run: {'rate': 10.0, 'seed': 1, 'network': 'own', 'plugin': 'RULES = {}'},
}
_WORDS = {'source': 'elsewhere', 'note': 'lossy'}
_PARTS = {Protocol: 'protocol', Condition: 'condition', Data: 'dataset'}


def _with(kind, **fields) -> Run:
  if kind is Run:
    return dataclasses.replace(_RUN, **fields)
  part = dataclasses.replace(getattr(_RUN, _PARTS[kind]), **fields)
  return dataclasses.replace(_RUN, **{_PARTS[kind]: part})


def test_run_id_changes_with_everything_that_changes_the_result():
  for kind, others in _OTHERS.items():
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(others) == names - {*_WORDS, *_PARTS.values()}
  others = [
    _with(kind, **{name: value})
    for kind, fields in _OTHERS.items()
    for name, value in fields.items()
  ]
  others += [
    _with(Protocol, initial_std=std) for std in ((0.01, 0.05), (0.05, 0.01))
  ]
  ids = {run.run_id for run in (_RUN, *others)}
  assert len(ids) == 1 + len(others)
  assert all(len(name) == 20 and int(name, 16) >= 0 for name in ids)


def test_run_id_does_not_change_with_words_or_spelling_of_numbers():
  words = _with(Data, **_WORDS)
  assert words.run_id == _RUN.run_id
  assert words.config() != _RUN.config()
  whole = dataclasses.replace(
    _RUN, rate=1, protocol=Protocol(weight_decay=0, input_scale=1)
  )
  same = dataclasses.replace(_RUN, protocol=Protocol(weight_decay=0.0))
  assert whole.run_id == same.run_id


def test_run_id_is_the_same_in_every_version():
  # Results would be trained again if this changed: raise VERSION then.
  assert VERSION == 2
  assert _RUN.run_id == 'f4d4e3d40d62d0a466e2'


def test_config_is_flat_and_complete():
  config = _RUN.config()
  assert config['batch_plan'] == [[None, 100]]
  fields = set().union(*_OTHERS.values())
  # Runs without these are those of versions that had none.
  fields -= {'name', 'network', 'plugin', 'adam'}
  assert config.keys() == fields | {'version', 'dataset', *_WORDS}


def _factors(epochs: int) -> list[float]:
  return [Protocol(epochs=epochs).rate_factor(e + 1) for e in range(epochs)]


@pytest.mark.parametrize(
  ('epochs', 'counts'),
  [
    (65, (50, 10, 5)),  # the paper's
    (13, (10, 2, 1)),
    (6, (4, 1, 1)),
    (3, (1, 1, 1)),
    (2, (2, 0, 0)),
    (1, (1, 0, 0)),
  ],
)
def test_schedule_in_proportion(epochs, counts):
  high, middle, low = counts
  assert _factors(epochs) == [1.0] * high + [0.1] * middle + [0.01] * low


def test_batch_plan_in_time():
  run = _with(Condition, batch_plan=conditions.THEN_500)
  epochs = (1, 3, 4, 65)
  for images, sizes in (
    (500, [100, 100, 500, 500]),
    (120, [100, 100, 120, 120]),
  ):
    assert [run.batch_size(epoch, images) for epoch in epochs] == sizes
  for images, sizes in ((500, [100, 500]), (120, [100, 120]), (100, [100])):
    assert run.batch_sizes(images) == sizes
  grouped = dataclasses.replace(run, protocol=Protocol(batch_norm_groups=5))
  sizes = [grouped.statistics_size(epoch, 120) for epoch in epochs]
  assert sizes == [20, 20, 24, 24]
  assert _RUN.batch_size(1, 500) == _RUN.batch_size(65, 500) == 100


def test_runs_of_a_cell_are_seeds_times_conditions_times_rates():
  column = conditions.find('uSF+BM')
  both = {'dataset': _RUN.dataset, 'protocol': Protocol()}
  runs = [*runs_of(column, seeds=(0, 7), **both)]
  assert len(runs) == 2 * 2 * 5 == len({run.run_id for run in runs})
  assert [run.rate for run in runs[:5]] == [100.0, 10.0, 1.0, 0.1, 0.01]
  assert {run.seed for run in runs} == {0, 7}


@pytest.mark.parametrize(
  ('kind', 'name', 'value'),
  [
    (Protocol, 'epochs', 0),
    (Protocol, 'base_rate', 0.0),
    (Protocol, 'base_rate', math.nan),
    (Protocol, 'base_rate', math.inf),
    (Protocol, 'initial_std', -1.0),
    (Protocol, 'input_scale', 0.0),
    (Protocol, 'batch_norm_epsilon', 0.0),
    (Protocol, 'batch_norm_groups', 0),
    (Protocol, 'calibration_batches', 0),
    (Protocol, 'holdout', 1.0),
    (Protocol, 'holdout', -0.1),
    (Protocol, 'holdout', math.nan),
    (Protocol, 'momentum', 1.0),
    (Protocol, 'weight_decay', -1e-4),
    (Protocol, 'train_size', 1),
    (Protocol, 'reduction', 'median'),
    (Run, 'rate', 0.0),
    (Run, 'rate', math.inf),
    (Run, 'seed', -1),
    (Run, 'seed', 2**32),
  ],
)
def test_impossible_numbers(kind, name, value):
  with pytest.raises(ValueError, match=rf'^{name} must .*{value!r}'):
    _with(kind, **{name: value}).check()


@pytest.mark.parametrize('std', [(), (0.01, 0.0), (math.nan, 0.01)])
def test_impossible_initial_weights_by_layer(std):
  with pytest.raises(ValueError, match='^initial_std must be positive, not '):
    Protocol(initial_std=std).check()
