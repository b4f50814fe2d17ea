"""Batch norm in Linen and in NNX, and its statistics in float64."""

import functools

import jax
import numpy as np
from flax import nnx

from symjax_bp import nnx as asymmetric
from symjax_bp.linen import BatchNorm

EPSILON = 1e-4
ROUNDING = float(np.finfo(np.float32).eps)


def random_array(shape, seed=0, scale=0.05, offset=0.3):
  """Random numbers, by default so small that epsilon matters."""
  rng = np.random.default_rng(seed)
  return (offset + scale * rng.standard_normal(shape)).astype(np.float32)


def numpy_statistics(x, axis=-1):
  """Mean and standard deviation in float64, with x's number of axes."""
  x = np.asarray(x, np.float64)
  axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  mean = x.mean(axes, keepdims=True)
  variance = np.square(x - mean).mean(axes, keepdims=True)
  return mean, np.sqrt(variance + EPSILON)


def numpy_average(values, alpha):
  """The bias-corrected exponential moving average as a weighted mean."""
  weights = (1.0 - alpha) ** np.arange(len(values))[::-1]
  return np.tensordot(weights / weights.sum(), np.stack(values), 1)


def statistics_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def linen_form(x, **options):
  """Normalizes x in training mode; returns (y, statistics)."""
  layer = BatchNorm(use_running_average=False, **options)
  y, variables = layer.apply({}, x, mutable=['batch_stats'])
  return y, variables['batch_stats']


def nnx_form(x, axis=-1, **options):
  layer = asymmetric.BatchNorm(x.shape[axis], axis=axis, **options)
  y = layer(x)
  return y, statistics_of(layer)


@functools.partial(jax.jit, static_argnames=('form', 'axis', 'axis_name'))
def with_gradient(form, x, g, **options):
  """Returns y, the gradient of the sum of y * g, and the statistics."""
  y, vjp, statistics = jax.vjp(
    functools.partial(form, **options), x, has_aux=True
  )
  return y, vjp(g)[0], dict(statistics)


def mini_batches(count, seed=0):
  return [random_array((8, 5), seed + k, 1.0 + k, 2.0) for k in range(count)]
