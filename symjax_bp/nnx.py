"""Flax NNX: asymmetric layers, and existing models made asymmetric.

``Linear``, ``LinearGeneral`` and ``Conv`` are Flax's own with one more
argument, ``feedback``; ``with_feedback(model, rule)`` copies an existing model
and gives every layer in the copy a rule. What rules draw is held in variables
of type ``Feedback``, which are no ``nnx.Param``: ``nnx.grad``,
``nnx.Optimizer(..., wrt=nnx.Param)`` and parameter counts leave them alone;
``nnx.split``, ``nnx.state`` and checkpoints carry them.

A draw that is made anew for every update (brSF) changes when the training step
says so, and then once in all layers: call ``redraw(model, key)`` next to
``optimizer.update``, with the number of the update folded into the key.
Evaluation and gradient accumulation therefore do not change V.

Layers may be stacked along leading axes, as ``nnx.vmap`` does for ``nnx.scan``:
each has a V of its own.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from symjax_bp import metrics, primitives
from symjax_bp.feedback import FeedbackRule, symmetric
from symjax_bp.matching import Patterns, check_rule, joined, rule_table
from symjax_bp.nnx_layers import LAYERS, check_call, geometry, operation_of
from symjax_bp.normalization import NNXBatchNorm as BatchNorm

__all__ = [
  'BatchNorm',
  'Conv',
  'Feedback',
  'Linear',
  'LinearGeneral',
  'feedback_table',
  'feedback_weights',
  'layer_alignment',
  'layer_rules',
  'plain_twin',
  'redraw',
  'with_feedback',
]

Model = TypeVar('Model', bound=nnx.Module)

# Their parameters have an axis more where layers are stacked.
_ELEMENTWISE = (
  nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm,
  BatchNorm,
)  # fmt: skip
_NO_RNGS = (
  '{rule!r} draws random feedback: pass rngs=nnx.Rngs(...), for instance '
  'nnx.Rngs(feedback=0).'
)


class Feedback(nnx.Variable):
  """A rule's random draw, or the key of the next one; not a parameter."""


class _Operation(nnx.Module):
  """Stands in a layer for ``jax.lax``'s operation and knows the layer's V."""

  def __init__(self, layer: Any, rule: FeedbackRule, key: Any):
    kernel = layer.kernel[...]
    self.name, _, _ = operation_of(layer)
    self.rule = rule
    self.rank, _ = geometry(layer)
    # Flax hands W over in the dtype of the computation; draws don't follow it.
    self.dtype = kernel.dtype
    self.mask = nnx.data(getattr(layer, 'mask', None))
    self.key: Any = nnx.data(None)
    self.kernel: Any = nnx.data(None)
    if rule.redraws:
      self.key = Feedback(_split(key, kernel.shape[: kernel.ndim - self.rank]))
    elif rule.draws:
      self.kernel = Feedback(rule.draw(key, kernel))

  def feedback_weights(self, W: jax.Array) -> jax.Array:
    """V for the kernel of the layer, or for several that are stacked."""
    stack = W.shape[: W.ndim - self.rank]

    def stacked(array, shape):  # What is not is shared by the layers.
      return None if array is None else jnp.broadcast_to(array[...], shape)

    weights = self._weights
    for _ in stack:
      weights = jax.vmap(weights)
    return weights(
      W,
      stacked(self.key, stack),
      stacked(self.kernel, W.shape),
      stacked(self.mask, W.shape),
    )

  def _weights(self, W, key, draw, mask) -> jax.Array:
    if key is not None:
      draw = self.rule.draw(key, jax.ShapeDtypeStruct(W.shape, self.dtype))
    V = self.rule.weights(W, draw)
    return V if mask is None else V * mask.astype(V.dtype)

  def __call__(self, x, W, *args, **kwargs) -> jax.Array:
    primitive = getattr(primitives, self.name)
    return primitive(x, W, self.feedback_weights(W), *args, **kwargs)


def _attach(layer: Any, rule: FeedbackRule, key, path: str = '') -> None:
  """Replaces the operation of a layer."""
  name, operation, default = operation_of(layer)
  if not (
    operation is None
    or operation is default
    or isinstance(operation, _Operation)
  ):
    raise ValueError(
      f'layer {path!r} has an operation of its own ({name} or {name}_cls), '
      f'which {rule!r} would replace: exclude the layer.'
    )
  setattr(layer, name, nnx.data(_Operation(layer, rule, key)))


