"""Feedback for any JAX function: weights carry their rules to their products.

``with_feedback(function, rules)`` traces ``function(params, *args)``, lets
``symjax_bp.kinds`` decide what happens at each equation of the jaxpr, and
evaluates it equation by equation. Equations that no weight reaches are bound as
they are; a product of a weight and data becomes
``symjax_bp.primitives.asymmetric``.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from symjax_bp import kinds
from symjax_bp.feedback import FeedbackRule
from symjax_bp.kinds import CONSTANT, DATA, Kind, Level, Plan, Step, Trait
from symjax_bp.primitives import Fan, Product, asymmetric

__all__ = [
  'FeedbackError',
  'FeedbackFunction',
  'Row',
  'Rules',
  'combine',
  'format_table',
  'partition',
  'redraw',
  'with_feedback',
]


class FeedbackError(ValueError):
  """Weights are used in a way for which no feedback is defined."""


# --- Rules by path ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rules:
  """Rules by the path of a parameter, and what to leave alone.

  Attributes:
    pairs: regular expressions and rules; the first that is found wins.
    exclude: regular expressions.
  """

  pairs: tuple[tuple[str, FeedbackRule], ...]
  exclude: tuple[str, ...] = ()

  @classmethod
  def create(cls, rules: Any, exclude: str | Sequence[str] = ()) -> 'Rules':
    """Checks what a user gave."""
    if isinstance(rules, Rules):
      return rules
    pairs = rules if isinstance(rules, Mapping) else {'': rules}
    if not pairs:
      raise ValueError('rules must not be an empty mapping.')
    for pattern, each in pairs.items():
      if not isinstance(each, FeedbackRule):
        name = f'rules[{pattern!r}]' if pairs is rules else 'rules'
        raise TypeError(
          f'{name} must be a feedback rule such as symjax_bp.usf() or '
          f"symjax_bp.from_name('uSF'), not {each!r}."
        )
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in (*pairs, *exclude):
      try:
        re.compile(pattern)
      except (re.error, TypeError) as error:
        raise ValueError(
          f'{pattern!r} is not a regular expression: {error}.'
        ) from error
    return cls(tuple(pairs.items()), exclude)

  def find(self, path: str) -> FeedbackRule | None:
    """The rule of a parameter, or None where no expression is found."""
    found = (rule for pattern, rule in self.pairs if re.search(pattern, path))
    return next(found, None)

  def excludes(self, path: str) -> bool:
    """Whether a parameter is trained by plain backpropagation."""
    return any(re.search(pattern, path) for pattern in self.exclude)

  def check_used(self, paths: Iterable[str]) -> None:
    """Raises if an expression is found in none of the paths."""
    paths = sorted(paths)
    for pattern in (*dict(self.pairs), *self.exclude):
      if not any(re.search(pattern, path) for path in paths):
        raise ValueError(
          f'{pattern!r} matches no parameter; their paths are {paths}.'
        )


# --- Parameters and their feedback by path ----------------------------------

# Added or multiplied entry by entry wherever a library calls them so.
_NO_WEIGHTS = ('bias', 'scale')


def path_of(keys: Any) -> str:
  """The path of a leaf, such as 'encoder/Conv_0/kernel'."""
  # What Flax keeps in a box is called box.value.
  if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey('value'):
    keys = keys[:-1]
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths."""
  leaves = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = path_of(keys)
    if path in leaves:
      raise ValueError(f'two parameters have the path {path!r}: rename one.')
    leaves[path] = leaf
  return leaves


def is_weight(path: str, leaf: Any, kind: Any = jnp.floating) -> bool:
  """Whether a parameter can have a rule: floating, no bias, no scale."""
  # Equinox keeps functions among the parameters.
  is_array = hasattr(leaf, 'dtype') or isinstance(leaf, (float, complex))
  no_weight = path.rpartition('/')[2] in _NO_WEIGHTS or not is_array
  return not no_weight and jnp.issubdtype(jax.dtypes.result_type(leaf), kind)


def fold_path(key: jax.Array, path: str) -> jax.Array:
  """A key for one parameter."""
  digest = hashlib.sha256(path.encode()).digest()
  return jax.random.fold_in(key, int.from_bytes(digest[:4], 'little'))


def _check_state(path: str, rule: FeedbackRule, stored: Any) -> Any:
  """The rule's state from {name of the rule that made it: state}."""
  if rule.state_name in stored:
    return stored[rule.state_name]
  raise FeedbackError(
    f'the feedback of {path!r} was made by {" and ".join(stored)}, but its '
    f'rule is {rule!r}: make the feedback anew with init.'
  )


