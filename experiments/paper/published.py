"""The published numbers and the order of the paper's rows."""

import csv
import functools
from collections.abc import Mapping
from pathlib import Path

_FILE = Path(__file__).with_name('results.csv')


@functools.cache
def errors() -> Mapping[tuple[str, str, str], float]:
  """Error in % by (table, dataset, condition), in the paper's order."""
  with _FILE.open(newline='', encoding='utf-8') as file:
    return {
      (row['table'], row['dataset'], row['condition']): float(
        row['error_percent']
      )
      for row in csv.DictReader(file)
    }


@functools.cache
def by_condition() -> Mapping[tuple[str, str], float]:
  """Error in % by (dataset, condition), whichever table has it."""
  return {
    (dataset, condition): error
    for (_, dataset, condition), error in errors().items()
  }


@functools.cache
def datasets(table: str | None = None) -> tuple[str, ...]:
  """The rows of a table in the paper's order; of all tables for None."""
  return tuple(
    dict.fromkeys(
      dataset for name, dataset, _ in errors() if table in (None, name)
    )
  )
