"""The paper's tables with our cells beside its numbers."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from experiments.paper import published as paper
from experiments.paper import statistics
from experiments.paper.conclusions import POINTS
from experiments.paper.conditions import COLUMNS, TABLES, Table, find_table
from experiments.report.frame import (
  NO_RUNS,
  Cell,
  Frame,
  Results,
  Row,
  Selection,
  first_name,
  is_variant,
)

MARKS = {'worse': '▲', 'better': '▼', '': ''}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One cell of a table: our two results, the paper's number, three flags.

  Flags say how an error compares with the row's baseline: 'worse', 'better' or
  ''. They mean something where `flagged`: we have the baseline, and this is
  not it.
  """

  condition: str
  cell: Cell
  paper: float | None
  flagged: bool
  flag: str
  flag_held_out: str
  flag_paper: str

  @property
  def best(self) -> Selection | None:
    """Our best test error, selected as in the paper."""
    return self.cell.best

  @property
  def held_out(self) -> Selection | None:
    """Our held-out test error."""
    return self.cell.held_out

  @property
  def agrees(self) -> bool:
    """Whether ours compares with the baseline as the paper's does."""
    return self.flag == self.flag_paper


@dataclasses.dataclass(frozen=True)
class Line:
  """A row of a table; `row` is None where we have no run of the dataset."""

  row: Row | None
  dataset: str
  entries: Sequence[Entry]

  @property
  def label(self) -> str:
    """The dataset, labeled if it is not one of the paper's."""
    label = self.row.label if self.row else self.dataset
    other = '' if self.dataset in paper.datasets() else " (not the paper's)"
    return label + other

  @property
  def title(self) -> str:
    """The label and the protocol."""
    return f'{self.label}, {self.row.protocol}' if self.row else self.label

  @property
  def ours(self) -> bool:
    """Whether any of our results is in it."""
    return any(entry.best for entry in self.entries)

  def of(self, conditions: Sequence[str]) -> list[Entry]:
    """The cells of these conditions."""
    return [entry for entry in self.entries if entry.condition in conditions]

  @property
  def published(self) -> bool:
    """Whether the paper has the row."""
    return any(entry.paper is not None for entry in self.entries)

  @property
  def shared(self) -> list[Entry]:
    """The cells that both we and the paper have."""
    return [e for e in self.entries if e.best and e.paper is not None]

  @property
  def agreement(self) -> list[str]:
    """Such as ['rank correlation 0.93', 'same marks 9 of 10']."""
    parts, shared = [], self.shared
    rank = statistics.rank_correlation(
      [entry.best.mean for entry in shared if entry.best],
      [entry.paper for entry in shared if entry.paper is not None],
    )
    if rank is not None:
      parts.append(f'rank correlation {rank:.2f}')
    if flagged := [entry for entry in shared if entry.flagged]:
      same = sum(entry.agrees for entry in flagged)
      parts.append(f'same marks {same} of {len(flagged)}')
    if marked := sum(bool(e.cell.mark) for e in shared):
      parts.append(f'{marked} of {len(shared)} cells incomplete')
    return parts


@dataclasses.dataclass(frozen=True)
class Grid:
  """A filled table: our rows, then the paper's rows without a run of ours."""

  table: Table
  lines: Sequence[Line]

  @property
  def name(self) -> str:
    """Such as 'Table 2'."""
    known = self.table.name in TABLES
    return f'Table {self.table.name}' if known else 'Other conditions'

  @property
  def rows(self) -> list[Line]:
    """The rows with results of ours."""
    return [line for line in self.lines if line.ours]

  @property
  def columns(self) -> list[str]:
    """The conditions that these rows have runs of."""
    return [
      name
      for at, name in enumerate(self.table.columns)
      if any(line.entries[at].cell.expected for line in self.rows)
    ]


def flag(error: float | None, baseline: float | None) -> str:
  """The paper's color: yellow (worse), blue (better) or none."""
  if error is None or baseline is None:
    return ''
  points = round(error - baseline, 6)  # 55.15 - 52.15 is 3, not 2.9999...
  if points >= POINTS:
    return 'worse'
  return 'better' if points <= -POINTS else ''


def grids(
  results: Results,
  names: Iterable[str] | None = None,
  protocols: Iterable[str] | None = None,
) -> list[Grid]:
  """The paper's tables, and one of conditions that are none of its columns.

  Args:
    results: what `read` returns.
    names: which tables, filled or not. For None those with results: a
      protocol's rows are in a table if it has results in columns of the table
      that no table before it has.
    protocols: whose rows; None for all.

  Raises:
    ValueError: no table of that name; names the nearest.
  """
  wanted = set(results.protocols if protocols is None else protocols)
  rows = [row for row in results.rows.values() if row.protocol in wanted]
  if names is not None:
    return [_fill(results, find_table(name), rows) for name in names]
  own = sorted({name for *_, name in results.cells} - set(COLUMNS))
  found, earlier = [], set()
  for table in (
    *TABLES.values(),
    Table('other', "Not the paper's", tuple(own)),
  ):
    new = [c for c in table.columns if first_name(c) not in earlier]
    earlier |= {first_name(name) for name in table.columns}
    having = {
      protocol
      for (protocol, _, name), cell in results.cells.items()
      if name in new and cell.best
    }
    shown = [row for row in rows if row.protocol in having]
    grid = _fill(results, table, shown, new)
    if any(line.ours for line in grid.lines):
      found.append(grid)
  return found


