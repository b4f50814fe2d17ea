r"""Batch normalization with the paper's statistics, for Linen and NNX.

For testing, layers keep exponential moving averages of the means and *standard
deviations* of mini-batches. :func:`calibrate` computes them from 20 training
mini-batches, as the paper does after each epoch.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.core import Tracer

from symjax_bp.transform import path_of, separate

__all__ = ['BatchNorm', 'NNXBatchNorm', 'calibrate', 'calibrate_nnx']

# The statistics before the first mini-batch.
_INITIAL = {'mean': np.float32(0), 'std': np.float32(1), 'count': np.int32(0)}


class BatchNorm(nn.Module):
  r"""Batch normalization with averages of standard deviations (Linen).

  Takes x of shape (batch, spatial axes..., features), floats or integers, and
  returns y of the same shape. Training uses the mean :math:`\mu` and the
  population variance :math:`v` of the mini-batch over every axis but ``axis``,

  .. math::
    y = (x - \mu) / \sigma, \qquad \sigma = \sqrt{v + \epsilon}

  and, if the collection ``batch_stats`` is mutable, updates the averages in it
  with :math:`x_k = \mu` and :math:`x_k = \sigma` of the k-th mini-batch:

  .. math::
    a_k = a_{k-1} + w_k\,(x_k - a_{k-1}), \qquad
    w_k = \alpha / (1 - (1 - \alpha)^k)

  with which the first mini-batch counts in full. Evaluation normalizes with the
  averages, which are 0 and 1 before the first mini-batch. A feature that is
  constant over the mini-batch becomes exactly 0.

  Attributes:
    use_running_average: True to evaluate, False to train; here or in the call.
    axis: The axis of the features.
    alpha: :math:`\alpha` in (0, 1].
    epsilon: :math:`\epsilon > 0`, in units of the variance.
    dtype: The dtype of y (default: that of x, or float32 for integers).
      Statistics are computed in float32 or wider and stored in float32.
    param_dtype: The dtype of scale and bias.
    use_bias, use_scale: Whether y has a learnable bias, a learnable scale.
    bias_init, scale_init: Their initializers.
    axis_name, axis_index_groups: The pmap, shard_map or vmap axis over which a
      mini-batch is split, as for :func:`jax.lax.pmean`: statistics are those
      of the whole mini-batch. A jit over sharded arrays needs no name.

  Raises:
    ValueError: ``alpha``, ``epsilon`` or ``axis`` is out of range, or x is
      complex, empty or has another number of features than the statistics.

  Examples:
    >>> from symjax_bp.batch_norm import BatchNorm
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    >>> layer = BatchNorm(use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), x)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'count': (), 'mean': (2,), 'std': (2,)}}
    >>> y, variables = layer.apply(variables, x, mutable='batch_stats')
    >>> print(y.round(3))
    [[-1.225  0.   ]
     [ 0.     0.   ]
     [ 1.225  0.   ]]
    >>> print(variables['batch_stats']['std'].round(2))
    [1.63 0.01]

  References:
    Liao, Leibo and Poggio, `How Important is Weight Symmetry in
    Backpropagation? <https://arxiv.org/abs/1510.05067>`_, 2016, sections 3, 5
  """

  use_running_average: bool | None = None
  axis: int = -1
  alpha: float = 0.05
  epsilon: float = 1e-4
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  use_bias: bool = False
  use_scale: bool = False
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  axis_name: str | None = None
  axis_index_groups: Any = None

  def __post_init__(self) -> None:
    _check_options(self.alpha, self.epsilon)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None
  ) -> jax.Array:
    """Normalizes a mini-batch x."""
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    shape = (_num_features(x, self.axis),)
    arrays, statistics, dtype = {}, {}, self.param_dtype
    if self.use_scale:
      arrays['scale'] = self.param('scale', self.scale_init, shape, dtype)
    if self.use_bias:
      arrays['bias'] = self.param('bias', self.bias_init, shape, dtype)
    if use_running_average or self.is_mutable_collection('batch_stats'):
      for name, value in _initial_statistics(shape).items():
        variable = self.variable('batch_stats', name, lambda v=value: v)
        statistics[name], arrays[name] = variable, variable.value
    axis_name = None if self.is_initializing() else self.axis_name
    y, updated = _batch_norm(self, x, arrays, use_running_average, axis_name)
    if not self.is_initializing():
      for name, value in updated.items():
        statistics[name].value = value
    return y


class NNXBatchNorm(nnx.Module):
  """Batch normalization with averages of standard deviations (NNX).

  Equations, options and errors are those of :class:`BatchNorm`. The averages
  are the :class:`flax.nnx.BatchStat` variables ``mean``, ``std`` and ``count``,
  which every call in training mode updates. ``model.train()``,
  ``model.eval()`` and :func:`flax.nnx.view` select the mode.

  Args:
    num_features: The size of x on ``axis``.
    use_running_average: True to evaluate, False to train; the argument of the
      call takes precedence.
    rngs: The stream ``params`` initializes scale and bias.
  """

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int = -1,
    alpha: float = 0.05,
    epsilon: float = 1e-4,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = False,
    use_scale: bool = False,
    bias_init: Initializer = nn.initializers.zeros,
    scale_init: Initializer = nn.initializers.ones,
    axis_name: str | None = None,
    axis_index_groups: Any = None,
    rngs: nnx.Rngs | None = None,
  ):
    _check_options(alpha, epsilon)
    shape = (num_features,)

    def parameter(is_used: bool, init: Initializer) -> nnx.Param | None:
      if not is_used:
        return nnx.data(None)
      if rngs is None:
        raise ValueError(
          'rngs is None, but use_scale and use_bias draw initial values from '
          'its stream params: pass rngs=nnx.Rngs(seed)'
        )
      return nnx.Param(init(rngs.params(), shape, param_dtype))

    self.scale = parameter(use_scale, scale_init)
    self.bias = parameter(use_bias, bias_init)
    statistics = _initial_statistics(shape).values()
    self.mean, self.std, self.count = map(nnx.BatchStat, statistics)
    self.num_features, self.axis = num_features, axis
    self.use_running_average = use_running_average
    self.alpha, self.epsilon = alpha, epsilon
    self.dtype, self.param_dtype = dtype, param_dtype
    self.use_bias, self.use_scale = use_bias, use_scale
    self.axis_name, self.axis_index_groups = axis_name, axis_index_groups

  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None
  ) -> jax.Array:
    """Normalizes a mini-batch x."""
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise ValueError(
        'use_running_average is None: pass True or False to NNXBatchNorm or to '
        'its call, or select the mode with model.train() or model.eval()'
      )
    names = (*_INITIAL, 'scale', 'bias')
    variables = {name: getattr(self, name) for name in names}
    arrays = {k: v[...] for k, v in variables.items() if v is not None}
    average, axis_name = use_running_average, self.axis_name
    y, updated = _batch_norm(self, x, arrays, average, axis_name)
    for name, value in updated.items():
      variables[name][...] = value
    return y

  def set_view(self, use_running_average: bool | None = None) -> None:
    """Selects the mode for :func:`flax.nnx.view`.

    Args:
      use_running_average: True to evaluate, False to train.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


