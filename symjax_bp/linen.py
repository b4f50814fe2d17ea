r"""Flax Linen: models with feedback, and layers with a ``feedback`` field.

``with_feedback(model, rules)`` is ``symjax_bp.with_feedback`` for Linen models:
a module with the parameters, initial values, outputs and methods of the model.
``Dense``, ``DenseGeneral`` and ``Conv`` are Flax's own layers with a rule each.
The outermost ``with_feedback`` wins.

The states of the rules are in ``variables['feedback']``, never in ``params``: a
tree of the model's modules, in which ``'kernel:rndf()'`` is the state of the
rule ``rndf()`` for ``kernel``. Pass it to ``apply`` along with ``params``; an
optimizer may have the part that learns, see ``symjax_bp.partition``. For
parameters without states, ``apply(..., rngs={'feedback': key},
mutable=['feedback'])`` makes them. A rule that redraws (brSF) can also take its
seed from ``rngs={'feedback': key}`` alone. ``mutable=['feedback_weights']``
returns V.

For modules with feedback inside ``nn.scan`` and ``nn.vmap``, map the collection
and the key stream: ``variable_axes={'feedback': 0}``,
``split_rngs={'feedback': True}``; for V, ``'feedback_weights': 0`` as well.
``with_feedback`` around them needs none of these.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors, traverse_util
from flax.core import FrozenDict, lift, unfreeze
from flax.core.scope import CollectionFilter, LazyRng, union_filters
from flax.typing import Dtype, Initializer

from symjax_bp import batch_norm, metrics, transform
from symjax_bp.feedback import FeedbackRule

__all__ = [
  'BatchNorm',
  'Conv',
  'Dense',
  'DenseGeneral',
  'calibrate',
  'feedback_table',
  'feedback_weights',
  'layer_alignment',
  'layer_rules',
  'with_feedback',
  'without_feedback',
]


def _call(
  bound: Any,
  plain: nn.Module,
  method: str,
  rules: transform.Rules | None,
  row_convolution: bool,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> Any:
  """Calls a method of a plain model in the place of a bound module.

  Args:
    bound: the module whose scope, parameters and keys the model takes.
    plain: the model, unbound.
    method: name of its method.
    rules: its rules; None for plain backpropagation, also inside.
    row_convolution: see ``symjax_bp.with_feedback``.
    args: of the method.
    kwargs: of the method.
  """
  if bound.scope is None:
    raise ValueError(
      f'{type(plain).__name__} is called without variables: call '
      'model.apply(variables, ...) or model.bind(variables)(...).'
    )
  scope = bound.scope.rewound()
  above = scope.flags.get('feedback')
  # A flag, because nn.jit keeps its traces by the flags of a scope.
  _set_flag(scope, 'feedback', True)

  def run(scope, *args, **kwargs):
    return getattr(plain.copy(parent=scope), method)(*args, **kwargs)

  if rules is None or above is not None:
    return run(scope, *args, **kwargs)
  initializing = bound.is_initializing()
  before = _copied(scope.rng_counters)
  # A plain call makes the parameters.
  result = run(scope, *args, **kwargs) if initializing else None
  after = _copied(scope.rng_counters)
  prefix = prefix_of(bound)

  def interpret(scope_fn, repack, groups, rngs, *args, **kwargs):
    ((variables,),) = groups
    hidden = {'feedback', 'feedback_weights', 'params'}
    if initializing:
      # Decoders take another input once the collection 'cache' is there.
      hidden.add('cache')
    rest = {k: v for k, v in variables.items() if k not in hidden}

    def function(params, rest, rngs, args, kwargs):
      # However often this is traced, its keys are those of one call.
      _count_from(scope, before)
      inner = scope_fn((({**rest, 'params': params},),), rngs)
      y = run(inner, *args, **kwargs)
      return y, repack(inner)

    f = transform.FeedbackFunction(function, rules, row_convolution, prefix)
    params = variables.get('params', {})
    call = transform.Call(f, params, (rest, rngs, args, kwargs), {})
    if initializing:
      key: Any = _key(scope, 'params')
      states = f.init_states(key, params, call)
      _check_unmapped(scope, call)
      return states, repack(scope_fn(groups, rngs))
    states = _flat(variables.get('feedback', {}))
    states |= _made_now(scope, f, params, states, call)
    _check_unmapped(scope, call.plan(states))
    if scope.is_mutable_collection('feedback_weights'):
      V = f.weights_by_path(params, states, call.rows())
      _put(scope, 'feedback_weights', V)
    return call.evaluate()

  result_or_states = lift.pack(
    interpret, (True,), (True,), (True,), name='feedback', enable_kwargs=True
  )(scope, *args, **kwargs)
  if not initializing:
    return result_or_states
  _count_from(scope, after)
  if result_or_states and not scope.is_mutable_collection('feedback'):
    raise ValueError(
      f'the feedback of {prefix[:-1] or type(bound).__name__!r} has no place: '
      "add variable_axes={'feedback': 0}, split_rngs={'feedback': True} to "
      "nn.scan or nn.vmap, 'feedback' to the collections of another lift or "
      'to mutable of init.'
    )
  _put(scope, 'feedback', _named(result_or_states))
  return result


def _set_flag(scope: Any, name: str, value: Any) -> None:
  scope.flags = FrozenDict({**scope.flags, name: value})


class _Unique:
  """A flag with which nn.jit, which keeps traces by hash, keeps none."""

  _hashes = itertools.count()

  def __hash__(self) -> int:
    return hash((_Unique, next(self._hashes)))


def _retraced(
  model: nn.Module, method: Any, path: str = ''
) -> Callable[..., Any]:
  """A method for ``apply`` in which each layer is seen, also under nn.jit.

  Args:
    model: the model.
    method: its method, the name of one, or None for ``__call__``.
    path: of the model in a larger one.
  """

  def call(bound: Any, *args, **kwargs):
    scope = bound.scope.rewound()
    _set_flag(scope, 'retraced', _Unique())
    _set_flag(scope, 'path', path)
    # Anew, because modules in its fields have the flags of before.
    bound = model.copy(parent=scope)
    if callable(method):
      return method(bound, *args, **kwargs)
    return getattr(bound, method or '__call__')(*args, **kwargs)

  return call


def prefix_of(bound: nn.Module) -> str:
  """Where the parameters of a module are in the whole model: '' or 'a/b/'."""
  scope: Any = bound.scope
  above = scope.flags.get('path')  # See at_path.
  return ''.join(f'{name}/' for name in (above, *bound.path) if name)


def at_path(model: nn.Module, path: str) -> nn.Module:
  """A copy whose ``apply`` names its weights by paths in a larger model."""

  def apply(variables, *args, method=None, **kwargs):
    method = _retraced(model, method, path)
    return model.apply(variables, *args, method=method, **kwargs)

  copied = model.clone()
  object.__setattr__(copied, 'apply', apply)  # Modules are frozen.
  return copied


def _check_unmapped(scope: Any, call: transform.Call) -> None:
  """Raises if a lift would transform what rules keep, as if it were W."""
  keeps = any(rule.keeps_state for _, rule, _ in call.products())
  if keeps and any('map_variables' in name for name in scope.debug_path):
    raise ValueError(
      f'{"/".join(scope.path)!r} keeps feedback, which nn.WeightNorm, '
      'nn.SpectralNorm and nn.map_variables would change along with the '
      'weights: put with_feedback around them, and a plain layer inside.'
    )


def _count_from(scope: Any, counters: Mapping[Any, Any]) -> None:
  # In place, because Flax shares the dictionary between scopes.
  scope.rng_counters.clear()
  scope.rng_counters.update(_copied(counters))


def _copied(counters: Mapping[Any, Any]) -> dict[Any, Any]:
  """Flax's counters of keys, which are nested; their keys are objects."""
  return {
    name: _copied(count) if isinstance(count, dict) else count
    for name, count in counters.items()
  }


