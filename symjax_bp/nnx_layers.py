"""Flax NNX's layers: where each holds its operation, and what it does with it.

Linen has one place to step into a layer's product for all of them; in NNX each
kind of layer has an attribute for it, and a subclass may go around it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.interpreters import partial_eval

# The attribute of each layer that holds its operation, and what may be there.
_OPERATIONS = {
  nnx.Linear: ('dot_general', lax.dot_general),
  nnx.LinearGeneral: ('dot_general', lax.dot_general),
  nnx.Conv: ('conv_general_dilated', lax.conv_general_dilated),
}
LAYERS = tuple(_OPERATIONS)


def _kind(layer: Any) -> type:
  """The class of Flax that a layer is of."""
  return next(kind for kind in LAYERS if isinstance(layer, kind))


def operation_of(layer: Any) -> tuple[str, Any, Any]:
  """Name and value of a layer's operation, and Flax's own value."""
  name, default = _OPERATIONS[_kind(layer)]
  own = getattr(layer, 'dot_general_cls', None)
  return name, own or getattr(layer, name), default


def geometry(layer: Any) -> tuple[int, tuple[int, ...]]:
  """Rank of a kernel that is not stacked, and a shape of inputs for it."""
  if isinstance(layer, nnx.LinearGeneral):
    contracted = zip(layer.axis, layer.in_features, strict=True)
    sizes = {**dict(layer.batch_axis), **dict(contracted)}
    shape = [1] * (1 + max(len(sizes), *map(abs, sizes)))
    for axis, size in sizes.items():
      shape[axis] = size
    return len(sizes) + len(layer.out_features), tuple(shape)
  window = getattr(layer, 'kernel_size', ())
  # Wide enough for a subclass that pools.
  return 2 + len(window), (1, *(64 for _ in window), layer.in_features)


def check_call(layer: Any, path: str) -> None:
  """Raises unless the kernel of a subclass acts by the operation alone.

  To see that, the layer is traced with an operation that forgets its kernel.
  """
  kind = _kind(layer)
  if type(layer).__call__ is kind.__call__:
    return
  name, _, default = operation_of(layer)
  rank, shape = geometry(layer)
  called = []

  def forget(x, W, *args, **kwargs):
    called.append(True)
    y = jax.eval_shape(lambda x, W: default(x, W, *args, **kwargs), x, W)
    return jnp.zeros(y.shape, y.dtype)

  def call(kernel, rest, x):
    return jax.tree.leaves(nnx.merge(graph, kernel, rest)(x))

  def one_layer(array):
    return jax.ShapeDtypeStruct(array.shape[kernel.ndim - rank :], array.dtype)

  layer = nnx.clone(layer)
  setattr(layer, name, nnx.static(forget))
  kernel = layer.kernel[...]
  graph, *state = nnx.split(layer, lambda _, value: value is layer.kernel, ...)
  x = jax.ShapeDtypeStruct(shape, kernel.dtype)
  try:
    jaxpr = jax.make_jaxpr(call)(*jax.tree.map(one_layer, state), x).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if called and not used[0]:
      return
    reason = 'takes its kernel elsewhere than to super().__call__(x)'
  except Exception as error:
    reason = f'can not be tried on one array ({type(error).__name__}: {error})'
  raise ValueError(
    f'layer {path!r} can not be made asymmetric: its {type(layer).__name__}.'
    f'__call__ {reason}. Call super().__call__(x), or hold {kind.__name__} in '
    'a module of your own in place of deriving from it. To train it by plain '
    f'backpropagation, exclude={path!r}.'
  )