# Rules are called 'kolen_pollack()', so no parameter has such a path.
_LEARNED = re.compile(r'\)/learned(?:/|$)')


def is_learned(path: str) -> bool:
  """Whether an array of a state learns, by its path."""
  return _LEARNED.search(path) is not None


def partition(feedback: Any) -> tuple[Any, Any]:
  """Splits feedback into a part that learns and a fixed part.

  Differentiating fixed feedback is an error, because weight decay would shrink
  it. In a model with rules of both kinds or with product feedback, give the
  optimizer the learned part:

  >>> import symjax_bp
  >>> f = symjax_bp.with_feedback(
  ...   lambda W, x: jnp.tanh(x @ W['a']) @ W['b'],
  ...   {'a': symjax_bp.rndf(), 'b': symjax_bp.kolen_pollack()},
  ... )
  >>> W, x = {'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 2))}, jnp.ones((1, 3))
  >>> learned, fixed = partition(f.init(jax.random.key(0), W))
  >>> jax.tree.map(jnp.shape, learned)
  {'a': {'rndf()': None}, 'b': {'kolen_pollack()': {'learned': (4, 2)}}}
  >>> def loss(W, learned):
  ...   return f(W, combine(learned, fixed), x).sum()
  >>> dW, dR = jax.grad(loss, (0, 1))(W, learned)

  Args:
    feedback: what ``init`` returned, or a collection ``feedback`` of Linen.

  Returns:
    Two trees like ``feedback``, each with None in the place of the other's
    arrays; ``combine`` joins them.
  """
  return tuple(
    jax.tree_util.tree_map_with_path(
      lambda keys, x, part=part: (
        x if is_learned(path_of(keys)) is part else None
      ),
      feedback,
    )
    for part in (True, False)
  )


