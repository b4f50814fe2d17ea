"""Tables and claims as text, Markdown and HTML."""

import base64
import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from experiments.paper import published as paper
from experiments.report import commands
from experiments.report.claims import Claim
from experiments.report.frame import (
  DEFAULTS,
  Cell,
  CellKey,
  Frame,
  Results,
  Row,
  first_name,
  words,
)
from experiments.report.tables import (
  MARKS,
  Entry,
  Grid,
  compared,
  grids,
  settings,
)

if typing.TYPE_CHECKING:
  from experiments.report.plots import Picture

HOW = (
  "Errors in %, ours | the paper's number. The first line of a cell is the "
  'best test error, selected as in the paper: the lowest over epochs and '
  'rates. Held-out: epoch and rate are chosen on a held-out part of the '
  'training set (ties: the first epoch, the highest rate), and the test '
  'error is read there. [a, b]: 95 % bootstrap interval over seeds, or over'
  ' datasets for a mean over datasets; for two or three values it is their '
  'range. ▲ 3 points or more worse than the baseline of the row (yellow in '
  'the paper), ▼ 3 points or more better (blue).'
)
_WIDTH = 120


def text_tables(results: Results, names: Iterable[str] | None = None) -> str:
  """The tables for a terminal, by protocol; see `grids` for the names."""
  names = None if names is None else list(names)
  parts = [*results.warnings, textwrap.fill(HOW, 80), '']
  parts += [textwrap.fill(note, _WIDTH) for note in notes(results)]
  for protocol in results.protocols:
    found = grids(results, names, [protocol])
    parts += ['', protocol, '=' * len(protocol)]
    for grid in found:
      title = f'{grid.name}. {grid.table.title}'
      parts += ['', title, '-' * len(title), *_text_grid(grid)]
  return '\n'.join(parts).rstrip() + '\n'


def notes(results: Results) -> list[str]:
  """What a reader must know of datasets and runs, a line each."""
  lines = []
  for row in results.rows.values():
    if row.name not in paper.datasets():
      lines.append(f"{row.label}: not one of the paper's datasets.")
    lines += [f'{row.label}: {note}.' for note in row.notes]
  waiting = results.runs[~results.runs.finished]
  failed = int((waiting.failure != '').sum())
  for state, count in (
    ('Failed', failed),
    ('Unfinished', len(waiting) - failed),
  ):
    if count:
      lines.append(f'{state} runs, not in the tables: {count}.')
  return list(dict.fromkeys(lines))


def _text_grid(grid: Grid) -> list[str]:
  lines = [line for line in grid.lines if line.ours]
  rows = {}
  for line in lines:
    for title, cells in (
      (line.label, [_both(entry) for entry in line.entries]),
      ('  95 %', [interval(entry) for entry in line.entries]),
      ('  held-out', [_held_out(entry) for entry in line.entries]),
      ('  incomplete', [e.cell.mark if e.cell else '' for e in line.entries]),
    ):
      if any(cells):
        rows[line.label, title] = cells
  if not rows:
    return ['No results yet.']
  frame = pd.DataFrame(list(rows.values()), columns=list(grid.table.columns))
  frame.index = [title for _, title in rows]
  frame = frame.loc[:, (frame != '').any()]
  width = max(map(len, frame.index))
  frame.index = [title.ljust(width) for title in frame.index]
  text = frame.to_string(line_width=_WIDTH)
  parts = [part.removesuffix('\\').rstrip() for part in text.split('\n')]
  parts += [
    f'{line.label}, beside the paper: {", ".join(line.agreement)}'
    for line in lines
    if line.agreement
  ]
  if missing := [line.label for line in grid.lines if not line.ours]:
    missing = f'No results yet: {", ".join(missing)}.'
    parts.append(textwrap.fill(missing, _WIDTH, break_on_hyphens=False))
  return parts


def number(value: float) -> str:
  """An error as the paper prints it."""
  return f'{value:.2f}'


def interval(entry: Entry) -> str:
  """'[a, b]' of our best test error, or ''."""
  ends = entry.best and entry.best.interval
  return f'[{ends[0]:.2f}, {ends[1]:.2f}]' if ends else ''


def _both(entry: Entry) -> str:
  ours = number(entry.best.mean) + MARKS[entry.flag] if entry.best else ''
  if entry.paper is None:
    return ours
  return f'{ours} | {number(entry.paper)}{MARKS[entry.flag_paper]}'


def _held_out(entry: Entry) -> str:
  if not entry.held_out:
    return ''
  return number(entry.held_out.mean) + MARKS[entry.flag_held_out]


def text_claims(results: Results, claims: Sequence[Claim]) -> str:
  """Every conclusion of the paper with its verdicts, by protocol."""
  return _render(
    'claims.txt.jinja',
    warnings=results.warnings,
    by_protocol=_by_protocol(claims),
  )


