"""What each array of a traced function is: constant, weight or data.

``symjax_bp.transform`` sends every weight, together with its rule, to the
products in which it meets data. This module decides, for each equation of a
jaxpr and from kinds alone, what has to happen there. Four kinds form a chain;
an operation on several arrays gives the largest:

==========  ==================================================================
constant    independent of parameters with a rule and of the arguments
statistic   a sum, maximum or comparison over a weight: a norm, a mask
weight      computed from parameters by movement and arithmetic entry by entry
data        everything that depends on the arguments
==========  ==================================================================

A product (``dot_general``, a convolution, an outer product written with ``*``)
of a weight and data gets feedback. Sums, scales and look-ups need none. Every
other meeting of a weight and data is a problem, and so is an equation that JAX
may add in the future: it can be refused, but it cannot be wrong.

A weight may carry an array R of its own shape, from which its rule computes V.
R follows every movement of the weight (reshape, transpose, slice, gather, ...)
and stays as it is under arithmetic. Two weights combine if they have one rule.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

# Private, and only for messages and names: the user's source line of an
# equation. JAX has no public way to it.
from jax._src import source_info_util
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

__all__ = ['CONSTANT', 'DATA', 'Kind', 'Level', 'Plan', 'Step', 'Use', 'plan']


class Level(enum.IntEnum):
  """The chain of kinds."""

  CONSTANT = 0
  STATISTIC = 1
  WEIGHT = 2
  DATA = 3


class Trait(enum.Enum):
  """What else is known of a weight or of data."""

  PICKED = 'a weight gathered by data: rows of an embedding, an expert'
  UNCLEAR = 'no longer known to be a weight'
  WIDE = 'a weight that was broadcast'
  HIDDEN = 'data that depend on a parameter'
  SCALAR = 'data broadcast from one number'
  EXPANDED = 'data broadcast along an axis: half of an outer product'
  BLENDED = 'data in which a whole weight was added or multiplied'


@dataclasses.dataclass(frozen=True)
class Kind:
  """The kind of one array.

  Attributes:
    level: its place in the chain.
    paths: the parameters that a weight is made of.
    rule: identifies their rule; None for none.
    needs_R: whether the rule computes V from an array R.
    has_R: whether R is still beside the weight.
    layout: identifies how a weight was last rearranged; 0 is a parameter's own.
    traits: see ``Trait``.
    why: where a weight became unclear, lost R, or was blended with data.
  """

  level: Level = Level.CONSTANT
  paths: tuple[str, ...] = ()
  rule: Any = None
  needs_R: bool = False
  has_R: bool = False
  layout: int = 0
  traits: frozenset[Trait] = frozenset()
  why: str = ''

  def __contains__(self, trait: Trait) -> bool:
    return trait in self.traits

  def having(self, *traits: Trait, **changes: Any) -> 'Kind':
    """The same kind with further traits."""
    return dataclasses.replace(
      self, traits=self.traits.union(traits), **changes
    )

  def without(self, *traits: Trait) -> 'Kind':
    """The same kind with fewer traits."""
    return dataclasses.replace(self, traits=self.traits.difference(traits))

  @property
  def of_weight(self) -> bool:
    """Whether it comes from weights alone."""
    return self.level in (Level.STATISTIC, Level.WEIGHT)

  @property
  def may_be_data(self) -> bool:
    """Whether a product may take it as its input."""
    return self.level is Level.DATA or (
      self.level is Level.WEIGHT
      and not self.traits.isdisjoint((Trait.PICKED, Trait.UNCLEAR))
    )


CONSTANT = Kind()
DATA = Kind(Level.DATA)


class Use(NamedTuple):
  """One meeting of a parameter and data."""

  paths: tuple[str, ...]
  how: str  # 'product', 'scale', 'added' or 'looked up'
  eqn: Any
  at: int  # which operand of the equation


class Step(NamedTuple):
  """What to do at one equation.

  ``action`` is 'bind' (R stays beside the first result's weight), 'through'
  (each R stays beside its operand), 'move' (R goes along), 'mask' (R becomes 0
  where the constant factor is 0), 'product', or 'enter' (evaluate the inner
  plans).
  """

  eqn: Any
  action: str
  inputs: tuple[Kind, ...]
  outputs: tuple[Kind, ...]
  inner: tuple['Plan', ...] = ()

  @property
  def at(self) -> int:
    """Which operand of a product is the weight."""
    return _weight_at(self.inputs)

  @property
  def weight(self) -> Kind:
    """The kind of a product's weight."""
    return self.inputs[self.at]


class Plan(NamedTuple):
  """A jaxpr with a step for each of its equations."""

  closed: ClosedJaxpr
  steps: tuple[Step, ...]
  inputs: tuple[Kind, ...]
  outputs: tuple[Kind, ...]


class Log(NamedTuple):
  """What was found on the way: problems as text, and uses."""

  problems: list[str]
  uses: list[Use]


def _names(text: str) -> frozenset[str]:
  return frozenset(text.split())


# Primitives by what they do to a weight, by their names.
BILINEAR = _names('dot_general conv_general_dilated ragged_dot_general')
MOVES = _names(
  'reshape transpose convert_element_type broadcast_in_dim squeeze expand_dims'
  ' rev slice copy copy_p split tile reduce_precision device_put name'
  ' sharding_constraint mesh_cast reshard stop_gradient pvary pcast all_gather'
  ' all_gather_invariant unstack'
)
JOINS = _names('concatenate stack dynamic_update_slice scatter')
PICKS = _names('gather dynamic_slice')
COMPARISONS = _names('eq ne lt gt le ge is_finite')
ENTRYWISE = COMPARISONS | _names(
  'add sub mul div add_any neg sign abs exp exp2 log log1p log2 expm1 tanh'
  ' logistic sqrt rsqrt square integer_pow pow max min clamp round floor ceil'
  ' erf sin cos cbrt select_n and or not one_minus_square polynomial'
)
REDUCTIONS = _names(
  'reduce_sum reduce_max reduce_min reduce_prod argmax argmin reduce_and'
  ' reduce_or'
)
# Their derivative in the data does not contain the weight.
ADDITIONS = (
  COMPARISONS
  | JOINS
  | _names('add sub add_any max min select_n pad clamp scatter-add')
)
# Their operands that are arrays to choose from or to put together.
_PLACED = {
  'select_n': slice(1, None),
  'dynamic_update_slice': slice(2),
  'scatter': slice(0, None, 2),
}
# What a weight is blended with data by, and what keeps that.
_BLENDS = _names('add sub mul neg add_any select_n gather dynamic_slice')
_KEEP_BLENDED = MOVES | _BLENDS | {'concatenate'}
# Equations with functions inside, and where: the parameter that holds them.
_INNER = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'scan': 'jaxpr',
  'shard_map': 'jaxpr',
}
CONTROL = frozenset(_INNER) | {'cond', 'while'}
# Functions with a derivative of their own.
_DERIVED = _names('custom_jvp_call custom_vjp_call')