def combine(learned: Any, fixed: Any) -> Any:
  """Joins the two trees of ``partition``."""
  return jax.tree.map(
    lambda a, b: b if a is None else a,
    learned,
    fixed,
    is_leaf=lambda x: x is None,
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiated(what: str, x: Any) -> Any:
  """The identity on fixed feedback, whose derivative is an error."""
  del what
  return x


def _refuse(what, primals, tangents):
  if isinstance(tangents[0], SymbolicZero):
    return primals[0], tangents[0]
  raise FeedbackError(
    f'{what} is differentiated, but no loss trains it: weight decay would '
    'shrink it. Differentiate and optimize what learns alone: learned, fixed = '
    'symjax_bp.partition(feedback); for NNX the variables of type '
    'symjax_bp.nnx.LearnedFeedback. A weight mirror learns from mirror(...), '
    'which returns its gradient, and not from a loss.'
  )


undifferentiated.defjvp(_refuse, symbolic_zeros=True)


def redraw(feedback: Any, step: Any) -> Any:
  """Chooses the draws of rules that redraw (brSF) by a step number or a key.

  Without this, V follows from a seed and the bits of W and changes with every
  update. The result ignores the bits of W: V of a step is the same even if W
  differs by rounding, as on another number of devices. Apply it to the stored
  feedback at each step.

  >>> import symjax_bp
  >>> f = symjax_bp.with_feedback(lambda W, x: x @ W, symjax_bp.brsf())
  >>> W = jnp.ones((1, 3))
  >>> feedback = f.init(jax.random.key(0), W)
  >>> for step in range(2):
  ...   V = f.weights(W, redraw(feedback, step))
  ...   print((10 * V).round())
  [[ 6. 10.  7.]]
  [[2. 3. 1.]]

  Args:
    feedback: what ``init`` returned, or a collection ``feedback`` of Linen.
    step: an integer, which is folded into each seed; or a PRNG key, which
      replaces them (each path is folded into it).
  """
  is_key = _is_key(step)

  def fold(seed):
    key = jax.random.wrap_key_data(seed[:2], impl='threefry2x32')
    return jax.random.bits(jax.random.fold_in(key, step), (3,), jnp.uint32)

  def draw(keys, leaf):
    if jnp.asarray(leaf).dtype != jnp.uint32:
      return leaf
    if is_key:
      key = fold_path(step, path_of(keys))
      seeds = jax.random.bits(key, leaf.shape, jnp.uint32)
    else:  # Stacked layers have a seed each.
      seeds = jnp.vectorize(fold, signature='(n)->(n)')(leaf)
    return seeds.at[..., 2].set(0)

  return jax.tree_util.tree_map_with_path(draw, feedback)


# --- Evaluation -------------------------------------------------------------


class Value(NamedTuple):
  """An array, the R beside it if it is a weight that has one, and its kind."""

  x: Any
  R: Any
  kind: Kind


# Evaluates a product: (product, its other operands, weight, step) -> y.
Multiply = Callable[[Product, list[Any], Value, Step], jax.Array]


def _pack(values: Iterable[Value]) -> list[Any]:
  """Arrays, each R behind its weight."""
  return [
    array
    for value in values
    for array in ((value.x, value.R) if value.kind.has_R else (value.x,))
  ]


def _unpack(arrays: Iterable[Any], each: Iterable[Kind]) -> list[Value]:
  rest = iter(arrays)
  return [
    Value(next(rest), next(rest) if kind.has_R else None, kind) for kind in each
  ]


def _as_kinds(values: Iterable[Value], each: Iterable[Kind]) -> list[Value]:
  """Values as the kinds of a loop or a branch.

  R may be lost there; a constant in the place of a weight is its own R.
  """

  def R_of(value: Value) -> Any:
    return value.R if value.kind.has_R else value.x

  return [
    Value(value.x, R_of(value) if kind.has_R else None, kind)
    for value, kind in zip(values, each, strict=True)
  ]


def _bind(eqn: Any, arrays: Sequence[Any]) -> list[Any]:
  params = eqn.primitive.get_bind_params(eqn.params)
  functions = ()
  if isinstance(params, tuple):  # Up to JAX 0.10.
    functions, params = params
  result = eqn.primitive.bind(*functions, *arrays, **params)
  return list(result) if eqn.primitive.multiple_results else [result]


def _evaluate(
  plan: Plan, values: Sequence[Value], multiply: Multiply
) -> list[Value]:
  """Evaluates a planned function."""
  jaxpr = plan.closed.jaxpr
  known: dict[Any, Value] = {
    var: Value(const, None, CONSTANT)
    for var, const in zip(jaxpr.constvars, plan.closed.consts, strict=True)
  }
  known.update(zip(jaxpr.invars, values, strict=True))

  def read(var: Any) -> Value:
    if hasattr(var, 'val'):
      return Value(var.val, None, CONSTANT)
    return known[var]

  for step in plan.steps:
    eqn = step.eqn
    inputs = [read(var) for var in eqn.invars]
    with kinds.source_context(eqn), eqn.ctx.manager:
      outputs = _step(step, inputs, multiply)
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [read(var) for var in jaxpr.outvars]


def _step(step: Step, inputs: list[Value], multiply: Multiply) -> list[Value]:
  eqn, action = step.eqn, step.action
  xs = [value.x for value in inputs]
  if action == 'enter':
    return _enter(step, inputs, multiply)
  if action == 'product':
    at = _weight_at(inputs)
    op = _product(eqn, at)
    y = multiply(op, xs[:at] + xs[at + 1 :], inputs[at], step)
    return [Value(y, None, step.outputs[0])]
  results = _bind(eqn, xs)
  if action == 'through':
    Rs = [value.R for value in inputs]
  elif not any(kind.has_R for kind in step.outputs):
    Rs = [None] * len(results)
  elif action == 'move':
    Rs = _move(eqn, inputs)
  else:
    R = _kept(step.outputs[0], inputs)
    if action == 'mask':
      R = _mask(R, next(v for v in inputs if not v.kind.has_R))
    Rs = [R] * len(results)
  triples = zip(results, Rs, step.outputs, strict=True)
  return [Value(x, R if kind.has_R else None, kind) for x, R, kind in triples]


def _kept(kind: Kind, inputs: Sequence[Value]) -> Any:
  """The R that arithmetic keeps: that of the weight, not of its scale."""
  each = [value for value in inputs if value.kind.has_R]
  return next((v.R for v in each if v.kind.paths == kind.paths), each[0].R)


def _product(eqn: Any, at: int) -> Product:
  return Product.create(eqn.primitive.bind, eqn.params, at=at)


def _weight_at(inputs: Sequence[Value]) -> int:
  """Which of the first two operands is the weight; the second of two."""

  def clarity(i: int) -> tuple[bool, bool, int]:
    kind = inputs[i].kind
    return kind.level is Level.WEIGHT, not kind.may_be_data, i

  return max((0, 1), key=clarity)


def _move(eqn: Any, inputs: Sequence[Value]) -> list[Any]:
  """R after a movement of its weight; constants stay where they were put."""
  if eqn.primitive.name == 'convert_element_type' and not jnp.issubdtype(
    eqn.params['new_dtype'], jnp.floating
  ):
    return [inputs[0].R]  # Integers are for the weight: a quantization.
  moved = [v.R if v.kind.has_R else v.x for v in inputs]
  if eqn.primitive.name == 'pad':
    moved[1] = jnp.zeros_like(moved[1])
  first = next(R for R, v in zip(moved, inputs, strict=True) if v.kind.has_R)
  moved = [
    a.astype(first.dtype)
    if not v.kind.has_R and a.dtype != first.dtype and _floating(a)
    else a
    for a, v in zip(map(jnp.asarray, moved), inputs, strict=True)
  ]
  return _bind(eqn, moved)


def _floating(array: Any) -> bool:
  return jnp.issubdtype(array.dtype, jnp.floating)


def _mask(R: Any, factor: Value) -> Any:
  """R is 0 where a weight is masked by a constant."""
  if factor.kind.level is not Level.CONSTANT or not jnp.ndim(factor.x):
    return R
  kept = (jnp.asarray(factor.x) != 0).astype(R.dtype)
  return R * jnp.broadcast_to(kept, R.shape)


def _enter(step: Step, inputs: list[Value], multiply: Multiply) -> list[Value]:
  """Evaluates the functions inside an equation of control flow."""
  name, params = step.eqn.primitive.name, step.eqn.params
  given, outputs = step.inputs, step.outputs

  def function(plan: Plan, into: Sequence[Kind]) -> Callable[..., list[Any]]:
    def flat(*arrays):
      results = _evaluate(plan, _unpack(arrays, plan.inputs), multiply)
      return _pack(_as_kinds(results, into))

    return flat

  if name == 'cond':
    branches = [function(plan, outputs) for plan in step.inner]
    results = lax.switch(inputs[0].x, branches, *_pack(inputs[1:]))
    return _unpack(results, outputs)
  (plan,) = step.inner
  body = function(plan, outputs)
  if name in ('remat2', 'checkpoint'):
    options = {key: params[key] for key in ('prevent_cse', 'policy')}
    return _unpack(jax.checkpoint(body, **options)(*_pack(inputs)), outputs)
  if name == 'scan':
    return _scan(step, inputs, function)
  if name == 'shard_map':

    def with_R(specs, each):
      return tuple(
        spec
        for spec, kind in zip(specs, each, strict=True)
        for spec in ((spec, spec) if kind.has_R else (spec,))
      )

    mapped = jax.shard_map(
      body,
      mesh=params['mesh'],
      in_specs=with_R(params['in_specs'], given),
      out_specs=list(with_R(params['out_specs'], outputs)),
      check_vma=params['check_vma'],
      axis_names=set(params['newly_manual_axes']),
    )
    return _unpack(mapped(*_pack(inputs)), outputs)
  return _evaluate(plan, inputs, multiply)  # jit and other calls: inlined


def _scan(step: Step, inputs: list[Value], function) -> list[Value]:
  params, (plan,) = step.eqn.params, step.inner
  constants, carry = kinds.scan_counts(params)
  end = constants + carry
  initial = _as_kinds(inputs[constants:end], plan.inputs[constants:end])
  body = function(plan, step.outputs)
  fixed = _pack(inputs[:constants])
  split = len(_pack(initial))

  def iterate(carried, x):
    results = body(*fixed, *carried, *x)
    return results[:split], results[split:]

  carried, stacked = lax.scan(
    iterate,
    _pack(initial),
    _pack(inputs[end:]),
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return _unpack([*carried, *stacked], step.outputs)


# --- The interface ----------------------------------------------------------


# Sees every product with feedback while a call is traced: (path of the weight,
# product, W, V, equation) -> (V, learning, extra). For metrics.
Observer = Callable[..., tuple[jax.Array, Any, Any]]
_OBSERVER: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
  'observer', default=None
)


_RECORD: contextvars.ContextVar[list['Row'] | None] = contextvars.ContextVar(
  'record', default=None
)


@contextlib.contextmanager
def _holding(variable: contextvars.ContextVar, value: Any) -> Iterator[Any]:
  token = variable.set(value)
  try:
    yield value
  finally:
    variable.reset(token)


def observed(observer: Observer):
  """Calls the observer at each product with feedback that is traced."""
  return _holding(_OBSERVER, observer)


def recorded():
  """Collects the rows of all functions with feedback that are traced."""
  return _holding(_RECORD, [])


class Row(NamedTuple):
  """One parameter in the table of a function.

  Attributes:
    path: of the parameter.
    shape: of the parameter.
    rule: its rule where it has feedback, else None.
    use: how it meets data: 'product' (feedback, if it has a rule), 'scale',
      'added', 'looked up' (no feedback is needed), 'excluded', or 'unused'.
    fan: sizes of its first product.
  """

  path: str
  shape: tuple[int, ...]
  rule: FeedbackRule | None
  use: str
  fan: Fan | None = None


def with_others(rows: Sequence[Row], params: Mapping[str, Any]) -> list[Row]:
  """Each row once, and rows for weights that no rule follows."""
  found = {}
  for row in rows:
    # Of the parameter, not of the part that a scan or a vmap hands to a layer.
    shape = jnp.shape(params[row.path]) if row.path in params else row.shape
    found.setdefault(row.path, row._replace(shape=shape))
  for path, W in params.items():
    if is_weight(path, W):
      found.setdefault(path, Row(path, jnp.shape(W), None, 'not followed'))
  return list(found.values())


def format_table(rows: Sequence[Row]) -> str:
  """A table of parameters as text, with a line of totals."""
  cells = [('weight', 'shape', 'feedback', 'use')]
  for row in rows:
    feedback = repr(row.rule) if row.rule else 'plain backpropagation'
    cells.append((row.path, str(row.shape), feedback, row.use))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in cells]
  asymmetric = [math.prod(row.shape) for row in rows if row.rule]
  total = sum(math.prod(row.shape) for row in rows)
  lines.append(
    f'{len(asymmetric)} of {len(rows)} weights with feedback: '
    f'{sum(asymmetric):,} of {total:,} parameters'
  )
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Static:
  """A tree without some of its leaves; hashable if the others are.

  Attributes:
    leaves: its leaves in order, None in the place of those left out.
    tree: its structure.
  """

  leaves: tuple[Any, ...]
  tree: Any

  def __call__(self, parts: Mapping[int, Any]) -> Any:
    """The tree with leaves for those left out, by position."""
    leaves = [parts.get(i, leaf) for i, leaf in enumerate(self.leaves)]
    return jax.tree.unflatten(self.tree, leaves)


