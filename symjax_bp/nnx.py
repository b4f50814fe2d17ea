"""Flax NNX: models with feedback, and layers with a ``feedback`` argument.

``with_feedback(model, rules)`` is ``symjax_bp.with_feedback`` for an NNX model:
a copy with the class, attributes, parameters and outputs of the model. Every
module in the copy is asymmetric, whether it is called from outside or by
another. ``Linear``, ``LinearGeneral`` and ``Conv`` are Flax's own layers with a
rule each; the outermost ``with_feedback`` wins.

The states of the rules are variables of type ``Feedback``, in the attribute
``feedback`` of each module with weights. They are not ``nnx.Param``, and no
filter for kernels matches their paths: ``nnx.grad`` and
``nnx.Optimizer(..., nnx.Param)`` leave them alone; ``nnx.split``, ``nnx.state``
and checkpoints carry them. States that learn (Kolen-Pollack) are
``LearnedFeedback``: train ``nnx.Any(nnx.Param, LearnedFeedback)``. A filter for
a whole module, such as ``nnx.PathContains('layers')``, matches all its
variables, feedback too: combine it with ``nnx.Param``.

Methods are traced, as by ``jax.jit``: Python does not know the values of arrays
in them. ``Net.method(model, ...)`` calls a method untraced.

Weights are variables of type ``nnx.Param``; other variables are data. Arrays
that are attributes, such as masks, are constants. Weights that are taken out of
a model and used by hand (``x @ model.W[...]`` in your own function) are trained
by plain backpropagation: write a method.
"""

import copy
import copyreg
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.linen import initializers
from flax.typing import Dtype, Initializer

from symjax_bp import batch_norm, linen, metrics, transform
from symjax_bp.feedback import FeedbackRule
from symjax_bp.kinds import Kind, Level

__all__ = [
  'BatchNorm',
  'Conv',
  'Feedback',
  'LearnedFeedback',
  'Linear',
  'LinearGeneral',
  'calibrate',
  'feedback_table',
  'feedback_weights',
  'layer_alignment',
  'layer_rules',
  'redraw',
  'with_feedback',
  'without_feedback',
]

Model = TypeVar('Model', bound=nnx.Module)


# Under a name, nnx.bridge can carry it to and from Linen.
@nnx.register_variable_name('Feedback')
class Feedback(nnx.Variable):
  """The state of a rule for a weight; not a parameter."""


@nnx.register_variable_name('LearnedFeedback')
class LearnedFeedback(Feedback):
  """Feedback that learns, for an optimizer."""


class _Store(nnx.Pytree):
  """The rules of a module's weights, and what they keep.

  Attributes:
    rules: pairs of the name of a weight and its rule, None if it is excluded.

  ``Feedback`` variables are called by position and rule, such as '0:rndf()'.
  Weights that are tied share them.
  """

  def __init__(self, rules: Any, variables: Mapping[str, Feedback]):
    self.rules = tuple(rules)
    for name, variable in variables.items():
      setattr(self, name, variable)


@dataclasses.dataclass(frozen=True)
class _Inside:
  """What a module has while a call around it replaces its products.

  Attributes:
    stores: names and values of what was taken from it, because a scan or a vmap
      of stacked layers would map it, as if it had a layer axis.
  """

  stores: tuple[tuple[str, _Store], ...] = ()


# Static attributes of copies, so that JAX traces these and models separately:
# set in a method, whose products the outermost call replaces; and a path in a
# larger model, for tables.
_INSIDE, _PREFIX = '_pytree__feedback_inside', '_pytree__feedback_prefix'


# --- Asymmetric classes -----------------------------------------------------

