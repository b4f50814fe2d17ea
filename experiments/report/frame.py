"""Records of runs, checked, as a data frame and as the cells of the tables.

A record with a missing or wrong field is left out and named in a warning, so
that one bad file cannot hide the others. Two runs are comparable when they have
the same protocol; a cell is a condition on a dataset under one protocol.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.datasets.specs import SPECS
from experiments.paper import published as paper
from experiments.paper import statistics
from experiments.paper.conditions import (
  COLUMNS,
  Condition,
  names_of,
  steps_of,
)
from experiments.paper.protocol import RATES, Protocol
from experiments.runs.store import Record

_NAMED = 20  # warnings; more are counted

_PLACES = {name: at for at, name in enumerate(COLUMNS)}

DEFAULTS = dataclasses.asdict(Protocol())
# Fields that say which run it is; all others are the protocol.
_IDENTITY = (
  'version', 'dataset', 'digest', 'source', 'note', 'rule', 'batch_manhattan',
  'batch_norm', 'batch_plan', 'frozen', 'adam', 'rate', 'seed',
)  # fmt: skip
_ROW = ['protocol', 'label']
_CELL = [*_ROW, 'condition']
_SEED = [*_CELL, 'seed']

Frame = Any  # of pandas, which type checkers do not follow
RowKey = tuple[str, str]
CellKey = tuple[str, str, str]


class EmptyReportError(ValueError):
  """There is nothing to report."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A dataset under a protocol.

  Attributes:
    protocol: its name.
    label: the dataset, and of several copies which one.
    name: the dataset; where its classes are not the paper's, how many.
    dataset: what the runs call it.
    digest: of its images and labels.
    sources: where it was read.
    notes: how it differs from the paper's.
    chance: error of guessing, in percent; None while no run is finished.
    train_images: how many images are trained on.
  """

  protocol: str
  label: str
  name: str
  dataset: str
  digest: str
  sources: tuple[str, ...]
  notes: tuple[str, ...]
  chance: float | None
  train_images: int | None

  @property
  def key(self) -> RowKey:
    """Protocol and label."""
    return self.protocol, self.label


@dataclasses.dataclass(frozen=True)
class Selection:
  """Errors in percent by seed, and the (rate, epoch) that were chosen."""

  values: Mapping[int, float]
  chosen: Mapping[int, tuple[float, int | None]]

  @property
  def mean(self) -> float:
    """Mean over seeds."""
    return sum(self.values.values()) / len(self.values)

  @property
  def interval(self) -> statistics.Interval | None:
    """95 % bootstrap interval of the mean, None for one seed."""
    return statistics.mean_interval(tuple(self.values.values()))


@dataclasses.dataclass(frozen=True)
class Cell:
  """A condition on a dataset under a protocol.

  A seed counts once all its rates and batch plans are there. While no seed is
  complete, the incomplete ones are shown, and marked.

  Attributes:
    best: the paper's selection: the lowest test error over epochs and rates.
    held_out: epoch and rate chosen on held-out training images.
    present: finished runs.
    expected: runs that make all seeds of the cell complete.
    diverged: finished runs that diverged.
    settled: whether one seed is complete.
  """

  best: Selection | None
  held_out: Selection | None
  present: int
  expected: int
  diverged: int
  settled: bool

  @property
  def error(self) -> float:
    """The best test error, the mean over seeds; NaN without a result."""
    return self.best.mean if self.best else math.nan

  @property
  def mark(self) -> str:
    """'' if complete, else such as '4/5 rates' or '12/15 runs'."""
    if self.present == self.expected:
      return ''
    what = 'rates' if self.expected == len(RATES) else 'runs'
    return f'{self.present}/{self.expected} {what}'


NO_RUNS = Cell(None, None, present=0, expected=0, diverged=0, settled=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
  """All contents of a report.

  Attributes:
    runs: a row per run, finished or not.
    protocols: their fields by name; those with default settings come first,
      most training before less.
    rows: by protocol and label; datasets in the paper's order, others last.
    cells: by protocol, label and condition, in the order of rows and tables.
    warnings: a line for each record that is left out.
  """

  runs: Frame
  protocols: Mapping[str, Mapping[str, Any]]
  rows: Mapping[RowKey, Row]
  cells: Mapping[CellKey, Cell]
  warnings: Sequence[str]

  @property
  def main(self) -> list[str]:
    """Protocols with default settings, or all if there are none."""
    usual = [
      p for p, fields in self.protocols.items() if not is_variant(fields)
    ]
    return usual or list(self.protocols)

  @property
  def main_rows(self) -> list[Row]:
    """The rows of these protocols, most training first."""
    order = self.main
    rows = [row for row in self.rows.values() if row.protocol in order]
    return sorted(rows, key=lambda row: order.index(row.protocol))

  def runs_of(self, row: Row) -> Frame:
    """The row's finished runs, once for each name of their condition."""
    runs = self.runs[self.runs.finished]
    runs = runs[(runs.protocol == row.protocol) & (runs.label == row.label)]
    return runs.explode('condition')

  def cells_of(self, row: Row) -> dict[str, Cell]:
    """The row's cells with a result, each under its first name."""
    return {
      name: cell
      for (*key, name), cell in self.cells.items()
      if tuple(key) == row.key and cell.best and first_name(name) == name
    }

  def fullest(
    self, rows: Iterable[Row], names: Iterable[str], least: int = 0
  ) -> list[tuple[Row, dict[str, Cell]]]:
    """Of each dataset a row with most of some conditions, and its cells.

    It is the first that has three quarters of the conditions of the fullest
    row. Rows without cells, or with fewer than ``least`` of the conditions, are
    left out.
    """
    names, found = set(names), collections.defaultdict(list)
    for row in rows:
      cells = self.cells_of(row)
      count = len(names & cells.keys())
      if cells and count >= least:
        found[row.label].append((count, (row, cells)))
    chosen = []
    for of in found.values():
      enough = 0.75 * max(count for count, _ in of)
      chosen.append(next(pair for count, pair in of if count >= enough))
    return chosen


