"""A Linen model whose calls are followed, layer by layer.

``WithFeedback`` is a module around a model that is not its child: on its very
scope, so that variables and keys are the model's own. It follows every call of
a layer, gives it its rule, and refuses what can't have one.
"""

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from symjax_bp.feedback import FeedbackRule
from symjax_bp.injection import LAYERS, injected, instead, recording_number
from symjax_bp.matching import Patterns, by_path, joined


@dataclasses.dataclass(frozen=True)
class Detached:
  """Hides a model from Flax, which would make it a child with a name."""

  model: nn.Module


class WithFeedback(nn.Module):
  """A Linen model whose layers use feedback weights; see ``with_feedback``.

  Attributes:
    detached: holds the model, as it was.
    patterns: which rule for which module path, and what to leave alone; None
      leaves the model's layers as they are.
    instead: the rule of all layers in the model that have one.
  """

  detached: Detached
  patterns: Patterns | None = None
  instead: FeedbackRule | None = None

  @property
  def model(self) -> nn.Module:
    """The model, as it was given."""
    return self.detached.model

  def __call__(self, *args, **kwargs):
    """Calls the model."""
    return self._call('__call__', *args, **kwargs)

  def __getattr__(self, name: str):
    """Other methods of the model, for ``apply(..., method='encode')``."""
    detached = self.__dict__.get('detached')
    method = getattr(type(detached.model), name, None) if detached else None
    if name.startswith('_') or not isinstance(method, types.FunctionType):
      return super().__getattr__(name)

    def call(self, *args, **kwargs):
      return self._call(name, *args, **kwargs)

    return types.MethodType(call, self)

  @nn.nowrap
  def _call_wrapped_method(self, fun, args, kwargs):
    """Flax's own way to methods, ones that come as functions too."""
    name = getattr(fun, '__name__', '')
    own, models = (
      getattr(getattr(type(module), name, None), '__wrapped__', None) is fun
      for module in (self, self.model)
    )
    if models and not own:
      return self._call(name, *args, **kwargs)
    return super()._call_wrapped_method(fun, args, kwargs)

  def _call(self, method: str, *args, **kwargs):
    unbound: Any = self.scope
    scope = unbound.rewound()
    # nn.jit keeps traces by the flags of a scope, among other things: without
    # this one a model traced before, in plain form, would stay plain.
    above = scope.flags.get('feedback', ())
    here = (self.patterns, self.instead, recording_number())
    scope.flags = FrozenDict({**scope.flags, 'feedback': (*above, here)})
    model = self.model.copy(parent=scope)
    if self.patterns is None:
      with nn.intercept_methods(self._replace):
        return getattr(model, method)(*args, **kwargs)
    following = _Following(self.patterns, len(self.path))
    with nn.intercept_methods(following):
      result = getattr(model, method)(*args, **kwargs)
    parameters = by_path(_parameters(scope))
    self.patterns.check_used(
      following.seen.union(module for module, _ in parameters),
      # A method may not have come to all of them, nor nn.jit traced anew.
      (
        joined(module, name)
        for module, name in parameters
        if module not in following.asymmetric
      ),
    )
    return result

  @nn.nowrap
  def _replace(self, next_fun, args, kwargs, context):
    if self.instead is None or not _is_layer(context):
      return next_fun(*args, **kwargs)
    with instead(self.instead):
      return next_fun(*args, **kwargs)


class _Following:
  """Gives every layer its rule, in one call of a model.

  Attributes:
    seen: paths of layers, and of other weights.
    asymmetric: paths of layers that have got a rule.
  """

  def __init__(self, patterns: Patterns, depth: int):
    self.seen: set[str] = set()
    self.asymmetric: set[str] = set()
    self._patterns = patterns
    self._depth = depth

  def __call__(self, next_fun, args, kwargs, context):
    """What Flax calls in place of a method."""
    path = '/'.join(context.module.path[self._depth :])
    if _is_layer(context):
      self.seen.add(path)
      if self._patterns.excluded(path):
        return next_fun(*args, **kwargs)
      self.asymmetric.add(path)
      with injected(context.module, self._patterns.rule(path)):
        result = next_fun(*args, **kwargs)
    else:
      result = next_fun(*args, **kwargs)
    self._refuse_weights(path, context)
    return result

  def _refuse_weights(self, path: str, context: Any) -> None:
    """Raises if a module has weights that are no known layer's kernel."""
    module = context.module
    if isinstance(module, WithFeedback):
      return  # What is in it has been met on its own.
    if isinstance(module, nn.Embed) and context.method_name != 'attend':
      return  # A look-up has no input gradient: nothing to be made asymmetric.
    for name, value in _own_weights(module).items():
      if path in self.asymmetric and name in ('kernel', 'bias'):
        continue
      parameter = joined(path, name)
      self.seen.add(parameter)
      if not self._patterns.excluded(parameter):
        raise ValueError(
          f'{type(module).__name__} has weights that can not be made '
          f'asymmetric: {parameter!r} of shape {value.shape}. Only Dense, '
          'DenseGeneral and Conv (and what is built of them) can. To train it '
          f'by plain backpropagation, exclude={parameter!r}.'
        )


def _is_layer(context: Any) -> bool:
  return isinstance(context.module, LAYERS) and (
    context.method_name == '__call__'
  )


def _parameters(scope: Any) -> Mapping[str, Any]:
  return scope.variables().get('params', {})


def _own_weights(module: Any) -> dict[str, Any]:
  """Parameters of two or more axes that are not those of a submodule."""
  scope, parameters = module.scope, _parameters(module.scope)
  # Flax's bridge to NNX puts what the module in it has.
  if not any(c.__module__.startswith('flax.nnx') for c in type(module).mro()):
    parameters = {
      name: value
      for name, value in parameters.items()
      if 'params' in scope.reservations.get(name, ())
    }
  return {
    joined(inside, part): leaf
    for name, value in parameters.items()
    for (inside, part), leaf in by_path({name: value}).items()
    if jnp.ndim(leaf) >= 2
  }


def refuse_shared(model: nn.Module) -> None:
  """Raises if a model uses a module that is another one's too.

  Inside of a wrapper it would be copied, with parameters of its own.
  """
  for name, part in _parts(model):
    above: Any = part.parent
    if not isinstance(above, nn.Module) or part.scope is None:
      continue
    kept = any(value is part for value in vars(above).values())
    if kept or any(part.scope.variables().values()):
      raise ValueError(
        f'model.{name} is {part.name!r} of {type(above).__name__}, which '
        f'{type(model).__name__} shares; with_feedback would copy it. Wrap '
        f'{type(above).__name__} as a whole, with rules by path.'
      )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
  """Modules in the fields of a model, and theirs."""
  for field in dataclasses.fields(model):
    if field.name in ('parent', 'name'):
      continue
    values = jax.tree.leaves(
      getattr(model, field.name), is_leaf=lambda x: isinstance(x, nn.Module)
    )
    for value in values:
      if isinstance(value, nn.Module):
        yield field.name, value
        yield from ((f'{field.name}.{name}', x) for name, x in _parts(value))