def _key(rule: FeedbackRule, rngs: nnx.Rngs | None) -> jax.Array | None:
  """A key from the stream ``feedback``, or beside the others.

  Without a stream of that name the key is folded out of the default one
  without advancing it, so that what is drawn later stays as it was.
  """
  if not rule.draws:
    return None
  if rngs is not None and 'feedback' in rngs:
    return rngs['feedback']()
  stream: Any = getattr(rngs, 'params', None)
  if stream is None:
    raise ValueError(_NO_RNGS.format(rule=rule))
  key = jax.random.fold_in(stream.key[...], stream.count[...])
  return _fold(key, 'feedback')


def _fold(key: jax.Array, path: str) -> jax.Array:
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _split(key: Any, stack: tuple[int, ...]) -> jax.Array:
  """A key, or one for each of the layers that are stacked."""
  return jax.random.split(key, stack) if stack else key


class _Asymmetric(nnx.Module):
  """A layer of Flax with one more argument, ``feedback``."""

  def __init__(self, *args, feedback: FeedbackRule, rngs: nnx.Rngs, **kwargs):
    check_rule('feedback', feedback)
    init: Any = super().__init__
    init(*args, rngs=rngs, **kwargs)
    _attach(self, feedback, _key(feedback, rngs))


class Linear(_Asymmetric, nnx.Linear):
  """``flax.nnx.Linear`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Linear(3, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> x = jnp.ones((1, 3))
  >>> print(jax.grad(lambda x: layer(x).sum())(x))
  [[ 0. -2.  0.]]
  >>> print(jnp.sign(layer.kernel[...]).sum(1))  # = dx
  [ 0. -2.  0.]

  Args:
    in_features: number of input features.
    out_features: number of output features.
    feedback: the rule.
    rngs: key streams; a draw comes from ``feedback`` where that is named.
    **kwargs: as for ``flax.nnx.Linear``.
  """


class LinearGeneral(_Asymmetric, nnx.LinearGeneral):
  """``flax.nnx.LinearGeneral`` with feedback weights.

  >>> import symjax_bp
  >>> layer = LinearGeneral(
  ...   (3, 4),
  ...   (5, 2),
  ...   axis=(-2, -1),
  ...   feedback=symjax_bp.rndf(),
  ...   rngs=nnx.Rngs(0),
  ... )
  >>> layer.dot_general.kernel.shape
  (3, 4, 5, 2)

  Args:
    in_features: number of input features, one or several.
    out_features: number of output features, one or several.
    feedback: the rule.
    rngs: key streams; a draw comes from ``feedback`` where that is named.
    **kwargs: as for ``flax.nnx.LinearGeneral``.
  """


class Conv(_Asymmetric, nnx.Conv):
  """``flax.nnx.Conv`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Conv(
  ...   1, 1, (2,), padding='VALID', feedback=symjax_bp.usf(), rngs=nnx.Rngs(0)
  ... )
  >>> print(jnp.sign(layer.kernel[...]).ravel())
  [ 1. -1.]
  >>> print(jax.grad(lambda x: layer(x).sum())(jnp.ones((1, 4, 1))).ravel())
  [ 1.  0.  0. -1.]

  Args:
    in_features: number of input features.
    out_features: number of output features.
    kernel_size: one number or one for each spatial axis.
    feedback: the rule.
    rngs: key streams; a draw comes from ``feedback`` where that is named.
    **kwargs: as for ``flax.nnx.Conv``.
  """


def _layers(model: nnx.Module) -> Iterator[tuple[str, Any]]:
  """All layers that can be asymmetric, with their paths."""
  for path, module in list(nnx.iter_modules(model)):
    if isinstance(module, LAYERS):
      yield '/'.join(map(str, path)), module


def _operations(model: nnx.Module) -> Iterator[tuple[str, Any, _Operation]]:
  """All layers that have a rule: path, layer, operation."""
  for path, layer in _layers(model):
    operation = operation_of(layer)[1]
    if isinstance(operation, _Operation):
      yield path, layer, operation


