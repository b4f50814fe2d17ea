"""The tables as one tidy CSV: a line per cell and protocol."""

import csv
import io

from experiments.paper.conditions import TABLES
from experiments.report.cells import Result
from experiments.report.studies import Store, Study
from experiments.report.tables import Entry, Line, fill, grids

COLUMNS = (
  'table', 'dataset', 'condition', 'ours_best_validation', 'ours_held_out',
  'interval_low', 'interval_high', 'held_out_low', 'held_out_high', 'paper',
  'flag_ours', 'flag_held_out', 'flag_paper', 'seeds', 'runs', 'expected_runs',
  'diverged_runs', 'best_rate', 'best_epoch', 'in_paper', 'protocol',
)  # fmt: skip


def text(store: Store) -> str:
  """All six tables (errors in %) and those of the user's own conditions."""
  file = io.StringIO()
  writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
  writer.writeheader()
  for study in store.studies:
    tables = [fill(study, table) for table in TABLES.values()]
    tables += [grid for grid in grids(study) if grid.table.name not in TABLES]
    for grid in tables:
      for line in grid.lines:
        for entry in line.entries:
          if entry.cell or entry.paper is not None:
            writer.writerow(_row(study, grid.table.name, line, entry))
  return file.getvalue()


def _row(study: Study, table: str, line: Line, entry: Entry) -> dict:
  best, cell = entry.best_validation, entry.cell
  low, high = _ends(best)
  held_low, held_high = _ends(entry.held_out)
  chosen = None
  if best:
    seed = min(best.values, key=lambda seed: (best.values[seed], seed))
    chosen = best.chosen[seed]
  epoch = chosen.outcome.best_epoch if chosen and chosen.outcome else None
  return {
    'table': table,
    'dataset': line.label,
    'condition': entry.condition,
    'ours_best_validation': _number(best.mean if best else None),
    'ours_held_out': _number(entry.held_out.mean if entry.held_out else None),
    'interval_low': low,
    'interval_high': high,
    'held_out_low': held_low,
    'held_out_high': held_high,
    'paper': _number(entry.paper),
    'flag_ours': entry.flag,
    'flag_held_out': entry.flag_held_out,
    'flag_paper': entry.flag_paper,
    'seeds': len(best.values) if best else 0,
    'runs': cell.present if cell else 0,
    'expected_runs': cell.expected if cell else 0,
    'diverged_runs': cell.diverged if cell else 0,
    'best_rate': f'{chosen.rate:g}' if chosen else '',
    'best_epoch': '' if epoch is None else epoch,
    'in_paper': 'yes' if line.in_paper else 'no',
    'protocol': study.title,
  }


def _ends(result: Result | None) -> tuple[str, str]:
  ends = result.interval if result else None
  return (_number(ends[0]), _number(ends[1])) if ends else ('', '')


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:.4f}'.rstrip('0').rstrip('.')
