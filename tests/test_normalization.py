"""Batch norm is its closed form, and its averages are the paper's protocol."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from symjax_bp.normalization import (
  BatchNorm,
  NNXBatchNorm,
  calibrate,
  calibrate_nnx,
)

EPSILON = 1e-4
SHAPES = [
  ((8, 5), -1),
  ((6, 5), 0),
  ((4, 6, 6, 3), -1),
  ((4, 3, 6, 6), 1),
  ((2, 3, 4, 5, 2), -1),
]
DEVICES = 4


def _random(shape, seed=0, scale=3.0, offset=2.0):
  rng = np.random.default_rng(seed)
  return (offset + scale * rng.standard_normal(shape)).astype(np.float32)


def _numpy_statistics(x, axis=-1):
  """Mean and standard deviation in float64, with x's number of axes."""
  x = np.asarray(x, np.float64)
  axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  mean = x.mean(axes, keepdims=True)
  variance = np.square(x - mean).mean(axes, keepdims=True)
  return mean, np.sqrt(variance + EPSILON)


def _numpy_average(values, alpha):
  """The bias-corrected exponential moving average as a weighted mean."""
  weights = (1.0 - alpha) ** np.arange(len(values))[::-1]
  return np.tensordot(weights / weights.sum(), np.stack(values), 1)


def _linen(x, **options):
  """Normalises x in training mode; returns (y, batch_stats)."""
  layer = BatchNorm(use_running_average=False, **options)
  y, variables = layer.apply({}, x, mutable=['batch_stats'])
  return y, variables['batch_stats']


def _statistics(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def _nnx(x, axis=-1, **options):
  layer = NNXBatchNorm(x.shape[axis], axis=axis, **options)
  y = layer(x)
  return y, _statistics(layer)


FORMS = pytest.mark.parametrize('form', [_linen, _nnx])


@FORMS
@pytest.mark.parametrize(('shape', 'axis'), SHAPES)
def test_training_is_the_closed_form(form, shape, axis):
  x = _random(shape)
  mean, std = _numpy_statistics(x, axis)
  y, statistics = form(x, axis=axis)
  np.testing.assert_allclose(y, (x - mean) / std, rtol=0, atol=1e-5)
  assert statistics['count'] == 1
  # The first mini-batch counts in full.
  np.testing.assert_allclose(statistics['mean'], mean.ravel(), rtol=1e-5)
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=1e-5)


@pytest.mark.parametrize(('shape', 'axis'), SHAPES)
def test_gradient_is_the_closed_form(shape, axis):
  x, g = _random(shape), _random(shape, seed=1)
  mean, std = _numpy_statistics(x, axis)
  y = (x - mean) / std
  axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  projection = y * (g * y).mean(axes, keepdims=True)
  expected = (g - g.mean(axes, keepdims=True) - projection) / std
  layer = BatchNorm(use_running_average=False, axis=axis)
  _, vjp = jax.vjp(functools.partial(layer.apply, {}), x)
  np.testing.assert_allclose(vjp(g)[0], expected, rtol=0, atol=2e-6)


@FORMS
def test_large_mean_does_not_drown_the_deviation(form):
  x = _random((100, 3), scale=0.5, offset=5e4)
  _, std = _numpy_statistics(x)
  _, statistics = form(x)
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=1e-5)


@pytest.mark.parametrize('alpha', [0.05, 0.5, 1.0, 1e-6])
def test_averages_are_bias_corrected_and_of_deviations(alpha):
  batches = [
    _random((10, 3), seed, scale=1.0 + seed, offset=seed) for seed in range(25)
  ]
  linen, variables = BatchNorm(use_running_average=False, alpha=alpha), {}
  layer = NNXBatchNorm(3, alpha=alpha)
  for x in batches:
    _, variables = linen.apply(variables, x, mutable=['batch_stats'])
    layer(x)
  statistics = variables['batch_stats']
  means, stds = zip(*map(_numpy_statistics, batches), strict=True)
  mean, std = _numpy_average(means, alpha), _numpy_average(stds, alpha)
  np.testing.assert_allclose(statistics['mean'], mean[0], rtol=2e-5)
  np.testing.assert_allclose(statistics['std'], std[0], rtol=2e-5)
  assert statistics['count'] == 25
  if alpha < 1.0:  # The average of variances is another number.
    variance = _numpy_average([np.square(s) for s in stds], alpha)
    assert (np.sqrt(variance[0]) > 1.001 * np.asarray(statistics['std'])).all()
  chex.assert_trees_all_equal(_statistics(layer), dict(statistics))
  # Evaluation adds no second epsilon.
  x = _random((4, 3))
  evaluated = BatchNorm(use_running_average=True).apply(variables, x)
  np.testing.assert_allclose(evaluated, (x - mean) / std, rtol=1e-4, atol=1e-5)
  layer.eval()
  chex.assert_trees_all_equal(layer(x), evaluated)
  assert layer.count[...] == 25