def calibrate(
  model: nn.Module,
  variables: Mapping[str, Any],
  batches: Iterable[Any],
  num_batches: int = 20,
  *,
  rngs: Any = None,
  **apply_kwargs: Any,
) -> dict[str, Any]:
  """Computes new statistics for testing from training mini-batches.

  Restarts the averages of :class:`BatchNorm` layers and runs the model forward
  on 20 mini-batches (section 5 of the paper): the result depends on the current
  weights and these mini-batches only. Compiles once for mini-batches of one
  shape. Works under vmap over ``variables``, and for a model with an
  ``axis_name`` inside the pmap or shard_map that binds it.

  Args:
    model: A Linen model with hashable fields (tuples, not lists or arrays).
    variables: Its variables, ``batch_stats`` included.
    batches: Mini-batches of inputs: an array each, or a tuple or list of the
      model's positional arguments. Leaves that are no arrays are static.
    num_batches: The number of mini-batches to take and average.
    rngs: Keys for ``model.apply``, folded with the number of the mini-batch.
    **apply_kwargs: For ``model.apply``, e.g. ``train=True``.

  Returns:
    ``variables`` with new ``batch_stats``; the rest is the same.

  Raises:
    ValueError: ``batch_stats`` is missing or holds statistics of other layers,
      there are too few mini-batches, or a layer ran in evaluation mode.

  Examples:
    >>> from symjax_bp.batch_norm import BatchNorm, calibrate
    >>> batches = [jnp.array([[0.0], [8.0 * k]]) for k in range(20)]
    >>> layer = BatchNorm(use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), batches[0])
    >>> variables = calibrate(layer, variables, batches)
    >>> print(variables['batch_stats']['mean'].round(3))
    [44.705]
  """
  statistics = _restart(variables.get('batch_stats', {}))
  for index, inputs in enumerate(_take(batches, num_batches)):
    variables = {**variables, 'batch_stats': statistics}
    arrays, rebuilt = separate((inputs, apply_kwargs))
    statistics = _observe(model, variables, rngs, index, arrays, rebuilt)
  _check_observed(statistics)
  return {**variables, 'batch_stats': statistics}


def calibrate_nnx(
  model: nnx.Module, batches: Iterable[Any], num_batches: int = 20
) -> None:
  """Computes new statistics for testing, in place: :func:`calibrate` for NNX.

  Runs a copy of the model after ``train()``. In the model itself only the
  statistics of its :class:`NNXBatchNorm` layers change.

  Args:
    model: An NNX model; an error leaves it unchanged.
    batches, num_batches: As for :func:`calibrate`, as are the errors.
  """
  trained = nnx.clone(model)
  trained.train()
  statistics = nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat))
  nnx.update(trained, _restart(statistics))
  for inputs in _take(batches, num_batches):
    _observe_nnx(trained, *separate(inputs))
  statistics = nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat))
  _check_observed(statistics)
  nnx.update(model, statistics)


