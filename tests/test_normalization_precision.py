"""Batch norm keeps its digits, whatever the inputs and their dtype."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from symjax_bp.normalization import BatchNorm, calibrate
from tests.batch_norms import EPSILON, FORMS, numpy_statistics, random_array


@FORMS
def test_large_mean_does_not_drown_the_deviation(form):
  x = random_array((100, 3), scale=0.5, offset=5e4)
  _, std = numpy_statistics(x)
  _, statistics = form(x)
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=1e-5)


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
  assert np.isfinite(vjp(random_array(shape))[0]).all()


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
  y, statistics = form(random_array(shape))
  np.testing.assert_array_equal(y, np.zeros(shape, np.float32))
  np.testing.assert_array_equal(statistics['mean'], random_array(shape).ravel())


@FORMS
def test_half_precision(form):
  # A bfloat16 mean of 4096 numbers near 3 would be wrong in its first digit.
  x = jnp.asarray(random_array((4096, 3), scale=0.5, offset=3.0), jnp.bfloat16)
  mean, std = numpy_statistics(x)
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
  y, statistics = form(jnp.asarray(random_array((8, 5)), x_dtype), dtype=dtype)
  assert y.dtype == expected
  chex.assert_type([statistics['mean'], statistics['std']], jnp.float32)


@FORMS
def test_double_precision(form):
  with jax.enable_x64(True):
    x = jnp.asarray(random_array((8, 5)), jnp.float64)
    mean, std = numpy_statistics(x)
    y, statistics = form(x)
    np.testing.assert_allclose(y, (x - mean) / std, rtol=0, atol=1e-13)
    assert y.dtype == jnp.float64
    chex.assert_type([statistics['mean'], statistics['std']], jnp.float32)


def test_half_precision_input_with_single_precision_parameters():
  x = jnp.asarray(random_array((8, 5)), jnp.bfloat16)
  layer = BatchNorm(use_running_average=False, use_scale=True, use_bias=True)
  y, variables = layer.init_with_output(jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  chex.assert_type(jax.tree.leaves(variables['params']), jnp.float32)