@pytest.mark.parametrize('use_scale', [False, True])
@pytest.mark.parametrize('use_bias', [False, True])
def test_parameters_only_when_asked(use_scale, use_bias):
  x = _random((8, 5))
  scale = {'scale': _random(5, seed=1)} if use_scale else {}
  params = scale | ({'bias': _random(5, seed=2)} if use_bias else {})
  linen = BatchNorm(
    use_running_average=False, use_scale=use_scale, use_bias=use_bias
  )
  layer = NNXBatchNorm(
    5, use_scale=use_scale, use_bias=use_bias, rngs=nnx.Rngs(0)
  )
  initial = linen.init(jax.random.key(0), x).get('params', {})
  expected = {'scale': np.ones(5), 'bias': np.zeros(5)}
  chex.assert_trees_all_equal(
    dict(initial), {k: np.float32(expected[k]) for k in params}
  )
  assert nnx.to_pure_dict(nnx.state(layer, nnx.Param)).keys() == params.keys()
  for name, value in params.items():
    getattr(layer, name)[...] = jnp.asarray(value)
  mean, std = _numpy_statistics(x)
  y = (x - mean) / std * params.get('scale', 1.0) + params.get('bias', 0.0)
  actual = linen.apply({'params': params}, x)
  np.testing.assert_allclose(actual, y, rtol=0, atol=2e-5)
  chex.assert_trees_all_equal(layer(x), actual)


def test_nothing_moves_during_initialization():
  variables = BatchNorm().init(
    jax.random.key(0), _random((8, 5)), use_running_average=False
  )
  chex.assert_trees_all_equal(
    variables,
    {
      'batch_stats': {
        'mean': np.zeros(5, np.float32),
        'std': np.ones(5, np.float32),
        'count': np.int32(0),
      }
    },
  )


def test_evaluation_before_any_mini_batch_returns_the_input():
  x = _random((8, 5))
  layer = BatchNorm(use_running_average=True)
  variables = layer.init(jax.random.key(0), x)
  np.testing.assert_array_equal(layer.apply(variables, x), x)
  np.testing.assert_array_equal(NNXBatchNorm(5)(x, True), x)


def test_training_is_pure_unless_statistics_are_mutable():
  x = _random((8, 5))
  layer = BatchNorm(use_running_average=False)
  variables = layer.init(jax.random.key(0), x)
  pure = layer.apply(variables, x)
  chex.assert_trees_all_equal(pure, layer.apply({}, x))
  y, updated = layer.apply(variables, x, mutable=['batch_stats'])
  chex.assert_trees_all_equal(pure, y)
  assert updated['batch_stats']['count'] == 1
  assert variables['batch_stats']['count'] == 0


def test_nnx_modes():
  x = _random((8, 5))
  layer = NNXBatchNorm(5)
  trained = layer(x)
  layer.eval()
  evaluated = layer(x + 1.0)
  assert layer.count[...] == 1
  chex.assert_trees_all_equal(layer(x + 1.0), evaluated)
  # The call's argument, nnx.view and train() each choose training again.
  chex.assert_trees_all_equal(layer(x, use_running_average=False), trained)
  chex.assert_trees_all_equal(
    nnx.view(layer, use_running_average=False)(x), trained
  )
  layer.train()
  chex.assert_trees_all_equal(layer(x), trained)
  assert layer.count[...] == 4


