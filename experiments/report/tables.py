"""The paper's tables with our cells beside its numbers."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from experiments.paper import published as paper
from experiments.paper.conditions import CONDITIONS, TABLES, Table
from experiments.report import naming, statistics
from experiments.report.cells import Cell, Result
from experiments.report.studies import Study

# A cell is yellow (worse) or blue (better) from this many points on.
POINTS = 3.0

WORSE, BETTER, ALIKE = 'worse', 'better', ''
MARKS = {WORSE: '▲', BETTER: '▼', ALIKE: ''}
LEGEND = (
  '▲ 3 points or more worse than the baseline of that row (yellow in the '
  'paper), ▼ 3 points or more better (blue)'
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One cell of a table: our two results, the paper's number, three flags.

  They mean something where `flagged`: we have the baseline, this is not it.
  """

  condition: str
  cell: Cell | None
  paper: float | None
  flagged: bool
  flag: str
  flag_held_out: str
  flag_paper: str

  @property
  def best_validation(self) -> Result | None:
    """Our result chosen as the paper chose its own."""
    return self.cell.best_validation if self.cell else None

  @property
  def held_out(self) -> Result | None:
    """Our result chosen on held-out training images."""
    return self.cell.held_out if self.cell else None


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How a row agrees with the paper's, by best validation error.

  Attributes:
    columns: columns that both have.
    rank: Spearman's correlation over them; None for fewer than three.
    same_flags: how many of `flags` columns have the paper's flag.
    flags: columns that both have, without the baseline; 0 without baseline.
    incomplete: how many of our cells in it lack some runs.
  """

  columns: int
  rank: float | None
  same_flags: int
  flags: int
  incomplete: int


@dataclasses.dataclass(frozen=True)
class Line:
  """A row of a table."""

  label: str
  in_paper: bool
  entries: Sequence[Entry]
  agreement: Agreement | None

  @property
  def title(self) -> str:
    """The dataset, labelled if it is not one of the paper's."""
    return self.label + ('' if self.in_paper else " (not the paper's)")

  @property
  def ours(self) -> bool:
    """Whether any of our results is in it."""
    return any(entry.best_validation for entry in self.entries)


@dataclasses.dataclass(frozen=True)
class Grid:
  """A table filled from one study."""

  table: Table
  lines: Sequence[Line]

  @property
  def name(self) -> str:
    """Such as 'Table 2'."""
    if self.table.name not in TABLES:
      return 'Other conditions'
    return f'Table {self.table.name}'

  @property
  def heading(self) -> str:
    """Name and title."""
    return f'{self.name}. {self.table.title}'

  @property
  def ours(self) -> bool:
    """Whether any of our results is in one of the table's own columns."""
    own = own_columns(self.table)
    return any(
      entry.best_validation and entry.condition in own
      for line in self.lines
      for entry in line.entries
    )


def flag(error: float | None, baseline: float | None) -> str:
  """The paper's colour: yellow (worse), blue (better) or none."""
  if error is None or baseline is None:
    return ALIKE
  points = round(error - baseline, 6)  # 55.15 - 52.15 is 3, not 2.9999...
  if points >= POINTS:
    return WORSE
  return BETTER if points <= -POINTS else ALIKE


def grids(study: Study, names: Iterable[str] | None = None) -> list[Grid]:
  """The named tables; for None those the study has results of its own for."""
  if names is not None:
    return [fill(study, TABLES[name]) for name in names]
  found = [fill(study, table) for table in (*TABLES.values(), _others(study))]
  return [grid for grid in found if grid.ours]


def _others(study: Study) -> Table:
  """Conditions that are no column of the paper's."""
  names = sorted({name for _, name in study.cells} - set(CONDITIONS))
  return Table('other', "Not the paper's", tuple(names))


def own_columns(table: Table) -> tuple[str, ...]:
  """The columns that no earlier table has under any name."""
  earlier = set()
  for other in TABLES.values():
    if other.name == table.name:
      break
    earlier |= {naming.same(name) for name in other.columns}
  return tuple(c for c in table.columns if naming.same(c) not in earlier)


def fill(study: Study, table: Table) -> Grid:
  """Puts a study's cells and the paper's numbers into a table.

  Rows are the paper's, in its order, then the study's other datasets. A row
  the paper's table lacks is there if it has results in the table's own columns.
  """
  published = paper.datasets(table.name)
  own = own_columns(table)
  rows = [
    (label, row.name)
    for label, row in study.rows.items()
    if row.name in published
    or any((label, column) in study.cells for column in own)
  ]
  present = {dataset for _, dataset in rows}
  rows += [(name, name) for name in published if name not in present]
  place = {name: i for i, name in enumerate(paper.datasets())}
  rows.sort(key=lambda row: place.get(row[1], len(place)))
  lines = [_line(study, table, label, dataset) for label, dataset in rows]
  return Grid(table, lines)


def _line(study: Study, table: Table, label: str, dataset: str) -> Line:
  in_paper = dataset in paper.datasets()
  cells = {c: study.cells.get((label, c)) for c in table.columns}
  published = {
    c: paper.errors().get((table.name, dataset, c)) for c in table.columns
  }
  base = study.cells.get((label, table.baseline))
  base_paper = paper.by_condition().get((dataset, table.baseline))
  base_best = _mean(base.best_validation if base else None)
  base_held = _mean(base.held_out if base else None)
  entries = [
    Entry(
      condition,
      cell,
      published[condition],
      base_best is not None and condition != table.baseline,
      flag(_mean(cell.best_validation if cell else None), base_best),
      flag(_mean(cell.held_out if cell else None), base_held),
      flag(published[condition], base_paper),
    )
    for condition, cell in cells.items()
  ]
  return Line(label, in_paper, entries, _agreement(entries))


def _mean(result: Result | None) -> float | None:
  return result.mean if result else None


def _agreement(entries: Sequence[Entry]) -> Agreement | None:
  pairs = [
    (entry, entry.best_validation.mean, entry.paper)
    for entry in entries
    if entry.best_validation and entry.paper is not None
  ]
  if not pairs:
    return None
  flags = [entry for entry, *_ in pairs if entry.flagged]
  return Agreement(
    columns=len(pairs),
    rank=statistics.rank_correlation(
      [ours for _, ours, _ in pairs], [theirs for *_, theirs in pairs]
    ),
    same_flags=sum(entry.flag == entry.flag_paper for entry in flags),
    flags=len(flags),
    incomplete=sum(not e.cell.complete for e, *_ in pairs if e.cell),
  )


def notes(study: Study) -> list[str]:
  """What a reader must know of a study's datasets and runs, a line each."""
  lines = []
  for row in study.rows.values():
    if not row.in_paper:
      lines.append(f"{row.label}: not one of the paper's datasets.")
    lines += [f'{row.label}: {note}.' for note in row.notes]
  failed = sum(run.failure is not None for run in study.unfinished)
  if failed:
    lines.append(f'Failed runs, not in the tables: {failed}.')
  if waiting := len(study.unfinished) - failed:
    lines.append(f'Unfinished runs, not in the tables: {waiting}.')
  return list(dict.fromkeys(lines))


def shown_cells(study: Study) -> Mapping[tuple[str, str], Cell]:
  """A study's cells in the order of its rows and of the tables' columns."""
  order = {name: place for place, name in enumerate(CONDITIONS)}
  labels = {label: place for place, label in enumerate(study.rows)}
  return dict(
    sorted(
      study.cells.items(),
      key=lambda item: (
        labels[item[0][0]],
        order.get(item[0][1], len(order)),
        item[0][1],
      ),
    )
  )