def _by_protocol(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
  found: dict[str, list[Claim]] = {}
  for claim in claims:
    found.setdefault(claim.protocol, []).append(claim)
  return found


def markdown(
  results: Results, claims: Sequence[Claim], pictures: 'Sequence[Picture]'
) -> str:
  """RESULTS.md; protocols with other settings have a table of their own."""
  decided = {
    protocol: of
    for protocol, of in _by_protocol(claims).items()
    if protocol in results.main and any(claim.decided for claim in of)
  }
  shown = grids(results, protocols=results.main)
  return _render(
    'results.md.jinja',
    **_shared(results, claims),
    grids=shown,
    pictures=pictures,
    claims=decided,
    statements=list(zip(*decided.values(), strict=True)),
    other=[pair for pair in compared(shown) if _differs(pair[1])],
    both=_both,
    held_out=_held_out,
  )


def html(
  results: Results,
  claims: Sequence[Claim],
  overall: 'Sequence[Picture]',
  pictures: 'Mapping[tuple[str, str], Sequence[Picture]]',
) -> str:
  """One page that needs nothing else: no network, no scripts, no files.

  Args:
    results: what `read` returns.
    claims: what `judge` returns.
    overall: pictures of all results.
    pictures: by table and title of a row.
  """
  details = _details(results)

  def anchor(row: Row, name: str) -> str:
    return details[row.protocol, row.label, first_name(name)].anchor

  return _render(
    'report.html.jinja',
    **_shared(results, claims),
    grids=grids(results),
    overall=overall,
    pictures=pictures,
    claims=_by_protocol(claims),
    details=details.values(),
    anchor=anchor,
    marks=MARKS,
    uri=_uri,
  )


def _shared(results: Results, claims: Iterable[Claim]) -> dict[str, Any]:
  """What both pages show."""
  return {
    'results': results,
    'overview': _overview(results, claims),
    'notes': notes(results),
    'settings': {
      dataset: table.map(lambda x: '' if pd.isna(x) else number(x))
      for dataset, table in settings(results).items()
    },
    'commands': [
      line
      for protocol in results.protocols
      for line in (f'# {protocol}', *commands.of_protocol(results, protocol))
    ],
    'defaults': {
      name: ' '.join(words(value)) for name, value in DEFAULTS.items()
    },
    'data': list(dict.fromkeys(
      (row.label, ', '.join(row.sources), row.digest)
      for row in results.rows.values()
    )),
    'environments': _environments(results),
  }  # fmt: skip


def _overview(
  results: Results, claims: Iterable[Claim]
) -> list[dict[str, Any]]:
  """Per protocol: its runs, and how they compare with the paper."""
  rows = []
  for protocol, of in _by_protocol(claims).items():
    runs = results.runs[results.runs.protocol == protocol]
    cells = [e for _, e in compared(grids(results, protocols=[protocol]))]
    gaps = [abs(e.best.mean - (e.paper or 0)) for e in cells if e.best]
    decided = [claim.agrees for claim in of if claim.decided]
    rows.append({
      'protocol': protocol,
      'datasets': ', '.join(dict.fromkeys(runs.label)),
      'runs': int(runs.finished.sum()),
      'hours': f'{runs.seconds.sum() / 3600:.1f}',
      'cells': len(gaps),
      'difference': number(sum(gaps) / len(gaps)) if gaps else '',
      'equal flags': _part([e.agrees for e in cells if e.flagged]),
      'equal verdicts': _part(decided),
    })  # fmt: skip
  return rows


def _part(of: Sequence[bool]) -> str:
  return f'{sum(of)} of {len(of)}' if of else ''


def _differs(entry: Entry) -> bool:
  """Whether comparisons with the baseline are not all the same."""
  held_out = entry.held_out and entry.flag_held_out != entry.flag
  return bool(entry.flagged and (held_out or not entry.agrees))


def _environments(results: Results) -> Frame:
  """Machine and versions: a column for each combination, most runs first."""
  counts = results.runs[results.runs.finished].environment.value_counts()
  order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  if not any(about for about, _ in order):
    return pd.DataFrame()
  columns = [pd.Series(dict(about), name=f'{count} runs', dtype=object)
             for about, count in order]  # fmt: skip
  return pd.concat(columns, axis=1).sort_index().fillna('')


@dataclasses.dataclass(frozen=True)
class _Detail:
  """A cell once, though a condition may have several names."""

  anchor: str
  title: str
  names: list[str]
  cell: Cell
  runs: Frame


def _details(results: Results) -> dict[CellKey, _Detail]:
  """All cells by protocol, label and the condition's first name."""
  runs = results.runs.sort_values(
    ['seed', 'plan', 'rate', 'run_id'], ascending=[True, True, False, True]
  )
  runs = runs.assign(spark=[_spark(errors) for errors in runs.errors])
  by = ['protocol', 'label', 'condition']
  members = runs.explode('condition').groupby(by).groups
  found: dict[CellKey, _Detail] = {}
  for key, cell in results.cells.items():
    protocol, label, name = key
    first = protocol, label, first_name(name)
    if first not in found:
      title = f'{label}, {protocol}'
      found[first] = _Detail(
        f'cell-{len(found)}', title, [], cell, runs.loc[members[key]]
      )
    found[first].names.append(name)
  return found


def _spark(errors: Sequence[tuple[int, float]]) -> str:
  """A learning curve as the points of a drawing of 110 x 24."""
  step = 110 / max(len(errors) - 1, 1)
  return ' '.join(
    f'{step * at:.1f},{24 - 0.22 * min(error, 100):.1f}'
    for at, (_, error) in enumerate(errors)
  )


def _uri(picture: 'Picture') -> str:
  return 'data:image/svg+xml;base64,' + base64.b64encode(picture.svg).decode()


def _markdown(value: Any) -> str:
  """A text that Markdown shows as it is."""
  text = str(value)
  text = text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
  return re.sub(r'([\\`*_\[\]|~#$!])', r'\\\1', text)


def _code(lines: Iterable[str]) -> str:
  """A block of code that the text can't end."""
  text = '\n'.join(lines)
  longest = max((len(ticks) for ticks in re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return f'{fence}\n{text}\n{fence}'


def _render(template: str, **values: Any) -> str:
  environment = jinja2.Environment(
    autoescape='html' in template,
    loader=jinja2.FileSystemLoader(Path(__file__).with_name('templates')),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {'md': _markdown, 'code': _code}
  values |= {'how': HOW, 'number': number, 'interval': interval}
  values |= {'command': commands.of_run}
  return environment.get_template(template).render(values).rstrip() + '\n'