def test_nnx_gradient_and_jit():
  x, g = _random((8, 5)), _random((8, 5), seed=1)

  @nnx.jit
  def step(layer, x):
    loss = lambda layer: jnp.sum(layer(x) * g)
    return nnx.grad(loss)(layer)

  layer = NNXBatchNorm(5, use_scale=True, use_bias=True, rngs=nnx.Rngs(0))
  grads = nnx.to_pure_dict(step(layer, x))
  mean, std = _numpy_statistics(x)
  np.testing.assert_allclose(grads['bias'], g.sum(0), rtol=1e-5)
  np.testing.assert_allclose(
    grads['scale'], (g * (x - mean) / std).sum(0), rtol=1e-4
  )
  assert layer.count[...] == 1


@FORMS
@pytest.mark.parametrize('shape', [(100, 4), (7, 13, 13, 4)])
def test_constant_features_become_exactly_zero(form, shape):
  # Rounding in the mean, divided by sqrt(epsilon), would be as large as 1.
  x = np.broadcast_to(np.float32([0.1, 1 / 3, 12345.678, -3e6 + 0.25]), shape)
  y, statistics = jax.jit(form)(x)
  np.testing.assert_array_equal(y, np.zeros(shape, np.float32))
  np.testing.assert_allclose(statistics['std'], np.sqrt(EPSILON), rtol=1e-6)
  layer = BatchNorm(use_running_average=False)
  _, vjp = jax.vjp(functools.partial(layer.apply, {}), x)
  assert np.isfinite(vjp(_random(shape))[0]).all()


def test_constant_features_stay_zero_in_evaluation():
  x = np.broadcast_to(np.float32([0.1, 12345.678]), (100, 2))
  layer = BatchNorm()
  variables = layer.init(jax.random.key(0), x, use_running_average=True)
  variables = calibrate(layer, variables, [x] * 5, 5, use_running_average=False)
  y = layer.apply(variables, x, use_running_average=True)
  np.testing.assert_array_equal(y, np.zeros_like(x))


@FORMS
@pytest.mark.parametrize('shape', [(1, 5), (5,)])
def test_single_example_becomes_zero(form, shape):
  y, statistics = form(_random(shape))
  np.testing.assert_array_equal(y, np.zeros(shape, np.float32))
  np.testing.assert_array_equal(statistics['mean'], _random(shape).ravel())


@FORMS
def test_half_precision(form):
  # A bfloat16 mean of 4096 numbers near 3 would be wrong in its first digit.
  x = jnp.asarray(_random((4096, 3), scale=0.5, offset=3.0), jnp.bfloat16)
  mean, std = _numpy_statistics(x)
  y, statistics = form(x)
  assert y.dtype == jnp.bfloat16
  chex.assert_type([statistics['mean'], statistics['std']], jnp.float32)
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=1e-5)
  expected = (np.asarray(x, np.float64) - mean) / std
  np.testing.assert_allclose(
    np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-5
  )


@FORMS
@pytest.mark.parametrize(
  ('x_dtype', 'dtype', 'expected'),
  [
    (jnp.float32, None, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float16, None, jnp.float16),
    (jnp.uint8, None, jnp.float32),
  ],
)
def test_dtype_of_the_result(form, x_dtype, dtype, expected):
  y, statistics = form(jnp.asarray(_random((8, 5)), x_dtype), dtype=dtype)
  assert y.dtype == expected
  chex.assert_type([statistics['mean'], statistics['std']], jnp.float32)


@FORMS
def test_double_precision(form):
  with jax.enable_x64(True):
    x = jnp.asarray(_random((8, 5)), jnp.float64)
    mean, std = _numpy_statistics(x)
    y, statistics = form(x)
    np.testing.assert_allclose(y, (x - mean) / std, rtol=0, atol=1e-13)
    assert y.dtype == jnp.float64
    chex.assert_type([statistics['mean'], statistics['std']], jnp.float32)