def known() -> frozenset[str]:
  """Names of all primitives for which a weight as operand is decided."""
  return (
    BILINEAR | MOVES | JOINS | PICKS | ENTRYWISE | REDUCTIONS | ADDITIONS
    | CONTROL | {'optimization_barrier'}
  )  # fmt: skip


def named(paths: Sequence[str]) -> str:
  """The parameters that a weight is made of, for a message."""
  *others, last = map(repr, paths)
  return (
    f'the combination of {", ".join(others)} and {last}' if others else last
  )


def where(eqn: Any, calls: Sequence[Any] = ()) -> str:
  """The primitive and the user's line of an equation, or of a call of it."""
  # Functions that JAX jits itself know no line of the user.
  lines = (source_info_util.summarize(e.source_info) for e in (eqn, *calls))
  return f'{eqn.primitive.name} at {next(filter(None, lines), "")}'


def source_context(eqn: Any):
  """A context in which new equations have the source and names of this one."""
  names = source_info_util.current_name_stack() + eqn.source_info.name_stack
  return source_info_util.user_context(
    eqn.source_info.traceback, name_stack=names
  )


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
  """How many constants and carried arrays a scan has."""
  if 'num_consts' in params:
    return params['num_consts'], params['num_carry']
  # JAX 0.12 keeps its arguments as a tree of three parts.
  constants, carry, _ = params['ft_in'].unpack()
  return len(list(constants)), len(list(carry))


