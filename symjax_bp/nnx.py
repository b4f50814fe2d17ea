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
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax

from symjax_bp import metrics, primitives
from symjax_bp.feedback import FeedbackRule, symmetric
from symjax_bp.matching import Patterns, check_rule, rule_table
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

# The attribute of each layer that holds its operation, and what may be there.
_OPERATIONS = {
  nnx.Linear: ('dot_general', lax.dot_general),
  nnx.LinearGeneral: ('dot_general', lax.dot_general),
  nnx.Conv: ('conv_general_dilated', lax.conv_general_dilated),
}
_LAYERS = tuple(_OPERATIONS)
_NO_RNGS = (
  '{rule!r} draws random feedback: pass rngs=nnx.Rngs(...), for instance '
  'nnx.Rngs(feedback=0).'
)


class Feedback(nnx.Variable):
  """A rule's random draw, or the key of the next one; not a parameter."""


class _Operation(nnx.Module):
  """Stands in a layer for ``jax.lax``'s operation and knows the layer's V."""

  def __init__(self, name: str, rule: FeedbackRule, kernel, key, mask):
    self.name = name
    self.rule = rule
    self.mask = nnx.data(mask)
    self.key: Any = nnx.data(None)
    self.kernel: Any = nnx.data(None)
    if rule.redraws:
      self.key = Feedback(key)
    elif rule.draws:
      self.kernel = Feedback(rule.draw(key, kernel))

  def feedback_weights(self, W: jax.Array) -> jax.Array:
    draw = None
    if self.rule.redraws:
      draw = self.rule.draw(self.key[...], W)
    elif self.rule.draws:
      draw = self.kernel[...]
    V = self.rule.weights(W, draw)
    return V if self.mask is None else V * self.mask.astype(V.dtype)

  def __call__(self, x, W, *args, **kwargs) -> jax.Array:
    primitive = getattr(primitives, self.name)
    return primitive(x, W, self.feedback_weights(W), *args, **kwargs)


def _operation_of(layer: nnx.Module) -> tuple[str, Any, Any]:
  """Name and value of a layer's operation, and Flax's own value."""
  name, default = next(
    entry for kind, entry in _OPERATIONS.items() if isinstance(layer, kind)
  )
  own = getattr(layer, 'dot_general_cls', None)
  return name, own or getattr(layer, name), default


def _attach(layer: Any, rule: FeedbackRule, key, path: str = '') -> None:
  """Replaces the operation of a layer."""
  name, operation, default = _operation_of(layer)
  if not (
    operation is None
    or operation is default
    or isinstance(operation, _Operation)
  ):
    raise ValueError(
      f'layer {path!r} has an operation of its own ({name} or {name}_cls), '
      f'which {rule!r} would replace: exclude the layer.'
    )
  kernel = layer.kernel[...]
  mask = getattr(layer, 'mask', None)
  setattr(layer, name, nnx.data(_Operation(name, rule, kernel, key, mask)))


def _key(rule: FeedbackRule, rngs: nnx.Rngs | None) -> jax.Array | None:
  """A key from the stream ``feedback``, or beside the others.

  Without a stream of that name the key is folded out of the default one
  without advancing it, so that what is drawn later stays as it was.
  """
  if not rule.draws:
    return None
  if rngs is None:
    raise ValueError(_NO_RNGS.format(rule=rule))
  if 'feedback' in rngs:
    return rngs['feedback']()
  stream: Any = rngs['params']
  key = jax.random.fold_in(stream.key[...], stream.count[...])
  return _fold(key, 'feedback')


def _fold(key: jax.Array, path: str) -> jax.Array:
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


class Linear(nnx.Linear):
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

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    feedback: FeedbackRule,
    rngs: nnx.Rngs,
    **kwargs,
  ):
    check_rule('feedback', feedback)
    super().__init__(in_features, out_features, rngs=rngs, **kwargs)
    _attach(self, feedback, _key(feedback, rngs))


class LinearGeneral(nnx.LinearGeneral):
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

  def __init__(
    self,
    in_features: int | Sequence[int],
    out_features: int | Sequence[int],
    *,
    feedback: FeedbackRule,
    rngs: nnx.Rngs,
    **kwargs,
  ):
    check_rule('feedback', feedback)
    super().__init__(in_features, out_features, rngs=rngs, **kwargs)
    _attach(self, feedback, _key(feedback, rngs))


class Conv(nnx.Conv):
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

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    *,
    feedback: FeedbackRule,
    rngs: nnx.Rngs,
    **kwargs,
  ):
    check_rule('feedback', feedback)
    super().__init__(
      in_features, out_features, kernel_size, rngs=rngs, **kwargs
    )
    _attach(self, feedback, _key(feedback, rngs))