def test_half_precision_input_with_single_precision_parameters():
  x = jnp.asarray(_random((8, 5)), jnp.bfloat16)
  layer = BatchNorm(use_running_average=False, use_scale=True, use_bias=True)
  y, variables = layer.init_with_output(jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  chex.assert_type(jax.tree.leaves(variables['params']), jnp.float32)


def _weighted(layer, x, g):
  y, updated = layer.apply({}, x, mutable=['batch_stats'])
  return jnp.sum(y * g), (y, updated['batch_stats'])


def _whole_batch(x, g):
  layer = BatchNorm(use_running_average=False)
  (_, aux), dx = jax.value_and_grad(
    functools.partial(_weighted, layer), has_aux=True
  )(x, g)
  return aux, dx


SYNCHRONISED = BatchNorm(use_running_average=False, axis_name='batch')


def _synchronised(x, g):
  (_, aux), dx = jax.value_and_grad(
    functools.partial(_weighted, SYNCHRONISED), has_aux=True
  )(x, g)
  return aux, dx


@pytest.mark.parametrize('shape', [(8, 5), (8, 4, 4, 3)])
def test_pmap_is_the_whole_batch(shape):
  x, g = _random(shape), _random(shape, seed=1)
  split = lambda a: a.reshape(DEVICES, -1, *a.shape[1:])
  (y, statistics), dx = jax.pmap(
    _synchronised, axis_name='batch', devices=jax.devices()[:DEVICES]
  )(split(x), split(g))
  (y_whole, statistics_whole), dx_whole = _whole_batch(x, g)
  np.testing.assert_allclose(y, split(y_whole), rtol=0, atol=1e-6)
  np.testing.assert_allclose(dx, split(dx_whole), rtol=0, atol=1e-6)
  for device in range(DEVICES):
    chex.assert_trees_all_close(
      jax.tree.map(lambda a, d=device: a[d], statistics),
      statistics_whole,
      rtol=1e-6,
    )


@pytest.mark.parametrize('shape', [(8, 5), (8, 4, 4, 3)])
def test_shard_map_is_the_whole_batch(shape):
  x, g = _random(shape), _random(shape, seed=1)
  split, replicated = PartitionSpec('batch'), PartitionSpec()
  synchronised = jax.shard_map(
    _synchronised,
    mesh=Mesh(jax.devices()[:DEVICES], ('batch',)),
    in_specs=split,
    out_specs=((split, replicated), split),
  )
  actual = jax.jit(synchronised)(x, g)
  chex.assert_trees_all_close(actual, _whole_batch(x, g), rtol=1e-6, atol=1e-6)


def test_vmap_with_axis_name_is_the_whole_batch():
  x, g = _random((8, 5)), _random((8, 5), seed=1)
  (y, _), dx = jax.vmap(_synchronised, axis_name='batch')(x, g)
  (y_whole, _), dx_whole = _whole_batch(x, g)
  np.testing.assert_allclose(y, y_whole, rtol=0, atol=1e-6)
  np.testing.assert_allclose(dx, dx_whole, rtol=0, atol=1e-6)


def test_nnx_pmap_is_the_whole_batch():
  x = _random((8, 5))
  graphdef, state = nnx.split(NNXBatchNorm(5, axis_name='batch'))

  def forward(state, x):
    layer = nnx.merge(graphdef, state)
    return layer(x), _statistics(layer)

  y, statistics = jax.pmap(
    forward,
    axis_name='batch',
    in_axes=(None, 0),
    devices=jax.devices()[:DEVICES],
  )(state, x.reshape(DEVICES, 2, 5))
  whole, expected = _nnx(x)
  np.testing.assert_allclose(y.reshape(8, 5), whole, rtol=0, atol=1e-6)
  chex.assert_trees_all_close(
    jax.tree.map(lambda a: a[0], statistics), expected, rtol=1e-6
  )


def test_axis_index_groups():
  x = _random((8, 5))
  layer = BatchNorm(
    use_running_average=False,
    axis_name='batch',
    axis_index_groups=[[0, 1], [2, 3]],
  )
  y = jax.pmap(
    functools.partial(layer.apply, {}),
    axis_name='batch',
    devices=jax.devices()[:DEVICES],
  )(x.reshape(DEVICES, 2, 5))
  expected = np.concatenate([_linen(x[:4])[0], _linen(x[4:])[0]])
  np.testing.assert_allclose(y.reshape(8, 5), expected, rtol=0, atol=1e-6)


def test_initialization_needs_no_axis():
  SYNCHRONISED.init(jax.random.key(0), _random((8, 5)))


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
  return [_random((rows, 5), seed + k, scale=1.0 + k) for k in range(count)]


def _variables(model=None, seed=0):
  model = model or Network()
  return model.init(jax.random.key(seed), _random((8, 5)), train=True)


def test_calibrate_is_the_papers_protocol():
  batches, variables = _batches(20), _variables()
  calibrated = calibrate(Network(), variables, batches, train=True)
  kernel = np.asarray(variables['params']['Dense_0']['kernel'], np.float64)
  means, stds = zip(
    *(_numpy_statistics(x @ kernel) for x in batches), strict=True
  )
  statistics = calibrated['batch_stats']['first']
  assert statistics['count'] == 20
  for name, values in (('mean', means), ('std', stds)):
    np.testing.assert_allclose(
      statistics[name], _numpy_average(values, 0.05)[0], rtol=1e-4, atol=1e-5
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
  endless = (_random((8, 5), seed) for seed in itertools.count())
  calibrated = calibrate(Network(), _variables(), endless, 2, train=True)
  assert calibrated['batch_stats']['second']['count'] == 2
  np.testing.assert_array_equal(next(endless), _random((8, 5), 2))


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
  x = _random((8, 5))
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
  model, variables, x = Network(), _variables(), _random((6, 8, 5))

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
      _statistics(model),
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
  model(_random((8, 5)))
  before = jax.tree.map(np.array, _statistics(model))
  with pytest.raises(ValueError, match='batches holds 2'):
    calibrate_nnx(model, _batches(2))
  chex.assert_trees_all_equal(_statistics(model), before)


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


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'alpha': 0.0}, r'alpha is 0\.0, but must be in \(0, 1\]'),
    ({'alpha': 1.5}, r'alpha is 1\.5'),
    ({'alpha': float('nan')}, 'alpha is nan'),
    ({'epsilon': 0.0}, r'epsilon is 0\.0, but must be above 0'),
    ({'epsilon': -1e-4}, r'epsilon is -0\.0001'),
  ],
)
def test_option_errors(options, message):
  with pytest.raises(ValueError, match=message):
    BatchNorm(**options)
  with pytest.raises(ValueError, match=message):
    NNXBatchNorm(5, **options)


