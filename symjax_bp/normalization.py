r"""Batch normalisation by the paper: Linen, NNX and the statistics of testing.

A mini-batch is normalised with its own mean and standard deviation, without
learnable parameters unless asked. For testing, exponential moving averages of
these means and *standard deviations* are kept; :func:`calibrate` makes them
anew from 20 training mini-batches, as the paper does after each epoch.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.core import Tracer

from symjax_bp.batch_statistics import (
  INITIAL,
  batch_norm,
  check_options,
  initial_statistics,
  num_features,
)
from symjax_bp.matching import has_arrays


class BatchNorm(nn.Module):
  r"""Batch normalisation with averages of standard deviations (Linen).

  Over every axis but ``axis``, with the mini-batch's mean :math:`\mu` and
  variance :math:`v` (of the population, not of a sample):

  .. math::
    y = (x - \mu) / \sigma, \qquad \sigma = \sqrt{v + \epsilon}

  and with ``use_running_average`` the same with the averages kept in the
  collection ``batch_stats``. Where that collection is mutable, the k-th
  mini-batch moves them, :math:`x_k` being :math:`\mu` or :math:`\sigma`:

  .. math::
    a_k = a_{k-1} + w_k\,(x_k - a_{k-1}), \qquad
    w_k = \alpha / (1 - (1 - \alpha)^k)

  which is the exponential moving average corrected for its start: the first
  mini-batch counts in full and nothing remains of the initial value. Where the
  collection is immutable a training step stays pure, and needs no
  ``batch_stats`` at all; :func:`calibrate` then makes them for testing.
  During initialisation nothing is averaged.

  A feature that is constant over the mini-batch, as every feature of a single
  example without spatial axes is, becomes 0. Before the first mini-batch the
  averages are 0 and 1, so that evaluation returns its input.

  Attributes:
    use_running_average: Whether to normalise with the averages (evaluation) or
      with the mini-batch's statistics (training); here or in the call.
    axis: The axis of the features.
    alpha: :math:`\alpha` in (0, 1].
    epsilon: :math:`\epsilon > 0`, in units of the variance.
    dtype: The dtype of the result (default: the input's, or float32 for an
      input of integers). Statistics are computed in float32 or better and kept
      in float32.
    param_dtype: The dtype of scale and bias.
    use_bias: Whether to add a learnable bias to y.
    use_scale: Whether to multiply y by a learnable scale.
    bias_init: Initializer of the bias.
    scale_init: Initializer of the scale.
    axis_name: Name of the axis of a pmap, shard_map or vmap over which
      mini-batches are split: statistics are those of the whole mini-batch.
      First the means are averaged over that axis, then the squares of what is
      left of x after subtracting their average. A jit over sharded arrays
      needs no axis name. Without a name each device averages its own
      statistics.
    axis_index_groups: Groups of indices of that axis which share statistics,
      see :func:`jax.lax.pmean`.

  Raises:
    ValueError: ``alpha``, ``epsilon`` or ``axis`` out of range, or an input
      that is complex, empty or of another number of features.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from symjax_bp.normalization import BatchNorm
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    >>> layer = BatchNorm()
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> jax.tree.map(jnp.shape, variables)
    {'batch_stats': {'count': (), 'mean': (2,), 'std': (2,)}}
    >>> y, variables = layer.apply(
    ...   variables, x, use_running_average=False, mutable='batch_stats'
    ... )
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
    check_options(self.alpha, self.epsilon)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None
  ) -> jax.Array:
    """Normalises a mini-batch.

    Args:
      x: Floats or integers, (batch, spatial axes..., features) in any order
        that ``axis`` describes.
      use_running_average: See the attribute; exactly one of them is given.

    Returns:
      An array of x's shape.
    """
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    shape = (num_features(x, self.axis),)
    scale = bias = None
    if self.use_scale:
      scale = self.param('scale', self.scale_init, shape, self.param_dtype)
    if self.use_bias:
      bias = self.param('bias', self.bias_init, shape, self.param_dtype)
    variables = {}
    if use_running_average or self.is_mutable_collection('batch_stats'):
      variables = {
        name: self.variable('batch_stats', name, lambda v=value: v)
        for name, value in initial_statistics(shape).items()
      }
    y, statistics = batch_norm(
      self,
      x,
      {name: variable.value for name, variable in variables.items()},
      scale,
      bias,
      use_running_average,
      None if self.is_initializing() else self.axis_name,
    )
    if not self.is_initializing():
      for name, value in statistics.items():
        variables[name].value = value
    return y