def _key(scope: Any, otherwise: str = '') -> jax.Array | None:
  """The key of the stream 'feedback', or one beside another stream."""
  if 'feedback' in scope.rngs:
    return LazyRng.create(scope.rngs['feedback']).as_jax_rng()
  if otherwise in scope.rngs:
    return LazyRng.create(scope.rngs[otherwise], 'feedback').as_jax_rng()
  return None


def _made_now(scope, f, params, stored, call) -> dict[str, Any]:
  """States that ``apply`` was not given but can make from a key."""
  key = _key(scope)
  if key is None:
    return {}
  store = scope.is_mutable_collection('feedback')
  states = f.init_states(key, params, call)
  states = {
    path: state
    for path, state in states.items()
    if path not in stored and (store or call.rules[path].redraws)
  }
  if store:
    _put(scope, 'feedback', _named(states))
  return states


def _named(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """{'Dense_0/kernel:rndf()': state} from {path: {name of rule: state}}."""
  return {
    f'{path}:{rule}': value
    for path, state in states.items()
    for rule, value in state.items()
  }


def _put(scope: Any, collection: str, leaves: Mapping[str, Any]) -> None:
  """Writes leaves, given by path, into a collection."""
  tree = traverse_util.unflatten_dict(dict(leaves), sep='/')
  for name, value in tree.items():
    scope.put_variable(collection, name, value)


def _flat(collection: Mapping[str, Any]) -> dict[str, Any]:
  """{path: {name of rule: state}} from the collection ``feedback``."""
  states: dict[str, Any] = {}
  leaves = traverse_util.flatten_dict(
    dict(unfreeze(dict(collection))),
    is_leaf=lambda keys, _: bool(keys) and ':' in keys[-1],
    sep='/',
  )
  for name, value in leaves.items():
    path, _, rule = name.partition(':')
    states.setdefault(path, {})[rule] = value
  return states


class _Asymmetric(nn.Module):
  """A layer of Flax with one more field, the rule of its kernel."""

  feedback: FeedbackRule = dataclasses.field(kw_only=True)

  def __post_init__(self):
    transform.Rules.create(self.feedback)
    super().__post_init__()

  @nn.nowrap
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer as Flax does."""
    kind: Any = type(self).__mro__[2]
    fields = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(kind)
      if field.init and field.name not in ('parent', 'name')
    }
    plain = kind(**fields, parent=None)
    rules = transform.Rules.create(self.feedback)
    return _call(self, plain, '__call__', rules, False, (inputs,), {})


class Dense(_Asymmetric, nn.Dense):
  """``flax.linen.Dense`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Dense(2, feedback=symjax_bp.usf())
  >>> x = jnp.ones((1, 3))
  >>> variables = layer.init(jax.random.key(0), x)
  >>> print(jax.grad(lambda x: layer.apply(variables, x).sum())(x))
  [[0. 0. 2.]]
  >>> print(jnp.sign(variables['params']['kernel']).sum(1))  # = dx
  [0. 0. 2.]

  Attributes:
    feedback: the rule; all other fields are those of ``flax.linen.Dense``.
  """


class DenseGeneral(_Asymmetric, nn.DenseGeneral):
  """``flax.linen.DenseGeneral`` with feedback weights; see ``Dense``."""


class Conv(_Asymmetric, nn.Conv):
  """``flax.linen.Conv`` with feedback weights; see ``Dense``."""


@dataclasses.dataclass(frozen=True)
class _Detached:
  """Hides a model from Flax, which would make it a child with a name.

  Hashable also if the model is not.
  """

  model: nn.Module

  def __hash__(self) -> int:
    try:
      return hash(self.model)
    except TypeError:  # It has a list, such as that of nn.Sequential.
      return hash(type(self.model))


class WithFeedback(nn.Module):
  """A Linen model whose weights use feedback; see ``with_feedback``.

  Attributes:
    detached: holds the model, as it was.
    rules: rules by the paths of parameters; None for plain backpropagation.
    row_convolution: see ``with_feedback``.
  """

  detached: _Detached
  rules: transform.Rules | None = None
  row_convolution: bool = False

  @nn.nowrap
  def __call__(self, *args, **kwargs):
    """Calls the model."""
    return self._call('__call__', *args, **kwargs)

  @nn.nowrap
  def __getattr__(self, name: str):
    """Other methods and the fields of the model, such as a cell's."""
    # Not self.detached: a copy that is being unpickled has no fields yet.
    detached: Any = self.__dict__.get('detached')
    if name.startswith('__') or not hasattr(detached, 'model'):
      return super().__getattr__(name)
    model = detached.model
    method = getattr(type(model), name, None)
    if method is None and not hasattr(model, name):
      raise AttributeError(
        f'{type(model).__name__} has no field or method {name!r}. Its '
        'submodules cannot be taken out of what with_feedback returns: use '
        'them in a method of the model.'
      )
    if not isinstance(method, types.FunctionType) or hasattr(method, 'nowrap'):
      return getattr(model, name)

    def call(self, *args, **kwargs):
      return self._call(name, *args, **kwargs)

    return types.MethodType(call, self)

  @nn.nowrap
  def _call_wrapped_method(self, fun, args, kwargs):
    """Flax's own way to methods, also those given as functions."""
    # Private: Flax has no public way to see method=Model.encode.
    name = getattr(fun, '__name__', '')
    own, models = (
      getattr(getattr(type(module), name, None), '__wrapped__', None) is fun
      for module in (self, self.detached.model)
    )
    if models and not own:
      return self._call(name, *args, **kwargs)
    return super()._call_wrapped_method(fun, args, kwargs)

  @nn.nowrap
  def _call(self, method: str, *args, **kwargs):
    options = (self.rules, self.row_convolution)
    return _call(self, self.detached.model, method, *options, args, kwargs)


def with_feedback(
  model: nn.Module,
  rules: FeedbackRule | Mapping[str, FeedbackRule],
  exclude: str | Sequence[str] = (),
  *,
  row_convolution: bool = False,
) -> WithFeedback:
  """``symjax_bp.with_feedback`` for a Linen model, which stays unchanged.

  In a method of another module the result takes the name of the model, so its
  parameters are where they are without feedback. (Flax gives layers made in
  that method, such as those in ``nn.Sequential([nn.Dense(3)])``, to the module
  around it; here they are the model's own.) A model that shares a submodule
  with the module around it is a ValueError.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> mlp = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
  >>> model = with_feedback(
  ...   mlp, {'layers_0': symjax_bp.usf(), 'layers_2': symjax_bp.rndf()}
  ... )
  >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
  >>> jax.tree.map(jnp.shape, variables['feedback'])
  {'layers_2': {'kernel:rndf()': (3, 2)}}
  >>> print(feedback_table(model, jnp.ones((1, 4))))
  weight           shape   feedback  use
  layers_0/kernel  (4, 3)  usf()     product
  layers_2/kernel  (3, 2)  rndf()    product
  2 of 2 weights with feedback: 18 of 18 parameters
  """
  if not isinstance(model, nn.Module):
    raise TypeError(
      f'model must be a flax.linen.Module, not {type(model).__name__}.'
    )
  _refuse_shared(model)
  created = transform.Rules.create(rules, exclude)
  options = {'rules': created, 'row_convolution': row_convolution}
  return _in_its_place(model, **options)


def _in_its_place(model: Any, **options: Any) -> WithFeedback:
  """Wraps a model; inside of another one, with its name and parameters."""
  above = model.parent
  if isinstance(above, nn.Module) and model.scope is not None:
    # The model gives its name up, which Flax would not let be used twice.
    scope: Any = above.scope
    scope.reservations.pop(model.name, None)
    options |= {'name': model.name, 'parent': above}
  try:
    return WithFeedback(_Detached(model), **options)
  except errors.AssignSubModuleError as error:
    raise ValueError(
      f'model is {model.name!r} of {type(above).__name__}: wrap it in the '
      'setup() or the compact method of that module.'
    ) from error


def _refuse_shared(model: nn.Module) -> None:
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


def without_feedback(model: nn.Module) -> nn.Module:
  """The same model trained by plain backpropagation, on the same variables.

  It needs neither the collection nor the key stream ``feedback``, so it is
  also the model to evaluate, and to attack: adversarial examples computed
  through V are weak by construction.
  """
  return _in_its_place(model)


def layer_rules(model: nn.Module, *args, **kwargs) -> list[transform.Row]:
  """Returns how each weight of a model is used, in the order of use.

  Args:
    model: any Linen model.
    args, kwargs: arguments to call it with; of arrays only shapes and dtypes
      matter.

  Returns:
    A row for each parameter that is not a bias or scale.
  """
  arrays, rebuilt = transform.separate((args, kwargs))

  def call(function, arrays, **options):
    args, kwargs = rebuilt(arrays)
    method = _retraced(model, kwargs.pop('method', None))
    return function(*args, method=method, **options, **kwargs)

  def init(key, arrays):
    return call(functools.partial(model.init, key), arrays)

  def apply(variables, key, arrays):
    function = functools.partial(model.apply, variables)
    return call(function, arrays, rngs={'params': key}, mutable=True)

  key = jax.random.key(0)
  with transform.recorded() as rows:
    variables = jax.eval_shape(init, key, arrays)
  if any(row.use == 'unused' for row in rows):
    # nnx.bridge.ToLinen uses its parameters in apply alone.
    with transform.recorded() as rows:
      jax.eval_shape(apply, variables, key, arrays)
  return transform.with_others(
    rows, transform.by_path(variables.get('params', {}))
  )


def feedback_table(model: nn.Module, *args, **kwargs) -> str:
  """Returns ``layer_rules`` as text."""
  return transform.format_table(layer_rules(model, *args, **kwargs))


def feedback_weights(
  model: nn.Module, variables: Mapping[str, Any], *args, **kwargs
) -> dict[str, jax.Array]:
  """Returns V of each weight with feedback, by its path, as it was used.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer, x = Dense(2, feedback=symjax_bp.usf()), jnp.ones((1, 1))
  >>> variables = layer.init(jax.random.key(0), x)
  >>> print(variables['params']['kernel'] > 0)
  [[ True False]]
  >>> print(feedback_weights(layer, variables, x)['kernel'])
  [[ 1. -1.]]

  Args:
    model: an asymmetric model.
    variables: its variables.
    args, kwargs: arguments of ``apply``.

  Raises:
    ValueError: if a lift around a layer does not hand its V out.
  """
  mutable = union_filters(kwargs.pop('mutable', False), 'feedback_weights')
  kwargs['method'] = _retraced(model, kwargs.get('method'))
  with transform.recorded() as rows:
    _, changed = model.apply(variables, *args, mutable=mutable, **kwargs)
  V = transform.by_path(changed.get('feedback_weights', {}))
  missing = sorted({row.path for row in rows if row.rule} - V.keys())
  if missing:
    raise ValueError(
      f'V of {missing} has no place: add '
      "variable_axes={'feedback_weights': 0} to nn.scan or nn.vmap, "
      "'feedback_weights' to the collections of another lift, or put "
      'with_feedback around it, as around a module of NNX.'
    )
  return V


def layer_alignment(
  model: nn.Module,
  variables: Mapping[str, Any],
  loss: Callable[[Any], jax.Array],
  *args,
  mutable: CollectionFilter = (),
  **kwargs,
) -> dict[str, metrics.Alignment]:
  """``symjax_bp.metrics.layer_alignment`` for a Linen model.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Dense(2, feedback=symjax_bp.usf())
  >>> x = jnp.array([[1.0, 2.0, 3.0]])
  >>> variables = layer.init(jax.random.key(0), x)
  >>> row = layer_alignment(layer, variables, lambda y: (y**2).sum(), x)
  >>> print(row['kernel'].concordance, row['kernel'].update_angle)
  1.0 0.0

  Args:
    model: an asymmetric model.
    variables: its variables.
    loss: the scalar loss as a function of the model's output.
    mutable: collections that the call changes, such as ``batch_stats``.
    args, kwargs: arguments of ``apply``.
  """
  rest = {name: value for name, value in variables.items() if name != 'params'}
  kwargs['method'] = _retraced(model, kwargs.get('method'))
  changing = union_filters(mutable, ())

  def evaluate(params):
    output, _ = model.apply(
      {**rest, 'params': params}, *args, mutable=changing, **kwargs
    )
    return loss(output)

  return metrics.layer_alignment(evaluate, variables['params'])


class BatchNorm(nn.Module):
  r"""Batch normalization with averages of standard deviations.

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
    ValueError: ``alpha``, ``epsilon`` or ``axis`` is out of range, ``dtype`` is
      not floating, or x is complex, empty or has another number of features
      than the statistics.

  Examples:
    >>> from symjax_bp.linen import BatchNorm
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
    batch_norm.check_options(self.alpha, self.epsilon)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: jax.Array, use_running_average: bool | None = None
  ) -> jax.Array:
    """Normalizes a mini-batch x."""
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    shape = (batch_norm.num_features(x, self.axis),)
    arrays, statistics, dtype = {}, {}, self.param_dtype
    if self.use_scale:
      arrays['scale'] = self.param('scale', self.scale_init, shape, dtype)
    if self.use_bias:
      arrays['bias'] = self.param('bias', self.bias_init, shape, dtype)
    if use_running_average or self.is_mutable_collection('batch_stats'):
      for name, value in batch_norm.initial_statistics(shape).items():
        variable = self.variable('batch_stats', name, lambda v=value: v)
        statistics[name], arrays[name] = variable, variable.value
    axis_name = None if self.is_initializing() else self.axis_name
    y, updated = batch_norm.normalize(
      self, x, arrays, use_running_average, axis_name
    )
    if not self.is_initializing():
      for name, value in updated.items():
        statistics[name].value = value
    return y


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
    model: A Linen model without arrays in its fields.
    variables: Its variables, ``batch_stats`` included.
    batches: Mini-batches of inputs: an array each, or a tuple or list of the
      model's positional arguments. Leaves that are not arrays are static.
    num_batches: The number of mini-batches to take and average.
    rngs: Keys for ``model.apply``, folded with the number of the mini-batch.
    **apply_kwargs: For ``model.apply``, e.g. ``train=True``.

  Returns:
    ``variables`` with new ``batch_stats``; the rest is the same.

  Raises:
    ValueError: ``batch_stats`` is missing or holds statistics of other layers,
      there are too few mini-batches, or a layer ran in evaluation mode.

  Examples:
    >>> from symjax_bp.linen import BatchNorm, calibrate
    >>> batches = [jnp.array([[0.0], [8.0 * k]]) for k in range(20)]
    >>> layer = BatchNorm(use_running_average=False)
    >>> variables = layer.init(jax.random.key(0), batches[0])
    >>> variables = calibrate(layer, variables, batches)
    >>> print(variables['batch_stats']['mean'].round(3))
    [44.705]
  """
  statistics = batch_norm.restart(variables.get('batch_stats', {}))
  for index, inputs in enumerate(batch_norm.take(batches, num_batches)):
    variables = {**variables, 'batch_stats': statistics}
    arrays, rebuilt = transform.separate((inputs, apply_kwargs))
    statistics = _observe(
      _Detached(model), variables, rngs, index, arrays, rebuilt
    )
  batch_norm.check_observed(statistics)
  return {**variables, 'batch_stats': statistics}


@functools.partial(jax.jit, static_argnames=('detached', 'rebuilt'))
def _observe(detached, variables, rngs, index, arrays, rebuilt):
  """Runs one mini-batch forward and returns the new batch_stats."""
  inputs, kwargs = rebuilt(arrays)
  rngs = jax.tree.map(lambda key: jax.random.fold_in(key, index), rngs)
  _, updated = detached.model.apply(
    variables, *inputs, **kwargs, rngs=rngs, mutable=['batch_stats']
  )
  return updated['batch_stats']
