"""How a Linen layer comes by its V: one layer, one call, one rule.

Flax's layers ask a field (``dot_general_cls``, ``conv_general_dilated_cls``)
for the operation that they apply. For the time of a call the field holds an
``Injection``, which answers with the primitive and the V of this layer.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import LazyRng

from symjax_bp import primitives
from symjax_bp.feedback import FeedbackRule

# The field of each layer that Flax asks for its operation, and ours.
_OPERATIONS = {
  nn.Dense: ('dot_general', primitives.dot_general),
  nn.DenseGeneral: ('dot_general', primitives.dot_general),
  nn.Conv: ('conv_general_dilated', primitives.conv_general_dilated),
}
LAYERS = tuple(_OPERATIONS)

# Classes that have been seen to ask. (A call of nn.jit's need not: it may have
# been traced before.)
_ASKING: weakref.WeakSet[type] = weakref.WeakSet()

_INSTEAD: contextvars.ContextVar[FeedbackRule | None] = contextvars.ContextVar(
  'instead', default=None
)
_RECORDINGS = itertools.count(1)
_RECORDING: contextvars.ContextVar[tuple[int, dict[str, FeedbackRule]]] = (
  contextvars.ContextVar('recording')
)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, FeedbackRule]]:
  """Notes {module path: rule in use} of every layer traced meanwhile."""
  rules: dict[str, FeedbackRule] = {}
  token = _RECORDING.set((next(_RECORDINGS), rules))
  try:
    yield rules
  finally:
    _RECORDING.reset(token)


def recording_number() -> int:
  """A number of its own for every recording; 0 where there is none."""
  return _RECORDING.get((0, {}))[0]


def _path(module: Any) -> str:
  return '/'.join(module.path)


def _key(module: Any, rule: FeedbackRule) -> jax.Array:
  """The layer's own key: by its path alone, not by how often it is called."""
  rngs = module.scope.rngs
  if 'feedback' in rngs:
    return LazyRng.create(rngs['feedback']).as_jax_rng()
  if module.is_initializing() and 'params' in rngs:
    return LazyRng.create(rngs['params'], 'feedback').as_jax_rng()
  raise ValueError(
    f'{rule!r} of layer {_path(module)!r} draws from the key stream '
    "'feedback', which is missing: pass rngs={'feedback': key} to apply, with "
    'the number of the update folded into the key. Inside nn.scan, nn.vmap or '
    "nn.RNN add split_rngs={'feedback': True} (False for one V at all steps). "
    'To evaluate without keys, apply plain_twin(model).'
  )


def _stored_draw(module: Any, rule: FeedbackRule, kernel) -> jax.Array:
  if not (
    module.has_variable('feedback', 'kernel')
    or module.is_mutable_collection('feedback')
  ):
    raise ValueError(
      f'{rule!r} of layer {_path(module)!r} keeps its random draw in the '
      "collection 'feedback', which is missing: pass the 'feedback' that init "
      "returned to apply along with 'params', or make one with "
      "apply(..., rngs={'feedback': key}, mutable=['feedback']). Inside "
      "nn.scan or nn.vmap add variable_axes={'feedback': 0} and "
      "split_rngs={'feedback': True}; where 'params' is broadcast (nn.RNN), "
      "add 'feedback' to variable_broadcast."
    )
  draw: Any = module.variable(
    'feedback', 'kernel', lambda: rule.draw(_key(module, rule), kernel)
  ).value
  if draw.shape != kernel.shape:
    raise ValueError(
      f"variables['feedback'] of layer {_path(module)!r} must have the shape "
      f'of its kernel, {kernel.shape}, not {draw.shape}.'
    )
  return draw


def _feedback_weights(module, rule: FeedbackRule, W) -> jax.Array:
  """V for the kernel that the layer is about to use."""
  draw = None
  if rule.draws:
    # Flax hands over W in the compute dtype; draws have that of the parameters.
    kernel = jax.ShapeDtypeStruct(W.shape, module.param_dtype)
    if rule.redraws:
      draw = rule.draw(_key(module, rule), kernel)
    else:
      draw = _stored_draw(module, rule, kernel)
  V = rule.weights(W, draw)
  mask = getattr(module, 'mask', None)
  if mask is not None:
    V = V * mask.astype(V.dtype)
  _RECORDING.get((0, {}))[1][_path(module)] = rule
  if not module.is_initializing():
    module.sow(
      'feedback_weights',
      'kernel',
      V,
      init_fn=lambda: None,
      reduce_fn=lambda _, V: V,
    )
  return V


@contextlib.contextmanager
def instead(rule: FeedbackRule) -> Iterator[None]:
  """Makes layers that get a rule meanwhile use this one."""
  token = _INSTEAD.set(rule)
  try:
    yield
  finally:
    _INSTEAD.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class Injection:
  """What Flax calls, in place of an operation's class, for the operation.

  Attributes:
    module: the layer.
    rule: its rule.
    primitive: the operation with V.
    classes: of the layer, and of what Flax's transforms make of it.
  """

  module: Any
  rule: FeedbackRule
  primitive: Callable[..., jax.Array]
  classes: tuple[type, ...]

  def __call__(self) -> Callable[..., jax.Array]:
    """Returns the operation, of the signature of ``jax.lax``."""
    _ASKING.update(self.classes)

    def operation(x, W, *args, **kwargs):
      V = _feedback_weights(self.module, self.rule, W)
      return self.primitive(x, W, V, *args, **kwargs)

    return operation


@contextlib.contextmanager
def injected(module: Any, rule: FeedbackRule) -> Iterator[None]:
  """Makes a layer use a rule for the time of one call.

  A rule that is there already stays: the outermost ``with_feedback`` wins.

  Raises:
    ValueError: if the layer has an operation of its own, or asks for none.
  """
  base, (name, primitive) = next(
    each for each in _OPERATIONS.items() if isinstance(module, each[0])
  )
  field = f'{name}_cls'
  before = getattr(module, field)
  classes = (type(module),)
  if isinstance(before, Injection):
    rule, classes = before.rule, (*before.classes, *classes)
  elif before is not None or getattr(module, name) is not None:
    raise ValueError(
      f'layer {_path(module)!r} has an operation of its own ({name} or '
      f'{field}), which {rule!r} would replace: exclude the layer.'
    )
  else:
    rule = _INSTEAD.get() or rule
  injection = Injection(module, rule, primitive, classes)
  object.__setattr__(module, field, injection)
  try:
    yield
  finally:
    object.__setattr__(module, field, before)
  if type(module) not in _ASKING:
    raise ValueError(
      f'layer {_path(module)!r}, a {type(module).__name__}, does not use its '
      f'kernel as {base.__name__} does, so {rule!r} can not reach it: call '
      f'super().__call__, or exclude={_path(module)!r} to train it by plain '
      'backpropagation.'
    )