def _fill(
  results: Results,
  table: Table,
  rows: Iterable[Row],
  columns: Iterable[str] | None = None,
) -> Grid:
  """Rows that the paper's table lacks need results in one of the columns."""
  columns = set(table.columns if columns is None else columns)
  published = paper.datasets(table.name)
  lines = []
  for row in rows:
    line = _line(results, table, row.name, row)
    if line.ours and (
      row.name in published
      or any(e.cell.expected for e in line.entries if e.condition in columns)
    ):
      lines.append(line)
  ours = {line.dataset for line in lines}
  lines += [
    _line(results, table, name, None) for name in published if name not in ours
  ]
  return Grid(table, lines)


def _line(
  results: Results, table: Table, dataset: str, row: Row | None
) -> Line:
  cells = {
    name: results.cells.get((*row.key, name), NO_RUNS) if row else NO_RUNS
    for name in (table.baseline, *table.columns)
  }
  base, published = cells[table.baseline], paper.errors()
  base_paper = paper.by_condition().get((dataset, table.baseline))
  entries = []
  for name in table.columns:
    ours, theirs = cells[name], published.get((table.name, dataset, name))
    entries.append(Entry(
      name,
      ours,
      theirs,
      base.best is not None and name != table.baseline,
      flag(_mean(ours.best), _mean(base.best)),
      flag(_mean(ours.held_out), _mean(base.held_out)),
      flag(theirs, base_paper),
    ))  # fmt: skip
  return Line(row, dataset, entries)


def _mean(selection: Selection | None) -> float | None:
  return selection.mean if selection else None


def compared(found: Iterable[Grid]) -> list[tuple[Line, Entry]]:
  """Cells that both we and the paper have, each condition of a row once."""
  cells = {}
  for line in (line for grid in found for line in grid.rows):
    for entry in line.shared:
      first = first_name(entry.condition)
      cells.setdefault((line.title, first), (line, entry))
  return list(cells.values())


def settings(results: Results) -> dict[str, Frame]:
  """By dataset: protocols with other settings beside the default ones.

  Best test errors of complete cells, of conditions that several protocols have;
  means over the seeds that all of these have.
  """
  # Recording layers changes no error, so it is not another setting.
  known = list(results.protocols.values())
  of = {
    protocol: fields
    for protocol, fields in results.protocols.items()
    if not (
      fields['layer_metrics'] and {**fields, 'layer_metrics': False} in known
    )
  }
  others = [name for name, fields in of.items() if is_variant(fields)]
  lengths = [(of[p]['epochs'], of[p]['train_size']) for p in others]
  shown = [
    p
    for p, fields in of.items()
    if (fields['epochs'], fields['train_size']) in lengths
  ]
  table = pd.DataFrame(
    [
      (results.rows[protocol, label].name, protocol, name, seed, error)
      for (protocol, label, name), cell in results.cells.items()
      if cell.best and cell.settled and first_name(name) == name
      and protocol in shown
      for seed, error in cell.best.values.items()
    ],
    columns=['dataset', 'protocol', 'condition', 'seed', 'error'],
  )  # fmt: skip
  key = ['dataset', 'condition']
  count = table.groupby(key).protocol.transform('nunique')
  having = table.groupby([*key, 'seed']).protocol.transform('nunique')
  table = table[(count > 1) & (having == count)]
  found = {}
  for dataset, group in table.groupby('dataset', sort=False):
    means = group.pivot_table(
      index='protocol', columns='condition', values='error'
    )
    means = means.reindex(
      index=[p for p in shown if p in means.index],
      columns=[name for name in COLUMNS if name in means],
    )
    theirs = [paper.by_condition().get((str(dataset), name)) for name in means]
    if any(theirs):
      means.loc["the paper's numbers"] = theirs
    found[dataset] = means
  return found


def as_frame(results: Results) -> Frame:
  """All tables, a row per cell; errors in percent."""
  own = [grid for grid in grids(results) if grid.table.name not in TABLES]
  rows = [
    _csv_row(grid.table.name, line, entry)
    for grid in (*grids(results, TABLES), *own)
    for line in grid.lines
    for entry in line.entries
    if entry.cell.expected or entry.paper is not None
  ]
  return pd.DataFrame(rows)


def _csv_row(table: str, line: Line, entry: Entry) -> dict[str, Any]:
  cell, best, held = entry.cell, entry.best, entry.held_out
  low, high = (best.interval if best else None) or (None, None)
  held_low, held_high = (held.interval if held else None) or (None, None)
  rate = epoch = None
  if best:
    seed = min(best.values, key=lambda seed: (best.values[seed], seed))
    rate, epoch = best.chosen[seed]
  row = {
    'table': table,
    'dataset': line.row.label if line.row else line.dataset,
    'protocol': line.row.protocol if line.row else '',
    'condition': entry.condition,
    'best_test_error': _mean(best),
    'low': low,
    'high': high,
    'held_out_test_error': _mean(held),
    'held_out_low': held_low,
    'held_out_high': held_high,
    'paper': entry.paper,
    'flag': entry.flag,
    'flag_held_out': entry.flag_held_out,
    'flag_paper': entry.flag_paper,
    'seeds': len(best.values) if best else 0,
    'runs': cell.present,
    'expected_runs': cell.expected,
    'diverged_runs': cell.diverged,
    'best_rate': None if rate is None else f'{rate:g}',
    'best_epoch': None if epoch is None else f'{epoch}',
    'in_paper': 'yes' if line.dataset in paper.datasets() else 'no',
  }
  return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
