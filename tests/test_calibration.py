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

from symjax_bp.normalization import (
  BatchNorm,
  NNXBatchNorm,
  calibrate,
  calibrate_nnx,
)
from tests.batch_norms import (
  DEVICES,
  numpy_average,
  numpy_statistics,
  random_array,
  statistics_of,
)


class Network(nn.Module):
  """Two normalised layers, dropout between them."""

  dropout: float = 0.0
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, shift=None, *, train=False):
    norm = functools.partial(
      BatchNorm, use_running_average=not train, axis_name=self.axis_name
    )
    x = nn.Dense(4, use_bias=False)(x)
    x = nn.relu(norm(name='first')(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    if shift is not None:
      x = x + shift
    return norm(name='second')(nn.Dense(3)(x))


def _batches(count, seed=0, rows=8):
  return [
    random_array((rows, 5), seed + k, scale=1.0 + k) for k in range(count)
  ]


def _variables(model=None, seed=0):
  model = model or Network()
  return model.init(jax.random.key(seed), random_array((8, 5)), train=True)


def test_calibrate_is_the_papers_protocol():
  batches, variables = _batches(20), _variables()
  calibrated = calibrate(Network(), variables, batches, train=True)
  kernel = np.asarray(variables['params']['Dense_0']['kernel'], np.float64)
  means, stds = zip(
    *(numpy_statistics(x @ kernel) for x in batches), strict=True
  )
  statistics = calibrated['batch_stats']['first']
  assert statistics['count'] == 20
  for name, values in (('mean', means), ('std', stds)):
    np.testing.assert_allclose(
      statistics[name], numpy_average(values, 0.05)[0], rtol=1e-4, atol=1e-5
    )


def test_calibrate_changes_nothing_else():
  variables = _variables()
  before = jax.tree.map(np.array, variables)
  calibrated = calibrate(
    Network(), variables, _batches(3), num_batches=3, train=True
  )
  assert calibrated.keys() == variables.keys()
  assert calibrated['params'] is variables['params']
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal_shapes_and_dtypes(calibrated, variables)


def test_calibrate_depends_on_weights_and_batches_only():
  run = functools.partial(calibrate, Network(), num_batches=3, train=True)
  variables = _variables()
  expected = run(variables, _batches(3))
  history = dict(variables)
  history['batch_stats'] = jax.tree.map(
    lambda a: jnp.full_like(a, 9 if a.dtype == jnp.int32 else jnp.nan),
    variables['batch_stats'],
  )
  chex.assert_trees_all_equal(run(history, _batches(3)), expected)
  for other in (
    run(variables, _batches(3, seed=7)),
    run(_variables(seed=1), _batches(3)),
  ):
    a, b = (jax.tree.leaves(v['batch_stats']) for v in (other, expected))
    assert not np.allclose(np.hstack(a), np.hstack(b), rtol=1e-3)


def test_calibrate_takes_no_more_than_it_needs():
  endless = (random_array((8, 5), seed) for seed in itertools.count())
  calibrated = calibrate(Network(), _variables(), endless, 2, train=True)
  assert calibrated['batch_stats']['second']['count'] == 2
  np.testing.assert_array_equal(next(endless), random_array((8, 5), 2))


@pytest.mark.parametrize('container', [tuple, list])
def test_calibrate_passes_several_inputs(container):
  batches = [container((x, jnp.ones((8, 4)))) for x in _batches(2)]
  variables = _variables()
  several = calibrate(Network(), variables, batches, 2, train=True)
  keyword = calibrate(
    Network(), variables, _batches(2), 2, train=True, shift=jnp.ones((8, 4))
  )
  chex.assert_trees_all_equal(several, keyword)
  plain = calibrate(Network(), variables, _batches(2), 2, train=True)
  first, second = (
    several['batch_stats'][k]['mean'] - plain['batch_stats'][k]['mean']
    for k in ('first', 'second')
  )
  assert not first.any() and second.all()


def test_calibrate_compiles_once():
  traces = []

  class Counted(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      traces.append(x.shape)
      return BatchNorm(use_running_average=not train)(x)

  variables = _variables(Counted())
  traces.clear()
  for _ in range(3):
    variables = calibrate(Counted(), variables, _batches(4), 4, train=True)
  assert traces == [(8, 5)]


def test_calibrate_draws_other_dropout_for_every_batch():
  model = Network(dropout=0.5)
  x = random_array((8, 5))
  run = functools.partial(calibrate, model, _variables(), train=True)
  key = {'dropout': jax.random.key(3)}
  once = run([x], 1, rngs=key)['batch_stats']
  twice = run([x, x], 2, rngs=key)['batch_stats']
  again = run([x, x], 2, rngs=key)['batch_stats']
  chex.assert_trees_all_equal(twice, again)
  # The same inputs before dropout, others behind it.
  chex.assert_trees_all_close(
    once['first']['std'], twice['first']['std'], rtol=1e-6
  )
  assert not np.allclose(once['second']['std'], twice['second']['std'], 1e-3)


def test_calibrate_under_vmap_over_weights():
  run = functools.partial(
    calibrate, Network(), batches=_batches(3), num_batches=3, train=True
  )
  several = [_variables(seed=seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
  together = jax.vmap(lambda v: run(v)['batch_stats'])(stacked)
  for k, variables in enumerate(several):
    chex.assert_trees_all_close(
      jax.tree.map(lambda a, k=k: a[k], together),
      run(variables)['batch_stats'],
      rtol=1e-5,
      atol=1e-6,
    )


def test_calibrate_inside_pmap_is_the_whole_batch():
  variables, batches = _variables(), np.stack(_batches(3))
  model = Network(axis_name='batch')
  statistics = jax.pmap(
    lambda xs: calibrate(model, variables, xs, 3, train=True)['batch_stats'],
    axis_name='batch',
    in_axes=1,
    devices=jax.devices()[:DEVICES],
  )(batches.reshape(3, DEVICES, 2, 5))
  expected = calibrate(Network(), variables, batches, 3, train=True)
  chex.assert_trees_all_close(
    jax.tree.map(lambda a: a[0], statistics),
    expected['batch_stats'],
    rtol=1e-5,
    atol=1e-6,
  )


def test_network_in_jit_and_vmap():
  model, variables, x = Network(), _variables(), random_array((6, 8, 5))

  @jax.jit
  def forward(variables, x):
    return model.apply(variables, x, train=True, mutable=['batch_stats'])

  y, updated = jax.vmap(forward, in_axes=(None, 0))(variables, x)
  for k in range(6):
    expected, statistics = forward(variables, x[k])
    np.testing.assert_allclose(y[k], expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(
      jax.tree.map(lambda a, k=k: a[k], updated), statistics, rtol=1e-5
    )


class NNXNetwork(nnx.Module):
  """The NNX twin of Network."""

  def __init__(self, rngs, dropout=0.0):
    self.dense = nnx.Linear(5, 4, use_bias=False, rngs=rngs)
    self.first = NNXBatchNorm(4)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)
    self.second = NNXBatchNorm(3)

  def __call__(self, x):
    x = self.dropout(nnx.relu(self.first(self.dense(x))))
    return self.second(self.head(x))


def test_calibrate_nnx_is_calibrate():
  variables = _variables()
  model = NNXNetwork(nnx.Rngs(0))
  model.dense.kernel[...] = variables['params']['Dense_0']['kernel']
  model.head.kernel[...] = variables['params']['Dense_1']['kernel']
  expected = calibrate(Network(), variables, _batches(20), train=True)
  for _ in range(2):  # The second time from other statistics.
    calibrate_nnx(model, _batches(20))
    chex.assert_trees_all_close(
      statistics_of(model),
      dict(expected['batch_stats']),
      rtol=1e-6,
    )


def _without_statistics(model):
  """Weights and random streams, as arrays that can be compared."""
  return jax.tree.map(
    lambda a: (
      jax.random.key_data(a)
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
      else a
    ),
    nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.BatchStat))),
  )


@pytest.mark.parametrize('mode', ['train', 'eval', 'mixed'])
def test_calibrate_nnx_leaves_the_rest_alone(mode):
  model = NNXNetwork(nnx.Rngs(0), dropout=0.5)
  if mode != 'mixed':
    getattr(model, mode)()
  else:
    model.first.eval()
  modes = [
    model.first.use_running_average,
    model.second.use_running_average,
    model.dropout.deterministic,
  ]
  before = _without_statistics(model)
  calibrate_nnx(model, _batches(2), num_batches=2)
  chex.assert_trees_all_equal(_without_statistics(model), before)
  assert model.second.count[...] == 2
  assert modes == [
    model.first.use_running_average,
    model.second.use_running_average,
    model.dropout.deterministic,
  ]


def test_calibrate_nnx_compiles_once():
  traces = []

  class Counted(nnx.Module):
    def __init__(self):
      self.norm = NNXBatchNorm(5)

    def __call__(self, x):
      traces.append(x.shape)
      return self.norm(x)

  model = Counted()
  for _ in range(3):
    calibrate_nnx(model, _batches(4), num_batches=4)
  assert traces == [(8, 5)]


def test_calibrate_nnx_fails_without_a_trace():
  model = NNXNetwork(nnx.Rngs(0))
  model(random_array((8, 5)))
  before = jax.tree.map(np.array, statistics_of(model))
  with pytest.raises(ValueError, match='batches holds 2'):
    calibrate_nnx(model, _batches(2))
  chex.assert_trees_all_equal(statistics_of(model), before)


class Foreign(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    x = BatchNorm(use_running_average=not train)(x)
    return nn.BatchNorm(use_running_average=not train, name='theirs')(x)


class Bare(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    del train
    return nn.Dense(2)(x)


@pytest.mark.parametrize(
  ('model', 'batches', 'arguments', 'message'),
  [
    (Network(), [], {}, 'batches holds 0 mini-batches, but num_batches is 20'),
    (Network(), 3, {}, 'batches holds 3 .* smaller num_batches'),
    (Network(), 3, {'num_batches': 0}, 'num_batches is 0'),
    (
      Network(),
      3,
      {'num_batches': 3, 'train': False},
      'first/count is 0: .* train=True',
    ),
    (Foreign(), 20, {}, 'batch_stats holds theirs/mean|theirs/var'),
    (Bare(), 20, {}, 'no batch_stats'),
  ],
)
def test_calibrate_errors(model, batches, arguments, message):
  variables = _variables(model)
  batches = _batches(batches) if isinstance(batches, int) else batches
  with pytest.raises(ValueError, match=message):
    calibrate(model, variables, batches, **{'train': True, **arguments})


def test_calibrate_nnx_errors():
  with pytest.raises(ValueError, match='no batch_stats'):
    calibrate_nnx(nnx.Linear(5, 2, rngs=nnx.Rngs(0)), _batches(20))
  model = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='batch_stats holds var'):
    calibrate_nnx(model, _batches(20))