@functools.partial(jax.jit, static_argnames=('model', 'rebuilt'))
def _observe(model, variables, rngs, index, arrays, rebuilt):
  """Runs one mini-batch forward and returns the new batch_stats."""
  inputs, kwargs = rebuilt(arrays)
  rngs = jax.tree.map(lambda key: jax.random.fold_in(key, index), rngs)
  _, updated = model.apply(
    variables, *inputs, **kwargs, rngs=rngs, mutable=['batch_stats']
  )
  return updated['batch_stats']


@functools.partial(nnx.jit, static_argnames='rebuilt')
def _observe_nnx(model, arrays, rebuilt):
  """Runs one mini-batch forward, which updates the model's statistics."""
  model(*rebuilt(arrays))


def _take(batches: Iterable[Any], num_batches: int) -> Iterator[tuple]:
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


def _restart(statistics: Any) -> Any:
  """Returns the tree with every statistic as before the first mini-batch."""

  def restart(path, value):
    name = path_of(path[-1:])
    if name not in _INITIAL:
      raise ValueError(
        f'batch_stats holds {path_of(path)}, but calibrate can restart only '
        'the averages of the layers of symjax_bp.batch_norm'
      )
    return jnp.full_like(value, _INITIAL[name])

  if not jax.tree.leaves(statistics):
    raise ValueError(
      'the model has no batch_stats: it needs a BatchNorm layer of '
      'symjax_bp.batch_norm, and for Linen the batch_stats of model.init'
    )
  return jax.tree.map_with_path(restart, statistics)


def _check_observed(statistics: Any) -> None:
  """Raises if a layer averaged nothing; under jit the counts are unknown."""
  for path, value in jax.tree.leaves_with_path(statistics):
    is_known = path_of(path[-1:]) == 'count' and not isinstance(value, Tracer)
    if is_known and not value.all():
      raise ValueError(
        f'{path_of(path)} is 0: this layer did not run in training mode; for '
        'Linen pass what selects it, e.g. train=True'
      )


def _check_options(alpha: float, epsilon: float) -> None:
  if not (0.0 < alpha <= 1.0 and epsilon > 0.0):
    raise ValueError(
      f'alpha is {alpha} and epsilon is {epsilon}, but alpha must be in (0, 1] '
      "(1 - momentum of Flax's layers) and epsilon above 0"
    )


def _num_features(x: Any, axis: int) -> int:
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


def _initial_statistics(shape: tuple[int, ...]) -> dict[str, jax.Array]:
  shapes = {'mean': shape, 'std': shape, 'count': ()}
  return {name: jnp.full(shapes[name], _INITIAL[name]) for name in _INITIAL}


def _batch_norm(
  layer: Any, x: Any, arrays: dict, use_averages: bool, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The layer as a function; returns y and the statistics that change."""
  x = jnp.asarray(x)
  features = _num_features(x, layer.axis)
  if 'mean' in arrays and arrays['mean'].shape != (features,):
    raise ValueError(
      f'x has {features} features (shape {x.shape}, axis {layer.axis}), but '
      f"the layer's statistics are of {arrays['mean'].size}"
    )
  dtype = layer.dtype
  if dtype is None:
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
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
    y, mean, std = _normalize(x, axes, layer.epsilon, axis_name, groups)
    if 'count' in arrays:
      updated = _average(arrays, {'mean': mean, 'std': std}, layer.alpha)
  if 'scale' in arrays:
    y = y * expanded('scale')
  if 'bias' in arrays:
    y = y + expanded('bias')
  return y.astype(dtype), updated


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _normalize(x, axes, epsilon, axis_name, groups):
  """Returns x normalized over `axes` and devices, its mean and its std."""
  # Values relative to one example make rounding relative to the spread of a
  # feature instead of its size, and exactly 0 if the feature is constant.
  origin = x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))]
  mean = origin + jnp.mean(x - jnp.expand_dims(origin, axes), axes)
  mean = _across_devices(mean, axis_name, groups)
  centered = x - jnp.expand_dims(mean, axes)
  variance = jnp.mean(jnp.square(centered), axes)
  std = jnp.sqrt(_across_devices(variance, axis_name, groups) + epsilon)
  return centered * jnp.expand_dims(1 / std, axes), mean, std


@_normalize.defjvp
def _normalize_jvp(axes, epsilon, axis_name, groups, primal, dx):
  """The derivative in closed form; JAX's own reads x twice as often."""
  y, mean, std = _normalize(*primal, axes, epsilon, axis_name, groups)
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
