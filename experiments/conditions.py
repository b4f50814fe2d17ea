"""Every column of the paper's tables 2 to 6 as one row of data.

A condition says what is asymmetric, how weights are updated, whether there is
batch normalisation, which batches are used and what is frozen. Nothing here
imports JAX, so the command line can list conditions at once.
"""

import dataclasses
import difflib
import re

# (epochs, batch size) in turn; None stands for all epochs that are left.
BatchPlan = tuple[tuple[int | None, int], ...]

BATCH_100: BatchPlan = ((None, 100),)
THEN_500: BatchPlan = ((3, 100), (None, 500))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
  """One column of a table.

  Attributes:
    name: as in the paper's tables.
    rule: name of the feedback rule, for ``symjax_bp.from_name``.
    batch_manhattan: setting of the update, 0 (SGD) to 3.
    batch_norm: 'none', 'plain' (no learnable parameters) or 'affine'.
    batch_plans: the procedures to try; the best one is the result.
    frozen: 'nothing', 'last layer' (the paper's *Bottom*: all learning is
      below) or 'before last layer' (its *Top*).
  """

  name: str
  rule: str = 'BP'
  batch_manhattan: int = 0
  batch_norm: str = 'none'
  batch_plans: tuple[BatchPlan, ...] = (BATCH_100,)
  frozen: str = 'nothing'


_NAME = re.compile(
  r'(SGD|BP|uSF|NuSF|[bf]rSF(?:-\d+(?:\.\d+)?%)?|RndF|(?=BN|BM))'
  r'(?:\+?(BN))?(?:\+?BM([123])?)?'
)


def _condition(name: str, **changes) -> Condition:
  """Reads a name such as ``brSF-25%+BN+BM``; BM alone is setting 1."""
  match = _NAME.fullmatch(name)
  if match is None:
    raise ValueError(f'{name!r} is no name of a condition.')
  rule, norm, setting = match.groups()
  manhattan = int(setting or 1) if 'BM' in name else 0
  return Condition(
    name=name,
    **{
      'rule': 'BP' if rule in ('', 'SGD') else rule,
      'batch_manhattan': manhattan,
      'batch_norm': 'plain' if norm else 'none',
      **changes,
    },
  )


def _frozen(name: str) -> tuple[Condition, Condition]:
  """The two controls of experiment C2."""
  whole = _condition(name)
  return (
    dataclasses.replace(whole, name=f'{name} Bottom', frozen='last layer'),
    dataclasses.replace(whole, name=f'{name} Top', frozen='before last layer'),
  )


_ROWS = (
  _condition('SGD'),
  _condition('BM'),
  _condition('BN', batch_norm='affine'),
  _condition('BN+BM', batch_norm='affine'),
  _condition('uSF'),
  _condition('NuSF'),
  _condition('uSF+BM', batch_plans=(BATCH_100, THEN_500)),
  _condition('uSF+BN'),
  _condition('uSF+BN+BM'),
  _condition('brSF+BN+BM'),
  _condition('frSF+BN+BM'),
  *(
    _condition(f'{rule}-{percent}%+BN+BM')
    for rule in ('brSF', 'frSF')
    for percent in (100, 75, 50, 25)
  ),
  _condition('RndF'),
  _condition('RndF+BN'),
  _condition('RndF+BM'),
  _condition('RndF+BN+BM'),
  *_frozen('SGD'),
  *_frozen('RndF'),
  *_frozen('RndF+BN+BM'),
  *_frozen('uSF+BN+BM'),
  *(_condition(f'BM{k}') for k in (1, 2, 3)),
  *(_condition(f'uSF+BN+BM{k}') for k in (1, 2, 3)),
  *(
    dataclasses.replace(
      _condition(update),
      name=f'{update}-{size}',
      batch_plans=(((None, size),),),
    )
    for update in ('SGD', 'BM')
    for size in (100, 30, 10, 5)
  ),
)

CONDITIONS: dict[str, Condition] = {row.name: row for row in _ROWS}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the paper: its columns in order and what it is about."""

  name: str
  title: str
  columns: tuple[str, ...]
  baseline: str = 'SGD'  # cells are coloured against this column


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


def find(name: str) -> Condition:
  """Returns the condition of a name, in upper or lower case.

  Besides the paper's own, any ``RULE[+BN][+BM[1-3]]`` is one, such as
  ``frSF-10%+BN``.

  Raises:
    ValueError: if there is none; names the nearest.
  """
  if name not in CONDITIONS and _NAME.fullmatch(name):
    return _condition(name)
  return CONDITIONS[_nearest('condition', name, CONDITIONS)]


def find_table(name: str) -> Table:
  """Returns the table of a name, in upper or lower case.

  Raises:
    ValueError: if there is none; names the nearest.
  """
  return TABLES[_nearest('table', name, TABLES)]


def _nearest(kind: str, name: str, known) -> str:
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
