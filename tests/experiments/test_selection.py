"""The runs that options select, and what is refused beforehand."""

import pickle

import numpy as np
import pytest

from experiments.datasets import DatasetError
from experiments.paper.conditions import TABLES, THEN_500
from experiments.paper.protocol import Protocol
from experiments.runs import launch
from experiments.runs.selection import Selection, shard_of
from experiments.runs.store import load
from experiments.runs.train import Options
from tests.experiments import tiny
from tests.experiments.listener import Listener


def _runs(devices=1, protocol=None, **chosen):
  return Selection(**chosen).runs(Protocol(**(protocol or {})), devices)


def test_a_selection_is_tables_and_conditions_times_datasets_and_rates():
  runs = _runs(table=('2',), rate=(1.0, 10.0), seed=(0, 1))
  # 11 columns, one of them with two procedures, at two rates and seeds.
  assert len(runs) == 12 * 2 * 2
  assert {run.dataset.name for run in runs} == {'digits'}
  assert _runs(table=('2',), condition=('SGD', 'sgd')) == _runs(table=('2',))
  assert len(_runs(condition=('BM', 'BM1', 'BM-100'))) == 5


def test_table_4_is_both_halves_with_their_baseline():
  both = {run.run_id for run in _runs(table=('4',))}
  halves = {run.run_id for run in _runs(table=('4-C1', '4-C2'))}
  assert both == halves
  assert len(both) == (8 + 8) * 5
  c2 = _runs(table=('4-C2',))
  assert len(c2) == (8 + 1) * 5  # cells are colored against SGD
  assert 'SGD' not in TABLES['4-C2'].columns


@pytest.mark.parametrize('parts', [1, 2, 7, 100])
def test_shards_are_all_runs_once(parts):
  runs = _runs(table=('2',))
  shards = [shard_of(runs, f'{i}/{parts}') for i in range(1, parts + 1)]
  assert sorted(r.run_id for shard in shards for r in shard) == sorted(
    run.run_id for run in runs
  )
  sizes = {len(shard) for shard in shards}
  assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
  ('condition', 'devices', 'protocol', 'message'),
  [
    (
      'SGD-500', 1, {'train_size': 200},
      r"condition is 'SGD-500', with mini-batches of 500, .* at most 180, the "
      r'images of digits to train on \(200, less 20 held out\)\. Put a smaller '
      r'number .* --train-size or --holdout',
    ),
    (
      'uSF+BN', 1, {'train_size': 100, 'batch_norm_groups': 4},
      'mini-batches of 100, but they can have at most 90, ',
    ),
    ('uSF+BM', 1, {'train_size': 50, 'holdout': 0.2}, 'of 100, .* at most 40,'),
    (
      'uSF+BM', 1, {'train_size': 502, 'batch_norm_groups': 4, 'holdout': 0.2},
      r"batch_norm_groups is 4, .* 'uSF\+BM', and one has 402 images \(500 are "
      r'planned\), of 402, the images of digits .* Change --batch-norm-groups',
    ),
    ('SGD', 1, {'batch_norm_groups': 3}, 'batch_norm_groups is 3.* 100 images'),
    (
      'uSF+BM', 4, {'train_size': 502, 'holdout': 0.2},
      'devices is 4, .* 402 .* --devices',
    ),
    ('SGD', 8, {}, 'devices is 8, .* one has 100 images'),
    ('SGD', 1, {'holdout': 0.001}, r'holdout is 0.001.*10 classes.*--train-si'),
    ('SGD', 1, {'holdout': 0.999}, r'holdout is 0.999.*10 classes.*--train-si'),
  ],
)  # fmt: skip
def test_batches_and_splits_that_the_images_do_not_fill_are_refused(
  condition, devices, protocol, message
):
  with pytest.raises(ValueError, match=message):
    _runs(devices, protocol, condition=(condition,))


def test_larger_batches_later_on_take_all_images_with_a_warning(capsys):
  runs = _runs(4, {'train_size': 500, 'holdout': 0.2}, condition=('uSF+BM',))
  assert len(runs) == 10
  capsys.readouterr()
  runs = _runs(1, {'train_size': 500}, condition=('SGD', 'uSF+BM'))
  plans = {run.condition.batch_plan for run in runs}
  assert plans == {((None, 100),), THEN_500}
  assert capsys.readouterr().out == (
    'uSF+BM: the mini-batches of 500 that follow those of 100 have only 450, '
    'all of the images of digits to train on (500, less 50 held out).\n'
  )
  _runs(1, {'train_size': 500, 'holdout': 0.0}, condition=('uSF+BM',))
  assert capsys.readouterr().out == ''


_PLUGIN = """
import flax.linen as nn
import symjax_bp
from experiments.paper.conditions import Condition


class Module(nn.Module):
  classes: int

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(self.classes, name='output')(x.reshape(len(x), -1))


RULES = {'half': symjax_bp.rule(lambda w: 0.5 * w)}
NETWORKS = {'module': lambda classes, batch_norm: Module(classes)}
CONDITIONS = {'mine': Condition(rule='half', batch_manhattan=1)}
"""