def column_order(name: str) -> tuple[int, str]:
  """A key to sort conditions by: in the paper's order, then by name."""
  return _PLACES.get(name, len(_PLACES)), name


@functools.cache
def first_name(name: str) -> str:
  """The first of a condition's names: BM, BM1 and BM-100 are the same."""
  return names_of(COLUMNS[name].conditions[0])[0] if name in COLUMNS else name


def read(records: Iterable[Record]) -> Results:
  """Checks the records and groups them.

  Raises:
    EmptyReportError: there is no readable run; says how to make one.
  """
  found, warnings = [], []
  for record in sorted(records, key=lambda record: str(record.run_id)):
    try:
      if record.problem is not None:
        raise _BadRecord(record.problem)
      found.append(_run(record))
    except _BadRecord as bad:
      text = f'run {record.run_id} is left out: {bad}'
      warnings.append(printable(text))
  if more := len(warnings[_NAMED:]):
    warnings[_NAMED:] = [f'{more} more of the runs are left out']
  if not found:
    hint = (
      'there are no runs to report. Make some with `python -m experiments '
      'demo` (a minute, no downloads) or `python -m experiments run --table 2`.'
    )
    raise EmptyReportError('\n'.join((*warnings, hint)))
  # A column of None alone would not be one of numbers.
  runs = pd.DataFrame(found).astype(dict.fromkeys(
    ('best', 'best_epoch', 'holdout', 'held_out', 'held_out_epoch'), float
  ))  # fmt: skip
  runs['name'], runs['label'] = _names(runs)
  protocols = dict(zip(runs.protocol, runs.fields, strict=True))
  order = sorted(protocols, key=lambda name: (
    is_variant(protocols[name]),
    -(protocols[name]['train_size'] or math.inf),
    -protocols[name]['epochs'],
    name,
  ))  # fmt: skip
  place = {name: at for at, name in enumerate(paper.datasets())}
  rows = [_row(group) for _, group in runs.groupby(_ROW, sort=False)]
  rows.sort(key=lambda row: (
    place.get(row.dataset, len(place)), row.dataset, order.index(row.protocol),
    row.label,
  ))  # fmt: skip
  by_key = {row.key: row for row in rows}
  return Results(
    runs,
    {name: protocols[name] for name in order},
    by_key,
    _cells(runs, list(by_key)),
    warnings,
  )


def is_variant(fields: Mapping[str, Any]) -> bool:
  """Whether settings other than epochs and images are not the defaults."""
  return any(
    value != DEFAULTS.get(name)
    for name, value in fields.items()
    if name not in ('epochs', 'train_size')
  )


def words(value: Any) -> list[str]:
  """A protocol's value as words of a command."""
  values = value if isinstance(value, list | tuple) else [value]
  return [
    json.dumps(v)[1:-1] if isinstance(v, str)
    else json.dumps(v).removesuffix('.0')
    for v in values
  ]  # fmt: skip


def printable(text: str) -> str:
  """Replaces characters that a terminal or an XML reader might act on."""
  return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}'
                 for c in text)  # fmt: skip


class _BadRecord(Exception):
  """A record with a missing or wrong field."""


_MISSING = object()
_WANTED = {
  str: 'a text', int: 'an integer', float: 'a finite number',
  bool: 'true or false', dict: 'an object', list: 'a list',
}  # fmt: skip