def separate(
  tree: Any, take: Callable[[Any], bool], is_leaf: Any = None
) -> tuple[dict[int, Any], Static]:
  """Takes some leaves out of a tree, by position, and what puts them back."""
  leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
  parts = {i: leaf for i, leaf in enumerate(leaves) if take(leaf)}
  rest = (None if i in parts else leaf for i, leaf in enumerate(leaves))
  return parts, Static(tuple(rest), structure)


def _is_array(leaf: Any) -> bool:
  kinds = (jax.Array, np.ndarray, np.generic, float, complex)
  return isinstance(leaf, kinds) and not isinstance(leaf, bool)


class Call:
  """A traced call of a function with feedback; ``plan`` comes first."""

  log: kinds.Log
  _plan: Plan
  _values: list[Value]
  _rules: list[FeedbackRule | None]
  _results: list[int]  # Where arrays stand in the result.
  _finish: Static

  def __init__(
    self,
    f: 'FeedbackFunction',
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
  ):
    self._f, self._params = f, by_path(params)
    self._arrays, rebuilt = separate((params, args, kwargs), _is_array)

    def flat(*arrays):
      parts = dict(zip(self._arrays, arrays, strict=True))
      given, positional, named = rebuilt(parts)
      results = f.function(given, *positional, **named)
      parts, self._finish = separate(results, _is_array)
      self._results = list(parts)
      return list(parts.values())

    self._closed = jax.make_jaxpr(flat)(*self._arrays.values())
    f.rules.check_used(self._params)

  def plan(
    self,
    states: Mapping[str, Any] | None,
    *,
    checked: bool = True,
    mirrored: bool = False,
  ) -> 'Call':
    """Decides every equation.

    Args:
      states: {path: state}; None for a plan as if all were there.
      checked: whether a problem is an error.
      mirrored: whether it is the weight mirror's noise phase.

    Returns:
      This call.
    """
    paths = list(self._params)
    self._rules, self._values = [], []
    for i, array in self._arrays.items():
      if i < len(paths):
        value = self._parameter(paths[i], array, states, mirrored)
      else:
        value = Value(array, None, CONSTANT if _is_key(array) else DATA)
      self._values.append(value)
    each = [value.kind for value in self._values]
    self._plan, self.log = kinds.plan(self._closed, each)
    if checked:
      self._check(states)
    return self

  def _parameter(self, path, leaf, states, mirrored) -> Value:
    """A parameter as a value, with its R."""
    f, plain = self._f, Value(leaf, None, CONSTANT.having(Trait.HIDDEN))
    # A complex weight has no feedback: it is followed, to be refused.
    if not is_weight(path, leaf, jnp.inexact) or f.rules.excludes(path):
      return plain
    rule = f.rules.find(path)
    if rule is None or not is_weight(path, leaf):
      return Value(leaf, None, Kind(Level.WEIGHT, (path,)))
    known = (i for i, r in enumerate(self._rules) if _same(r, rule))
    number = next(known, len(self._rules))
    if number == len(self._rules):
      self._rules.append(rule)
    R = None
    has_R = rule.keeps_state and (states is None or path in states)
    if has_R and states is not None:
      W = jnp.asarray(leaf)
      learns = mirrored or rule.learning is not None
      R = rule.expand(W, f.guarded(path, rule, states[path], learns))
      shape = None if R is None else R.shape
      if shape != W.shape:
        raise FeedbackError(
          f'the feedback of {f.prefix + path!r} has shape {shape}, '
          f'but the weight has {W.shape}: make the feedback anew with init.'
        )
    kind = Kind(Level.WEIGHT, (path,), number, rule.keeps_state, has_R)
    return Value(leaf, R, kind)

  def _check(self, states: Mapping[str, Any] | None) -> None:
    """Raises if a weight cannot have feedback, or its state is missing."""
    f, uses = self._f, self.log.uses
    missing = [
      f.prefix + path
      for use in uses
      for path in use.paths
      if use.how == 'product' and states is not None and path not in states
      for rule in (f.rules.find(path),)
      if rule is not None and rule.keeps_state
    ]
    if missing:
      raise FeedbackError(
        f'the feedback of {", ".join(map(repr, dict.fromkeys(missing)))} is '
        'missing: pass what init returned for these parameters and this call.'
      )
    found = [*self.log.problems, *self._without_fan()]
    if found:
      problems = '\n  '.join(dict.fromkeys(found))
      inside = f' in {f.prefix[:-1]!r}' if f.prefix else ''
      raise FeedbackError(
        f'weights that cannot be given feedback{inside}:\n  {problems}\n'
        'Exclude them (exclude=PATH) to train them by plain backpropagation, '
        'or rewrite the operation as a product of a weight and data.'
      )
    record = _RECORD.get()
    if record is not None:
      for row in self.rows():
        record.append(row._replace(path=f.prefix + row.path))

  def _without_fan(self) -> Iterator[str]:
    """Problems of rules that need the sizes of a product that has none."""
    for use in self.log.uses:
      rules = [self._f.rules.find(path) for path in use.paths]
      rule = next((r for r in rules if r is not None and r.needs_fan), None)
      if use.how == 'product' and rule is not None and _fan(use) is None:
        yield (
          f'{" and ".join(map(repr, use.paths))} meets data in an outer '
          f'product written by hand, which has no fan-in for {rule!r} '
          f'({kinds.where(use.eqn)})'
        )

  def rows(self) -> list['Row']:
    """How each weight is used, in the order of use; biases are left out."""
    rules = self._f.rules
    uses: dict[str, list[kinds.Use]] = {}
    for use in self.log.uses:
      for path in use.paths:
        uses.setdefault(path, []).append(use)
    for path, W in self._params.items():
      if is_weight(path, W, jnp.inexact):
        uses.setdefault(path, [])
    rows = []
    for path, each in uses.items():
      how = ', '.join(dict.fromkeys(use.how for use in each))
      how = how or ('excluded' if rules.excludes(path) else 'unused')
      row = Row(path, jnp.shape(self._params[path]), None, how)
      product = next((use for use in each if use.how == 'product'), None)
      if product is not None:
        row = row._replace(rule=rules.find(path), fan=_fan(product))
      rows.append(row)
    return rows

  def V(self, op: Product, weight: Value) -> jax.Array:
    """The feedback weights of a product."""
    rule: Any = self._rules[weight.kind.rule]
    # A second reverse pass differentiates the first one, with its V. What V
    # learns is for R alone.
    W = weight.x if rule.learning is None else lax.stop_gradient(weight.x)
    return rule.weights(W, weight.R, op.fan(W.shape))

  def _multiply(self, op, xs, weight: Value, step: Step) -> jax.Array:
    """A product with feedback."""
    V = self.V(op, weight)
    op = dataclasses.replace(op, rows=self._f.row_convolution)
    rule: Any = self._rules[weight.kind.rule]
    learning, extra, observer = rule.learning, None, _OBSERVER.get()
    if observer is not None:
      path = self._f.prefix + ' + '.join(weight.kind.paths)
      V, learning, extra = observer(path, op, weight.x, V, step.eqn)
    return asymmetric(op, xs, weight.x, V, learning, extra)

  def evaluate(self, multiply: Multiply | None = None) -> Any:
    """The result of the call; ``multiply`` evaluates its products."""
    values = _evaluate(self._plan, self._values, multiply or self._multiply)
    results = (value.x for value in values)
    return self._finish(dict(zip(self._results, results, strict=True)))


