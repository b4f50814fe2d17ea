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
from collections.abc import Iterable, Sequence
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
  SCALAR = 'data, or what may be data, broadcast from one number'
  EXPANDED = 'data broadcast along an axis: half of an outer product'
  BLENDED = 'data to which a weight was added, or which scaled it'
  NAMED = 'a constant that is a bias or a scale by its name'


@dataclasses.dataclass(frozen=True)
class Kind:
  """The kind of one array.

  Attributes:
    level: its place in the chain.
    paths: the parameters that a weight or a named constant is made of.
    rule: identifies their rule; None for none.
    needs_R: whether the rule computes V from an array R.
    has_R: whether R is still beside the weight.
    layout: identifies how a weight was last rearranged or masked; a parameter's
      own is empty.
    traits: see ``Trait``.
    why: where a weight became unclear, lost R, or was blended with data.
  """

  level: Level = Level.CONSTANT
  paths: tuple[str, ...] = ()
  rule: Any = None
  needs_R: bool = False
  has_R: bool = False
  layout: tuple[Any, ...] = ()
  traits: frozenset[Trait] = frozenset()
  why: str = ''

  def __contains__(self, trait: Trait) -> bool:
    return trait in self.traits

  def having(self, *traits: Trait, **changes: Any) -> 'Kind':
    """The same kind with further traits."""
    return dataclasses.replace(
      self, traits=self.traits.union(traits), **changes
    )

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
  how: str  # see ``transform.Row.use``
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
  'reshape transpose convert_element_type broadcast_in_dim squeeze rev slice'
  ' copy split unstack tile reduce_precision device_put name stop_gradient'
  ' sharding_constraint reshard pvary all_gather all_gather_invariant'
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
# Every entry stays where it is.
_IN_PLACE = _names('convert_element_type stop_gradient copy name')
# What a weight is blended with data by, and what keeps that: it is linear.
_CLIPS = _names('max min clamp')
_BLENDS = _CLIPS | _names(
  'add sub mul div add_any select_n dynamic_update_slice scatter scatter-add'
)
_KEEP_BLENDED = (
  MOVES | JOINS | PICKS | BILINEAR | (_BLENDS - _CLIPS) | {'neg', 'pad'}
)
_RANDOM = _names(
  'random_bits random_clone random_fold_in random_seed random_split'
  ' random_unwrap random_wrap threefry2x32'
)
# What fills mutable arrays, and what reads them.
_WRITES = _names('swap addupdate')
_READS = _names('get swap freeze')
# Equations with functions inside.
CONTROL = _names(
  'jit closed_call remat2 custom_jvp_call custom_vjp_call shard_map scan cond'
  ' while'
)
# Functions with a derivative of their own.
_DERIVED = _names('custom_jvp_call custom_vjp_call')


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
  params = eqn.params
  if 'branches' in params:
    return tuple(params['branches'])
  inner = params['jaxpr'] if 'jaxpr' in params else params['call_jaxpr']
  return (inner if hasattr(inner, 'consts') else ClosedJaxpr(inner, ()),)


def _size(var: Any) -> int:
  return math.prod(getattr(var.aval, 'shape', ()))


def _is_number(var: Any, kind: Kind) -> bool:
  """Whether an array is one number, which may have been broadcast."""
  return Trait.SCALAR in kind or _size(var) == 1


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
    hidden = (Trait.HIDDEN,) if b.of_weight or Trait.HIDDEN in b else ()
    # A constant is its own R; a statistic has none.
    return a.having(*hidden, has_R=a.has_R and not b.of_weight)
  if a.of_weight:
    return _merge((a, b), has_R=a.has_R and b.has_R)
  first = a if a.paths else b
  return dataclasses.replace(first, traits=a.traits | b.traits)


def _blended(weight: Kind, why: str) -> Kind:
  return DATA.having(Trait.BLENDED, paths=weight.paths, why=why)


