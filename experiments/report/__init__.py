"""The report: turns records of runs into tables, claims, plots and a page.

Reading order: `frame` (checks records; a data frame and cells), `tables`,
`claims`, `plain` (answers in words), `plots`, `rules` (compared by error and
angle), `commands` (to repeat runs) and `pages` (all of these as text, Markdown
and HTML).

Never imports JAX, and imports pandas and matplotlib only when they are used.
"""

import os
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

if typing.TYPE_CHECKING:
  from experiments.runs.store import Record


def text_tables(
  records: 'Iterable[Record]',
  tables: Sequence[str] | None = None,
  width: int = 120,
) -> str:
  """The paper's tables as text, cells with runs only.

  Args:
    records: from `studies.load`.
    tables: names of tables; None selects those with results.
    width: characters in a line of the terminal.

  Raises:
    EmptyReportError: there is no readable run; says how to make one.
    ValueError: no table has that name.
  """
  from experiments.report import frame, pages

  return pages.text_tables(frame.read(records), tables, width)


def answers_text(records: 'Iterable[Record]', width: int = 120) -> str:
  """A plain sentence per dataset: how far each condition gets.

  Raises:
    EmptyReportError: there is no readable run; says how to make one.
  """
  from experiments.report import frame, plain
  from experiments.terminal import filled

  found = plain.answers(frame.read(records))
  return '\n'.join(filled(answer, width) for answer in found)


def claims_text(records: 'Iterable[Record]', width: int = 120) -> str:
  """The paper's conclusions as text, with effects and verdicts.

  Args:
    records: from `studies.load`.
    width: characters in a line of the terminal.

  Raises:
    EmptyReportError: there is no readable run; says how to make one.
  """
  from experiments.report import claims, frame, pages

  results = frame.read(records)
  return pages.text_claims(results, claims.judge(results), width)


def write_report(
  records: 'Iterable[Record]',
  folder: str | os.PathLike[str],
  *,
  markdown_only: bool = False,
) -> list[Path]:
  """Writes RESULTS.md, one HTML page, tables, claims and plots into a folder.

  The same records give the same bytes in any order. A file is written
  completely or not at all.

  Args:
    records: from `studies.load`.
    folder: where to write; created if missing.
    markdown_only: write only RESULTS.md and the plots in it.

  Returns:
    The paths of the files, plots last.

  Raises:
    EmptyReportError: there is no readable run; says how to make one.
    OSError: a file cannot be written; those before it are complete.
  """
  from experiments.report import claims, frame, pages, plots, rules, tables
  from experiments.runs.files import write_whole

  results = frame.read(records)
  judged = claims.judge(results)
  found = (
    plots.overview(results),
    plots.against_p(results),
    plots.of_settings(results),
  )
  overall = [picture for picture in found if picture]
  compared = [(of, rules.figure(of)) for of in rules.compare(results)]
  summaries = [(of.row, rules.summary(of), drawn) for of, drawn in compared]
  text = pages.markdown(results, judged, overall, summaries)
  files = {'RESULTS.md': text.encode()}
  pictures, aligned = {}, []
  if not markdown_only:
    pictures = {
      (grid.name, line.title): plots.curves(results, grid, line)
      for grid in tables.grids(results)
      for line in grid.rows
    }
    layers = (plots.alignment(results, row) for row in results.rows.values())
    aligned = [picture for picture in layers if picture]
    details = [(of.row, rules.table(of), drawn) for of, drawn in compared]
    page = pages.html(results, judged, overall, details, pictures, aligned)
    table = tables.as_frame(results).to_csv(index=False, lineterminator='\n')
    files |= {
      'report.html': page.encode(),
      'tables.txt': pages.text_tables(results).encode(),
      'tables.csv': table.encode(),
      'claims.txt': pages.text_claims(results, judged).encode(),
    }
  angles = [picture for *_, picture in compared]
  for picture in (*overall, *angles, *aligned, *pictures.values()):
    if picture.png:
      files[f'plots/{picture.name}.png'] = picture.png
    if not (picture.png and markdown_only):
      files[f'plots/{picture.name}.svg'] = picture.svg
  root = Path(folder)
  (root / 'plots').mkdir(parents=True, exist_ok=True)
  return [write_whole(root / name, body) for name, body in files.items()]
