"""The report: reads stored runs, writes tables, claims, plots and a page.

Reading order: `runs` (a stored run, checked), `studies` (runs by protocol),
`cells` (a condition on a dataset, its two results), `tables`, `conclusions` and
`verdicts`; the other modules turn these into text, Markdown, CSV, plots, HTML.

Imports no JAX, and plotting only when a plot is made.
"""

import os
import typing
from collections.abc import Iterable
from pathlib import Path

if typing.TYPE_CHECKING:
  from experiments.report.runs import Record
  from experiments.report.verdicts import Claim


def text_tables(
  records: 'Iterable[Record]', tables: Iterable[str] | None = None
) -> str:
  """The paper's tables as text, rows with results only.

  Args:
    records: of a results folder.
    tables: names of tables; None for those that have results.

  Raises:
    EmptyStoreError: there is no readable run; says how to make one.
    ValueError: no table of that name.
  """
  from experiments.report import studies, text

  return text.tables(studies.gather(records), tables)


def claims(records: 'Iterable[Record]') -> 'list[Claim]':
  """The paper's conclusions, judged by the records of each protocol.

  Raises:
    EmptyStoreError: there is no readable run; says how to make one.
  """
  from experiments.report import studies, verdicts

  return verdicts.claims(studies.gather(records))


def claims_text(records: 'Iterable[Record]') -> str:
  """The paper's conclusions as text, with effects and verdicts.

  Raises:
    EmptyStoreError: there is no readable run; says how to make one.
  """
  from experiments.report import studies, text

  return text.claims(studies.gather(records))


def results_markdown(
  records: 'Iterable[Record]',
  *,
  plots: str = 'plots',
) -> str:
  """RESULTS.md alone; `plots` is the plots' folder as seen from it.

  Raises:
    EmptyStoreError: there is no readable run; says how to make one.
  """
  from experiments.report import contents, results, studies

  report = contents.contents(studies.gather(records))
  return results.text(report, plots=plots)


def write_report(
  records: 'Iterable[Record]',
  folder: str | os.PathLike[str],
  *,
  markdown_only: bool = False,
) -> list[Path]:
  """Writes the files of the report into a folder; see `write`.

  Raises:
    EmptyStoreError: there is no readable run; says how to make one.
    OSError: a file can't be written.
  """
  from experiments.report import write

  return write.write_report(records, folder, markdown_only=markdown_only)
