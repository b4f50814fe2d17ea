"""Batch normalization with the paper's statistics, as functions of arrays.

``symjax_bp.linen`` and ``symjax_bp.nnx`` make layers of them: ``BatchNorm``
keeps exponential averages of the means and *standard deviations* of
mini-batches for testing, and ``calibrate`` computes them from 20 training
mini-batches, as the paper does after each epoch.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from symjax_bp.transform import path_of

__all__ = [
  'INITIAL',
  'check_observed',
  'check_options',
  'initial_statistics',
  'normalize',
  'num_features',
  'restart',
  'take',
]

# The statistics before the first mini-batch.
INITIAL = {'mean': np.float32(0), 'std': np.float32(1), 'count': np.int32(0)}


def take(batches: Iterable[Any], num_batches: int) -> Iterator[tuple]:
  """Yields the positional arguments of exactly num_batches mini-batches."""
  if num_batches < 1:
    raise ValueError(f'num_batches is {num_batches}, but must be at least 1')
  taken = 0
  for batch in itertools.islice(batches, num_batches):
    taken += 1
    yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)
  if taken < num_batches:
    raise ValueError(
      f'batches holds {taken} mini-batches, but num_batches is {num_batches}: '
      'pass more mini-batches or a smaller num_batches'
    )


def restart(statistics: Any) -> Any:
  """Returns the tree with every statistic as before the first mini-batch."""

  def restart(path, value):
    name = path_of(path[-1:])
    if name not in INITIAL:
      raise ValueError(
        f'batch_stats holds {path_of(path)}, but calibrate can restart only '
        'the averages of symjax_bp.linen.BatchNorm and symjax_bp.nnx.BatchNorm'
      )
    return jnp.full_like(value, INITIAL[name])

  if not jax.tree.leaves(statistics):
    raise ValueError(
      'the model has no batch_stats: it needs a BatchNorm layer of '
      'symjax_bp.linen or symjax_bp.nnx, and for Linen the batch_stats of '
      'model.init'
    )
  return jax.tree.map_with_path(restart, statistics)


def check_observed(statistics: Any) -> None:
  """Raises if a layer averaged nothing; under jit the counts are unknown."""
  for path, value in jax.tree.leaves_with_path(statistics):
    is_known = path_of(path[-1:]) == 'count' and not isinstance(value, Tracer)
    if is_known and not value.all():
      raise ValueError(
        f'{path_of(path)} is 0: this layer did not run in training mode; for '
        'Linen pass what selects it, e.g. train=True'
      )


def check_options(alpha: float, epsilon: float) -> None:
  """Raises if an option of a layer is out of range."""
  if not (0.0 < alpha <= 1.0 and epsilon > 0.0):
    raise ValueError(
      f'alpha is {alpha} and epsilon is {epsilon}, but alpha must be in (0, 1] '
      "(1 - momentum of Flax's layers) and epsilon above 0"
    )


def num_features(x: Any, axis: int) -> int:
  """Returns the size of x on `axis` after checking both."""
  shape = jnp.shape(x)
  if axis not in range(-len(shape), len(shape)):
    raise ValueError(
      f'axis is {axis}, but x has shape {shape}: axis must be an integer in '
      f'[{-len(shape)}, {len(shape)})'
    )
  if jnp.iscomplexobj(x):
    raise ValueError('x is complex, but must be real')
  return shape[axis]


def initial_statistics(shape: tuple[int, ...]) -> dict[str, jax.Array]:
  """Returns the statistics before the first mini-batch."""
  shapes = {'mean': shape, 'std': shape, 'count': ()}
  return {name: jnp.full(shapes[name], INITIAL[name]) for name in INITIAL}


def normalize(
  layer: Any, x: Any, arrays: dict, use_averages: bool, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The layer as a function; returns y and the statistics that change."""
  x = jnp.asarray(x)
  features = num_features(x, layer.axis)
  if 'mean' in arrays and arrays['mean'].shape != (features,):
    raise ValueError(
      f'x has {features} features (shape {x.shape}, axis {layer.axis}), but '
      f"the layer's statistics are of {arrays['mean'].size}"
    )
  dtype = layer.dtype
  if dtype is None:
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'dtype is {jnp.dtype(dtype)}, but must be floating')
  # The mean of many numbers in half precision has no correct digit.
  exact = dtype if jnp.finfo(dtype).bits > 16 else jnp.float32
  x = x.astype(exact)
  axes = tuple(i for i in range(x.ndim) if i != layer.axis % x.ndim)

  def expanded(name):
    return jnp.expand_dims(arrays[name].astype(exact), axes)

  updated = {}
  if use_averages:
    y = (x - expanded('mean')) * (1 / expanded('std'))
  elif 0 in x.shape:
    raise ValueError(f'x has shape {x.shape}: there is nothing to average')
  else:
    groups = layer.axis_index_groups
    y, mean, std = _standardize(x, axes, layer.epsilon, axis_name, groups)
    if 'count' in arrays:
      updated = _average(arrays, {'mean': mean, 'std': std}, layer.alpha)
  if 'scale' in arrays:
    y = y * expanded('scale')
  if 'bias' in arrays:
    y = y + expanded('bias')
  return y.astype(dtype), updated


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _standardize(x, axes, epsilon, axis_name, groups):
  """Returns x normalized over `axes` and devices, its mean and its std."""
  # Values relative to one example make rounding relative to the spread of a
  # feature instead of its size, and exactly 0 if the feature is constant.
  origin = x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))]
  if axis_name is not None:
    origin = jax.lax.pmax(origin, axis_name, axis_index_groups=groups)
  mean = jnp.mean(x - jnp.expand_dims(origin, axes), axes)
  mean = origin + _across_devices(mean, axis_name, groups)
  centered = x - jnp.expand_dims(mean, axes)
  variance = jnp.mean(jnp.square(centered), axes)
  std = jnp.sqrt(_across_devices(variance, axis_name, groups) + epsilon)
  return centered * jnp.expand_dims(1 / std, axes), mean, std


@_standardize.defjvp
def _standardize_jvp(axes, epsilon, axis_name, groups, primal, dx):
  """The derivative in closed form; JAX's own reads x twice as often."""
  y, mean, std = _standardize(*primal, axes, epsilon, axis_name, groups)
  (dx,) = dx
  dmean = _across_devices(jnp.mean(dx, axes), axis_name, groups)
  dstd = _across_devices(jnp.mean(y * dx, axes), axis_name, groups)
  dy = dx - jnp.expand_dims(dmean, axes) - y * jnp.expand_dims(dstd, axes)
  return (y, mean, std), (dy * jnp.expand_dims(1 / std, axes), dmean, dstd)


def _across_devices(mean, axis_name, groups):
  if axis_name is None:
    return mean
  return jax.lax.pmean(mean, axis_name, axis_index_groups=groups)


def _average(stored: dict, observed: dict, alpha: float) -> dict:
  """Adds one mini-batch to the averages, without a gradient."""
  count = stored['count'] + 1
  # 1 - (1 - alpha)^count without cancellation for a small alpha.
  decay = jnp.log1p(jnp.float32(-alpha)) * count.astype(jnp.float32)
  weight = alpha / -jnp.expm1(decay)
  updated = {'count': count}
  for name, value in jax.lax.stop_gradient(observed).items():
    old = stored[name]
    new = value.astype(old.dtype)
    # With a rounded weight of 1 a constant feature would not become 0.
    updated[name] = jnp.where(count == 1, new, old + weight * (new - old))
  return updated