@FORMS
def test_input_errors(form):
  empty = np.zeros((0, 5), np.float32)
  with pytest.raises(ValueError, match=r'x has shape \(0, 5\)'):
    form(empty)
  assert NNXBatchNorm(5)(empty, use_running_average=True).shape == (0, 5)
  with pytest.raises(ValueError, match='x is complex'):
    form(np.zeros((2, 5), np.complex64))


@pytest.mark.parametrize('axis', [2, -3])
def test_axis_errors(axis):
  x = _random((8, 5))
  message = rf'axis is {axis}, but x has shape \(8, 5\): .* \[-2, 2\)'
  with pytest.raises(ValueError, match=message):
    _linen(x, axis=axis)
  with pytest.raises(ValueError, match=message):
    NNXBatchNorm(5, axis=axis)(x)


@pytest.mark.parametrize('use_running_average', [False, True])
def test_number_of_features_errors(use_running_average):
  layer = BatchNorm()
  _, statistics = _linen(_random((8, 5)))
  message = 'x has 4 features .* statistics are of 5'
  with pytest.raises(ValueError, match=message):
    layer.apply(
      {'batch_stats': statistics},
      _random((8, 4)),
      use_running_average=use_running_average,
      mutable=['batch_stats'],
    )
  with pytest.raises(ValueError, match=message):
    NNXBatchNorm(5)(_random((8, 4)), use_running_average)


def test_mode_and_rngs_errors():
  x = _random((8, 5))
  with pytest.raises(ValueError, match='use_running_average is None'):
    NNXBatchNorm(5, use_running_average=None)(x)
  with pytest.raises(ValueError, match='use_scale.*rngs=nnx.Rngs'):
    NNXBatchNorm(5, use_scale=True)