class NNXBatchNorm(nnx.Module):
  """Batch normalisation with averages of standard deviations (NNX).

  :class:`BatchNorm` as a :class:`flax.nnx.Module`: the equations, the options
  and the errors are the same. The averages are the :class:`flax.nnx.BatchStat`
  variables ``mean``, ``std`` and ``count``, which every call in training mode
  moves; ``model.train()``, ``model.eval()`` and :func:`flax.nnx.view` choose
  the mode.

  Args:
    num_features: The number of features, the size of x on ``axis``.
    use_running_average: As in :class:`BatchNorm`; the call's argument takes
      precedence. The other options, too, are those of :class:`BatchNorm`.
    rngs: Needed with ``use_scale`` or ``use_bias`` only: the stream ``params``.

  Raises:
    ValueError: As :class:`BatchNorm`, or parameters are wanted without rngs.

  Examples:
    >>> import jax.numpy as jnp
    >>> from symjax_bp.normalization import NNXBatchNorm
    >>> layer = NNXBatchNorm(num_features=2)
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    >>> print(layer(x).round(3))
    [[-1.225  0.   ]
     [ 0.     0.   ]
     [ 1.225  0.   ]]
    >>> layer.eval()
    >>> print(layer(jnp.array([[7.0, 5.01]])).round(2))
    [[2.45 1.  ]]
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
    check_options(alpha, epsilon)
    if rngs is None and (use_scale or use_bias):
      raise ValueError(
        'rngs is None, but use_scale and use_bias draw their initial values '
        'from the stream params: pass rngs=nnx.Rngs(seed)'
      )
    shape = (num_features,)

    def parameter(wanted: bool, init: Initializer) -> nnx.Param | None:
      if not wanted or rngs is None:
        return nnx.data(None)
      return nnx.Param(init(rngs.params(), shape, param_dtype))

    initial = initial_statistics(shape)
    self.mean = nnx.BatchStat(initial['mean'])
    self.std = nnx.BatchStat(initial['std'])
    self.count = nnx.BatchStat(initial['count'])
    self.scale = parameter(use_scale, scale_init)
    self.bias = parameter(use_bias, bias_init)
    self.num_features = num_features
    self.use_running_average = use_running_average
    self.axis = axis
    self.alpha = alpha
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.axis_name = axis_name
    self.axis_index_groups = axis_index_groups

  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None
  ) -> jax.Array:
    """Normalises a mini-batch, see :meth:`BatchNorm.__call__`."""
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise ValueError(
        'use_running_average is None: pass True or False to NNXBatchNorm or to '
        'its call, or choose the mode by model.train() or model.eval()'
      )
    y, statistics = batch_norm(
      self,
      x,
      {name: getattr(self, name)[...] for name in INITIAL},
      None if self.scale is None else self.scale[...],
      None if self.bias is None else self.bias[...],
      use_running_average,
      self.axis_name,
    )
    for name, value in statistics.items():
      getattr(self, name)[...] = value
    return y

  def set_view(self, use_running_average: bool | None = None) -> None:
    """Sets the mode for :func:`flax.nnx.view`.

    Args:
      use_running_average: Whether to normalise with the averages.
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
  """Makes the statistics for testing anew, from training mini-batches.

  The collection ``batch_stats`` starts again from nothing and averages the
  first ``num_batches`` mini-batches, run forward in training mode, so that it
  depends on the present weights and on these mini-batches only. The forward
  pass is compiled once for all mini-batches of one shape and all later calls.
  Under vmap over ``variables`` it calibrates several sets of weights at once;
  a model with an ``axis_name`` is calibrated inside the pmap or shard_map that
  binds it.

  Args:
    model: A Linen model with :class:`BatchNorm` layers.
    variables: Its variables, ``batch_stats`` included.
    batches: Mini-batches of inputs: one array each, or a tuple or list of the
      model's positional arguments, of which those that are no arrays may
      steer the call. No more than ``num_batches`` are taken.
    num_batches: How many mini-batches to average.
    rngs: Keys for ``model.apply``; each mini-batch folds its number into them.
    **apply_kwargs: Passed on to ``model.apply``, above all what selects the
      training mode, e.g. ``train=True``.

  Returns:
    ``variables`` with other ``batch_stats``; the rest is the same.

  Raises:
    ValueError: There are no ``batch_stats`` or not only those of
      :class:`BatchNorm`, too few mini-batches, or a layer that averaged none
      of them because it ran in evaluation mode.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from symjax_bp.normalization import BatchNorm, calibrate
    >>> batches = [jnp.array([[0.0], [8.0 * k]]) for k in range(20)]
    >>> layer = BatchNorm()
    >>> variables = layer.init(
    ...   jax.random.key(0), batches[0], use_running_average=True
    ... )
    >>> variables = calibrate(
    ...   layer, variables, batches, use_running_average=False
    ... )
    >>> print(variables['batch_stats']['mean'].round(3))
    [44.705]

  References:
    Liao, Leibo and Poggio, `How Important is Weight Symmetry in
    Backpropagation? <https://arxiv.org/abs/1510.05067>`_, 2016, section 5
  """
  statistics = _restarted(variables.get('batch_stats', {}))
  try:
    hash(model)
  except TypeError as error:
    raise ValueError(
      f'model is a {type(model).__name__} with a field that is not hashable '
      f'({error}), so it can not be compiled: give it tuples instead of arrays '
      'and lists, or keep arrays in variables'
    ) from error
  for index, inputs in enumerate(_take(batches, num_batches)):
    statistics = _observe(
      model,
      {**variables, 'batch_stats': statistics},
      rngs,
      index,
      *_traced_and_static(dict(enumerate(inputs))),
      *_traced_and_static(apply_kwargs),
    )
  _check_observed(statistics)
  return {**variables, 'batch_stats': statistics}