def _fan(use: kinds.Use) -> Fan | None:
  """Sizes of a product."""
  shape = use.eqn.invars[use.at].aval.shape
  return _product(use.eqn, use.at).fan(shape)


@dataclasses.dataclass(frozen=True)
class FeedbackFunction:
  """A function with feedback, as ``with_feedback`` returns it.

  Attributes:
    function: the function.
    rules: its rules by path.
    row_convolution: see ``with_feedback``.
    prefix: path of the parameters in a larger model.
  """

  function: Callable[..., Any]
  rules: Rules
  row_convolution: bool = False
  prefix: str = ''

  def init(self, key: jax.Array, params: Any, *args, **kwargs) -> Any:
    """Makes the feedback: the state of each weight's rule.

    Args:
      key: a PRNG key.
      params: the parameters.
      *args, **kwargs: if given, arguments to call the function with: weights
        that it uses in no product, such as embeddings, then get no state.

    Returns:
      A tree parallel to ``params``. In the place of a weight is
      ``{name of its rule: state}``, or None where the rule keeps nothing.
    """
    call = Call(self, params, args, kwargs) if args or kwargs else None
    return _parallel(params, self.init_states(key, params, call))

  def init_states(
    self, key: jax.Array, params: Any, call: Call | None = None
  ) -> dict[str, dict[str, Any]]:
    """{path: {name of the rule: state}}; see ``init``."""
    weights = self._weights_of(params)
    if call is not None:
      others, multiplied = set(), set()
      for use in call.plan(None).log.uses:
        (multiplied if use.how == 'product' else others).update(use.paths)
      for path in others - multiplied:
        weights.pop(path, None)
    states = {}
    for path, W in weights.items():
      rule = self.rules.find(path)
      if rule is not None and rule.keeps_state:
        state = rule.init(fold_path(key, path), jnp.asarray(W))
        states[path] = {rule.state_name: state}
    return states

  def __call__(self, params: Any, feedback: Any, *args, **kwargs) -> Any:
    """Calls the function; its backward pass uses feedback weights.

    ``feedback`` is what ``init`` returned.

    Raises:
      FeedbackError: if a weight is used in a way for which no feedback is
        defined; the message names all of them.
    """
    states = self.states(params, feedback)
    return Call(self, params, args, kwargs).plan(states).evaluate()

  def weights(self, params: Any, feedback: Any, *args, **kwargs) -> Any:
    """Returns V of each weight, as its rule computes it from the parameter.

    If the function masks or normalizes a weight first, its product uses the V
    of the result. NuSF and named scales depend on the product: pass arguments
    to call the function with, or kernels count as in Flax's layout.

    Returns:
      A tree parallel to ``params``, with None for parameters without feedback.
    """
    states = self.states(params, feedback)
    fans = None
    if args or kwargs:
      rows = Call(self, params, args, kwargs).plan(states).rows()
      fans = {row.path: row.fan for row in rows if row.rule}
    return _parallel(params, self.weights_by_path(params, states, fans))

  def weights_by_path(
    self,
    params: Any,
    states: Mapping[str, Any],
    fans: Mapping[str, Fan | None] | None = None,
  ) -> dict[str, jax.Array]:
    """{path: V}; of the paths of ``fans`` alone, if given."""
    V = {}
    for path, W in self._weights_of(params).items():
      rule = self.rules.find(path)
      if rule is None or (rule.keeps_state and path not in states):
        continue
      if fans is not None and path not in fans:
        continue
      W = lax.stop_gradient(jnp.asarray(W))
      R = rule.expand(W, states.get(path))
      V[path] = rule.weights(W, R, fans[path] if fans else None)
    return V

  def mirror(
    self,
    key: jax.Array,
    params: Any,
    feedback: Any,
    *args,
    decay: float = 0.0,
    **kwargs,
  ) -> Any:
    r"""Gradient of the weight mirror's noise phase, for the feedback.

    At each product noise :math:`x \sim N(0, 1)` replaces the input and

    .. math:: dR = -x^T (x W) / n + \mathrm{decay} \cdot R

    with the mean over the n rows of x. It uses no error and no label.

    Args:
      key: a PRNG key for the noise.
      params: the parameters.
      feedback: what ``init`` returned.
      *args, **kwargs: arguments to call the function with, for their shapes.
      decay: weight decay of R; R converges to W / decay.

    Returns:
      A tree like the learned part of ``feedback``, see ``partition``, for
      an optimizer.
    """
    learned, fixed = partition(feedback)

    def total(learned):
      states = self.states(params, combine(learned, fixed))
      call = Call(self, params, args, kwargs).plan(states, mirrored=True)

      def multiply(op, xs, weight, step):
        noise = fold_path(key, ' '.join(weight.kind.paths))
        V, extra = call.V(op, weight), jax.random.key_data(noise)
        return asymmetric(op, xs, weight.x, V, _mirror, extra)

      leaves = filter(_is_array, jax.tree.leaves(call.evaluate(multiply)))
      return sum(jnp.sum(y.astype(jnp.float32)) for y in leaves)

    return jax.tree.map(
      lambda g, R: g + jnp.asarray(decay, R.dtype) * R,
      jax.grad(total)(learned),
      learned,
    )

  def rows(self, params: Any, *args, **kwargs) -> list[Row]:
    """How each weight is used, in the order of use; biases are left out."""
    return Call(self, params, args, kwargs).plan(None, checked=False).rows()

  def table(self, params: Any, *args, **kwargs) -> str:
    """Returns the rule and the use of each weight as text."""
    return format_table(self.rows(params, *args, **kwargs))

  def states(self, params: Any, feedback: Any) -> dict[str, Any]:
    """{path: state} from a tree parallel to the parameters."""
    leaves, tree = jax.tree.flatten(params)
    none = [None] * len(leaves)
    stored = none if feedback is None else tree.flatten_up_to(feedback)
    found = zip(by_path(params), stored, strict=True)
    return self.check_states({p: s for p, s in found if s is not None})

  def check_states(self, stored: Mapping[str, Any]) -> dict[str, Any]:
    """{path: state} from {path: {name of the rule: state}}."""
    states = {}
    for path, each in stored.items():
      rule = self.rules.find(path)
      if rule is not None and rule.keeps_state:
        states[path] = _check_state(self.prefix + path, rule, each)
    return states

  def guarded(
    self, path: str, rule: FeedbackRule, state: Any, learns: bool
  ) -> Any:
    """A state of which only what learns can be differentiated."""
    what = f'the feedback of {self.prefix + path!r}, which {rule!r} keeps,'

    def guard(keys, x):
      name = f'{rule.state_name}/{path_of(keys)}'
      free = learns and is_learned(name)
      return x if free else undifferentiated(what, x)

    return jax.tree_util.tree_map_with_path(guard, state)

  def _weights_of(self, params: Any) -> dict[str, Any]:
    """Parameters that can have feedback."""
    leaves = by_path(params)
    self.rules.check_used(leaves)
    return {
      path: leaf
      for path, leaf in leaves.items()
      if is_weight(path, leaf) and not self.rules.excludes(path)
    }