def inner_jaxprs(eqn: Any) -> tuple[ClosedJaxpr, ...]:
  """The functions inside an equation of control flow."""
  if eqn.primitive.name == 'cond':
    return tuple(eqn.params['branches'])
  inner = eqn.params[_INNER[eqn.primitive.name]]
  return (inner if hasattr(inner, 'consts') else ClosedJaxpr(inner, ()),)


def _size(var: Any) -> int:
  return math.prod(getattr(var.aval, 'shape', ()))


def _weight_at(kinds: Sequence[Kind]) -> int:
  """Returns which of two operands is more like a weight."""
  return max(
    (0, 1),
    key=lambda i: (kinds[i].level is Level.WEIGHT, not kinds[i].may_be_data),
  )


def _join(a: Kind, b: Kind) -> Kind:
  """Returns the kind of an array that has one of two kinds."""
  if a.level is not b.level:
    a, b = (a, b) if a.level > b.level else (b, a)
    # A constant is its own R; a statistic has none.
    return dataclasses.replace(a, has_R=a.has_R and not b.of_weight)
  if a.of_weight:
    return _merge((a, b), has_R=a.has_R and b.has_R)
  first = a if Trait.BLENDED in a else b
  return dataclasses.replace(first, traits=a.traits | b.traits)


def _merge(kinds: Sequence[Kind], conflict: str = '', **changes: Any) -> Kind:
  """Returns the kind of a weight that is computed from several.

  ``conflict`` says where, in case their rules differ.
  """
  weights = [k for k in kinds if k.level is Level.WEIGHT]
  weights = weights or [k for k in kinds if k.level is Level.STATISTIC]
  first = next((k for k in weights if k.has_R), weights[0])
  merged = dataclasses.replace(
    first,
    paths=tuple(dict.fromkeys(path for k in weights for path in k.paths)),
    traits=frozenset().union(*(k.traits for k in weights)),
    why=next((k.why for k in weights if k.why), ''),
  )
  # What is unclear has no rule of its own to give.
  rules = {k.rule for k in weights if Trait.UNCLEAR not in k} or {first.rule}
  if len(rules) > 1:
    merged = merged.having(
      Trait.UNCLEAR,
      why=conflict or 'weights with different rules were combined',
    )
  return dataclasses.replace(merged, **changes)


