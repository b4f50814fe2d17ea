"""Writes a report's files, each whole or not at all."""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from experiments.report import markdown, page, results, text, tidy
from experiments.report.contents import contents
from experiments.report.runs import Record
from experiments.report.studies import gather


def write_report(
  records: Iterable[Record],
  folder: str | os.PathLike[str],
  *,
  commands: Sequence[str] = (),
  machine: Mapping[str, str] | str | None = None,
) -> list[Path]:
  """Writes tables, claims, plots, one HTML page and RESULTS.md.

  The same records give the same bytes, in whatever order they come.

  Args:
    records: of a results folder.
    folder: where to write; made if need be.
    commands: how the runs were made, for RESULTS.md.
    machine: what they ran on, for RESULTS.md.

  Returns:
    The files, the page first.

  Raises:
    EmptyStoreError: there is no readable run.
    OSError: a file can't be written; those before it are whole.
  """
  store = gather(records)
  report = contents(store)
  made = results.text(report, commands=commands, machine=machine)
  files = {
    'report.html': page.html(report),
    'RESULTS.md': made,
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
  return [replace(root / name, body) for name, body in contents_by_name.items()]


def replace(path: Path, body: bytes) -> Path:
  """Writes a file, whole or not at all; returns its path.

  Raises:
    OSError: it can't be written; what was there is still there.
  """
  descriptor, name = tempfile.mkstemp(dir=path.parent, prefix='.writing-')
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(body)
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    Path(name).unlink(missing_ok=True)
    raise
  return path