def _weights(model: nnx.Module) -> Iterator[tuple[str, tuple[int, ...], Any]]:
  """Path and shape of all weights: of layers, with these, and of the others.

  The others are all parameters of two or more axes, wherever they are, but for
  those of normalisations, and Linen modules that have none yet.
  """
  known = {
    id(getattr(module, name, None))
    for kinds, names in (
      (LAYERS, ('kernel', 'bias')),
      (_ELEMENTWISE, ('scale', 'bias')),
    )
    for _, module in nnx.iter_modules(model)
    if isinstance(module, kinds)
    for name in names
  }
  for parts, node in list(nnx.iter_graph(model)):
    path = '/'.join(map(str, parts))
    if isinstance(node, LAYERS):
      yield path, node.kernel.shape, node
    elif isinstance(node, nnx.Param) and id(node) not in known:
      for key, leaf in jax.tree.leaves_with_path(node.get_value()):
        name = jax.tree_util.keystr(key, simple=True, separator='/')
        shape = getattr(leaf, 'shape', ())
        if len(shape) >= 2:
          yield joined(path, name), shape, None
    elif isinstance(node, nnx.bridge.ToNNX) and not jax.tree.leaves(
      nnx.state(node, nnx.Not(nnx.RngState))
    ):
      yield path, (), None


def with_feedback(
  model: Model,
  rule: FeedbackRule | Mapping[str, FeedbackRule],
  *,
  rngs: nnx.Rngs | None = None,
  exclude: str | Sequence[str] = (),
) -> Model:
  """Returns an asymmetric copy of an NNX model.

  Every ``Linear``, ``LinearGeneral`` and ``Conv`` in the copy, however deep,
  uses the rule; a layer that has a rule already gets the new one. A subclass
  with a ``__call__`` of its own is tried on one array: its kernel may reach the
  output by ``super().__call__`` alone.

  What a layer draws follows from its path and shape and from one key for all:
  the next one of the stream ``feedback``. If ``rngs`` has no such stream, from
  the key and the count of ``params``, which does not advance: two calls then
  draw alike.

  >>> import symjax_bp
  >>> mlp = nnx.Sequential(
  ...   nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
  ...   nnx.relu,
  ...   nnx.Linear(3, 2, rngs=nnx.Rngs(1)),
  ... )
  >>> model = with_feedback(
  ...   mlp,
  ...   {'layers/0': symjax_bp.usf(), 'layers/2': symjax_bp.rndf()},
  ...   rngs=nnx.Rngs(feedback=2),
  ... )
  >>> print(feedback_table(model))
  layer     shape   feedback
  layers/0  (4, 3)  usf()
  layers/2  (3, 2)  rndf()
  >>> print(feedback_table(mlp))
  layer     shape   feedback
  layers/0  (4, 3)  plain backpropagation
  layers/2  (3, 2)  plain backpropagation

  Args:
    model: the model; it is not changed.
    rule: a rule for all layers, or a mapping {regular expression: rule}. An
      expression is searched for in a layer's path, such as ``'layers/0'``
      (``^`` and ``$`` anchor it); the first that is found wins.
    rngs: key streams such as ``nnx.Rngs(feedback=0)``; needed by rules that
      draw.
    exclude: one or more regular expressions for the paths of layers, and of
      other parameters, to leave as they are.

  Raises:
    TypeError: if ``rule`` is no rule or mapping to rules, or ``rngs`` no
      ``nnx.Rngs``.
    ValueError: if a rule draws and there is no ``rngs``, a layer matches no
      expression, an expression matches no layer, or the model has weights that
      can't be made asymmetric.
  """
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f'model must be an nnx.Module, not {type(model).__name__}; for a '
      'flax.linen.Module use symjax_bp.linen.with_feedback.'
    )
  if not (rngs is None or isinstance(rngs, nnx.Rngs)):
    raise TypeError(
      'rngs must be an nnx.Rngs, for instance nnx.Rngs(feedback=0), or None, '
      f'not {rngs!r}.'
    )
  patterns = Patterns.create(rule, exclude)
  copy = nnx.clone(model)
  base = None
  seen = []
  for path, shape, layer in list(_weights(copy)):
    seen.append(path)
    if patterns.excluded(path):
      continue
    if layer is None:
      what = f'of shape {shape}' if shape else '(its lazy_init comes first)'
      raise ValueError(
        'the model has weights that can not be made asymmetric: '
        f'{path!r} {what}. Only Linear, LinearGeneral and Conv (and what is '
        'built of them) can. To train it by plain backpropagation, '
        f'exclude={path!r}.'
      )
    each = patterns.rule(path)
    check_call(layer, path)
    if each.draws and base is None:
      base = _key(each, rngs)
    _attach(layer, each, None if base is None else _fold(base, path), path)
  patterns.check_used(seen)
  return copy


