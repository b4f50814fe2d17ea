"""Runs: their identity, the schedule of rates, batch plans, what is refused."""

import dataclasses
import math

import pytest

from experiments.paper import conditions
from experiments.paper import protocol as grid
from experiments.paper.protocol import Protocol, Run

_RUN = Run(
  dataset='MNIST',
  digest='d1',
  source='mnist.npz',
  rule='uSF',
  batch_manhattan=1,
  batch_norm='none',
  batch_plan=conditions.BATCH_100,
  frozen='nothing',
  rate=1.0,
  protocol=Protocol(),
)
# Another value for every field of the protocol: a new field needs one too.
_OTHER_PROTOCOL = {
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
}
_OTHER = {
  'dataset': 'CIFAR',
  'digest': 'd2',
  'rule': 'NuSF',
  'batch_manhattan': 2,
  'batch_norm': 'plain',
  'batch_plan': conditions.THEN_500,
  'frozen': 'last layer',
  'rate': 10.0,
  'seed': 1,
}


def test_run_id_changes_with_everything_that_changes_the_result():
  assert set(_OTHER_PROTOCOL) == {f.name for f in dataclasses.fields(Protocol)}
  fields = {f.name for f in dataclasses.fields(Run)}
  assert set(_OTHER) == fields - {'source', 'note', 'protocol'}
  others = [dataclasses.replace(_RUN, **{k: v}) for k, v in _OTHER.items()]
  for name, value in _OTHER_PROTOCOL.items():
    protocol = dataclasses.replace(_RUN.protocol, **{name: value})
    others.append(dataclasses.replace(_RUN, protocol=protocol))
  ids = {run.run_id for run in (_RUN, *others)}
  assert len(ids) == 1 + len(others)
  assert all(len(name) == 20 and int(name, 16) >= 0 for name in ids)


def test_run_id_does_not_change_with_words_or_spelling_of_numbers():
  words = dataclasses.replace(_RUN, source='elsewhere', note='lossy')
  assert words.run_id == _RUN.run_id
  assert words.config() != _RUN.config()
  whole = dataclasses.replace(
    _RUN, rate=1, protocol=Protocol(weight_decay=0, input_scale=1)
  )
  same = dataclasses.replace(_RUN, protocol=Protocol(weight_decay=0.0))
  assert whole.run_id == same.run_id


def test_run_id_is_the_same_in_every_version():
  # A store of results would be run again if this changed: raise VERSION then.
  assert grid.VERSION == 2
  assert _RUN.run_id == 'f4d4e3d40d62d0a466e2'


def test_config_is_flat_and_complete():
  config = _RUN.config()
  assert config['batch_plan'] == [[None, 100]]
  assert config['version'] == grid.VERSION
  assert config.keys() == {
    'version', 'source', 'note', *_OTHER, *_OTHER_PROTOCOL,
  }  # fmt: skip


def _factors(epochs: int) -> list[float]:
  return [Protocol(epochs=epochs).rate_factor(e + 1) for e in range(epochs)]


def test_schedule_of_the_paper():
  assert _factors(65) == [1.0] * 50 + [0.1] * 10 + [0.01] * 5


@pytest.mark.parametrize(
  ('epochs', 'counts'),
  [
    (130, (100, 20, 10)),
    (13, (10, 2, 1)),
    (26, (20, 4, 2)),
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
  run = dataclasses.replace(_RUN, batch_plan=conditions.THEN_500)
  epochs = (1, 3, 4, 65)
  assert [run.batch_size(epoch, 500) for epoch in epochs] == [
    100, 100, 500, 500,
  ]  # fmt: skip
  assert [run.batch_size(epoch, 120) for epoch in epochs] == [
    100, 100, 120, 120,
  ]  # fmt: skip
  assert run.batch_sizes(500) == [100, 500]
  assert run.batch_sizes(120) == [100, 120]
  assert run.batch_sizes(100) == [100]
  protocol = dataclasses.replace(run.protocol, batch_norm_groups=5)
  grouped = dataclasses.replace(run, protocol=protocol)
  assert [grouped.statistics_size(epoch, 120) for epoch in epochs] == [
    20, 20, 24, 24,
  ]  # fmt: skip
  assert _RUN.batch_size(1, 500) == _RUN.batch_size(65, 500) == 100


def test_runs_of_a_cell_are_seeds_times_plans_times_rates():
  runs = [
    *grid.runs_of(
      conditions.find('uSF+BM'),
      seeds=(0, 7),
      dataset='MNIST',
      digest='d',
      protocol=Protocol(),
    )
  ]
  assert len(runs) == 2 * 2 * 5 == len({run.run_id for run in runs})
  assert [run.rate for run in runs[:5]] == [100.0, 10.0, 1.0, 0.1, 0.01]
  assert {run.seed for run in runs} == {0, 7}


def test_unique_joins_columns_of_the_same_content():
  runs = [
    run
    for name in ('BM', 'BM1', 'BM-100', 'SGD', 'SGD-100')
    for run in grid.runs_of(
      conditions.find(name), dataset='MNIST', digest='d', protocol=Protocol()
    )
  ]
  assert len(grid.unique(runs)) == 10
  assert grid.unique(runs)[0] == runs[0]


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('epochs', 0),
    ('base_rate', 0.0),
    ('base_rate', math.nan),
    ('base_rate', math.inf),
    ('initial_std', -1.0),
    ('initial_std', 0.0),
    ('input_scale', 0.0),
    ('batch_norm_epsilon', 0.0),
    ('calibration_batches', 0),
    ('holdout', 1.0),
    ('holdout', -0.1),
    ('holdout', math.nan),
    ('momentum', 1.0),
    ('weight_decay', -1e-4),
    ('train_size', 1),
    ('reduction', 'median'),
  ],
)
def test_impossible_protocols(name, value):
  with pytest.raises(ValueError, match=f'^{name} must .*{value!r}'):
    Protocol(**{name: value})


@pytest.mark.parametrize('std', [(), (0.01, 0.0), (math.nan, 0.01)])
def test_impossible_initial_weights_by_layer(std):
  with pytest.raises(ValueError, match='^initial_std must be positive, not '):
    Protocol(initial_std=std)


def test_initial_weights_by_layer_are_another_run():
  def run(std):
    return dataclasses.replace(_RUN, protocol=Protocol(initial_std=std))

  ids = {run(std).run_id for std in (0.01, (0.01, 0.05), (0.05, 0.01))}
  assert len(ids) == 3
  assert run(0.01).run_id == _RUN.run_id
  assert run((0.01, 0.05)).config()['initial_std'] == [0.01, 0.05]
  assert run((0.01, 0.05)).protocol.initial_stds == (0.01, 0.05)
  assert _RUN.protocol.initial_stds == (0.01,)


@pytest.mark.parametrize(
  ('name', 'value'),
  [('rate', 0.0), ('rate', math.inf), ('seed', -1), ('seed', 2**32)],
)
def test_impossible_runs(name, value):
  with pytest.raises(ValueError, match=f'^{name} must be .*{value!r}'):
    dataclasses.replace(_RUN, **{name: value})
