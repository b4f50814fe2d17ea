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
    label: the dataset.
    columns: conditions that two protocols or more have in full.
    rows: by protocol, the error of each condition that is there in full; the
      last row is the paper's.
  """

  label: str
  columns: Sequence[str]
  rows: Mapping[str, Mapping[str, float]]


def side_by_side(store: Store) -> list[Comparison]:
  """The datasets that two protocols or more have results for."""
  labels = dict.fromkeys(row for study in store.studies for row in study.rows)
  return [found for label in labels if (found := _comparison(store, label))]


def _comparison(store: Store, label: str) -> Comparison | None:
  rows = {
    study.title: {
      naming.first_name(name): cell.best_validation.mean
      for (row, name), cell in study.cells.items()
      if row == label and cell.settled and cell.best_validation
    }
    for study in store.studies
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
    if (error := paper.by_condition().get((label, name))) is not None
  }
  if published:
    rows["the paper's numbers"] = published
  return Comparison(label, columns, rows)