def test_conditions_rules_and_networks_of_ones_own(tmp_path):
  path = tmp_path / 'plugin.py'
  path.write_text(_PLUGIN)
  protocol = {'epochs': 1, 'train_size': 200, 'layer_metrics': True}

  def runs(condition, **chosen):
    return _runs(1, protocol, condition=(condition,), rate=(1.0,), **chosen)

  own = {'plugin': path, 'network': 'module'}
  (run,) = runs('half+BM', **own)
  options = Options(tmp_path / 'results')
  launcher = launch.in_this_process(options)
  assert launch.launch([run], launcher, options, Listener()).done == 1
  (record,) = load(tmp_path / 'results')
  assert record.config['plugin'] == _PLUGIN
  (layer,) = record.metrics[-1]['layers'].values()
  assert layer['norm_ratio'] == pytest.approx(0.5)
  # A run that uses nothing of the plugin is the same run without it.
  assert runs('SGD', plugin=path) == runs('SGD')
  path.write_text(_PLUGIN + '\n')
  (other,) = runs('HALF+bm', **own)
  assert [other] == runs('mine', **own)
  assert other.run_id != run.run_id


@pytest.mark.parametrize('option', ['initial_std', 'batch_norm_epsilon'])
def test_a_module_has_its_own_initial_weights_and_norms(tmp_path, option):
  path = tmp_path / 'plugin.py'
  path.write_text(_PLUGIN)
  own = {'plugin': path, 'network': 'module', 'condition': ('SGD',)}
  message = f"{option} is 0.5, but network 'module' .* is a function"
  with pytest.raises(ValueError, match=message):
    _runs(1, {option: 0.5}, **own)


_CONDITION = (
  'from experiments.paper.conditions import Condition\n'
  "CONDITIONS = {'a': Condition("
)
_RULE = "import symjax_bp\nRULES = {{'{}': symjax_bp.usf()}}"


@pytest.mark.parametrize(
  ('source', 'network', 'message'),
  [
    ('x = 1', None, 'defines none of the dictionaries RULES, NETWORKS, COND'),
    ('1 / 0', None, 'the plugin fails with ZeroDivisionError: '),
    ('CONDITIONS = []', None, r'CONDITIONS of the plugin is \[\], but must'),
    ("CONDITIONS = {'a': 'uSF'}", None, r"CONDITIONS\['a'\] .* is 'uSF', but"),
    (_CONDITION + "rule='tiny')}", None, r"'a'\] .* has the rule 'tiny', but"),
    (_CONDITION + 'rule=0)}', None, 'has the rule 0, but it must be BP, '),
    (_CONDITION + 'batch_manhattan=4)}', None, '4, but .* one of 0, 1, 2, 3'),
    (_CONDITION + "batch_norm='all')}", None, "'all', but .* none, plain, af"),
    (_CONDITION + "frozen='Top')}", None, "'Top', but .* nothing, last layer"),
    (_CONDITION + 'batch_plan=())}', None, r'batch_plan \(\), but it must be'),
    (_CONDITION + 'batch_plan=[(3, 9)])}', None, 'must be a tuple of'),
    (_CONDITION + 'batch_plan=((0, 9),))}', None, 'must be a tuple of'),
    ('RULES = {1: 0}', None, 'a dictionary with names as keys'),
    ("RULES = {'a': len}", None, r"RULES\['a'\] .* len>, but .*FeedbackRule"),
    (_RULE.format('usf'), None, 'the name of a condition or a rule of this'),
    (_RULE.format('brSF-10%'), None, 'the name of a condition or a rule of'),
    (_RULE.format('BNorm'), None, "'BNorm'.* a name that no condition can"),
    (_RULE.format('half-3'), None, "'half-3'.* a name that no condition can"),
    ("NETWORKS = {'small': 5}", None, r"'small'\] .* 5, but must be a seq"),
    ("NETWORKS = {'small': ()}", None, r'\(\), but must be a sequence of lay'),
    (
      "NETWORKS = {'small': print}", 'smal',
      "network is 'smal', but must be one of .*: small",
    ),
    (None, None, 'plugin .* cannot be read: .*No such file'),
  ],
)  # fmt: skip
def test_plugins_that_cannot_be_used(tmp_path, source, network, message):
  path = tmp_path / 'plugin.py'
  if source is not None:
    path.write_text(source)
  with pytest.raises(ValueError, match=message):
    _runs(condition=('SGD',), plugin=path, network=network)


def test_a_dataset_of_ones_own(tmp_path):
  """Its network is a part of a run's identity; workers get its loader."""
  random = np.random.default_rng(0)
  y = np.arange(400, dtype=np.int64) % 2
  x = random.integers(0, 50, (400, 32, 32, 3)) + 150 * y[:, None, None, None]
  np.savez(
    tmp_path / 'mine.npz', x_train=x.astype(np.uint8), y_train=y,
    classes=np.array(['dark', 'bright']),
  )  # fmt: skip
  chosen = {'dataset': ('mine',), 'rate': (1.0,), 'data_dir': tmp_path}
  chosen |= {'condition': ('uSF+BN',), 'test_share': 0.25}
  protocol = {'epochs': 1}
  (cifar,) = _runs(1, protocol, **chosen)
  (mnist,) = _runs(1, protocol, architecture='mnist', **chosen)
  assert (cifar.network, mnist.network) == ('cifar', 'mnist')
  assert cifar.run_id != mnist.run_id
  chosen |= {'plugin': tiny.PLUGIN, 'network': 'small'}
  runs = _runs(1, protocol, architecture='mnist', **chosen)
  loader = Selection(architecture='mnist', **chosen).loader()
  options = pickle.loads(pickle.dumps(Options(tmp_path / 'results', loader)))
  loader.forget()
  launcher = launch.in_this_process(options)
  assert launch.launch(runs, launcher, options, Listener()).done == 1
  (record,) = load(tmp_path / 'results')
  assert record.result is not None
  assert record.result['train_images'] == 270
  assert record.result['chance_error'] == 50
  with pytest.raises(DatasetError, match='--test-share'):
    _runs(1, protocol, **(chosen | {'test_share': None}))
