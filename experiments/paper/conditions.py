"""Every column of the paper's tables 2 to 6 as one row of data.

A condition states the feedback rule, the update, batch normalization, batch
sizes and frozen layers. The paper's names of its columns state nearly all of
that, so a column is its name; ``find`` reads it. Rules that the paper does not
have (``FAMILY``) have names of the same form. Nothing here imports JAX, so the
command line lists conditions at once.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

# (epochs, batch size) in turn; None stands for all remaining epochs.
BatchPlan = tuple[tuple[int | None, int], ...]

BATCH_100: BatchPlan = ((None, 100),)
THEN_500: BatchPlan = ((3, 100), (None, 500))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
  """How a network is trained, apart from the protocol and the rate.

  Attributes:
    rule: name of the feedback rule: the paper's, or one of ``FAMILY``.
    batch_manhattan: setting of the update, 0 (SGD) to 3.
    batch_norm: 'none', 'plain' (no learnable parameters) or 'affine'.
    batch_plan: (epochs, batch size) in turn.
    frozen: 'nothing', 'last layer' (the paper's *Bottom*: the layers below
      learn) or 'before last layer' (its *Top*).
    adam: whether the update is Adam's, with decoupled weight decay.
  """

  rule: str = 'BP'
  batch_manhattan: int = 0
  batch_norm: str = 'none'
  batch_plan: BatchPlan = BATCH_100
  frozen: str = 'nothing'
  adam: bool = False

  def config(self) -> dict[str, Any]:
    """The fields as they are stored; ``adam`` only where it is used."""
    fields = dataclasses.asdict(self)
    if not self.adam:
      del fields['adam']
    return fields

  def problems(self, own: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong with a condition made by hand; `own` are further rules."""
    rule: Any = self.rule
    if not isinstance(rule, str) or rule not in ('BP', _rule(rule, own)):
      yield (
        f'has the rule {rule!r}, but it must be BP, a rule that '
        '`python -m experiments list` shows, or one in RULES of the plugin'
      )
    for name, allowed in (
      ('batch_manhattan', (0, 1, 2, 3)),
      ('batch_norm', ('none', 'plain', 'affine')),
      ('frozen', ('nothing', *_PARTS.values())),
    ):
      if getattr(self, name) not in allowed:
        yield (
          f'has {name} {getattr(self, name)!r}, but it must be one of '
          f'{", ".join(map(str, allowed))}'
        )
    if not _is_plan(self.batch_plan):
      yield (
        f'has batch_plan {self.batch_plan!r}, but it must be a tuple of '
        '(epochs or None, batch size), such as ((3, 100), (None, 500))'
      )