def _mirror(op, xs, W, V, g, dW, extra):
  """The gradient of V from noise in the place of the input."""
  noise = jax.random.normal(
    jax.random.wrap_key_data(extra), xs[0].shape, xs[0].dtype
  )
  noisy = (noise, *xs[1:])
  y = op(noisy, W)
  features = op.feature_axes(y.ndim, W.ndim) or (-1,)
  rows = y.size // math.prod(y.shape[axis] for axis in features)
  dV = op.weight_gradient(noisy, W, y)
  return -dV / jnp.asarray(rows, dV.dtype), None


def _is_key(array: Any) -> bool:
  dtype = getattr(array, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _same(a: Any, b: Any) -> bool:
  """Whether two rules are one; those with arrays in them are themselves."""
  if a is b:
    return True
  try:
    return hash(a) == hash(b) and a == b
  except TypeError:
    return False


def _parallel(params: Any, leaves: Mapping[str, Any]) -> Any:
  """A tree like ``params`` of what is given by path, and None."""
  tree = jax.tree.structure(params)
  return jax.tree.unflatten(tree, [leaves.get(p) for p in by_path(params)])


def with_feedback(
  function: Callable[..., Any],
  rules: FeedbackRule | Mapping[str, FeedbackRule],
  exclude: str | Sequence[str] = (),
  *,
  row_convolution: bool = False,
) -> FeedbackFunction:
  """``symjax_bp.with_feedback`` for functions."""
  leaves = jax.tree.leaves(function)
  if not callable(function) or any(isinstance(x, jax.Array) for x in leaves):
    raise TypeError(
      'target must be a function of its parameters, such as '
      f'lambda model, x: model(x), or a Flax module, not {type(function)}.'
    )
  return FeedbackFunction(
    function, Rules.create(rules, exclude), row_convolution
  )
