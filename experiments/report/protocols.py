"""Protocols side by side: what their differences do to the same cells."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.conditions import CONDITIONS
from experiments.report import naming, paper
from experiments.report.studies import Store

HOW = (
  'Best validation error (%) of the cells that two protocols or more have in '
  'full. A protocol is named by what it has that is not as by default.'
)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A dataset under several protocols; errors are best validation, in %.

  Attributes:
    dataset: its name.
    columns: conditions that two protocols or more have in full.
    rows: by protocol, the error of each condition that is there in full; the
      last row is the paper's. Copies of the dataset have a row each.
  """

  dataset: str
  columns: Sequence[str]
  rows: Mapping[str, Mapping[str, float]]


def side_by_side(store: Store) -> list[Comparison]:
  """The datasets that two protocols or more have results for."""
  names = dict.fromkeys(
    row.name for study in store.studies for row in study.rows.values()
  )
  return [found for name in names if (found := _comparison(store, name))]


def _comparison(store: Store, dataset: str) -> Comparison | None:
  rows = {
    study.title + label.removeprefix(dataset): {
      naming.first_name(name): cell.best_validation.mean
      for (of_row, name), cell in study.cells.items()
      if of_row == label and cell.settled and cell.best_validation
    }
    for study in store.studies
    for label, row in study.rows.items()
    if row.name == dataset
  }
  rows = {title: errors for title, errors in rows.items() if errors}
  columns = [
    name
    for name in CONDITIONS
    if sum(name in errors for errors in rows.values()) > 1
  ]
  if not columns:
    return None
  published = {
    name: error
    for name in columns
    if (error := paper.by_condition().get((dataset, name))) is not None
  }
  if published:
    rows["the paper's numbers"] = published
  return Comparison(dataset, columns, rows)