def _checked(name: str, value: Any, kind: type) -> Any:
  if value is _MISSING:
    raise _BadRecord(f'{name} is missing ({_WANTED[kind]} expected)')
  accepted = int | float if kind is float else kind
  if (
    not isinstance(value, accepted)
    or isinstance(value, bool) != (kind is bool)
    or (kind is float and not math.isfinite(value))
  ):
    raise _BadRecord(f'{name} is {repr(value)[:60]}, not {_WANTED[kind]}')
  return printable(value) if kind is str else value


def _field(
  holder: Any, where: str, key: str, kind: type, default: Any = _MISSING
) -> Any:
  """A field of the kind; if the default is None, null stands for it too."""
  value = _checked(where, holder, dict).get(key, default)
  if value is None and default is None:
    return None
  return _checked(f'{where}.{key}', value, kind)


def _run(record: Record) -> dict[str, Any]:
  """The frame's row of a record."""
  config = _checked('config', record.config, dict)
  condition = Condition(
    rule=_field(config, 'config', 'rule', str),
    batch_manhattan=_field(config, 'config', 'batch_manhattan', int),
    batch_norm=_field(config, 'config', 'batch_norm', str),
    batch_plan=_plan(config),
    frozen=_field(config, 'config', 'frozen', str),
    adam=_field(config, 'config', 'adam', bool, False),
  )
  fields = DEFAULTS | {k: v for k, v in config.items() if k not in _IDENTITY}
  if plugin := _field(config, 'config', 'plugin', str, ''):
    fields['plugin'] = hashlib.sha256(plugin.encode()).hexdigest()[:8]
  _field(fields, 'config', 'epochs', int)
  _field(fields, 'config', 'train_size', int, None)
  errors, layers, seconds = [], {}, 0.0
  for at, line in enumerate(_checked('metrics', record.metrics, list)):
    where = f'metrics[{at}]'
    error = _field(line, where, 'test_error', float)
    epoch = _field(line, where, 'epoch', int)
    errors.append((epoch, float(error)))
    if found := _layers(line, where):
      layers[epoch] = found
    seconds += _field(line, where, 'seconds', float, None) or 0.0
  if record.result is not None and not errors:
    raise _BadRecord('it has a result, but no epochs')
  about = {} if record.environment is None else record.environment
  return {
    'run_id': printable(str(record.run_id)),
    'dataset': _field(config, 'config', 'dataset', str),
    **{name: _field(config, 'config', name, str, '')
       for name in ('digest', 'source', 'note')},
    'condition': tuple(map(printable, names_of(condition))),
    'plan': ', then '.join(steps_of(condition.batch_plan)),
    'rate': float(_field(config, 'config', 'rate', float)),
    'seed': _field(config, 'config', 'seed', int),
    'protocol': _protocol_name(fields),
    'fields': fields,
    'config': config,
    'errors': errors,
    'layers': layers,
    'seconds': seconds,
    'environment': tuple(sorted(
      (printable(str(name)), _field(about, 'environment', name, str))
      for name in _checked('environment', about, dict)
    )),
    'failure': '' if record.error is None else printable(str(record.error)),
    'finished': record.result is not None,
    **_result(record.result),
  }  # fmt: skip


def _layers(line: Any, where: str) -> dict[str, dict[str, float | None]]:
  """Metrics by layer of an epoch; {} if none were recorded."""
  found = _field(line, where, 'layers', dict, None) or {}
  where = f'{where}.layers'
  return {
    printable(layer): {
      name: _field(row, f'{where}.{layer}', name, float, None)
      for name in _checked(f'{where}.{layer}', row, dict)
    }
    for layer, row in found.items()
  }


def _plan(config: Mapping[str, Any]) -> tuple[tuple[int | None, int], ...]:
  plan = _field(config, 'config', 'batch_plan', list)
  try:
    steps = tuple(
      (None if epochs is None else int(epochs), int(size))
      for epochs, size in plan
    )
  except (TypeError, ValueError):
    steps = ()
  if not steps:
    raise _BadRecord(
      f'config.batch_plan is {repr(plan)[:60]}, not a list of [epochs, batch '
      'size]'
    )
  return steps


def _result(result: Any) -> dict[str, Any]:
  fields = {
    'best': ('best_test_error', float, _MISSING),
    'best_epoch': ('best_epoch', int, None),
    'holdout': ('holdout_error', float, None),
    'held_out': ('held_out_test_error', float, None),
    'held_out_epoch': ('held_out_epoch', int, None),
    'diverged': ('diverged', bool, _MISSING),
    'chance': ('chance_error', float, _MISSING),
    'train_images': ('train_images', int, _MISSING),
  }
  if result is None:
    return dict.fromkeys(fields)
  found = {
    name: _field(result, 'result', key, kind, default)
    for name, (key, kind, default) in fields.items()
  }
  if not 0 <= found['chance'] < 100:
    raise _BadRecord(
      f'result.chance_error is {found["chance"]}, not an error of guessing in %'
    )
  return found