def plain_twin(model: Model) -> Model:
  """A copy of a model that is trained by plain backpropagation.

  >>> import symjax_bp
  >>> layer = Linear(3, 2, feedback=symjax_bp.rndf(), rngs=nnx.Rngs(0))
  >>> print(feedback_table(plain_twin(layer)))
  layer  shape   feedback
         (3, 2)  symmetric()

  Args:
    model: any NNX model, asymmetric in whole, in part or not at all.
  """
  copy = nnx.clone(model)
  for path, layer, _ in _operations(copy):
    _attach(layer, symmetric(), None, path)
  return copy


def redraw(model: nnx.Module, key: jax.Array) -> None:
  """Draws M and S_p anew in all layers that redraw; call it once an update.

  The same key gives the same V: fold the number of the update into it. Works
  inside ``nnx.jit``; not inside the function that ``nnx.grad`` differentiates.

  >>> import jax, symjax_bp
  >>> layer = Linear(1, 3, feedback=symjax_bp.brsf(), rngs=nnx.Rngs(0))
  >>> for step in range(2):
  ...   redraw(layer, jax.random.fold_in(jax.random.key(0), step))
  ...   V = feedback_weights(layer)['']
  ...   print((10 * abs(V)).round())
  [[7. 2. 6.]]
  [[4. 8. 9.]]

  Args:
    model: the model; its layers' keys are replaced in place.
    key: a PRNG key; each layer folds its path into it.

  Raises:
    TypeError: if ``key`` is no key.
  """
  dtype = getattr(key, 'dtype', object)
  if dtype == jnp.uint32:
    key = jax.random.wrap_key_data(key)
  elif not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise TypeError(f'key must be a jax.random.key(...), not {key!r}.')
  for path, _, operation in _operations(model):
    if operation.rule.redraws:
      stack = operation.key[...].shape
      operation.key[...] = _split(_fold(key, path), stack)


def feedback_weights(model: nnx.Module) -> dict[str, jax.Array]:
  """V of every layer that uses a rule, as the next backward pass sees it.

  >>> import symjax_bp
  >>> layer = Linear(1, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> print(layer.kernel[...] > 0, feedback_weights(layer)[''])
  [[ True False]] [[ 1. -1.]]

  Returns:
    {path of the layer: V}, in the dtype of the layer's parameters.
  """
  return {
    path: operation.feedback_weights(layer.kernel[...])
    for path, layer, operation in _operations(model)
  }


def layer_rules(
  model: nnx.Module,
) -> dict[str, tuple[tuple[int, ...], FeedbackRule | None]]:
  """Shape and rule of all weights, or None for plain backpropagation.

  Returns:
    ``{path: (kernel shape, rule)}`` for the layers and for every other
    parameter of two or more axes.
  """
  rules = {path: operation.rule for path, _, operation in _operations(model)}
  return {path: (shape, rules.get(path)) for path, shape, _ in _weights(model)}


def feedback_table(model: nnx.Module) -> str:
  """Which layer uses which rule, as text: is it really not backpropagation?"""
  return rule_table(layer_rules(model))


def layer_alignment(
  model: nnx.Module, loss: Callable[[Any], jax.Array], *args, **kwargs
) -> dict[str, metrics.Alignment]:
  """How well feedback and updates of each layer agree with backpropagation.

  Works under ``nnx.jit``; the model is not changed.

  >>> import jax.numpy as jnp, symjax_bp
  >>> layer = Linear(3, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> row = layer_alignment(layer, jnp.sum, jnp.ones((1, 3)))['']
  >>> print(row.concordance, row.gradient_angle)
  1.0 0.0

  Args:
    model: an asymmetric model.
    loss: the scalar loss as a function of the model's output.
    *args: arguments to call the model with.
    **kwargs: further arguments to call the model with.

  Returns:
    {path: ``metrics.Alignment``} of every layer that uses a rule, all computed
    from the V that was used.
  """

  def gradients(model: nnx.Module) -> dict[str, jax.Array]:
    def evaluate(model):
      return loss(model(*args, **kwargs))

    # A copy, whose batch statistics and keys the call may change.
    gradient = nnx.grad(evaluate)(nnx.clone(model))
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    gradient = nnx.merge(graph, gradient, rest)
    return {path: layer.kernel[...] for path, layer in _layers(gradient)}

  dW, true_dW = gradients(model), gradients(plain_twin(model))
  layers = dict(_layers(model))
  return {
    path: metrics.alignment(
      layers[path].kernel[...], V, dW[path], true_dW[path]
    )
    for path, V in feedback_weights(model).items()
  }
