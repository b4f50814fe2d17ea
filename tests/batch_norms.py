"""Batch norm in Linen and in NNX, and its statistics in float64."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from symjax_bp.normalization import BatchNorm, NNXBatchNorm

EPSILON = 1e-4
DEVICES = 4


def random_array(shape, seed=0, scale=3.0, offset=2.0):
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


def linen_form(x, **options):
  """Normalises x in training mode; returns (y, batch_stats)."""
  layer = BatchNorm(use_running_average=False, **options)
  y, variables = layer.apply({}, x, mutable=['batch_stats'])
  return y, variables['batch_stats']


def statistics_of(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def nnx_form(x, axis=-1, **options):
  layer = NNXBatchNorm(x.shape[axis], axis=axis, **options)
  y = layer(x)
  return y, statistics_of(layer)


FORMS = pytest.mark.parametrize('form', [linen_form, nnx_form])


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


def mini_batches(count, seed=0, rows=8):
  return [
    random_array((rows, 5), seed + k, scale=1.0 + k) for k in range(count)
  ]


def variables_of(model=None, seed=0):
  model = model or Network()
  return model.init(jax.random.key(seed), random_array((8, 5)), train=True)
