"""Writes a report's files, each whole or not at all."""

import os
from collections.abc import Iterable
from pathlib import Path

from experiments.report import markdown, page, results, text, tidy
from experiments.report.contents import contents
from experiments.report.runs import Record
from experiments.report.studies import gather
from experiments.runs.files import write_whole


def write_report(
  records: Iterable[Record],
  folder: str | os.PathLike[str],
  *,
  markdown_only: bool = False,
) -> list[Path]:
  """Writes tables, claims, plots, one HTML page and RESULTS.md.

  The same records give the same bytes, in whatever order they come.

  Args:
    records: of a results folder.
    folder: where to write; made if need be.
    markdown_only: write RESULTS.md and the plots, nothing else.

  Returns:
    The files, the plots last.

  Raises:
    EmptyStoreError: there is no readable run.
    OSError: a file can't be written; those before it are whole.
  """
  store = gather(records)
  report = contents(store)
  files = {'RESULTS.md': results.text(report)}
  if not markdown_only:
    files |= {
      'report.html': page.html(report),
      'tables.txt': text.tables(store, all_rows=True),
      'tables.csv': tidy.text(store),
      'tables.md': markdown.tables(store),
      'claims.txt': text.claims(store),
    }
  contents_by_name = {name: body.encode() for name, body in files.items()}
  for picture in report.pictures():
    contents_by_name[f'plots/{picture.name}.svg'] = picture.svg
    if picture.png is not None:
      contents_by_name[f'plots/{picture.name}.png'] = picture.png
  root = Path(folder)
  (root / 'plots').mkdir(parents=True, exist_ok=True)
  return [
    write_whole(root / name, body) for name, body in contents_by_name.items()
  ]