def _protocol_name(fields: Mapping[str, Any]) -> str:
  """Such as '13 epochs, 5000 images, weight decay 0': non-default settings.

  It depends on the protocol alone, so a name stays when others are added.
  """
  epochs, size = fields['epochs'], fields['train_size']
  parts = [f'{epochs} epoch' + 's' * (epochs != 1)]
  parts += [] if size is None else [f'{size} images']
  for name, value in sorted(fields.items()):
    if name not in ('epochs', 'train_size') and value != DEFAULTS.get(name):
      text = '' if value is True else ' '.join(['', *words(value)])
      parts.append(name.replace('_', ' ') + text)
  return printable(', '.join(parts))


def _names(runs: Frame) -> tuple[list[str], list[str]]:
  """Per run: the dataset, a part of its classes apart; and its copy, if any.

  A part of the paper's classes is easier, and not its dataset.
  """
  keys = ['protocol', 'dataset', 'digest']
  chance = runs.groupby(keys).chance.transform('first')
  names = []
  for dataset, error in zip(runs.dataset, chance, strict=True):
    classes = None if pd.isna(error) else round(100 / (100 - error))
    usual = SPECS[dataset].classes if dataset in SPECS else classes
    names.append(
      dataset if classes in (None, usual) else f'{dataset} ({classes} classes)'
    )
  copies = runs.assign(name=names).groupby(['protocol', 'name']).digest
  labels = [
    name + (f' [{digest[:8]}]' if several > 1 else '')
    for name, digest, several in zip(
      names, runs.digest, copies.transform('nunique'), strict=True
    )
  ]
  return names, labels


def _row(runs: Frame) -> Row:
  first, done = runs.iloc[0], runs[runs.finished]
  return Row(
    **first[['protocol', 'label', 'name', 'dataset', 'digest']],
    sources=tuple(sorted({*runs.source} - {''})),
    notes=tuple(sorted({*runs.note} - {''})),
    chance=float(done.chance.iloc[0]) if len(done) else None,
    train_images=int(done.train_images.iloc[0]) if len(done) else None,
  )


def _cells(runs: Frame, rows: list[RowKey]) -> dict[CellKey, Cell]:
  runs = runs.explode('condition', ignore_index=True)
  runs['fall'] = -runs.rate
  plans = {name: len(column.conditions) for name, column in COLUMNS.items()}
  runs['full'] = [len(RATES) * plans.get(name, 1) for name in runs.condition]
  done = runs[runs.finished].astype({'diverged': bool})
  grid = done[done.rate.isin(RATES)].drop_duplicates([*_SEED, 'rate', 'plan'])
  present = grid.groupby(_SEED).size().rename('present')
  best = done.sort_values(['best', 'fall', 'run_id']).drop_duplicates(_SEED)
  best = best.join(present, on=_SEED)
  best['complete'] = best.present == best.full
  settled = best.groupby(_CELL).complete.any()
  some = best.groupby(_CELL).complete.transform('sum') > 0
  best = best[best.complete | ~some]
  held = done.dropna(subset=['holdout', 'held_out'])
  held = held.sort_values(['holdout', 'fall', 'run_id']).drop_duplicates(_SEED)
  held = held.merge(best[_SEED], on=_SEED)
  bests = _selections(best, 'best', 'best_epoch')
  helds = _selections(held, 'held_out', 'held_out_epoch')
  counts = pd.DataFrame({
    'expected': runs.drop_duplicates(_SEED).groupby(_CELL).full.sum(),
    'present': present.groupby(_CELL).sum(),
    'diverged': done[done.diverged].groupby(_CELL).size(),
  }).fillna(0).astype(int).to_dict('index')  # fmt: skip
  order = sorted(
    counts, key=lambda key: (rows.index(key[:2]), *column_order(key[2]))
  )
  return {
    key: Cell(
      best=bests.get(key),
      held_out=helds.get(key),
      settled=bool(settled.get(key, False)),
      **counts[key],
    )
    for key in order
  }


def _selections(
  runs: Frame, error: str, epoch: str
) -> dict[CellKey, Selection]:
  found: dict[Any, Selection] = {}
  for key, group in runs.sort_values('seed').groupby(_CELL):
    epochs = [None if pd.isna(e) else int(e) for e in group[epoch]]
    chosen = zip(group.rate, epochs, strict=True)
    found[key] = Selection(
      dict(zip(group.seed, map(float, group[error]), strict=True)),
      dict(zip(group.seed, chosen, strict=True)),
    )
  return found
