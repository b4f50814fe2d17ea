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
import textwrap
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
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
      exclude = (exclude,)
    exclude = tuple(exclude)
    for pattern in (*pairs, *exclude):
      try:
        re.compile(pattern)
      except (re.error, TypeError) as error:
        raise ValueError(
          f'{pattern!r} is not a regular expression: {error}.'
        ) from error
    return cls(tuple(pairs.items()), exclude)

  def resolve(self, paths: Iterable[str]) -> dict[str, FeedbackRule | None]:
    """{path: its rule, or None if it is excluded}, without those of no rule.

    Raises:
      ValueError: if an expression is found in none of the paths.
    """
    paths, excluded = sorted(paths), tuple((p, None) for p in self.exclude)
    for pattern, _ in self.pairs + excluded:
      if not any(re.search(pattern, path) for path in paths):
        raise ValueError(
          f'{pattern!r} matches no parameter; their paths are {paths}.'
        )
    rules = {}
    for path in paths:
      for pattern, rule in excluded + self.pairs:
        if re.search(pattern, path):
          rules.setdefault(path, rule)
    return rules


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
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return distinct((path_of(keys), leaf) for keys, leaf in leaves)


def distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """A dictionary of paths and leaves, in which no path may be twice."""
  leaves = {}
  for path, leaf in pairs:
    if path in leaves:
      raise ValueError(f'two parameters have the path {path!r}: rename one.')
    leaves[path] = leaf
  return leaves


def is_weight(path: str, leaf: Any, kind: Any = jnp.floating) -> bool:
  """Whether a parameter can have a rule: floating, no bias, no scale."""
  # Equinox keeps functions and numbers among the parameters.
  if _is_named(path) or not is_array(leaf):
    return False
  return jnp.issubdtype(jax.dtypes.result_type(leaf), kind)


def _is_named(path: str) -> bool:
  return path.rpartition('/')[2] in _NO_WEIGHTS


def differentiable(
  params: Any,
) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
  """The leaves that have gradients, by path, and what puts them back."""
  leaves, structure = by_path(params), jax.tree.structure(params)
  taken = {path: x for path, x in leaves.items() if is_real(x)}

  def rebuilt(taken):
    return structure.unflatten((leaves | taken).values())

  return taken, rebuilt


def fold_path(key: jax.Array, path: str) -> jax.Array:
  """A key for one parameter."""
  digest = hashlib.sha256(path.encode()).digest()
  return jax.random.fold_in(key, int.from_bytes(digest[:4], 'little'))


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
  is_key = _is_key(step) or jnp.ndim(step) > 0

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
  """An array, and the R beside it if it is a weight that has one."""

  x: Any
  R: Any = None


# Evaluates a product: (product, its other operands, weight, step) -> y.
Multiply = Callable[[Product, list[Any], Value, Step], jax.Array]