# Containers of Flax compute nothing: parameters in them are their owner's.
_CONTAINERS = frozenset((*nnx.List.__mro__, *nnx.Dict.__mro__))
_ARITHMETIC = ('add', 'sub', 'mul', 'truediv', 'matmul')
_OPERATORS = (
  '__call__',
  '__getitem__',
  *(f'__{side}{name}__' for side in ('', 'r') for name in _ARITHMETIC),
)
_NO_METHODS = (
  type,
  property,
  classmethod,
  staticmethod,
  functools.cached_property,
)


class _AsymmetricMeta(type(nnx.Module)):
  """The class of classes that ``_asymmetric`` makes, which pickle by origin."""


def _is_made(cls: Any) -> bool:
  return '_plain_class' in vars(cls)


def _reduce(cls: Any) -> Any:
  if _is_made(cls):
    return _asymmetric, (cls._plain_class,)
  return cls.__qualname__


copyreg.pickle(_AsymmetricMeta, _reduce)


@functools.cache
def _asymmetric(plain: Any) -> Any:
  """A subclass whose methods use feedback; itself if it has none to change."""
  done = next((cls.__mro__ for cls in plain.__mro__ if _is_made(cls)), ())
  methods = {}
  for cls in reversed(plain.__mro__):
    if cls in _CONTAINERS or cls in done:
      continue
    for name, value in vars(cls).items():
      special = name.startswith('__') or name in dir(nnx.Module)
      if special and name not in _OPERATORS:
        continue
      if hasattr(value, '__get__') and not isinstance(value, _NO_METHODS):
        methods[name] = _interpreted(value)
  if not methods:
    return plain
  names = {
    '__module__': plain.__module__,
    '__qualname__': plain.__qualname__,
    '__doc__': plain.__doc__,
    '_plain_class': plain,
  }
  # Private: what the class statement's argument of that name was.
  options = {'pytree': plain._pytree__is_pytree}
  return _AsymmetricMeta(plain.__name__, (plain,), methods | names, **options)


def _interpreted(function: Any) -> Callable[..., Any]:
  @functools.wraps(function)
  def method(self, *args, **kwargs):
    return _call(self, function, args, kwargs)

  return method


# --- Calls ------------------------------------------------------------------


def _is_object(x: Any) -> bool:
  return isinstance(x, (nnx.Pytree, nnx.Variable))


def _objects(tree: Any) -> list[Any]:
  return [node for _, node in nnx.iter_graph(tree) if _is_object(node)]


def _asymmetric_modules(model: Any) -> list[tuple[str, Any]]:
  return [
    (_joined(*path), module)
    for path, module in nnx.iter_modules(model)
    if isinstance(type(module), _AsymmetricMeta)
  ]


