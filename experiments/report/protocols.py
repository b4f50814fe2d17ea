"""Protocols side by side: what their differences do to the same cells."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.paper import published as paper
from experiments.paper.conditions import CONDITIONS
from experiments.report import naming
from experiments.report.studies import Store

HOW = (
  'Best validation error (%) of the cells that two protocols or more have in '
  'full. A protocol is named by what it has that is not as by default.'
)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A dataset under several protocols; errors are best validation, in %.

  Of protocols and conditions, those that are more stand in rows. Copies of the
  dataset stand apart; the paper's numbers come last.

  Attributes:
    dataset: its name.
    columns: names of columns.
    rows: by name, the error of each column that is there in full.
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
  protocols = {
    study.title + label.removeprefix(dataset): {
      naming.first_name(name): cell.best_validation.mean
      for (of_row, name), cell in study.cells.items()
      if of_row == label and cell.settled and cell.best_validation
    }
    for study in store.studies
    for label, row in study.rows.items()
    if row.name == dataset
  }
  protocols = {title: errors for title, errors in protocols.items() if errors}
  conditions = [
    name
    for name in CONDITIONS
    if sum(name in errors for errors in protocols.values()) > 1
  ]
  if not conditions:
    return None
  published = {
    name: error
    for name in conditions
    if (error := paper.by_condition().get((dataset, name))) is not None
  }
  if published:
    protocols["the paper's numbers"] = published
  if len(conditions) <= len(protocols):
    return Comparison(dataset, conditions, protocols)
  by_condition = {
    name: {
      title: errors[name]
      for title, errors in protocols.items()
      if name in errors
    }
    for name in conditions
  }
  return Comparison(dataset, list(protocols), by_condition)
