"""Calibration is the paper's protocol and touches nothing else."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from symjax_bp import linen
from symjax_bp import nnx as asymmetric
from symjax_bp.linen import BatchNorm
from tests import batch_norms
from tests.batch_norms import ROUNDING, mini_batches, statistics_of
from tests.nnx_models import state

# Two layers, 8 rows and features up to 10: what float32 may round away. One
# mini-batch more or less changes statistics by 0.1 and more.
CLOSE = {'rtol': 0, 'atol': 2 * 8 * 10 * 10 * ROUNDING}


class Network(nn.Module):
  """Two normalized layers, dropout between them."""

  dropout: float = 0.0
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, options=None, shift=0.0, train=False):
    train = options['train'] if options else train
    norm = functools.partial(BatchNorm, not train, axis_name=self.axis_name)
    x = nn.relu(norm(name='first')(nn.Dense(4, use_bias=False)(x)))
    x = nn.Dropout(self.dropout, deterministic=not train)(x) + shift
    return norm(name='second')(nn.Dense(3)(x))


class NNXNetwork(nnx.Module):
  """The NNX twin of Network."""

  def __init__(self, dropout=0.0):
    rngs = nnx.Rngs(0)
    self.dense = nnx.Linear(5, 4, use_bias=False, rngs=rngs)
    self.first = asymmetric.BatchNorm(4)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)
    self.second = asymmetric.BatchNorm(3)

  def __call__(self, x, options=None, shift=0.0):
    assert options is None or options['train']
    x = self.dropout(nnx.relu(self.first(self.dense(x)))) + shift
    return self.second(self.head(x))


@functools.cache
def variables_of(model=None, seed=0):
  init = jax.jit((model or Network()).init, static_argnames='train')
  return init(jax.random.key(seed), mini_batches(1)[0], train=True)


def calibrate(variables, batches, model=None, **options):
  """The calibrated statistics of a Linen model."""
  options = {'train': True, 'num_batches': len(batches), **options}
  model = model or Network()
  return linen.calibrate(model, variables, batches, **options)['batch_stats']


def test_the_papers_protocol():
  batches, layer = mini_batches(20), BatchNorm(use_running_average=False)
  variables = layer.init(jax.random.key(0), batches[0])
  model = asymmetric.BatchNorm(5)
  means, stds = zip(*map(batch_norms.numpy_statistics, batches), strict=True)
  # 8 additions per mini-batch, then 20 updates of 4 operations each.
  atol = (8 + 4 * 20) * ROUNDING * np.abs(batches).max()
  for _ in range(2):  # The second time from other statistics.
    variables = linen.calibrate(layer, variables, batches)
    asymmetric.calibrate(model, batches)
    for found in (variables['batch_stats'], statistics_of(model)):
      assert found['count'] == 20
      for name, values in (('mean', means), ('std', stds)):
        expected = batch_norms.numpy_average(values, 0.05)[0]
        np.testing.assert_allclose(found[name], expected, 0, atol)


def test_every_layer_runs_in_training_mode():
  batches, variables = mini_batches(3), variables_of()
  apply = jax.jit(Network().apply, static_argnames=('train', 'mutable'))
  expected = variables
  for x in batches:
    _, moved = apply(expected, x, train=True, mutable=('batch_stats',))
    expected = {**expected, **moved}
  found = calibrate(variables, batches)
  chex.assert_trees_all_close(found, expected['batch_stats'], **CLOSE)
  model = NNXNetwork()
  model.dense.kernel[...] = variables['params']['Dense_0']['kernel']
  model.head.kernel[...] = variables['params']['Dense_1']['kernel']
  model.eval()
  asymmetric.calibrate(model, batches, 3)
  chex.assert_trees_all_close(statistics_of(model), found, **CLOSE)
  # Several inputs, of which those that are no arrays steer the call.
  found = calibrate(variables, batches, shift=jnp.ones((8, 4)))
  steered = [[x, {'train': True}, jnp.ones((8, 4))] for x in batches]
  again = calibrate(variables, list(map(tuple, steered)), train=False)
  chex.assert_trees_all_close(again, found, **CLOSE)
  asymmetric.calibrate(model, steered, 3)
  chex.assert_trees_all_close(statistics_of(model), found, **CLOSE)


def test_nothing_else_changes():
  variables, model = variables_of(), Network()
  before = jax.tree.map(np.array, variables)
  after = linen.calibrate(model, variables, mini_batches(20), train=True)
  assert after['params'] is variables['params']
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, variables)


@pytest.mark.parametrize('training', [(), ('first', 'second', 'dropout')])
def test_nothing_else_changes_in_nnx(training):
  model = NNXNetwork(dropout=0.5)
  model.eval()
  for name in training:
    getattr(model, name).train()

  def others():
    modes = (model.first.use_running_average, model.dropout.deterministic)
    return modes, state(model, nnx.Not(nnx.BatchStat))

  before = others()
  asymmetric.calibrate(model, mini_batches(2), num_batches=2)
  chex.assert_trees_all_equal(others(), before)


def test_no_more_batches_are_taken_than_needed():
  endless = map(lambda k: mini_batches(1, k)[0], itertools.count())
  linen.calibrate(Network(), variables_of(), endless, 2, train=True)
  np.testing.assert_array_equal(next(endless), mini_batches(1, 2)[0])


def test_an_nnx_model_compiles_once():
  traces = []

  class Counted(asymmetric.BatchNorm):
    def __call__(self, x):
      traces.append(x.shape)
      return super().__call__(x)

  model = Counted(5)
  for _ in range(2):
    asymmetric.calibrate(model, mini_batches(3), 3)
  assert traces == [(8, 5)]


def test_models_with_lists_are_calibrated_and_compile_once():
  traces = []

  def seen(x):
    traces.append(x.shape)
    return x

  def make():
    norm = BatchNorm(use_running_average=False)
    return nn.Sequential([seen, nn.Dense(4), norm])

  for wrap in (lambda model: model, linen.without_feedback):
    variables = wrap(make()).init(jax.random.key(0), mini_batches(1)[0])
    traces.clear()
    for _ in range(2):
      variables = linen.calibrate(wrap(make()), variables, mini_batches(3), 3)
    assert variables['batch_stats']['layers_2']['count'] == 3
    assert traces == [(8, 5)]


def test_every_batch_draws_its_own_dropout():
  x, rngs = mini_batches(1)[0], {'dropout': jax.random.key(3)}
  run = functools.partial(
    calibrate, variables_of(), model=Network(dropout=0.5), rngs=rngs
  )
  once, twice = run([x]), run([x, x])
  chex.assert_trees_all_equal(twice, run([x, x]))
  # The same inputs before dropout, others behind it.
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), once, twice)
  assert change['first']['std'] < CLOSE['atol'] < 1e-2 < change['second']['std']


def test_vmap_over_weights():
  several, batches = [variables_of(seed=k) for k in (0, 1)], mini_batches(3)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
  found = jax.vmap(lambda variables: calibrate(variables, batches))(stacked)
  for k, variables in enumerate(several):
    one = jax.tree.map(lambda a, k=k: a[k], found)
    chex.assert_trees_all_close(one, calibrate(variables, batches), **CLOSE)


def test_inside_pmap_it_is_the_whole_batch():
  variables, batches = variables_of(), np.stack(mini_batches(3))
  model = Network(axis_name='batch')
  found = jax.pmap(
    lambda batches: calibrate(variables, batches, model), 'batch', in_axes=1
  )(batches.reshape(3, 8, 1, 5))
  found = jax.tree.map(lambda a: a[0], found)
  chex.assert_trees_all_close(found, calibrate(variables, batches), **CLOSE)


class Bare(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return x


class Foreign(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.BatchNorm(use_running_average=not train)(x)


@pytest.mark.parametrize(
  ('model', 'batches', 'options', 'message'),
  [
    (Network(), 0, {}, 'batches holds 0 mini-batches, but num_batches is 20'),
    (Network(), 3, {}, 'batches holds 3 .* smaller num_batches'),
    (Network(), 3, {'num_batches': 0}, 'num_batches is 0'),
    (Network(), 20, {'train': False}, 'first/count is 0: .* train=True'),
    (Foreign(), 20, {}, 'batch_stats holds BatchNorm_0/var'),
    (Bare(), 20, {}, 'no batch_stats'),
  ],
)
def test_errors(model, batches, options, message):
  options = {'num_batches': 20, **options}
  with pytest.raises(ValueError, match=message):
    calibrate(variables_of(model), mini_batches(batches), model, **options)


@pytest.mark.parametrize(
  ('layer', 'batches', 'message'),
  [
    (asymmetric.BatchNorm, 2, 'batches holds 2'),
    (functools.partial(nnx.BatchNorm, rngs=nnx.Rngs(0)), 20, 'holds var'),
    (lambda _: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), 20, 'no batch_stats'),
  ],
)
def test_nnx_errors_leave_the_model_alone(layer, batches, message):
  model = layer(5)
  model(mini_batches(1)[0])
  before = jax.tree.map(np.array, statistics_of(model))
  with pytest.raises(ValueError, match=message):
    asymmetric.calibrate(model, mini_batches(batches))
  chex.assert_trees_all_equal(statistics_of(model), before)