def _is_plan(plan: Any) -> bool:
  try:
    return (
      isinstance(plan, tuple)
      and hash(plan) is not None
      and bool(plan)
      and all(
        size >= 1 and (epochs is None or epochs >= 1) for epochs, size in plan
      )
    )
  except (TypeError, ValueError):
    return False


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table: a name, and the conditions it stands for.

  Attributes:
    name: as in the paper's tables.
    conditions: the training procedures to try; the best one is the result.
  """

  name: str
  conditions: tuple[Condition, ...]


# Rules of the field that the paper does not have; LowRank takes any rank.
FAMILY: dict[str, str] = {
  'FrozenSign': 'feedback is the signs of the initial weights',
  'TiedNorm': 'feedback has random directions and the norms of the weights',
  'KP': 'feedback has the updates of the weights (Kolen-Pollack)',
  'PFA': 'feedback is a fixed matrix times a learned one (product feedback)',
  'LowRank4': 'feedback is a learned product of rank 4',
  'Mirror': 'feedback learns from noise after each step (weight mirror)',
  'DFA': 'each layer gets a random projection of the error at the output '
  '(direct feedback)',
  'SignDFA': 'each layer gets a random projection of the signs of the error at '
  'the output',
  'CenteredDFA': 'each layer gets a random projection of the error at the '
  'output, less its mean over the batch',
  'DRTP': 'each layer gets a random projection of the labels',
}
_RULES = {
  rule.lower(): rule
  for rule in ('uSF', 'NuSF', 'brSF', 'frSF', 'RndF', *FAMILY)
} | {'': '', 'sgd': 'SGD', 'bp': 'SGD', 'fa': 'RndF'}
_PARTS = {'bottom': 'last layer', 'top': 'before last layer'}
# A name that begins with BN, BM or Adam is read with a plus in front. After
# brSF and frSF a number without % is refused: a percentage, or a batch size?
_NAME = re.compile(
  r"""
  (?P<rule> .*? )
  (?P<norm> \+BN )?
  (?P<update> \+BM (?P<setting>[123])? | \+Adam )?
  (?: (?<!rSF)-(?P<size>[1-9]\d*) )?
  (?: \ (?P<part>Bottom|Top) )?
  """,
  re.IGNORECASE | re.VERBOSE,
)


def _rule(name: str, own: Iterable[str]) -> str | None:
  """The rule of a name, as it is written; None if there is none."""
  lower = name.lower()
  if match := re.fullmatch(r'([bf]rsf)-(\d+(?:\.\d+)?)%', lower):
    percent = float(match[2])
    flipped = f'-{percent:g}%' if percent else ''
    return None if percent > 100 else _RULES[match[1]] + flipped
  if match := re.fullmatch(r'lowrank([1-9]\d*)', lower):
    return f'LowRank{match[1]}'
  return (_RULES | {rule.lower(): rule for rule in own}).get(lower)


def _read(name: str, own: Iterable[str] = ()) -> Column | None:
  """The column that a name states, or None if it states none."""
  plus = '+' if re.match('BN|BM|Adam', name, re.IGNORECASE) else ''
  match = _NAME.fullmatch(plus + name)
  rule = _rule(match['rule'], own) if match else None
  if match is None or rule is None or not name[:1].isalpha():
    return None
  setting, size, part = match['setting'], match['size'], match['part']
  adam = (match['update'] or '').lower() == '+adam'
  manhattan = int(setting or 1) if match['update'] and not adam else 0
  terms = (
    rule,
    'BN' if match['norm'] else '',
    'Adam' if adam else f'BM{setting or ""}' if manhattan else '',
  )
  name = '+'.join(filter(None, terms))
  name += f'-{size}' if size else ''
  name += f' {part.capitalize()}' if part else ''
  condition = Condition(
    rule='BP' if rule in ('', 'SGD') else rule,
    batch_manhattan=manhattan,
    # The paper's columns BN and BN+BM alone have learnable parameters.
    batch_norm=('plain' if rule else 'affine') if match['norm'] else 'none',
    batch_plan=((None, int(size)),) if size else BATCH_100,
    frozen=_PARTS[part.lower()] if part else 'nothing',
    adam=adam,
  )
  return Column(name, (condition,))


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the paper: its columns in order and what it is about."""

  name: str
  title: str
  columns: tuple[str, ...]
  baseline: str = 'SGD'  # cells are colored against this column


def _percentages(rule: str) -> tuple[str, ...]:
  return tuple(f'{rule}-{p}%+BN+BM' for p in (100, 75, 50, 25))


TABLES: dict[str, Table] = {
  table.name: table
  for table in (
    Table(
      '2',
      'Experiment A: sign-concordant feedback',
      (
        'SGD', 'BM', 'BN', 'BN+BM', 'uSF', 'NuSF', 'uSF+BM', 'uSF+BN',
        'uSF+BN+BM', 'brSF+BN+BM', 'frSF+BN+BM',
      ),
    ),
    Table(
      '3',
      'Experiment B: sign-concordance violated with probability p',
      (
        'SGD', *_percentages('brSF'), 'brSF+BN+BM',
        *_percentages('frSF'), 'frSF+BN+BM',
      ),
    ),
    Table(
      '4-C1',
      'Experiment C1: fixed random feedback',
      (
        'SGD', 'RndF', 'NuSF', 'BN', 'RndF+BN', 'RndF+BM', 'RndF+BN+BM',
        'uSF+BN+BM',
      ),
    ),
    Table(
      '4-C2',
      'Experiment C2: last layer frozen (Bottom), all others frozen (Top)',
      tuple(
        f'{name} {part}'
        for name in ('SGD', 'RndF', 'RndF+BN+BM', 'uSF+BN+BM')
        for part in ('Bottom', 'Top')
      ),
    ),
    Table(
      '5',
      'Settings of Batch Manhattan',
      (
        'SGD', 'BM1', 'BM2', 'BM3', 'uSF+BN', 'uSF+BN+BM1', 'uSF+BN+BM2',
        'uSF+BN+BM3',
      ),
    ),
    Table(
      '6',
      'Batch sizes',
      tuple(f'{u}-{size}' for u in ('SGD', 'BM') for size in (100, 30, 10, 5)),
      baseline='SGD-100',
    ),
  )
}  # fmt: skip


def _column(name: str) -> Column:
  column = _read(name)
  assert column is not None, name
  conditions = column.conditions
  if name == 'uSF+BM':  # the only column with two training procedures
    conditions += (dataclasses.replace(conditions[0], batch_plan=THEN_500),)
  return Column(name, conditions)


COLUMNS: dict[str, Column] = {
  name: _column(name) for table in TABLES.values() for name in table.columns
}


