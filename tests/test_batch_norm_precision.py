"""Batch norm keeps its digits, whatever the inputs and their dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from symjax_bp.linen import BatchNorm, calibrate
from tests.batch_norms import (
  EPSILON,
  FORMS,
  ROUNDING,
  numpy_statistics,
  random_array,
  with_gradient,
)

CONSTANTS = np.float32([0.1, 1 / 3, 12345.678, -3e6 + 0.25])


@FORMS
def test_large_mean_does_not_drown_the_deviation(form):
  x = random_array((100, 3), scale=0.5, offset=5e4)
  _, std = numpy_statistics(x)
  _, statistics = form(x)
  # The mean is rounded to float32, by at most 5e4 * ROUNDING / 2, whose square
  # is added to the variance; sums of 100 small numbers do the rest.
  rtol = (5e4 * ROUNDING / 2 / 0.5) ** 2 / 2 + 100 * ROUNDING
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=rtol)


@FORMS
@pytest.mark.parametrize('shape', [(7, 13, 13, 4), (1, 4), (4,)])
def test_constant_features_become_exactly_zero(form, shape):
  # Rounding in the mean, divided by sqrt(epsilon), would be as large as 1.
  x = np.broadcast_to(CONSTANTS, shape)
  y, dx, statistics = with_gradient(form, x, random_array(shape))
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


@FORMS
def test_half_precision(form):
  # A bfloat16 mean of 1024 numbers near 3 would be wrong in its first digit.
  rows = 1024
  x = jnp.asarray(random_array((rows, 3), scale=0.5, offset=3.0), jnp.bfloat16)
  mean, std = numpy_statistics(x)
  y, statistics = form(x)
  np.testing.assert_allclose(statistics['mean'], mean[0], rtol=rows * ROUNDING)
  np.testing.assert_allclose(statistics['std'], std[0], rtol=rows * ROUNDING)
  # y is rounded to 8 bits; the float32 mean is off by rows roundings of x.
  expected = (np.asarray(x, np.float64) - mean) / std
  atol = rows * ROUNDING * 3.0 / 0.5
  np.testing.assert_allclose(np.float64(y), expected, rtol=2.0**-8, atol=atol)


@FORMS
@pytest.mark.parametrize(
  ('x_dtype', 'dtype', 'expected'),
  [
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.float16, None, jnp.float16),
    (jnp.uint8, None, jnp.float32),
  ],
)
def test_dtype_of_the_result(form, x_dtype, dtype, expected):
  x = jnp.asarray(random_array((8, 5), scale=3.0, offset=9.0), x_dtype)
  y, statistics = form(x, dtype=dtype)
  chex.assert_type(
    [y, statistics['mean'], statistics['std']],
    [expected, jnp.float32, jnp.float32],
  )
