"""Batch normalisation as functions of arrays; no Flax.

``mean`` and ``std`` are per feature, of a mini-batch; their averages, which
stand in for them in testing, are a dictionary of ``mean``, ``std`` and
``count``, the number of mini-batches averaged.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# The averages before the first mini-batch.
INITIAL = {'mean': 0.0, 'std': 1.0, 'count': 0}


def initial_statistics(shape: tuple[int, ...]) -> dict[str, jax.Array]:
  """The statistics of `shape` features before the first mini-batch."""
  return {
    'mean': jnp.full(shape, INITIAL['mean'], jnp.float32),
    'std': jnp.full(shape, INITIAL['std'], jnp.float32),
    'count': jnp.array(INITIAL['count'], jnp.int32),
  }


def batch_norm(
  options: Any,
  x: jax.Array,
  stored: Mapping[str, jax.Array],
  scale: jax.Array | None,
  bias: jax.Array | None,
  use_running_average: bool,
  axis_name: str | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The layer as a function: (y, the statistics that move, or nothing)."""
  x = jnp.asarray(x)
  features = num_features(x, options.axis)
  if stored and stored['mean'].shape != (features,):
    raise ValueError(
      f'x has {features} features (shape {x.shape}, axis {options.axis}), but '
      f"the layer's statistics are of {stored['mean'].size}"
    )
  dtype = options.dtype
  if dtype is None:
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
  # A half precision mean of many numbers would be no mean at all.
  exact = dtype if jnp.finfo(dtype).bits > 16 else jnp.float32
  x = x.astype(exact)
  others = tuple(i for i in range(x.ndim) if i != options.axis % x.ndim)

  moved = {}
  if use_running_average:
    mean, std = stored['mean'].astype(exact), stored['std'].astype(exact)
    y = (x - jnp.expand_dims(mean, others)) * jnp.expand_dims(1 / std, others)
  else:
    if 0 in x.shape:
      raise ValueError(f'x has shape {x.shape}: there is nothing to average')
    y, mean, std = _normalized(
      x, others, options.epsilon, axis_name, options.axis_index_groups
    )
    if stored:
      moved = _moved(stored, {'mean': mean, 'std': std}, options.alpha)

  if scale is not None:
    y = y * jnp.expand_dims(scale.astype(exact), others)
  if bias is not None:
    y = y + jnp.expand_dims(bias.astype(exact), others)
  return y.astype(dtype), moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _normalized(
  x: jax.Array,
  axes: tuple[int, ...],
  epsilon: float,
  axis_name: str | None,
  axis_index_groups: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x normalised over `axes` (and devices), its mean and std, (features,)."""
  average = _averaging(axes, axis_name, axis_index_groups)
  # Measured from one of the examples, so that rounding is relative to the
  # spread of a feature and not to its size, and exactly 0 if it is constant.
  origin = x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))]
  mean = average(x - jnp.expand_dims(origin, axes), origin)
  centred = x - jnp.expand_dims(mean, axes)
  std = jnp.sqrt(average(jnp.square(centred)) + epsilon)
  return centred * jnp.expand_dims(1 / std, axes), mean, std


@_normalized.defjvp
def _normalized_jvp(axes, epsilon, axis_name, axis_index_groups, primal, dx):
  """The derivative by hand: JAX's own goes over x more than twice as often."""
  y, mean, std = _normalized(
    *primal, axes, epsilon, axis_name, axis_index_groups
  )
  (dx,) = dx
  average = _averaging(axes, axis_name, axis_index_groups)
  dmean, dstd = average(dx), average(y * dx)
  dy = dx - jnp.expand_dims(dmean, axes) - y * jnp.expand_dims(dstd, axes)
  return (y, mean, std), (dy * jnp.expand_dims(1 / std, axes), dmean, dstd)


def _averaging(
  axes: tuple[int, ...], axis_name: str | None, axis_index_groups: Any
) -> Callable[..., jax.Array]:
  """Means over `axes`, of values measured from an origin, and over devices."""

  def average(values: jax.Array, origin: Any = 0.0) -> jax.Array:
    mean = origin + jnp.mean(values, axes)
    if axis_name is None:
      return mean
    return jax.lax.pmean(mean, axis_name, axis_index_groups=axis_index_groups)

  return average


def _moved(
  stored: Mapping[str, jax.Array],
  observed: Mapping[str, jax.Array],
  alpha: float,
) -> dict[str, jax.Array]:
  """The averages after one more mini-batch; not differentiated."""
  count = stored['count'] + 1
  # 1 - (1 - alpha)^count without cancellation for a small alpha.
  decay = jnp.log1p(jnp.float32(-alpha)) * count.astype(jnp.float32)
  weight = alpha / -jnp.expm1(decay)
  # A rounded weight of 1 would leave a constant feature beside its mean.
  moved = {}
  for name, value in jax.lax.stop_gradient(observed).items():
    old = stored[name]
    new = value.astype(old.dtype)
    moved[name] = jnp.where(count == 1, new, old + weight * (new - old))
  return {**moved, 'count': count}


def num_features(x: Any, axis: int) -> int:
  """Returns the size of x on `axis` after checking both."""
  shape = jnp.shape(x)
  if not -len(shape) <= axis < len(shape):
    raise ValueError(
      f'axis is {axis}, but x has shape {shape}: axis must be in '
      f'[{-len(shape)}, {len(shape)})'
    )
  if jnp.iscomplexobj(x):
    raise ValueError('x is complex, but must be real')
  return shape[axis]


def check_options(alpha: float, epsilon: float) -> None:
  """Raises unless the numbers are in their ranges."""
  if not 0.0 < alpha <= 1.0:
    raise ValueError(
      f'alpha is {alpha}, but must be in (0, 1]: the weight of the newest '
      "mini-batch, which is 1 - momentum of Flax's BatchNorm"
    )
  if not epsilon > 0.0:
    raise ValueError(
      f'epsilon is {epsilon}, but must be above 0, or a constant feature is '
      'divided by 0'
    )