def find(name: str, own: Iterable[str] = ()) -> Column:
  """Returns the column of a name, in upper or lower case.

  The paper's own names are valid, and any other name of the form
  ``RULE[+BN][+BM[1-3]|+Adam][-BATCH SIZE][ Bottom|Top]``, such as
  ``frSF-10%+BN``, ``uSF+BN+BM-30`` or ``DFA+Adam``.

  Args:
    name: of a column.
    own: names of further rules, those of a plugin.

  Raises:
    ValueError: if there is none; names the nearest.
  """
  if column := _read(name, own):
    return COLUMNS.get(column.name, column)
  return COLUMNS[_nearest('condition', name, COLUMNS)]


def find_exactly(name: str, own: Iterable[str] = ()) -> Column | None:
  """The column that ``find`` calls by this very name; None if there is none."""
  try:
    column = find(name, own)
  except ValueError:
    return None
  return column if column.name == name else None


def problems_of_name(rule: str, own: Iterable[str]) -> Iterator[str]:
  """Why a rule among `own` cannot have its name: no condition would use it."""
  column = _read(rule, own)
  if _read(rule) is not None:
    yield 'has the name of a condition or a rule of this program: rename it'
  elif column is None or column.conditions[0].rule != rule:
    yield (
      'has a name that no condition can have: it must begin with a letter, but '
      'not with BN, BM or Adam, must not end like a condition (+BN, +BM, '
      '+Adam, -30, Bottom, Top), and must differ in more than case from others'
    )


def plain_name(condition: Condition) -> str:
  """The first name of the same condition with backpropagation."""
  return names_of(dataclasses.replace(condition, rule='BP'))[0]


def setting_of(condition: Condition) -> str:
  """All but the rule, such as 'BN+BM'; 'SGD' for neither norm nor update."""
  return plain_name(condition).removeprefix('SGD+')


def in_words(rule: str) -> str | None:
  """What a rule of ``FAMILY`` is; None for the others."""
  if rank := re.fullmatch(r'LowRank(\d+)', rule):
    return FAMILY['LowRank4'].replace('4', rank[1])
  return FAMILY.get(rule)


def steps_of(plan: BatchPlan) -> list[str]:
  """The steps of a batch plan in words, such as '100 for 3 epochs'."""
  return [
    f'{size}' if epochs is None else f'{size} for {epochs} epochs'
    for epochs, size in plan
  ]


def names_of(condition: Condition) -> tuple[str, ...]:
  """All columns that a condition belongs to, or a name made up like theirs.

  The paper repeats columns: the same run is BM, BM1 and BM-100.
  """
  found = tuple(
    name for name, known in COLUMNS.items() if condition in known.conditions
  )
  return found or (_free_name(condition),)


def _free_name(condition: Condition) -> str:
  """A name that ``find`` reads wherever it can state the condition."""
  norm, terms = condition.batch_norm, []
  if condition.rule != 'BP':
    terms = [condition.rule]
  elif norm == 'plain':
    terms = ['SGD']
  if norm != 'none':
    usual = ('plain', 'affine') if condition.rule == 'BP' else ('plain',)
    terms.append('BN' if norm in usual else f'BN({norm})')
  if condition.batch_manhattan:
    setting = condition.batch_manhattan
    terms.append('BM' if setting == 1 else f'BM{setting}')
  if condition.adam:
    terms.append('Adam')
  name = '+'.join(terms) or 'SGD'
  if condition.batch_plan != BATCH_100:
    name += '-' + ','.join(
      f'{size}' if epochs is None else f'{size}x{epochs}'
      for epochs, size in condition.batch_plan
    )
  parts = {frozen: f' {part.capitalize()}' for part, frozen in _PARTS.items()}
  return name + parts.get(condition.frozen, '')


def find_tables(name: str) -> tuple[Table, ...]:
  """Returns the tables of a name, in upper or lower case; 4 is both halves.

  Raises:
    ValueError: if there is none; names the nearest.
  """
  halves = [t for key, t in TABLES.items() if key.partition('-')[0] == name]
  return tuple(halves) or (find_table(name),)


def find_table(name: str) -> Table:
  """Returns the one table of a name, in upper or lower case.

  Raises:
    ValueError: if there is none; names the nearest.
  """
  return TABLES[_nearest('table', name, TABLES)]


def _nearest(kind: str, name: str, known: Iterable[str]) -> str:
  by_lower = {key.lower(): key for key in known}
  if name.lower() in by_lower:
    return by_lower[name.lower()]
  close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)
  hint = ' or '.join(repr(by_lower[key]) for key in close)
  raise ValueError(
    f'unknown {kind} {name!r}'
    + (f'; did you mean {hint}?' if hint else '.')
    + f' `python -m experiments list` shows all {len(by_lower)}.'
  )
