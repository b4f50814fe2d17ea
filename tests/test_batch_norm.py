"""Batch norm is its closed form on any devices, and keeps its digits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from symjax_bp import nnx as asymmetric
from symjax_bp.linen import BatchNorm, calibrate
from tests.batch_norms import (
  EPSILON,
  ROUNDING,
  linen_form,
  nnx_form,
  numpy_average,
  numpy_statistics,
  random_array,
  statistics_of,
  with_gradient,
)

pytestmark = pytest.mark.optimized
TRAINING = BatchNorm(use_running_average=False)
INITIAL = {
  'mean': np.zeros(5, np.float32),
  'std': np.ones(5, np.float32),
  'count': np.int32(0),
}


@pytest.mark.parametrize('form', [linen_form, nnx_form])
@pytest.mark.parametrize(
  ('shape', 'axis'), [((6, 5), 0), ((4, 3, 6, 6), 1), ((2, 3, 4, 5, 2), -1)]
)
def test_training_is_the_closed_form_in_float64(float64, form, shape, axis):
  x, g = (np.float64(random_array(shape, seed)) for seed in range(2))
  y, dx, statistics = with_gradient(form, x, g, axis=axis)
  mean, std = numpy_statistics(x, axis)
  axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  centered = (x - mean) / std
  projection = centered * (g * centered).mean(axes, keepdims=True)
  expected = (g - g.mean(axes, keepdims=True) - projection) / std
  # Up to 144 additions of numbers up to 100, each rounded by 1e-16.
  np.testing.assert_allclose(y, centered, rtol=0, atol=1e-11)
  np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-11)
  assert statistics['count'] == 1
  # The first mini-batch counts in full and is stored in float32.
  for name, value in (('mean', mean), ('std', std)):
    chex.assert_type(statistics[name], jnp.float32)
    np.testing.assert_allclose(statistics[name], value.ravel(), rtol=ROUNDING)


@pytest.mark.parametrize('alpha', [0.05, 1.0, 1e-6])
def test_averages_are_bias_corrected_and_of_deviations(alpha):
  batches = [random_array((10, 3), k, 1.0 + k, offset=k) for k in range(25)]
  linen, variables = TRAINING.clone(alpha=alpha), {}
  layer = asymmetric.BatchNorm(3, alpha=alpha)
  for x in batches:
    _, variables = linen.apply(variables, x, mutable=['batch_stats'])
    layer(x)
  statistics = dict(variables['batch_stats'])
  chex.assert_trees_all_equal(statistics_of(layer), statistics)
  means, stds = zip(*map(numpy_statistics, batches), strict=True)
  # 10 additions per mini-batch, then 25 updates of 4 operations each.
  atol = (10 + 4 * 25) * ROUNDING * np.abs(batches).max()
  assert statistics['count'] == 25
  for name, values in (('mean', means), ('std', stds)):
    expected = numpy_average(values, alpha)[0]
    np.testing.assert_allclose(statistics[name], expected, rtol=0, atol=atol)
  if alpha < 1.0:  # The average of variances is another number.
    variance = numpy_average(np.square(stds), alpha)[0]
    assert (np.sqrt(variance) > statistics['std'] + 10 * atol).all()
  # Evaluation adds no second epsilon, and moves nothing.
  x = random_array((4, 3))
  mean, std = (np.float64(statistics[name]) for name in ('mean', 'std'))
  y = BatchNorm(use_running_average=True).apply(variables, x)
  np.testing.assert_allclose(y, (x - mean) / std, rtol=4 * ROUNDING)
  layer.eval()
  chex.assert_trees_all_equal(layer(x), y)
  chex.assert_trees_all_equal(statistics_of(layer), statistics)


@pytest.mark.parametrize('use_scale', [False, True])
@pytest.mark.parametrize('use_bias', [False, True])
def test_parameters_only_when_asked(use_scale, use_bias):
  x, options = (
    random_array((8, 5)),
    dict(use_scale=use_scale, use_bias=use_bias),
  )
  linen = TRAINING.clone(**options)
  layer = asymmetric.BatchNorm(5, **options, rngs=nnx.Rngs(0))
  expected = {'scale': np.ones(5, np.float32)} if use_scale else {}
  expected |= {'bias': np.zeros(5, np.float32)} if use_bias else {}
  params = nnx.state(layer, nnx.Param)
  chex.assert_trees_all_equal(nnx.to_pure_dict(params), expected)
  found = linen.init(jax.random.key(0), x).get('params', {})
  chex.assert_trees_all_equal(dict(found), expected)
  params = {name: random_array(5, seed=len(name)) for name in expected}
  nnx.update(layer, params)
  y = np.asarray(TRAINING.apply({}, x))
  y = y * params.get('scale', np.float32(1)) + params.get('bias', np.float32(0))
  chex.assert_trees_all_equal(linen.apply({'params': params}, x), y)
  chex.assert_trees_all_equal(layer(x), y)


def test_statistics_move_only_in_training_and_where_mutable():
  x = random_array((8, 5))
  variables = TRAINING.init(jax.random.key(0), x)
  pure = TRAINING.apply(variables, x)
  chex.assert_trees_all_equal(pure, TRAINING.apply({}, x))
  y, moved = TRAINING.apply(variables, x, mutable=['batch_stats'])
  chex.assert_trees_all_equal(pure, y)
  assert moved['batch_stats']['count'] == 1
  chex.assert_trees_all_equal(variables, {'batch_stats': INITIAL})
  # Evaluation before any mini-batch returns its input, which may be empty.
  for inputs in (x, x[:0]):
    layer = asymmetric.BatchNorm(5)
    y = layer(inputs, use_running_average=True)
    np.testing.assert_array_equal(y, inputs)
    chex.assert_trees_all_equal(statistics_of(layer), INITIAL)
    y = BatchNorm().apply(variables, inputs, use_running_average=True)
    np.testing.assert_array_equal(y, inputs)


def test_nnx_modes():
  x, layer = random_array((8, 5)), asymmetric.BatchNorm(5)
  trained = layer(x)
  layer.eval()
  # The call's argument, nnx.view and train() each select training again.
  train = (
    lambda: layer(x, use_running_average=False),
    lambda: nnx.view(layer, use_running_average=False)(x),
    lambda: layer.train() or layer(x),
  )
  for number, again in enumerate(train, 2):
    assert (layer(x + 1) != trained).all()
    chex.assert_trees_all_equal(again(), trained)
    assert layer.count[...] == number


@pytest.mark.parametrize(
  ('name', 'values', 'allowed'),
  [
    ('alpha', (0.0, 1.5, np.nan), r'\(0, 1\]'),
    ('epsilon', (0.0, -1.0, np.nan), 'above 0'),
  ],
)
def test_option_errors(name, values, allowed):
  for value in values:
    for make in (BatchNorm, functools.partial(asymmetric.BatchNorm, 5)):
      with pytest.raises(ValueError, match=f'{name} is {value}.* {allowed}'):
        make(**{name: value})


X = np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
  ('x', 'axis', 'message'),
  [
    (X[:0], -1, r'x has shape \(0, 5\)'),
    (X[:, :4], -1, r'x has 4 features \(shape \(2, 4\), axis -1\), .* of 5'),
    (X.astype(np.complex64), -1, 'x is complex'),
    (X, 2, r'axis is 2, but x has shape \(2, 5\): .* \[-2, 2\)'),
    (X, -3, r'axis is -3, but x has shape .* \[-2, 2\)'),
    (X, (0, 1), r'axis is \(0, 1\), but .* must be an integer'),
  ],
)
def test_input_errors(x, axis, message):
  linen = functools.partial(
    TRAINING.clone(axis=axis).apply, {'batch_stats': INITIAL}
  )
  for run in (
    functools.partial(linen, mutable=['batch_stats']),
    asymmetric.BatchNorm(5, axis=axis),
  ):
    with pytest.raises(ValueError, match=message):
      run(x)


def test_mode_rngs_and_dtype_errors():
  with pytest.raises(ValueError, match='use_running_average is None'):
    asymmetric.BatchNorm(5, use_running_average=None)(X)
  with pytest.raises(ValueError, match='use_scale.*rngs=nnx.Rngs'):
    asymmetric.BatchNorm(5, use_scale=True)
  for dtype in (jnp.int32, 'complex64'):
    with pytest.raises(ValueError, match=r'dtype is (int32|complex64), but'):
      asymmetric.BatchNorm(5, dtype=dtype)(X)


# --- Precision ----------------------------------------------------------------


CONSTANTS = np.float32([0.1, 1 / 3, 12345.678, -3e6 + 0.25])


def test_large_mean_does_not_drown_the_deviation():
  x = random_array((100, 3), scale=0.5, offset=5e4)
  _, std = numpy_statistics(x)
  _, statistics = linen_form(x)
  # The mean is rounded to float32, by at most 5e4 * ROUNDING / 2, whose square
  # is added to the variance; sums of 100 small numbers do the rest.
  rtol = (5e4 * ROUNDING / 2 / 0.5) ** 2 / 2 + 100 * ROUNDING
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=rtol)


@pytest.mark.parametrize('shape', [(7, 13, 13, 4), (1, 4), (4,)])
def test_constant_features_become_exactly_zero(shape):
  # Rounding in the mean, divided by sqrt(epsilon), would be as large as 1.
  x = np.broadcast_to(CONSTANTS, shape)
  y, dx, statistics = with_gradient(linen_form, x, random_array(shape))
  np.testing.assert_array_equal(y, np.zeros_like(x))
  np.testing.assert_array_equal(statistics['mean'], CONSTANTS)
  np.testing.assert_allclose(statistics['std'], np.sqrt(EPSILON), 4 * ROUNDING)
  assert np.isfinite(dx).all()


def test_constant_features_stay_zero_in_evaluation():
  x, layer = np.broadcast_to(CONSTANTS, (9, 4)), BatchNorm()
  variables = layer.init(jax.random.key(0), x, use_running_average=True)
  variables = calibrate(layer, variables, [x] * 5, 5, use_running_average=False)
  y = layer.apply(variables, x, use_running_average=True)
  np.testing.assert_array_equal(y, np.zeros_like(x))


def test_half_precision():
  # A bfloat16 mean of 1024 numbers near 3 would be wrong in its first digit.
  rows = 1024
  x = jnp.asarray(random_array((rows, 3), scale=0.5, offset=3.0), jnp.bfloat16)
  mean, std = numpy_statistics(x)
  y, statistics = linen_form(x)
  np.testing.assert_allclose(statistics['mean'], mean[0], rtol=rows * ROUNDING)
  np.testing.assert_allclose(statistics['std'], std[0], rtol=rows * ROUNDING)
  # y is rounded to 8 bits; the float32 mean is off by rows roundings of x.
  expected = (np.asarray(x, np.float64) - mean) / std
  atol = rows * ROUNDING * 3.0 / 0.5
  np.testing.assert_allclose(np.float64(y), expected, rtol=2.0**-8, atol=atol)


@pytest.mark.parametrize(
  ('x_dtype', 'dtype', 'expected'),
  [
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float16, None, jnp.float16),
    (jnp.uint8, None, jnp.float32),
  ],
)
def test_dtype_of_the_result(x_dtype, dtype, expected):
  x = jnp.asarray(random_array((8, 5), scale=3.0, offset=9.0), x_dtype)
  y, statistics = linen_form(x, dtype=dtype)
  chex.assert_type(
    [y, statistics['mean'], statistics['std']],
    [expected, jnp.float32, jnp.float32],
  )


# --- Devices ------------------------------------------------------------------


DEVICES, SHAPE = 4, (8, 3, 3, 5)


@pytest.mark.parametrize(
  'form, transform', [(linen_form, jax.vmap), (nnx_form, jax.pmap)]
)
def test_devices_are_the_whole_batch(float64, form, transform):
  """Whole steps by jit, pmap and shard_map are in test_data_parallel.py."""
  x, g = (jnp.float64(random_array(SHAPE, k)) for k in (0, 1))
  function = functools.partial(with_gradient, form, axis_name='batch')
  y, dx, statistics = transform(function, axis_name='batch')(
    *(a.reshape(DEVICES, -1, *SHAPE[1:]) for a in (x, g))
  )
  expected, gradient, whole = with_gradient(form, x, g)
  # 72 additions of numbers up to 100, each rounded by 1e-16.
  np.testing.assert_allclose(y.reshape(SHAPE), expected, rtol=0, atol=1e-11)
  np.testing.assert_allclose(dx.reshape(SHAPE), gradient, rtol=0, atol=1e-11)
  for name, value in whole.items():
    for device in statistics[name].reshape(-1, *value.shape):
      np.testing.assert_allclose(device, value, rtol=ROUNDING)


@pytest.mark.parametrize('devices', [3, 5, 7])
def test_constant_features_become_exactly_zero_on_any_devices(devices):
  # The mean of equal numbers is another number if their count is odd.
  x = np.broadcast_to(CONSTANTS, (devices, 2, 4))
  apply = functools.partial(BatchNorm(False, axis_name='batch').apply, {})
  np.testing.assert_array_equal(jax.vmap(apply, axis_name='batch')(x), 0 * x)


def test_axis_index_groups():
  x = random_array((DEVICES, 2, 5))
  layer = BatchNorm(False, axis_name='batch')
  layer.init(jax.random.key(0), x)  # Initialization needs no axis.
  layer = layer.clone(axis_index_groups=[[0, 1], [2, 3]])
  y = jax.pmap(functools.partial(layer.apply, {}), 'batch')(x)
  expected = [linen_form(half.reshape(4, 5))[0] for half in np.split(x, 2)]
  # 4 additions of deviations up to 5, and the rounding of x up to 0.5.
  atol = (4 * 5 + 0.5 / 0.05) * ROUNDING
  np.testing.assert_allclose(y.reshape(2, 4, 5), expected, rtol=0, atol=atol)