def _modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
  """All modules but our own operations, with their paths."""
  for path, module in list(nnx.iter_modules(model)):
    if not isinstance(module, _Operation):
      yield '/'.join(map(str, path)), module


def _other_weights(path: str, module: nnx.Module) -> Iterator[tuple[str, Any]]:
  """A module's own parameters of two or more axes, with their paths."""
  for name, value in vars(module).items():
    if isinstance(value, nnx.Param) and value[...].ndim >= 2:
      yield f'{path}/{name}'.lstrip('/'), value


def with_feedback(
  model: Model,
  rule: FeedbackRule | Mapping[str, FeedbackRule],
  *,
  rngs: nnx.Rngs | None = None,
  exclude: str | Sequence[str] = (),
) -> Model:
  """Returns an asymmetric copy of an NNX model.

  Every ``Linear``, ``LinearGeneral`` and ``Conv`` in the copy, however deep,
  uses the rule; a layer that has a rule already gets the new one.

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
    rngs: key streams; needed by rules that draw.
    exclude: one or more regular expressions for the paths of layers, and of
      other parameters, to leave as they are.

  Raises:
    TypeError: if ``rule`` is no rule or mapping to rules.
    ValueError: if a rule draws and there is no ``rngs``, a layer matches no
      expression, an expression matches no layer, or the model has weights that
      can't be made asymmetric.
  """
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f'model must be an nnx.Module, not {type(model).__name__}; for a '
      'flax.linen.Module use symjax_bp.linen.with_feedback.'
    )
  patterns = Patterns.create(rule, exclude)
  return _with_patterns(model, patterns, rngs, strict=True)


def _with_patterns(
  model: Model, patterns: Patterns, rngs: nnx.Rngs | None, strict: bool
) -> Model:
  copy = nnx.clone(model)
  base = None
  seen = []
  for path, module in _modules(copy):
    if not isinstance(module, _LAYERS):
      for parameter, value in _other_weights(path, module) if strict else ():
        seen.append(parameter)
        if not patterns.excluded(parameter):
          raise ValueError(
            f'{type(module).__name__} has weights that can not be made '
            f'asymmetric: {parameter!r} of shape {value.shape}. Only Linear, '
            'LinearGeneral and Conv (and what is built of them) can. To train '
            f'it by plain backpropagation, exclude={parameter!r}.'
          )
      continue
    seen.append(path)
    if patterns.excluded(path):
      continue
    rule = patterns.rule(path)
    if rule.draws and base is None:
      base = _key(rule, rngs)
    _attach(module, rule, None if base is None else _fold(base, path), path)
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
  patterns = Patterns.create(symmetric(), ())
  return _with_patterns(model, patterns, None, strict=False)


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
  """
  for path, module in _modules(model):
    if isinstance(module, _LAYERS):
      operation = _operation_of(module)[1]
      if isinstance(operation, _Operation) and operation.rule.redraws:
        operation.key[...] = _fold(key, path)


def feedback_weights(model: nnx.Module) -> dict[str, jax.Array]:
  """V of every layer that uses a rule, as the next backward pass sees it.

  >>> import symjax_bp
  >>> layer = Linear(1, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> print(layer.kernel[...] > 0, feedback_weights(layer)[''])
  [[ True False]] [[ 1. -1.]]

  Returns:
    {path of the layer: V}, in the dtype of the layer's parameters.
  """
  weights = {}
  for path, module in _modules(model):
    if isinstance(module, _LAYERS):
      operation = _operation_of(module)[1]
      if isinstance(operation, _Operation):
        weights[path] = operation.feedback_weights(module.kernel[...])
  return weights


def layer_rules(
  model: nnx.Module,
) -> dict[str, tuple[tuple[int, ...], FeedbackRule | None]]:
  """Shape and rule of all weights, or None for plain backpropagation.

  Returns:
    ``{path: (kernel shape, rule)}`` for the layers and for every other
    parameter of two or more axes.
  """
  rows = {}
  for path, module in _modules(model):
    if isinstance(module, _LAYERS):
      rule = getattr(_operation_of(module)[1], 'rule', None)
      rows[path] = (module.kernel.shape, rule)
    else:
      for parameter, value in _other_weights(path, module):
        rows[parameter] = (value.shape, None)
  return rows


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
    return {
      path: module.kernel[...]
      for path, module in _modules(gradient)
      if isinstance(module, _LAYERS)
    }

  dW, true_dW = gradients(model), gradients(plain_twin(model))
  modules = dict(_modules(model))
  return {
    path: metrics.alignment(
      modules[path].kernel[...], V, dW[path], true_dW[path]
    )
    for path, V in feedback_weights(model).items()
  }