def _fitted(values: Iterable[Value], each: Iterable[Kind]) -> list[Value]:
  """Values as the kinds of a loop or a branch.

  R may be lost there; a constant in the place of a weight is its own R.
  """
  return [
    Value(x, (x if R is None else R) if kind.has_R else None)
    for (x, R), kind in zip(values, each, strict=True)
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
  constants = zip(jaxpr.constvars, map(Value, plan.closed.consts), strict=True)
  known = dict(zip(jaxpr.invars, values, strict=True)) | dict(constants)

  def read(var: Any) -> Value:
    return Value(var.val) if hasattr(var, 'val') else known[var]

  for step in plan.steps:
    eqn = step.eqn
    inputs = [read(var) for var in eqn.invars]
    with kinds.source_context(eqn), eqn.ctx.manager:
      outputs = _step(step, inputs, multiply)
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [read(var) for var in jaxpr.outvars]


def _step(step: Step, inputs: list[Value], multiply: Multiply) -> list[Value]:
  eqn, action = step.eqn, step.action
  if action == 'enter':
    return _enter(step, inputs, multiply)
  xs = [value.x for value in inputs]
  if action == 'product':
    del xs[step.at]
    return [Value(multiply(_product(eqn, step.at), xs, inputs[step.at], step))]
  results = _bind(eqn, xs)
  if action == 'through':
    Rs = [R for _, R in inputs]
  elif not any(kind.has_R for kind in step.outputs):
    Rs = [None] * len(results)
  elif action == 'move':
    Rs = _move(eqn, inputs)
  else:
    # lax broadcasts axes of size 1 by itself, as under vmap.
    R = jnp.broadcast_to(_kept(step, inputs), jnp.shape(results[0]))
    if action == 'mask':  # R is 0 where a constant masks the weight.
      factor = next(x for x, R in inputs if R is None)
      kept = (jnp.asarray(factor) != 0).astype(R.dtype)
      R *= jnp.broadcast_to(kept, R.shape)
    Rs = [R] * len(results)
  triples = zip(results, Rs, step.outputs, strict=True)
  return [Value(x, R if kind.has_R else None) for x, R, kind in triples]


def _kept(step: Step, inputs: Sequence[Value]) -> Any:
  """The R that arithmetic keeps: that of the weight, not of its scale."""
  each = [
    (kind.paths, R)
    for kind, (_, R) in zip(step.inputs, inputs, strict=True)
    if R is not None
  ]
  return dict(each[::-1]).get(step.outputs[0].paths, each[0][1])


def _product(eqn: Any, at: int) -> Product:
  return Product.create(eqn.primitive.bind, eqn.params, at=at)


def _move(eqn: Any, inputs: Sequence[Value]) -> list[Any]:
  """R after a movement of its weight; constants stay where they were put."""
  if eqn.primitive.name == 'convert_element_type' and not jnp.issubdtype(
    eqn.params['new_dtype'], jnp.floating
  ):
    return [inputs[0].R]  # Integers are for the weight: a quantization.
  dtype = next(R.dtype for _, R in inputs if R is not None)

  def moved(x, R):
    if R is not None:
      return R
    x = jnp.asarray(x)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  arrays = [moved(*value) for value in inputs]
  if eqn.primitive.name == 'pad':
    arrays[1] = jnp.zeros_like(arrays[1])
  return _bind(eqn, arrays)


def _enter(step: Step, inputs: list[Value], multiply: Multiply) -> list[Value]:
  """Evaluates the functions inside an equation of control flow."""
  name, params = step.eqn.primitive.name, step.eqn.params
  functions = [
    lambda values, plan=plan: _fitted(
      _evaluate(plan, values, multiply), step.outputs
    )
    for plan in step.inner
  ]
  if name == 'cond':
    return lax.switch(inputs[0].x, functions, inputs[1:])
  (function,) = functions
  if name == 'remat2':
    options = {key: params[key] for key in ('prevent_cse', 'policy')}
    return jax.checkpoint(function, **options)(inputs)
  if name == 'shard_map':  # A weight and its R are placed alike.
    return jax.shard_map(
      function,
      mesh=params['mesh'],
      in_specs=(list(params['in_specs']),),
      out_specs=list(params['out_specs']),
      check_vma=params['check_vma'],
      axis_names=set(params['newly_manual_axes']),
    )(inputs)
  if name == 'scan':
    return _scan(step, inputs, function)
  return function(inputs)  # jit and other calls: inlined


def _scan(step: Step, inputs: list[Value], function) -> list[Value]:
  params, (plan,) = step.eqn.params, step.inner
  constants, carry = kinds.scan_counts(params)
  end = constants + carry
  fixed, initial, each = inputs[:constants], inputs[constants:end], inputs[end:]

  def iterate(carried, x):
    results = function([*fixed, *carried, *x])
    return results[:carry], results[carry:]

  carried, stacked = lax.scan(
    iterate,
    _fitted(initial, plan.inputs[constants:end]),
    each,
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carried, *stacked]


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
      'added', 'looked up', 'input' (a product's input is computed from it and
      constants alone), 'returned' (no feedback is needed), 'excluded', or
      'unused'.
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
  # Without a call it is not known that a weight meets data in a product.
  is_known = all(row.use for row in rows)
  lines.append(
    f'{len(asymmetric)} of {len(rows)} weights with '
    f'{"feedback" if is_known else "a rule"}: '
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


def is_array(leaf: Any) -> bool:
  """Whether a leaf is an array, or the shape of one."""
  return hasattr(leaf, 'dtype')


def is_real(leaf: Any) -> bool:
  """Whether a leaf is an array that has a gradient."""
  return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def separate(
  tree: Any, take: Callable[[Any], bool] = is_array, is_leaf: Any = None
) -> tuple[dict[int, Any], Static]:
  """Takes some leaves out of a tree, by position, and what puts them back."""
  leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
  parts = {i: leaf for i, leaf in enumerate(leaves) if take(leaf)}
  rest = (None if i in parts else leaf for i, leaf in enumerate(leaves))
  return parts, Static(tuple(rest), structure)


def _is_data(leaf: Any) -> bool:
  arrays = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)
  return isinstance(leaf, (*arrays, float, complex))


class Call:
  """A traced call of a function with feedback; ``plan`` comes first.

  Attributes:
    params: {path: parameter}.
    rules: their rules by path, see ``Rules.resolve``.
    uses: how weights meet data.
  """

  uses: list[kinds.Use]
  _plan: Plan
  _values: list[Value]
  _results: Mapping[int, Any]  # Shapes, by where arrays stand in the result.
  _finish: Static

  def __init__(
    self,
    f: 'FeedbackFunction',
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
  ):
    self._f, self.params = f, by_path(params)
    self.rules = f.rules.resolve(self.params)
    arrays, rebuilt = separate((params, args, kwargs), _is_data)
    # Numbers of a model, such as a dropout rate, stay numbers.
    numbers = {
      i: arrays.pop(i)
      for i in range(len(self.params))
      if i in arrays and not is_array(arrays[i])
    }
    self._arrays = arrays

    def flat(arrays):
      given, positional, named = rebuilt(numbers | arrays)
      results = f.function(given, *positional, **named)
      parts, self._finish = separate(results, _is_data)
      return parts

    self._closed, self._results = jax.make_jaxpr(flat, return_shape=True)(
      arrays
    )

  def plan(
    self, states: Mapping[str, Any] | None, *, mirrored: bool = False
  ) -> 'Call':
    """Decides every equation.

    Args:
      states: {path: {name of the rule: state}}; None for a plan as if all were
        there.
      mirrored: whether it is the weight mirror's noise phase.

    Returns:
      This call.
    """
    paths = list(self.params)
    self._values, each = [], []
    for i, array in self._arrays.items():
      kind, R = CONSTANT if _is_key(array) else DATA, None
      if i < len(paths):
        kind = self._kind(paths[i], states)
        if kind.has_R and states is not None:
          R = self._R(paths[i], states[paths[i]], mirrored)
      self._values.append(Value(array, R))
      each.append(kind)
    self._plan, log = kinds.plan(self._closed, each)
    self.uses = log.uses
    self._check(states, log.problems)
    return self

  def _excludes(self, path: str) -> bool:
    return path in self.rules and self.rules[path] is None

  def _kind(self, path: str, states: Mapping[str, Any] | None) -> Kind:
    leaf, rule = self.params[path], self.rules.get(path)
    # A complex weight has no feedback: it is followed, to be refused.
    if self._excludes(path) or not is_real(leaf):
      return CONSTANT.having(Trait.HIDDEN)
    if _is_named(path):
      return CONSTANT.having(Trait.HIDDEN, Trait.NAMED, paths=(path,))
    kind = Kind(Level.WEIGHT, (path,))
    if rule is None or not is_weight(path, leaf):
      return kind
    has_R = rule.keeps_state and (states is None or path in states)
    identity = _identity(rule)
    return kind.having(rule=identity, needs_R=rule.keeps_state, has_R=has_R)

  def _R(self, path: str, stored: Any, mirrored: bool) -> Any:
    f, W = self._f, jnp.asarray(self.params[path])
    rule: Any = self.rules[path]
    what = f'the feedback of {f.prefix + path!r}'
    learns = mirrored or rule.learning is not None

    def guard(keys, x):
      if learns and is_learned(f'{rule.state_name}/{path_of(keys)}'):
        return x
      return undifferentiated(f'{what}, which {rule!r} keeps,', x)

    state = f.state_of(path, rule, stored)
    guarded, problem = jax.tree_util.tree_map_with_path(guard, state), None
    try:
      R = rule.expand(W, guarded)
    except (IndexError, TypeError, ValueError) as error:
      R, problem = None, error
    if R is None or R.shape != W.shape:
      shapes = ' and '.join(str(jnp.shape(x)) for x in jax.tree.leaves(state))
      raise FeedbackError(
        f'{what} has shape {shapes}, but the weight has {W.shape}: make the '
        'feedback anew with init, under vmap if vmap maps the weights.'
      ) from problem
    return R

  def products(self) -> Iterator[tuple[str, FeedbackRule, kinds.Use]]:
    """The products with feedback: path and rule of the weight, and the use."""
    for use in self.uses:
      for path in use.paths:
        rule = self.rules.get(path)
        if use.how == 'product' and rule is not None:
          yield path, rule, use

  def _check(self, states: Mapping[str, Any] | None, problems: list[str]):
    """Raises if a weight cannot have feedback, or its state is missing."""
    prefix = self._f.prefix
    missing = [
      repr(prefix + path)
      for path, rule, _ in self.products()
      if states is not None and rule.keeps_state and path not in states
    ]
    if missing:
      raise FeedbackError(
        f'the feedback of {", ".join(dict.fromkeys(missing))} is missing: pass '
        'what init returned for these parameters and this call.'
      )
    problems = problems + [
      f'{kinds.named(use.paths)} meets data in an outer product '
      f'written by hand, which has no fan-in for {rule!r} '
      f'({kinds.where(use.eqn)})'
      for _, rule, use in self.products()
      if rule.needs_fan and _fan(use) is None
    ]
    if problems:
      found = '\n  '.join(dict.fromkeys(problems))
      inside = f' in {prefix[:-1]!r}' if prefix else ''
      raise FeedbackError(
        f'weights that cannot be given feedback{inside}:\n  {found}\n'
        'Exclude them (exclude=PATH) to train them by plain backpropagation, '
        'or rewrite the operation as a product of a weight and data.'
      )
    record = _RECORD.get()
    if record is not None:
      record += [row._replace(path=prefix + row.path) for row in self.rows()]

  def rows(self) -> list['Row']:
    """How each weight is used, in the order of use; biases are left out."""
    uses: dict[str, list[str]] = {}
    for use in self.uses:
      for path in use.paths:
        uses.setdefault(path, []).append(use.how)
    for path, W in self.params.items():
      if is_weight(path, W, jnp.inexact):
        rest = 'excluded' if self._excludes(path) else 'unused'
        uses.setdefault(path, [rest])
    first = {}
    for path, rule, use in self.products():
      first.setdefault(path, (rule, use))
    rows = []
    for path, each in uses.items():
      rule, use = first.get(path, (None, None))
      how = ', '.join(dict.fromkeys(each))
      shape = jnp.shape(self.params[path])
      rows.append(Row(path, shape, rule, how, use and _fan(use)))
    return rows

  def V(self, op: Product, weight: Value, step: Step) -> jax.Array:
    """The feedback weights of a product."""
    rule: Any = self.rules[step.weight.paths[0]]
    # A second reverse pass differentiates the first one, with its V. What V
    # learns is for R alone.
    W = weight.x if rule.learning is None else lax.stop_gradient(weight.x)
    return rule.weights(W, weight.R, op.fan(W.shape))

  def _multiply(self, op, xs, weight: Value, step: Step) -> jax.Array:
    """A product with feedback."""
    rule: Any = self.rules[step.weight.paths[0]]
    V, learning, extra = self.V(op, weight, step), rule.learning, None
    op = dataclasses.replace(op, rows=self._f.row_convolution)
    observer = _OBSERVER.get()
    if observer is not None:
      path = self._f.prefix + ' + '.join(step.weight.paths)
      V, learning, extra = observer(path, op, weight.x, V, step.eqn)
    return asymmetric(op, xs, weight.x, V, learning, extra)

  def result_kinds(self) -> Any:
    """The result with the kind of each array in its place."""
    outputs = self._plan.outputs
    return self._finish(dict(zip(self._results, outputs, strict=True)))

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
    rules: gives the rule of each parameter by its path: ``Rules``.
    row_convolution: see ``with_feedback``.
    prefix: path of the parameters in a larger model.
  """

  function: Callable[..., Any]
  rules: Any
  row_convolution: bool = False
  prefix: str = ''

  def init(self, key: jax.Array, params: Any, /, *args, **kwargs) -> Any:
    """Makes the feedback: the state of each weight's rule.

    Args:
      key: a PRNG key.
      params: the parameters.
      args, kwargs: if given, arguments to call the function with: weights
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
    rows = call.plan(None).rows() if call else ()
    skipped = {row.path for row in rows if not row.rule and row.use != 'unused'}
    return {
      path: {rule.state_name: rule.init(fold_path(key, path), jnp.asarray(W))}
      for path, W, rule in self._weights(params)
      if rule.keeps_state and path not in skipped
    }

  def __call__(self, params: Any, feedback: Any, /, *args, **kwargs) -> Any:
    """Calls the function; its backward pass uses feedback weights.

    ``feedback`` is what ``init`` returned.

    Raises:
      FeedbackError: if a weight is used in a way for which no feedback is
        defined; the message names all of them.
    """
    states = self._states(params, feedback)
    return Call(self, params, args, kwargs).plan(states).evaluate()

  def weights(self, params: Any, feedback: Any, /, *args, **kwargs) -> Any:
    """Returns V of each weight, as its rule computes it from the parameter.

    If the function masks or normalizes a weight first, its product uses the V
    of the result. NuSF and named scales depend on the product: pass arguments
    to call the function with, or kernels count as in Flax's layout.

    Returns:
      A tree parallel to ``params``, with None for parameters without feedback.
    """
    states = self._states(params, feedback)
    rows = None
    if args or kwargs:
      rows = Call(self, params, args, kwargs).plan(states).rows()
    return _parallel(params, self.weights_by_path(params, states, rows))

  def weights_by_path(
    self,
    params: Any,
    states: Mapping[str, Any],
    rows: Sequence[Row] | None = None,
  ) -> dict[str, jax.Array]:
    """{path: V}; of the weights with feedback in ``rows`` alone, if given."""
    fans = {row.path: row.fan for row in rows or () if row.rule}
    V = {}
    for path, W, rule in self._weights(params):
      if rule.keeps_state and path not in states:
        continue
      if rows is None or path in fans:
        stored, W = states.get(path), lax.stop_gradient(jnp.asarray(W))
        state = self.state_of(path, rule, stored) if rule.keeps_state else None
        R = rule.expand(W, state)
        V[path] = rule.weights(W, R, fans.get(path))
    return V

  def mirror(
    self,
    key: jax.Array,
    params: Any,
    feedback: Any,
    /,
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
      args, kwargs: arguments to call the function with, for their shapes.
      decay: weight decay of R; R converges to W / decay.

    Returns:
      A tree like the learned part of ``feedback``, see ``partition``, for
      an optimizer.
    """
    learned, fixed = partition(feedback)
    call = Call(self, params, args, kwargs)

    def multiply(op, xs, weight, step):
      noise = fold_path(key, ' '.join(step.weight.paths))
      V, extra = call.V(op, weight, step), jax.random.key_data(noise)
      learning = functools.partial(_mirror, jax.random.key_impl(noise))
      return asymmetric(op, xs, weight.x, V, learning, extra)

    def total(learned):
      states = self._states(params, combine(learned, fixed))
      y = call.plan(states, mirrored=True).evaluate(multiply)
      leaves = filter(_is_data, jax.tree.leaves(y))
      return sum(jnp.sum(y.astype(jnp.float32)) for y in leaves)

    return jax.tree.map(
      lambda g, R: g + jnp.asarray(decay, R.dtype) * R,
      jax.grad(total)(learned),
      learned,
    )

  def rows(self, params: Any, /, *args, **kwargs) -> list[Row]:
    """How each weight is used, in the order of use; biases are left out."""
    return Call(self, params, args, kwargs).plan(None).rows()

  def table(self, params: Any, /, *args, **kwargs) -> str:
    """Returns the rule and the use of each weight as text.

    Raises:
      FeedbackError: as the call does.
    """
    return format_table(self.rows(params, *args, **kwargs))

  def _states(self, params: Any, feedback: Any) -> dict[str, Any]:
    """{path: {name of the rule: state}} from a tree like the parameters."""
    if feedback is None:
      return {}
    try:
      stored = jax.tree.structure(params).flatten_up_to(feedback)
    except ValueError as error:
      found = textwrap.shorten(str(error), 300, placeholder='...')
      raise FeedbackError(
        'feedback must be the tree that init returned for these parameters, or '
        f'None if no rule keeps a state: {found}'
      ) from error
    found = zip(by_path(params), stored, strict=True)
    return {path: state for path, state in found if state is not None}

  def state_of(self, path: str, rule: FeedbackRule, stored: Any) -> Any:
    """The rule's state from {name of the rule that made it: state}."""
    if not isinstance(stored, Mapping):
      raise FeedbackError(
        f'the feedback of {self.prefix + path!r} must be what init returned, '
        f'not {type(stored).__name__}.'
      )
    if rule.state_name in stored:
      return stored[rule.state_name]
    raise FeedbackError(
      f'the feedback of {self.prefix + path!r} was made by '
      f'{" and ".join(stored)}, but its rule is {rule!r}: make the feedback '
      'anew with init.'
    )

  def _weights(self, params: Any) -> Iterator[tuple[str, Any, FeedbackRule]]:
    """Path, leaf and rule of each parameter that can have feedback."""
    leaves = by_path(params)
    rules = self.rules.resolve(leaves)
    for path, leaf in leaves.items():
      rule = rules.get(path)
      if rule is not None and is_weight(path, leaf):
        yield path, leaf, rule


def _mirror(impl, op, xs, W, V, g, dW, extra):
  """The gradient of V from noise in the place of the input."""
  key = jax.random.wrap_key_data(extra, impl=impl)
  noise = jax.random.normal(key, xs[0].shape, xs[0].dtype)
  noisy = (noise, *xs[1:])
  y = op(noisy, W)
  features = op.feature_axes(y.ndim, W.ndim) or (-1,)
  rows = y.size // math.prod(y.shape[axis] for axis in features)
  dV = op.weight_gradient(noisy, W, y)
  return -dV / jnp.asarray(rows, dV.dtype), None


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(getattr(leaf, 'dtype', bool), jax.dtypes.prng_key)


def _identity(rule: FeedbackRule) -> Any:
  """Equal for equal rules; those with arrays in them are themselves."""
  try:
    hash(rule)
  except TypeError:
    return id(rule)
  return rule


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