def attached(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Rules of weights by path, None if excluded, and what they keep."""
  rules, states = {}, {}
  for path, node in nnx.iter_graph(model):
    if isinstance(node, _Store):
      named = [(_joined(*path[:-1], name), rule) for name, rule in node.rules]
      rules.update(named)
      for key, variable in vars(node).items():
        if isinstance(variable, Feedback):
          at, kept = key.split(':', 1)
          where = named[int(at)][0], *kept.split('/')
          states[where] = variable.get_value()
  states = nnx.traversals.unflatten_mapping(states)
  for path, each in states.items():
    if len(each) > 1:  # nnx.update adds what it does not find.
      raise transform.FeedbackError(
        f'{path!r} has feedback of {" and ".join(each)}: the state of a model '
        'with other rules was put into this one.'
      )
  return rules, states


def _known(rules: Mapping[str, FeedbackRule | None]) -> Any:
  """Rules by path, in the place of ``transform.Rules``."""
  return types.SimpleNamespace(resolve=lambda paths: rules)


class _Opened:
  """A model, and arguments of a call, as a function of their arrays.

  Attributes:
    nodes: the model, and the NNX objects among the arguments, by position.
    params: {path: array} of the model's parameters and of its attributes that
      are arrays.
    constants: the paths of the latter.
    others: all other state of the nodes, and the arrays among the arguments.
  """

  def __init__(self, model: Any, args: Any, kwargs: Any):
    parts, self._static = transform.separate(
      (model, args, kwargs),
      lambda x: _is_object(x) or isinstance(x, (jax.Array, np.ndarray)),
      is_leaf=_is_object,
    )
    self.nodes = {i: x for i, x in parts.items() if _is_object(x)}

    def is_parameter(path, x):
      return path[0] == 0 and (
        isinstance(x, nnx.Param) or not isinstance(x, nnx.Variable)
      )

    split = nnx.split(self.nodes, is_parameter, Feedback, ...)
    self._graph, params, self._feedback, rest = split
    found, self._params = jax.tree_util.tree_flatten_with_path(params)
    value = jax.tree_util.GetAttrKey('value')  # What a variable holds.
    self._paths, self.constants = [], []
    for keys, _ in found:
      path = transform.path_of([key for key in keys[1:] if key != value])
      self._paths.append(path)
      if value not in keys:
        self.constants.append(path)
    leaves = (x for _, x in found)
    self.params = transform.distinct(zip(self._paths, leaves, strict=True))
    arrays = {i: x for i, x in parts.items() if i not in self.nodes}
    self.others = rest, arrays

  def copy(self, params: Any, others: Any) -> tuple[Any, Any, Any, Any]:
    """Copies of the nodes; then model, arguments and keywords with these."""
    rest, arrays = others
    values = [params[path] for path in self._paths]
    state = jax.tree.unflatten(self._params, values)
    nodes = nnx.merge(self._graph, state, self._feedback, rest, copy=True)
    return nodes, *self._static({**nodes, **arrays})


def _stores(module: Any) -> tuple[tuple[str, Any], ...]:
  named = vars(module).items()
  return tuple((name, x) for name, x in named if isinstance(x, _Store))


def _content(x: Any) -> tuple[list[Any], Any]:
  """What a call may change in an object, as a flat tree."""
  if isinstance(x, nnx.Variable):
    inner = x.get_raw_value(), x.get_metadata()
  else:
    inner = {n: v for n, v in vars(x).items() if not n.startswith('_pytree__')}
  return jax.tree.flatten(inner, is_leaf=_is_object)


class _Changes:
  """What a call does to copies of objects, to be done to the originals."""

  def __init__(self, copies: Any, originals: Any):
    objects = map(_objects, (copies, originals))
    self._pairs = list(zip(*objects, strict=True))
    for x, original in self._pairs:
      if isinstance(x, nnx.Module) and _INSIDE in vars(x):
        stores = _stores(original)
        for name, _ in stores:
          delattr(x, name)
        object.__setattr__(x, _INSIDE, _Inside(stores))
    self._before = {id(x): _content(x) for x, _ in self._pairs}

  def find(self, model: Any, result: Any) -> dict[int, Any]:
    """Finds changes after the call; returns new arrays by their ids."""
    self._result = result
    met = {id(x): x for x, _ in self._pairs}
    met |= {id(x): x for x in _objects((model, result))}
    after = {i: _content(x) for i, x in met.items()}
    self._changed = {i for i in met if self._is_changed(i, after[i])}
    leaves = jax.tree.leaves(result, is_leaf=_is_object)
    leaves += [leaf for i in self._changed for leaf in after[i][0]]
    self._kept = {id(leaf) for content, _ in after.values() for leaf in content}
    self._instead = {
      id(old): new
      for i, (content, structure) in self._before.items()
      if structure == after[i][1]
      for old, new in zip(content, after[i][0], strict=True)
    }
    return {id(x): x for x in leaves if isinstance(x, jax.Array)}

  def _is_changed(self, i: int, after: tuple[list[Any], Any]) -> bool:
    if i not in self._before or self._before[i][1] != after[1]:
      return True
    pairs = zip(self._before[i][0], after[0], strict=True)
    return any(a is not b for a, b in pairs)

  def replaced(self, constants: Mapping[str, Any]) -> dict[str, Any]:
    """What the call has put in the places of constants, None if nothing."""
    return {
      path: self._instead.get(id(x))
      for path, x in constants.items()
      if transform.is_weight(path, x) and id(x) not in self._kept
    }

  def carry_out(self, arrays: dict[int, Any]) -> Any:
    """Changes the originals; returns the result of the call."""
    self._outside = arrays | {id(x): original for x, original in self._pairs}
    for x, original in self._pairs:
      if id(x) not in self._changed:
        continue
      if isinstance(x, nnx.Variable):
        value = self._take_out(x.get_raw_value())
        original.update_from_state(x.copy(value))
        continue
      kept = {*vars(x), *dict(_stores(original))}
      for name in set(vars(original)) - kept:
        delattr(original, name)
      is_data = vars(x)['_pytree__nodes']
      for name, value in vars(x).items():
        if not name.startswith('_pytree__'):
          value = self._take_out(value)
          value = nnx.data(value) if is_data.get(name) else value
          setattr(original, name, value)
    return self._take_out(self._result)

  def _take_out(self, tree: Any) -> Any:
    return jax.tree.map(self._outside_of, tree, is_leaf=_is_object)

  def _outside_of(self, x: Any) -> Any:
    """What an object or array of the call is outside of it."""
    outside = self._outside
    if id(x) in outside or not _is_object(x):
      return outside.get(id(x), x)
    if isinstance(x, nnx.Variable):
      outside[id(x)] = x.copy(self._take_out(x.get_raw_value()))
    else:  # Made by the call; it may refer to itself.
      outside[id(x)] = made = copy.copy(x)
      attributes = {n: self._take_out(v) for n, v in vars(x).items()}
      vars(made).update(attributes)
      for name, store in vars(made).pop(_INSIDE, _Inside()).stores:
        setattr(made, name, nnx.clone(store))
    return outside[id(x)]


def _bridge_to_linen() -> Any:
  """The module of Linen that makes and calls the current model, if any."""
  module = nnx.bridge.wrappers.current_linen_module()
  return module if isinstance(module, nnx.bridge.ToLinen) else None


def _call(model: Any, function: Any, args: Any, kwargs: Any) -> Any:
  """Calls a method of an asymmetric model."""
  bridge = _bridge_to_linen()
  if bridge and bridge.scope.flags.get('feedback'):
    # The bridge makes the model for one call, and a rule around it wins.
    _detach(model)
  rules, states = ({}, {}) if _INSIDE in vars(model) else attached(model)
  if not rules:
    return function.__get__(model, type(model))(*args, **kwargs)
  opened = _Opened(model, args, kwargs)
  rules |= dict.fromkeys(opened.constants)
  calls = []

  def traced(params, others):
    nodes, model, args, kwargs = opened.copy(params, others)
    for _, module in _asymmetric_modules(model):
      object.__setattr__(module, _INSIDE, _Inside())
    changes = _Changes(nodes, opened.nodes)
    y = function.__get__(model, type(model))(*args, **kwargs)
    is_stream = isinstance(y, types.GeneratorType)
    arrays = changes.find(nodes, list(y) if is_stream else y)
    calls[:] = [changes, is_stream]
    constants = {path: params[path] for path in opened.constants}
    return arrays, changes.replaced(constants)

  prefix, _ = vars(model).get(_PREFIX, ('', None))
  if bridge:
    prefix = linen.prefix_of(bridge) + prefix
  f = transform.FeedbackFunction(traced, _known(rules), prefix=prefix)
  call = transform.Call(f, opened.params, (opened.others,), {}).plan(states)
  for path, kind in call.result_kinds()[1].items():
    # Else it may be a state. nnx.jit returns what it was given.
    if not (isinstance(kind, Kind) and kind.level is Level.CONSTANT):
      raise ValueError(
        f'{path!r} counts as a constant, as arrays do that are attributes, '
        'but the call changes it: hold it in an nnx.Variable.'
      )
  arrays, _ = call.evaluate()
  changes, is_stream = calls
  y = changes.carry_out(arrays)
  return iter(y) if is_stream else y


# --- Attaching rules --------------------------------------------------------


def _key(rngs: nnx.Rngs | None) -> jax.Array | None:
  """A key from the stream ``feedback``, or beside the others.

  Without a stream of that name the key is folded out of the default one
  without advancing it, so that what is drawn later stays as it was.
  """
  if rngs is None:
    return None
  if 'feedback' in rngs:
    return rngs['feedback']()
  stream: Any = getattr(rngs, 'params', None)
  if stream is None:
    return None
  key = jax.random.fold_in(stream.key[...], stream.count[...])
  return transform.fold_path(key, 'feedback')


def _joined(*parts: Any) -> str:
  return '/'.join(str(part) for part in parts if part != '')


def _leaves(path: Sequence[Any], param: nnx.Param) -> Iterator[tuple[str, Any]]:
  """Paths and arrays of a parameter, which may be a tree of arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(param.get_value())
  for keys, leaf in leaves:
    yield _joined(*path, transform.path_of(keys)), leaf


def _parameters(model: nnx.Module) -> dict[str, Any]:
  """{path: array} of all parameters, each once."""
  return transform.distinct(
    leaf
    for path, node in nnx.iter_graph(model)
    if isinstance(node, nnx.Param)
    for leaf in _leaves(path, node)
  )


def _own_params(module: nnx.Module) -> Iterator[tuple[Any, nnx.Param]]:
  """Paths and parameters of a module, in containers too, but no submodules."""
  inner = [
    path
    for path, each in nnx.iter_modules(module)
    if path and isinstance(_asymmetric(type(each)), _AsymmetricMeta)
  ]
  for path, node in nnx.iter_graph(module):
    below = any(path[: len(each)] == each for each in inner)
    if isinstance(node, nnx.Param) and not below:
      yield path, node


def _attach(model: Any, rules: transform.Rules, key: jax.Array | None) -> None:
  """Gives the weights of a model their rules, in place."""
  first = {id(node): path for path, node in nnx.iter_graph(model)}
  known = rules.resolve(_parameters(model))
  made: dict[str, dict[str, Feedback]] = {}
  module: Any
  _detach(model)
  for _, module in list(nnx.iter_modules(model)):
    cls = _asymmetric(type(module))
    if not isinstance(cls, _AsymmetricMeta):
      continue
    object.__setattr__(module, '__class__', cls)
    found, variables = [], {}
    for path, param in _own_params(module):
      home = first[id(param)]
      named = zip(_leaves(path, param), _leaves(home, param), strict=True)
      for (name, W), (whole, _) in named:
        if not transform.is_weight(name, W) or whole not in known:
          continue
        rule = known[whole]
        if whole not in made:
          made[whole] = _variables(rule, key, whole, W)
        at = len(found)
        variables |= {f'{at}:{n}': kept for n, kept in made[whole].items()}
        found.append((name, rule))
    # In other attributes ToNNX looks for variables of Linen.
    is_linen = isinstance(module, nnx.bridge.ToNNX)
    attribute = 'to_nnx__feedback' if is_linen else 'feedback'
    if found:
      if hasattr(module, attribute):
        raise ValueError(
          f'{type(module).__name__} has an attribute called feedback, which '
          'is where its feedback goes: rename it.'
        )
      setattr(module, attribute, _Store(found, variables))


def _variables(rule: Any, key: Any, path: str, W: Any) -> dict[str, Feedback]:
  """What a rule keeps for a weight, by name."""
  if rule is None or not rule.keeps_state:
    return {}
  if key is None:
    raise ValueError(
      f'rngs must be given for {rule!r}, which keeps something: pass '
      'rngs=nnx.Rngs(...), for instance nnx.Rngs(feedback=0).'
    )
  state = {rule.state_name: rule.init(transform.fold_path(key, path), W)}
  variables = {}
  for keys, x in jax.tree_util.tree_leaves_with_path(state):
    name = transform.path_of(keys)
    kind = LearnedFeedback if transform.is_learned(name) else Feedback
    variables[name] = kind(x, ref=False)
  return variables


def _detach(model: Any) -> None:
  """Makes the modules of a model plain, in place."""
  module: Any
  for _, module in list(nnx.iter_modules(model)):
    if isinstance(type(module), _AsymmetricMeta):
      for name, _ in _stores(module):
        delattr(module, name)
      if _is_made(type(module)):
        object.__setattr__(module, '__class__', type(module)._plain_class)
    is_bridge = isinstance(module, nnx.bridge.ToNNX)
    if is_bridge and isinstance(module.to_nnx__module, linen.WithFeedback):
      module.to_nnx__module = module.to_nnx__module.detached.model


class _Layer:
  """A layer of Flax whose kernel has a rule."""

  def __init__(self, *args, feedback: FeedbackRule, rngs: nnx.Rngs, **kwargs):
    parent: Any = super()
    parent.__init__(*args, rngs=rngs, **kwargs)
    _attach(self, transform.Rules.create(feedback), _key(rngs))


class Linear(_Layer, _asymmetric(nnx.Linear)):
  """``flax.nnx.Linear`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Linear(3, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> print(jax.grad(lambda x: layer(x).sum())(jnp.ones((1, 3))))
  [[ 0. -2.  0.]]
  >>> print(jnp.sign(layer.kernel[...]).sum(1))  # = dx
  [ 0. -2.  0.]

  The arguments are those of ``flax.nnx.Linear`` and ``feedback``, the rule.
  Its state is drawn from the stream ``feedback`` of ``rngs`` if there is one.
  """


class LinearGeneral(_Layer, _asymmetric(nnx.LinearGeneral)):
  """``flax.nnx.LinearGeneral`` with feedback weights; see ``Linear``."""


class Conv(_Layer, _asymmetric(nnx.Conv)):
  """``flax.nnx.Conv`` with feedback weights; see ``Linear``."""


def with_feedback(
  model: Model,
  rules: FeedbackRule | Mapping[str, FeedbackRule],
  exclude: str | Sequence[str] = (),
  *,
  rngs: nnx.Rngs | None = None,
) -> Model:
  """``symjax_bp.with_feedback`` for NNX models: an asymmetric copy.

  The state of a rule follows from the path of its weight and from one key for
  all rules: the next key of the stream ``feedback``. Without such a stream in
  ``rngs`` it is the key and the count of ``params``, which does not advance:
  two calls then draw alike.

  >>> import symjax_bp
  >>> mlp = nnx.Sequential(
  ...   nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
  ...   nnx.relu,
  ...   nnx.Linear(3, 2, rngs=nnx.Rngs(1)),
  ... )
  >>> rules = {'layers/0': symjax_bp.usf(), 'layers/2': symjax_bp.rndf()}
  >>> model = with_feedback(mlp, rules, rngs=nnx.Rngs(feedback=2))
  >>> print(feedback_table(model, jax.numpy.ones((1, 4))))
  weight           shape   feedback  use
  layers/0/kernel  (4, 3)  usf()     product
  layers/2/kernel  (3, 2)  rndf()    product
  2 of 2 weights with feedback: 18 of 18 parameters

  Args:
    model: the model; it is not changed.
    rules: see ``symjax_bp.with_feedback``.
    exclude: see there.
    rngs: key streams such as ``nnx.Rngs(feedback=0)``; a rule with a state
      raises a ValueError without them.
  """
  if not isinstance(model, nnx.Module):
    raise TypeError(f'model must be an nnx.Module, not {type(model).__name__}.')
  if not (rngs is None or isinstance(rngs, nnx.Rngs)):
    raise TypeError(
      'rngs must be an nnx.Rngs, for instance nnx.Rngs(feedback=0), or None, '
      f'not {rngs!r}.'
    )
  checked = transform.Rules.create(rules, exclude)
  keeps = any(rule.keeps_state for _, rule in checked.pairs)
  twin = nnx.clone(model)
  _attach(twin, checked, _key(rngs) if keeps else None)
  return twin


def without_feedback(model: Model) -> Model:
  """Returns a copy of a model that plain backpropagation trains."""
  twin = nnx.clone(model)
  _detach(twin)
  return twin


def redraw(model: nnx.Module, key: jax.Array) -> None:
  """``symjax_bp.redraw`` for an NNX model, whose feedback it replaces.

  From then on V changes at each ``redraw``, and no longer with W.

  >>> import jax, symjax_bp
  >>> layer = Linear(1, 3, feedback=symjax_bp.brsf(), rngs=nnx.Rngs(0))
  >>> for step in range(2):
  ...   redraw(layer, jax.random.key(step))
  ...   print((10 * abs(feedback_weights(layer)['kernel'])).round())
  [[ 4.  1. 10.]]
  [[8. 5. 8.]]
  """
  nodes = {
    _joined(*path): node
    for path, node in nnx.iter_graph(model)
    if isinstance(node, Feedback)
  }
  old = {path: node.get_value() for path, node in nodes.items()}
  for path, value in transform.redraw(old, key).items():
    nodes[path].set_value(value)


def feedback_weights(
  model: nnx.Module, *args, **kwargs
) -> dict[str, jax.Array]:
  """Returns V of each weight with feedback, by its path, in its dtype.

  Without those of a Linen model in it that has rules of its own, for which
  there is ``symjax_bp.linen.feedback_weights``.

  >>> import symjax_bp
  >>> layer = Linear(1, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> print(layer.kernel[...] > 0, feedback_weights(layer)['kernel'])
  [[ True False]] [[ 1. -1.]]

  Args:
    model: an asymmetric model.
    args, kwargs: optional arguments to call the model with: they make V
      exact for rules that depend on the product (NuSF).
  """
  rows = layer_rules(model, *args, **kwargs) if args or kwargs else None
  rules, states = attached(model)
  f = transform.FeedbackFunction(lambda params: None, _known(rules))
  return f.weights_by_path(_parameters(model), states, rows)


def _copy_with_paths(opened: _Opened, params: Any, others: Any) -> Any:
  """Copies of a model and arguments; its modules know their paths."""
  _, model, args, kwargs = opened.copy(params, others)
  for path, module in _asymmetric_modules(model):
    # Unlike all others, for what JAX traced before is not seen again.
    prefix = f'{path}/' if path else '', object()
    object.__setattr__(module, _PREFIX, prefix)
  for path, module in nnx.iter_modules(model):
    if isinstance(module, nnx.bridge.ToNNX):
      inner = linen.at_path(module.to_nnx__module, _joined(*path))
      module.to_nnx__module = inner
  return model, args, kwargs


def layer_rules(model: nnx.Module, *args, **kwargs) -> list[transform.Row]:
  """Returns how each weight of a model is used.

  Args:
    model: any NNX model.
    args, kwargs: optional arguments to call it with: rows then come in the
      order of use, and say what the use is. Without them, rows have the rules
      that match, and an embedding or a scale may be among them.

  Returns:
    A row for each parameter that is not a bias or scale.
  """
  parameters = _parameters(model)
  if not (args or kwargs):
    rules, _ = attached(model)
    rows = [
      transform.Row(path, parameters[path].shape, rule, '')
      for path, rule in rules.items()
      if rule is not None and path in parameters
    ]
    return transform.with_others(rows, parameters)
  opened = _Opened(model, args, kwargs)

  def call(*state):
    model, args, kwargs = _copy_with_paths(opened, *state)
    model(*args, **kwargs)

  with transform.recorded() as rows:
    jax.eval_shape(call, opened.params, opened.others)
  rows = [row for row in rows if row.rule or row.path in parameters]
  return transform.with_others(rows, parameters)


def feedback_table(model: nnx.Module, *args, **kwargs) -> str:
  """Returns ``layer_rules`` as text."""
  return transform.format_table(layer_rules(model, *args, **kwargs))


def layer_alignment(
  model: nnx.Module, loss: Callable[[Any], jax.Array], *args, **kwargs
) -> dict[str, metrics.Alignment]:
  """``symjax_bp.metrics.layer_alignment`` for an NNX model; does not change it.

  >>> import jax.numpy as jnp, symjax_bp
  >>> layer = Linear(3, 2, feedback=symjax_bp.usf(), rngs=nnx.Rngs(0))
  >>> row = layer_alignment(layer, jnp.sum, jnp.ones((1, 3)))['kernel']
  >>> print(row.concordance, row.update_angle)
  1.0 0.0

  Args:
    model: an asymmetric model.
    loss: the scalar loss as a function of the model's output.
    args, kwargs: arguments to call the model with.
  """
  opened = _Opened(model, args, kwargs)

  def evaluate(weights):
    params = opened.params | weights
    model, args, kwargs = _copy_with_paths(opened, params, opened.others)
    return loss(model(*args, **kwargs))

  weights = {
    p: W for p, W in opened.params.items() if transform.is_weight(p, W)
  }
  return metrics.layer_alignment(evaluate, weights)


class BatchNorm(nnx.Module):
  """Batch normalization with averages of standard deviations.

  Equations, options and errors are those of ``symjax_bp.linen.BatchNorm``. The
  averages are the :class:`flax.nnx.BatchStat` variables ``mean``, ``std`` and
  ``count``, which every call in training mode updates. ``model.train()``,
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
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
    axis_name: str | None = None,
    axis_index_groups: Any = None,
    rngs: nnx.Rngs | None = None,
  ):
    batch_norm.check_options(alpha, epsilon)
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
    statistics = batch_norm.initial_statistics(shape).values()
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
        'use_running_average is None: pass True or False to BatchNorm or to '
        'its call, or select the mode with model.train() or model.eval()'
      )
    names = (*batch_norm.INITIAL, 'scale', 'bias')
    variables = {name: getattr(self, name) for name in names}
    arrays = {k: v[...] for k, v in variables.items() if v is not None}
    average, axis_name = use_running_average, self.axis_name
    y, updated = batch_norm.normalize(self, x, arrays, average, axis_name)
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
  model: nnx.Module, batches: Iterable[Any], num_batches: int = 20
) -> None:
  """Computes new statistics for testing from training mini-batches, in place.

  Runs a copy of the model after ``train()`` on 20 mini-batches (section 5 of
  the paper). In the model itself only the statistics of its
  :class:`BatchNorm` layers change.

  Args:
    model: An NNX model; an error leaves it unchanged.
    batches: Mini-batches of inputs, as for ``symjax_bp.linen.calibrate``.
    num_batches: The number of mini-batches to take and average.

  Raises:
    ValueError: As for ``symjax_bp.linen.calibrate``.
  """
  trained = nnx.clone(model)
  trained.train()
  statistics = nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat))
  nnx.update(trained, batch_norm.restart(statistics))
  for inputs in batch_norm.take(batches, num_batches):
    _observe(trained, *transform.separate(inputs))
  statistics = nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat))
  batch_norm.check_observed(statistics)
  nnx.update(model, statistics)


@functools.partial(nnx.jit, static_argnames='rebuilt')
def _observe(model, arrays, rebuilt):
  """Runs one mini-batch forward, which updates the model's statistics."""
  model(*rebuilt(arrays))