def calibrate_nnx(
  model: nnx.Module, batches: Iterable[Any], num_batches: int = 20
) -> None:
  """Makes the statistics for testing anew, in place: :func:`calibrate` for NNX.

  Runs a copy of the model in training mode (``model.train()``): of the model
  itself only ``mean``, ``std`` and ``count`` of its :class:`NNXBatchNorm`
  layers change; its mode and random streams stay.

  Args:
    model: An NNX model with :class:`NNXBatchNorm` layers.
    batches: As for :func:`calibrate`.
    num_batches: As for :func:`calibrate`.

  Raises:
    ValueError: As :func:`calibrate`; the model is unchanged then.

  Examples:
    >>> import jax.numpy as jnp
    >>> from symjax_bp.normalization import NNXBatchNorm, calibrate_nnx
    >>> layer = NNXBatchNorm(num_features=1)
    >>> batches = [jnp.array([[0.0], [8.0 * k]]) for k in range(20)]
    >>> calibrate_nnx(layer, batches)
    >>> print(layer.mean[...].round(3), layer.std[...].round(3))
    [44.705] [44.705]
  """
  trained = nnx.clone(model)
  trained.train()
  statistics = nnx.state(trained, nnx.BatchStat)
  nnx.replace_by_pure_dict(statistics, _restarted(nnx.to_pure_dict(statistics)))
  nnx.update(trained, statistics)
  for inputs in _take(batches, num_batches):
    _observe_nnx(trained, *_traced_and_static(dict(enumerate(inputs))))
  statistics = nnx.state(trained, nnx.BatchStat)
  _check_observed(nnx.to_pure_dict(statistics))
  nnx.update(model, statistics)


@functools.partial(jax.jit, static_argnames=('model', 'static', 'static_named'))
def _observe(
  model, variables, rngs, index, inputs, static, named, static_named
):
  """Runs one mini-batch forward and returns the new batch_stats."""
  rngs = jax.tree.map(lambda key: jax.random.fold_in(key, index), rngs)
  _, updated = model.apply(
    variables,
    *_together(inputs, static),
    **named,
    **dict(static_named),
    rngs=rngs,
    mutable=['batch_stats'],
  )
  return updated['batch_stats']


@functools.partial(nnx.jit, static_argnames='static')
def _observe_nnx(model, inputs, static):
  """Runs one mini-batch forward, which moves the model's statistics."""
  model(*_together(inputs, static))


def _traced_and_static(arguments: Mapping) -> tuple[dict, tuple]:
  """Arguments that are arrays, and pairs of others, which may steer a call."""
  traced = {
    name: value for name, value in arguments.items() if has_arrays(value)
  }
  return traced, tuple(
    item for item in arguments.items() if item[0] not in traced
  )


def _together(inputs: dict[int, Any], static: tuple) -> list[Any]:
  """Positional arguments in their order."""
  return [value for _, value in sorted({**inputs, **dict(static)}.items())]


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


def _restarted(statistics: Any) -> Any:
  """Returns the tree with every statistic as before the first mini-batch."""

  def restart(path, value):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if name not in INITIAL:
      raise ValueError(
        f'batch_stats holds {_path(path)}, which is not a statistic of '
        'symjax_bp.normalization.BatchNorm: calibrate starts averages anew '
        'and does not know how for this one'
      )
    return jnp.full_like(value, INITIAL[name])

  if not jax.tree.leaves(statistics):
    raise ValueError(
      'the model has no batch_stats to calibrate: it needs a BatchNorm layer '
      'of symjax_bp.normalization, and for Linen the batch_stats of model.init'
    )
  return jax.tree_util.tree_map_with_path(restart, statistics)


def _check_observed(statistics: Any) -> None:
  """Raises if a layer averaged nothing, where that is known (not in a jit)."""
  for path, value in jax.tree_util.tree_leaves_with_path(statistics):
    is_count = jax.tree_util.keystr(path[-1:], simple=True) == 'count'
    if is_count and not isinstance(value, Tracer) and not value.all():
      raise ValueError(
        f'{_path(path)} is 0: this layer averaged no mini-batch, because it '
        'was not called or ran in evaluation mode; for Linen pass what selects '
        'the training mode, e.g. train=True or use_running_average=False'
      )


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