class _Analysis:
  """Decides equation after equation; finds problems and uses on the way."""

  def __init__(self, log: Log, calls: tuple[Any, ...] = ()):
    self.log = log
    self.calls = calls  # The equations around the function, innermost first.

  def where(self, eqn: Any) -> str:
    return where(eqn, self.calls)

  def plan(self, closed: ClosedJaxpr, kinds: Sequence[Kind]) -> Plan:
    jaxpr = closed.jaxpr
    known: dict[Any, Kind] = dict(zip(jaxpr.invars, kinds, strict=True))
    for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
      # A closed-over tracer may be differentiated, so it counts as data.
      known[var] = DATA if isinstance(const, Tracer) else CONSTANT

    def read(var: Any) -> Kind:
      return CONSTANT if hasattr(var, 'val') else known[var]

    steps = []
    for eqn in jaxpr.eqns:
      step = self.step(eqn, tuple(map(read, eqn.invars)))
      known.update(zip(eqn.outvars, step.outputs, strict=True))
      steps.append(step)
    outputs = tuple(map(read, jaxpr.outvars))
    return Plan(closed, tuple(steps), tuple(kinds), outputs)

  def refuse(self, eqn: Any, kind: Kind, text: str) -> None:
    came = f'; before that, {kind.why}' if kind.why else ''
    self.log.problems.append(
      f'{named(kind.paths)} {text} ({self.where(eqn)}){came}'
    )

  def use(self, eqn: Any, kinds: Sequence[Kind], how: str) -> None:
    self.log.uses.extend(
      Use(k.paths, how, eqn, i) for i, k in enumerate(kinds) if k.of_weight
    )

  def step(self, eqn: Any, kinds: tuple[Kind, ...]) -> Step:
    weight = next((k for k in kinds if k.of_weight), CONSTANT)
    data = any(k.level is Level.DATA for k in kinds)
    meets_data = weight.of_weight and data
    inner = eqn.primitive.name in BILINEAR | CONTROL
    # In the backward pass of a gradient that the function itself takes.
    if meets_data and inner and 'transpose(' in str(eqn.source_info.name_stack):
      self.refuse(
        eqn,
        weight,
        'is used by plain backpropagation inside the function: differentiate '
        'what with_feedback returns',
      )
    if eqn.primitive.name in CONTROL and weight.of_weight:
      return self.control(eqn, kinds)
    if eqn.primitive.name == 'optimization_barrier':
      return Step(eqn, 'through', kinds, kinds)
    action, kind = self.decide(eqn, kinds)
    return Step(eqn, action, kinds, (kind,) * len(eqn.outvars))

  def decide(self, eqn: Any, kinds: tuple[Kind, ...]) -> tuple[str, Kind]:
    """Action and kind of the results of an equation without inner functions."""
    name = eqn.primitive.name
    if name.startswith('random_') or name == 'threefry2x32':
      return 'bind', CONSTANT
    if not any(k.of_weight for k in kinds):
      return 'bind', self.no_weight(eqn, kinds)
    decide = self.weights_alone
    if name in BILINEAR:
      decide = self.product
    elif any(k.level is Level.DATA for k in kinds):
      decide = self.weight_and_data
    action, kind = decide(eqn, kinds)
    hidden = kind.level is Level.DATA
    return action, kind.having(Trait.HIDDEN) if hidden else kind

  def no_weight(self, eqn: Any, kinds: tuple[Kind, ...]) -> Kind:
    name = eqn.primitive.name
    hidden = (Trait.HIDDEN,) if any(Trait.HIDDEN in k for k in kinds) else ()
    if not any(k.level is Level.DATA for k in kinds):
      return CONSTANT.having(*hidden)
    kind = DATA.having(*hidden)
    if name == 'broadcast_in_dim':
      small, large = _size(eqn.invars[0]), _size(eqn.outvars[0])
      if small != large:
        kind = kind.having(Trait.SCALAR if small == 1 else Trait.EXPANDED)
    blended = [k for k in kinds if Trait.BLENDED in k]
    if blended and name in BILINEAR:
      if all(k.level is Level.DATA for k in kinds[:2]):
        self.refuse(
          eqn,
          blended[0],
          'was added to or multiplied by data of its own size, and the result '
          'meets data in a product',
        )
    elif blended and name in _KEEP_BLENDED:
      return kind.having(
        Trait.BLENDED, paths=blended[0].paths, why=blended[0].why
      )
    return kind

  def product(self, eqn: Any, kinds: tuple[Kind, ...]) -> tuple[str, Kind]:
    result, at = DATA, _weight_at(kinds)
    weight, other = kinds[at], kinds[1 - at]
    is_weight = weight.level is Level.WEIGHT and Trait.UNCLEAR not in weight
    looked_up = Trait.PICKED in weight and other.level is not Level.DATA
    if is_weight and other.may_be_data and not looked_up:
      self.use_in_product(eqn, weight, at)
      if Trait.UNCLEAR in other:
        result = result.having(Trait.BLENDED, paths=other.paths, why=other.why)
      return 'product', result
    data = any(k.level is Level.DATA for k in kinds)
    if data or (weight.may_be_data and other.may_be_data):
      kind = next(k for k in kinds if k.of_weight)
      self.refuse(
        eqn,
        kind,
        'meets data in a product, but is no longer known to be a weight'
        if kind.level is Level.WEIGHT
        else 'meets data in a product as a sum or maximum over its entries',
      )
      return 'bind', result
    return 'bind', self.unclear(eqn, kinds)

  def use_in_product(self, eqn: Any, weight: Kind, at: int) -> None:
    self.log.uses.append(Use(weight.paths, 'product', eqn, at))
    dtype = eqn.invars[at].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      self.refuse(
        eqn,
        weight,
        f'meets data in a product as {dtype}, but feedback needs a real '
        'floating dtype',
      )
    elif weight.rule is None:
      self.refuse(
        eqn,
        weight,
        'is used in a product, but matches none of the rules',
      )
    elif weight.needs_R and not weight.has_R:
      self.refuse(eqn, weight, 'cannot take its feedback R along')

  def unclear(self, eqn: Any, kinds: Sequence[Kind]) -> Kind:
    return _merge(
      kinds,
      level=Level.WEIGHT,
      has_R=False,
      traits=frozenset({Trait.UNCLEAR}),
      why=self.where(eqn),
    )

  def weights_alone(
    self, eqn: Any, kinds: tuple[Kind, ...]
  ) -> tuple[str, Kind]:
    name = eqn.primitive.name
    of_weight = [k for k in kinds if k.of_weight]
    moved = {'layout': id(eqn)}
    if name in MOVES and len(kinds) == 1:
      kind = dataclasses.replace(kinds[0], **moved)
      if name in ('convert_element_type', 'stop_gradient', 'copy', 'name'):
        kind = kinds[0]
      wide = name in ('broadcast_in_dim', 'tile')
      wide = wide and _size(eqn.outvars[0]) != _size(eqn.invars[0])
      return 'move', kind.having(Trait.WIDE) if wide else kind
    every_R = all(k.has_R for k in of_weight)
    if name in JOINS or (
      name == 'select_n'
      and not kinds[0].of_weight
      and all(k.level <= Level.WEIGHT for k in kinds[1:])
    ):
      kind = _merge(kinds, f'{self.where(eqn)} joined different rules')
      kind = dataclasses.replace(kind, has_R=every_R and kind.has_R, **moved)
      return 'move', kind
    if name in PICKS | {'pad'} and kinds[0].of_weight:
      return 'move', dataclasses.replace(kinds[0], **moved)
    if name in REDUCTIONS | COMPARISONS:
      return 'bind', _merge(
        kinds, level=Level.STATISTIC, has_R=False, traits=frozenset()
      )
    if name in ENTRYWISE:
      return self.arithmetic(eqn, kinds)
    return 'bind', self.unclear(eqn, kinds)

  def arithmetic(self, eqn: Any, kinds: tuple[Kind, ...]) -> tuple[str, Kind]:
    """Decides entry-by-entry arithmetic of weights, statistics, constants."""
    weights = [k for k in kinds if k.level is Level.WEIGHT]
    if not weights:
      return 'bind', _merge(kinds, level=Level.STATISTIC, has_R=False)
    weights = self.without_scales(eqn, kinds, weights)
    kind = _merge(weights, f'{self.where(eqn)} combined different rules')
    clear = [k for k in weights if Trait.UNCLEAR not in k]
    if len({(k.paths, k.layout) for k in clear if k.needs_R}) > 1:
      # Of two weights, or two arrangements of one, which R would it be?
      why = f'{self.where(eqn)} combined weights with an R each'
      kind = dataclasses.replace(kind, has_R=False, why=why)
    factors = [k for k in kinds if k.level is Level.CONSTANT]
    mask = eqn.primitive.name == 'mul' and len(factors) == 1 and kind.has_R
    return 'mask' if mask else 'bind', kind

  def without_scales(
    self, eqn: Any, kinds: Sequence[Kind], weights: list[Kind]
  ) -> list[Kind]:
    """Leaves out weights that are broadcast to scale another one."""
    size = _size(eqn.outvars[0])
    whole = [
      Trait.WIDE not in kind and _size(var) == size
      for var, kind in zip(eqn.invars, kinds, strict=True)
    ]
    allowed = {'mul': ([True, False], [False, True]), 'div': ([True, False],)}
    if len(weights) < 2 or whole not in allowed.get(eqn.primitive.name, ()):
      return weights
    at = whole.index(True)
    if kinds[1 - at].may_be_data:
      return weights
    self.log.uses.append(Use(kinds[1 - at].paths, 'scale', eqn, 1 - at))
    return [kinds[at]]

  def weight_and_data(
    self, eqn: Any, kinds: tuple[Kind, ...]
  ) -> tuple[str, Kind]:
    """Decides where weights meet data outside of ``BILINEAR``."""
    name = eqn.primitive.name
    of_weight = [k for k in kinds if k.of_weight]
    if name in PICKS and kinds[0].of_weight:
      self.use(eqn, kinds, 'looked up')
      return 'move', kinds[0].having(Trait.PICKED, layout=id(eqn))
    # Data decide which entries of weights and constants to take, or where.
    cases = kinds[_PLACED.get(name, slice(0))]
    allowed = (Level.CONSTANT, Level.WEIGHT)
    if any(k.of_weight for k in cases) and all(
      k.level in allowed for k in cases
    ):
      kind = _merge(cases, layout=id(eqn))
      every_R = all(k.has_R for k in cases if k.of_weight)
      return 'move', kind.having(Trait.PICKED, has_R=every_R and kind.has_R)

    size = _size(eqn.outvars[0])
    result = DATA
    if name in _BLENDS:
      result = self.blend(eqn, eqn.invars, kinds, size)
    if name in ADDITIONS:
      self.use(eqn, kinds, 'added')
      return 'bind', result
    if name in ('mul', 'div') and len(of_weight) == 1:
      at = 0 if kinds[0].level is Level.DATA else 1
      data, weight = kinds[at], kinds[1 - at]
      data_size = _size(eqn.invars[at])
      is_weight = weight.level is Level.WEIGHT
      divisor = name == 'div' and at == 0
      one_number = (Trait.SCALAR in data or data_size == 1) and size != 1
      if is_weight and one_number and not divisor:
        return 'bind', weight  # W / sigma is still a weight.
      outer = Trait.EXPANDED in data or data_size != size
      if name == 'mul' or divisor:
        dtype = eqn.outvars[0].aval.dtype
        spectrum = jnp.issubdtype(dtype, jnp.complexfloating)
        # A product of transforms is a convolution.
        if not outer and not (spectrum and Trait.UNCLEAR in weight):
          self.use(eqn, kinds, 'scale')
          return 'bind', result
        if is_weight and name == 'mul' and Trait.UNCLEAR not in weight:
          self.use_in_product(eqn, weight, 1 - at)
          return 'product', result
    self.refuse(
      eqn,
      of_weight[0],
      'meets data in an operation for which no feedback is defined',
    )
    return 'bind', DATA

  def blend(
    self, eqn: Any, operands: Sequence[Any], kinds: Sequence[Kind], size: int
  ) -> Kind:
    """Returns the kind of data that a whole weight may be added to."""
    for var, kind in zip(operands, kinds, strict=True):
      # lax broadcasts axes of size 1 by itself, so sizes tell what is whole.
      if (
        kind.level is Level.WEIGHT
        and kind.traits.isdisjoint((Trait.WIDE, Trait.PICKED))
        and _size(var) == size
        and len(var.aval.shape) > 1
      ):
        return DATA.having(Trait.BLENDED, paths=kind.paths, why=self.where(eqn))
    return DATA

  def control(self, eqn: Any, kinds: tuple[Kind, ...]) -> Step:
    """Decides an equation with inner functions and a weight as operand."""
    name = eqn.primitive.name
    data = any(k.level is Level.DATA for k in kinds)

    def entered(plans: tuple[Plan, ...], outputs) -> Step:
      return Step(eqn, 'enter', kinds, tuple(outputs), plans)

    if name == 'while':  # It has no reverse mode: there is nothing to replace.
      kind = DATA.having(Trait.HIDDEN) if data else self.unclear(eqn, kinds)
      return Step(eqn, 'bind', kinds, (kind,) * len(eqn.outvars))
    bodies = inner_jaxprs(eqn)
    inner = _Analysis(self.log, (eqn, *self.calls))
    if name == 'cond':
      plans = tuple(inner.plan(body, kinds[1:]) for body in bodies)
      results = zip(*(body.outputs for body in plans), strict=True)
      joined = map(functools.partial(self.either, eqn), eqn.outvars, results)
      return entered(plans, map(_carried, joined))
    if name == 'scan':
      return self.scan(eqn, kinds, bodies[0])
    if name in _DERIVED:
      if data:
        weight = next(k for k in kinds if k.of_weight)
        self.refuse(
          eqn,
          weight,
          'and data go into one function with a derivative of its own, which '
          'would be used in place of feedback',
        )
      plan = _Analysis(Log([], []), (eqn, *self.calls)).plan(bodies[0], kinds)
      outputs = (self.derived(eqn, kinds, kind) for kind in plan.outputs)
      return Step(eqn, 'bind', kinds, tuple(outputs))
    plan = inner.plan(bodies[0], kinds)
    return entered((plan,), plan.outputs)

  def either(self, eqn: Any, var: Any, kinds: Sequence[Kind]) -> Kind:
    """Returns the kind of a result that differs between branches."""
    kind = functools.reduce(_join, kinds)
    if kind.level is not Level.DATA or not any(k.of_weight for k in kinds):
      return kind
    self.use(eqn, kinds, 'added')
    if Trait.BLENDED in kind:
      return kind
    return self.blend(eqn, [var] * len(kinds), kinds, _size(var))

  def derived(self, eqn: Any, kinds: Sequence[Kind], kind: Kind) -> Kind:
    """Returns a weight's kind after a function with a derivative of its own."""
    in_place = any(k.layout == kind.layout for k in kinds if k.has_R)
    if kind.level is not Level.WEIGHT or in_place:
      return kind
    return dataclasses.replace(kind, has_R=False, why=self.where(eqn))

  def scan(self, eqn: Any, kinds: tuple[Kind, ...], body: ClosedJaxpr) -> Step:
    constants, carry = scan_counts(eqn.params)
    end = constants + carry
    carried = tuple(map(_carried, kinds[constants:end]))
    each = tuple(map(_carried, kinds[end:]))
    while True:  # The kinds of what is carried only grow: this ends.
      trial = _Analysis(Log([], []), (eqn, *self.calls))
      plan = trial.plan(body, (*kinds[:constants], *carried, *each))
      pairs = zip(carried, plan.outputs[:carry], strict=True)
      grown = tuple(_carried(_join(*pair)) for pair in pairs)
      if grown == carried:
        break
      carried = grown
    self.log.problems.extend(trial.log.problems)
    self.log.uses.extend(trial.log.uses)
    initial = zip(kinds[constants:end], carried, strict=True)
    became_data = [a for a, b in initial if b.level is Level.DATA]
    self.use(eqn, became_data, 'added')
    results = (*carried, *map(_carried, plan.outputs[carry:]))
    return Step(eqn, 'enter', kinds, results, (plan,))


def _carried(kind: Kind) -> Kind:
  """Returns a kind as a loop carries it, which forgets broadcasting."""
  return kind.without(Trait.SCALAR, Trait.EXPANDED, Trait.WIDE)


def plan(closed: ClosedJaxpr, kinds: Sequence[Kind]) -> tuple[Plan, Log]:
  """Decides every equation of a function.

  Args:
    closed: the function, traced.
    kinds: of its arguments.

  Returns:
    The plan, and the problems and uses that were found.
  """
  log = Log([], [])
  result = _Analysis(log).plan(closed, kinds)
  for kind in result.outputs:
    if kind.level is Level.WEIGHT and Trait.UNCLEAR in kind:
      log.problems.append(
        f'{named(kind.paths)} met only constants '
        f'({kind.why}): pass the data as an argument'
      )
  return result, log