def _with_blends(data: Kind, kinds: Sequence[Kind]) -> Kind:
  """Returns the kind of data that are linear in others."""
  blended = next((k for k in (data, *kinds) if Trait.BLENDED in k), None)
  if blended is None:
    return data
  return data.having(Trait.BLENDED, paths=blended.paths, why=blended.why)


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

  def moved(self, eqn: Any, kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    """The kinds of the results of an equation, with a layout each."""
    # A function that is called twice has its equations once.
    at = *map(id, self.calls), id(eqn)
    return tuple(k.having(layout=(*at, i)) for i, k in enumerate(kinds))

  def carried(self, eqn: Any, kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    """Kinds as a loop or a branch hands them on, without broadcasting."""
    kept = frozenset(Trait) - {Trait.SCALAR, Trait.EXPANDED, Trait.WIDE}
    kinds = (dataclasses.replace(k, traits=k.traits & kept) for k in kinds)
    return self.moved(eqn, kinds)

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
    name = eqn.primitive.name
    weight = next((k for k in kinds if k.of_weight), None)
    data = any(k.level is Level.DATA for k in kinds)
    inner = name in BILINEAR | CONTROL
    # In the backward pass of a gradient that the function itself takes.
    backward = inner and 'transpose(' in str(eqn.source_info.name_stack)
    if weight and data and backward:
      self.refuse(
        eqn,
        weight,
        'is used by plain backpropagation inside the function: differentiate '
        'what with_feedback returns',
      )
    followed = any({Trait.BLENDED, Trait.NAMED} & k.traits for k in kinds)
    if name in CONTROL and (weight or followed):
      step = self.control(eqn, kinds)
      return step if weight else step._replace(action='bind', inner=())
    if name == 'optimization_barrier':
      return Step(eqn, 'through', kinds, kinds)
    action, kind = self.decide(eqn, kinds)
    outputs = (kind,) * len(eqn.outvars)
    if action in ('move', 'mask') and name not in _IN_PLACE:
      outputs = self.moved(eqn, outputs)
    return Step(eqn, action, kinds, outputs)

  def decide(self, eqn: Any, kinds: tuple[Kind, ...]) -> tuple[str, Kind]:
    """Action and kind of the results of an equation without inner functions."""
    name = eqn.primitive.name
    weight = next((k for k in kinds if k.of_weight), None)
    if name in _RANDOM:
      return 'bind', CONSTANT
    if weight is None:
      return 'bind', self.no_weight(eqn, kinds)
    if name in _WRITES:
      self.refuse(eqn, weight, 'is written into a mutable array')
    if name in _WRITES or not eqn.outvars:  # The latter as in a print.
      return 'bind', DATA.having(Trait.HIDDEN)
    decide = self.weights_alone
    if name in BILINEAR:
      decide = self.product
    elif any(k.level is Level.DATA for k in kinds):
      decide = self.weight_and_data
    action, kind = decide(eqn, kinds)
    if name not in MOVES:
      kind = dataclasses.replace(kind, traits=kind.traits - {Trait.SCALAR})
    if kind.level is Level.DATA:
      kind = kind.having(Trait.HIDDEN)
      if name in _KEEP_BLENDED - BILINEAR:
        kind = _with_blends(kind, kinds)
    return action, kind

  def no_weight(self, eqn: Any, kinds: tuple[Kind, ...]) -> Kind:
    name = eqn.primitive.name
    traits = {Trait.HIDDEN} & {trait for k in kinds for trait in k.traits}
    if name in _READS:  # Whatever was written before.
      return DATA.having(Trait.HIDDEN)
    by_name = next((k for k in kinds if Trait.NAMED in k), None)
    if not any(k.level is Level.DATA for k in kinds):
      return by_name or CONSTANT.having(*traits)
    if name in _IN_PLACE | {'transpose'}:
      traits |= kinds[0].traits & {Trait.SCALAR, Trait.EXPANDED}
    if name == 'broadcast_in_dim':
      small, large = _size(eqn.invars[0]), _size(eqn.outvars[0])
      if small != large:
        traits.add(Trait.SCALAR if small == 1 else Trait.EXPANDED)
    kind = DATA.having(*traits)
    blended = next((k for k in kinds if Trait.BLENDED in k), None)
    if name in BILINEAR:
      if blended and all(k.level is Level.DATA for k in kinds[:2]):
        self.refuse(
          eqn,
          blended,
          'was added to or multiplied by data, and the result meets data in a '
          'product',
        )
        return kind
      # Without a contraction it is a scale, written as an einsum.
      if by_name and eqn.params.get('dimension_numbers', ())[:1] != (((), ()),):
        self.refuse(
          eqn,
          by_name,
          'meets data in a product, but a parameter with this name is taken '
          'for one that is added or multiplied entry by entry: rename it',
        )
      if CONSTANT.having(Trait.HIDDEN) in kinds:
        return kind  # A layer that is excluded.
    return _with_blends(kind, kinds) if name in _KEEP_BLENDED else kind

  def product(self, eqn: Any, kinds: tuple[Kind, ...]) -> tuple[str, Kind]:
    result, at = DATA, _weight_at(kinds)
    weight, other = kinds[at], kinds[1 - at]
    is_weight = weight.level is Level.WEIGHT and Trait.UNCLEAR not in weight
    looked_up = Trait.PICKED in weight and other.level is not Level.DATA
    if is_weight and other.may_be_data and not looked_up:
      self.use_in_product(eqn, weight, at)
      if Trait.UNCLEAR in other:
        self.use(eqn, (other,), 'input')
        result = _blended(other, other.why)
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
    dtype, problem = eqn.invars[at].aval.dtype, ''
    if not jnp.issubdtype(dtype, jnp.floating):
      problem = (
        f'meets data in a product as {dtype}, but feedback needs a real '
        'floating dtype'
      )
    elif weight.rule is None:
      problem = 'is used in a product, but matches none of the rules'
    elif weight.needs_R and not weight.has_R:
      problem = 'cannot take its feedback R along'
    if problem:
      self.refuse(eqn, weight, problem)

  def unclear(self, eqn: Any, kinds: Sequence[Kind]) -> Kind:
    return _merge(
      kinds,
      level=Level.WEIGHT,
      has_R=False,
      traits=frozenset({Trait.UNCLEAR}),
      why=self.where(eqn),
    )

  def joined(self, eqn: Any, kinds: Sequence[Kind]) -> Kind:
    """Returns the kind of a weight that is put together of several."""
    every_R = all(k.has_R for k in kinds if k.of_weight)
    conflict = f'{self.where(eqn)} joined different rules'
    return _merge(kinds, conflict, has_R=every_R)

  def weights_alone(
    self, eqn: Any, kinds: tuple[Kind, ...]
  ) -> tuple[str, Kind]:
    name = eqn.primitive.name
    if name in MOVES and len(kinds) == 1:
      small, large = _size(eqn.invars[0]), _size(eqn.outvars[0])
      wide = name in ('broadcast_in_dim', 'tile') and small != large
      one = wide and small == 1 and kinds[0].may_be_data
      traits = (Trait.WIDE,) * wide + (Trait.SCALAR,) * one
      return 'move', kinds[0].having(*traits)
    if name in JOINS or (
      name == 'select_n'
      and not kinds[0].of_weight
      and all(k.level <= Level.WEIGHT for k in kinds[1:])
    ):
      return 'move', self.joined(eqn, kinds)
    if name in PICKS | {'pad'} and kinds[0].of_weight:
      by_data = any(k.may_be_data for k in kinds[1:])
      return 'move', kinds[0].having(*(Trait.PICKED,) * by_data)
    if name in REDUCTIONS and kinds[0].may_be_data:
      return 'bind', kinds[0].having(has_R=False, why=self.where(eqn))
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
      kind = kind.having(has_R=False, why=why)
    factors = [
      var.aval.shape
      for var, k in zip(eqn.invars, kinds, strict=True)
      if k.level is Level.CONSTANT
    ]
    mask = eqn.primitive.name == 'mul' and any(factors) and kind.has_R
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
    scale = kinds[1 - at]
    # One number is a scale, whether it is data or not: a spectral norm.
    if scale.may_be_data and not _is_number(eqn.invars[1 - at], scale):
      return weights
    self.log.uses.append(Use(scale.paths, 'scale', eqn, 1 - at))
    return [kinds[at]]

  def weight_and_data(
    self, eqn: Any, kinds: tuple[Kind, ...]
  ) -> tuple[str, Kind]:
    """Decides where weights meet data outside of ``BILINEAR``."""
    name = eqn.primitive.name
    of_weight = [k for k in kinds if k.of_weight]
    if name in PICKS and kinds[0].of_weight:
      self.use(eqn, kinds, 'looked up')
      return 'move', kinds[0].having(Trait.PICKED)
    # Data decide which entries of weights and constants to take, or where.
    cases = kinds[_PLACED.get(name, slice(0))]
    allowed = (Level.CONSTANT, Level.WEIGHT)
    if any(k.of_weight for k in cases) and all(
      k.level in allowed for k in cases
    ):
      return 'move', self.joined(eqn, cases).having(Trait.PICKED)
    numbers = all(
      kind.of_weight or _is_number(var, kind)
      for var, kind in zip(eqn.invars, kinds, strict=True)
    )
    if name in _CLIPS and numbers and _size(eqn.outvars[0]) != 1:
      return 'bind', of_weight[0]
    if name in ADDITIONS:
      self.use(eqn, kinds, 'added')
      if name not in _BLENDS:
        return 'bind', DATA
      return 'bind', self.blend(eqn, eqn.outvars[0], eqn.invars, kinds)
    if name in ('mul', 'div') and len(of_weight) == 1:
      scaled = self.scaled(eqn, kinds)
      if scaled:
        return scaled
    self.refuse(
      eqn,
      of_weight[0],
      'meets data in an operation for which no feedback is defined',
    )
    return 'bind', DATA

  def scaled(
    self, eqn: Any, kinds: tuple[Kind, ...]
  ) -> tuple[str, Kind] | None:
    """Decides the product or quotient, entry by entry, of weight and data."""
    at = 0 if kinds[0].level is Level.DATA else 1
    data, weight = kinds[at], kinds[1 - at]
    name, result = eqn.primitive.name, eqn.outvars[0]
    size, data_size = _size(result), _size(eqn.invars[at])
    is_weight = weight.level is Level.WEIGHT
    divisor = name == 'div' and at == 0
    one_number = _is_number(eqn.invars[at], data) and size != 1
    if is_weight and one_number and not divisor:
      return 'bind', weight  # W / sigma is still a weight.
    outer = Trait.EXPANDED in data or data_size != size
    unclear = Trait.UNCLEAR in weight
    # A product of transforms is a convolution.
    spectrum = jnp.issubdtype(result.aval.dtype, jnp.complexfloating)
    if (name == 'mul' or divisor) and not outer and not (spectrum and unclear):
      self.use(eqn, kinds, 'scale')
      return 'bind', self.blend(eqn, result, eqn.invars, kinds)
    if name == 'mul' and outer and is_weight and not unclear:
      self.use_in_product(eqn, weight, 1 - at)
      # The sum over its axis makes it data.
      return 'product', _blended(weight, self.where(eqn))
    return None

  def blend(
    self, eqn: Any, result: Any, operands: Sequence[Any], kinds: Sequence[Kind]
  ) -> Kind:
    """Returns the kind of data that a whole weight may be added to."""
    for var, kind in zip(operands, kinds, strict=True):
      # lax broadcasts axes of size 1 by itself, so sizes tell what is whole.
      if (
        kind.level is Level.WEIGHT
        and kind.traits.isdisjoint((Trait.WIDE, Trait.PICKED))
        and _size(var) == _size(result)
        and len(var.aval.shape) > 1
      ):
        return _blended(kind, self.where(eqn))
    return DATA

  def control(self, eqn: Any, kinds: tuple[Kind, ...]) -> Step:
    """Decides an equation with inner functions and a weight as operand."""
    name = eqn.primitive.name
    data = any(k.level is Level.DATA for k in kinds)

    if name == 'while':  # It has no reverse mode: there is nothing to replace.
      params, trial = eqn.params, _Analysis(Log([], []), self.calls)
      operands = kinds[params['cond_nconsts'] :]
      counts = params['body_nconsts'], len(eqn.outvars)
      step = trial.loop(eqn, operands, params['body_jaxpr'], *counts)
      why = self.where(eqn)
      outputs = (k.having(has_R=False, why=k.why or why) for k in step.outputs)
      return Step(eqn, 'bind', kinds, tuple(outputs))
    bodies = inner_jaxprs(eqn)
    inner = _Analysis(self.log, (eqn, *self.calls))
    if name == 'cond':
      plans = tuple(inner.plan(body, kinds[1:]) for body in bodies)
      results = zip(*(body.outputs for body in plans), strict=True)
      joined = map(functools.partial(self.either, eqn), eqn.outvars, results)
      return Step(eqn, 'enter', kinds, self.carried(eqn, joined), plans)
    if name == 'scan':
      return self.loop(eqn, kinds, bodies[0], *scan_counts(eqn.params))
    weight = next((k for k in kinds if k.of_weight), None)
    if name in _DERIVED and weight and data:
      self.refuse(
        eqn,
        weight,
        'and data go into one function with a derivative of its own, which '
        'would be used in place of feedback',
      )
      outputs = (DATA.having(Trait.HIDDEN),) * len(eqn.outvars)
      return Step(eqn, 'bind', kinds, outputs)
    plan = inner.plan(bodies[0], kinds)
    if name in _DERIVED:
      outputs = (self.derived(eqn, kinds, kind) for kind in plan.outputs)
      return Step(eqn, 'bind', kinds, tuple(outputs))
    return Step(eqn, 'enter', kinds, plan.outputs, (plan,))

  def either(self, eqn: Any, var: Any, kinds: Sequence[Kind]) -> Kind:
    """Returns the kind of a result that differs between branches."""
    kind = functools.reduce(_join, kinds)
    if kind.level is not Level.DATA or not any(k.of_weight for k in kinds):
      return kind
    self.use(eqn, kinds, 'added')
    if Trait.BLENDED in kind:
      return kind
    kind = self.blend(eqn, var, [var] * len(kinds), kinds)
    return kind.having(Trait.HIDDEN)

  def derived(self, eqn: Any, kinds: Sequence[Kind], kind: Kind) -> Kind:
    """Returns a weight's kind after a function with a derivative of its own."""
    in_place = any(k.layout == kind.layout for k in kinds if k.has_R)
    if kind.level is not Level.WEIGHT or in_place:
      return kind
    return kind.having(has_R=False, why=self.where(eqn))

  def loop(
    self,
    eqn: Any,
    kinds: tuple[Kind, ...],
    body: Any,
    constants: int,
    carry: int,
  ) -> Step:
    """Decides a loop over constants, what is carried, and slices."""
    end = constants + carry
    operands = self.carried(eqn, kinds[constants:])
    carried, each = operands[:carry], operands[carry:]
    while True:  # The kinds of what is carried only grow: this ends.
      trial = _Analysis(Log([], []), (eqn, *self.calls))
      plan = trial.plan(body, (*kinds[:constants], *carried, *each))
      pairs = zip(carried, plan.outputs[:carry], strict=True)
      grown = self.carried(eqn, (_join(*pair) for pair in pairs))
      if grown == carried:
        break
      carried = grown
    self.log.problems.extend(trial.log.problems)
    self.log.uses.extend(trial.log.uses)
    initial = zip(kinds[constants:end], carried, strict=True)
    became_data = [a for a, b in initial if b.level is Level.DATA]
    self.use(eqn, became_data, 'added')
    results = self.carried(eqn, (*carried, *plan.outputs[carry:]))
    return Step(eqn, 'enter', kinds, results, (plan,))


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
      log.uses.append(Use(kind.paths, 'returned', None, 0))
  return result, log
