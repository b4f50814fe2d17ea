"""Tables and claims as text, Markdown and HTML."""

import base64
import dataclasses
import hashlib
import re
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pandas as pd

from experiments.paper import published as paper
from experiments.report import commands, plain, rules
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
  Line,
  compared,
  grids,
  settings,
)

if typing.TYPE_CHECKING:
  from experiments.report.plots import Picture
  from experiments.report.rules import Comparison

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
# What a terminal explains of it: the words of those signs that are shown.
_LEGEND = {
  '.': 'Best test error in %: the lowest over epochs and rates, as in the '
  'paper.',
  ' | ': "ours | the paper's.",
  'held-out': 'held-out: epoch and rate are chosen on a held-out part of the '
  'training set.',
  '[': '[a, b]: 95 % interval over seeds.',
  '▲': '▲: 3 points or more worse than the baseline of the row.',
  '▼': '▼: 3 points or more better.',
}
_BEST = 'best'
_WIDTH = 120
_TEMPLATES = Path(__file__).with_name('templates')
_SCRIPT = _TEMPLATES / 'page.js'


def text_tables(
  results: Results, names: Iterable[str] | None = None, width: int = _WIDTH
) -> str:
  """The tables for a terminal of that width, by protocol; see `grids`."""
  names = None if names is None else list(names)
  tables = []
  for protocol in results.protocols:
    found = grids(results, names, [protocol])
    tables += ['', *_underlined(protocol, '=', width)]
    for grid in found:
      title = f'{grid.name}. {grid.table.title}'
      tables += ['', *_underlined(title, '-', width), *_text_grid(grid, width)]
  shown = '\n'.join(tables)
  legend = [words for sign, words in _LEGEND.items() if sign in shown]
  return '\n'.join([
    *results.warnings,
    filled(' '.join(legend), width),
    *(filled(note, width) for note in notes(results)),
    *tables,
  ]).rstrip() + '\n'  # fmt: skip


def filled(text: str, width: int) -> str:
  """Lines of at most that width; names stay whole."""
  return textwrap.fill(
    text, width, break_long_words=False, break_on_hyphens=False
  )


def _underlined(title: str, line: str, width: int) -> list[str]:
  return [filled(title, width), line * min(len(title), width)]


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


def _text_grid(grid: Grid, width: int) -> list[str]:
  """One table if it fits, else a list of conditions for every row."""
  if not grid.rows:
    return ['No results yet.']
  found = [(line, _text_line(line, grid.columns)) for line in grid.rows]
  table = pd.concat([
    frame.T.set_axis([
      line.label if what == _BEST else f'  {what}' for what in frame
    ])
    for line, frame in found
  ])  # fmt: skip
  parts = _lines(table)
  if max(map(len, parts)) > width:
    parts = []
    for line, frame in found:
      having = [entry.cell is not None for entry in line.of(grid.columns)]
      rows = _lines(frame[having], width - 2)
      parts += [line.label, *(f'  {row}' for row in rows)]
  parts += [
    filled(
      f'{line.label}, beside the paper: {", ".join(line.agreement)}', width
    )
    for line in grid.rows
    if line.agreement
  ]
  return parts


def _text_line(line: Line, conditions: Sequence[str]) -> Frame:
  """What a row of a table has: a row per condition, no empty columns."""
  entries = line.of(conditions)
  frame = pd.DataFrame(
    {
      _BEST: [_both(entry) for entry in entries],
      '95 %': [interval(entry) for entry in entries],
      'held-out': [_held_out(entry) for entry in entries],
      'incomplete': [e.cell.mark if e.cell else '' for e in entries],
    },
    index=[entry.condition for entry in entries],
  )
  return frame.loc[:, (frame != '').any()]


def _lines(frame: Frame, width: int | None = None) -> list[str]:
  """A frame as lines, names at the left."""
  names = [str(name) for name in frame.index]
  longest = max(map(len, names))
  frame = frame.set_axis([name.ljust(longest) for name in names])
  text = frame.to_string(line_width=width)
  return [part.removesuffix('\\').rstrip() for part in text.split('\n')]


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


def text_claims(
  results: Results, claims: Sequence[Claim], width: int = _WIDTH
) -> str:
  """Every conclusion of the paper with its verdicts, by protocol."""
  text = _render(
    'claims.txt.jinja',
    warnings=results.warnings,
    by_protocol=_by_protocol(claims),
  )
  return '\n'.join(
    line if line in results.warnings else _indented(line, width)
    for line in text.split('\n')
  )


def _indented(line: str, width: int) -> str:
  """The line, broken where it is too long; its other parts further right."""
  indent = len(line) - len(line.lstrip()) + 4
  return textwrap.fill(
    line,
    width,
    subsequent_indent=' ' * indent,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _by_protocol(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
  found: dict[str, list[Claim]] = {}
  for claim in claims:
    found.setdefault(claim.protocol, []).append(claim)
  return found


def markdown(
  results: Results,
  claims: Sequence[Claim],
  pictures: 'Sequence[Picture]',
  compared_rules: 'Sequence[tuple[Comparison, Picture]]',
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
    rules=compared_rules,
    rule_table=rules.table,
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
  compared_rules: 'Sequence[tuple[Comparison, Picture]]',
  pictures: 'Mapping[tuple[str, str], Sequence[Picture]]',
  aligned: 'Sequence[Picture]',
) -> str:
  """One page that needs nothing else: no network, no files.

  Its script sorts tables, filters cells and opens what a link points to. The
  page allows no other script: its policy names the digest of this one.

  Args:
    results: what `read` returns.
    claims: what `judge` returns.
    overall: pictures of all results.
    compared_rules: rules by error and angle.
    pictures: by table and title of a row.
    aligned: alignment by layer and epoch.
  """
  details = _details(results)
  shown = grids(results)
  script = _SCRIPT.read_text(encoding='utf-8')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

  def detail(row: Row, name: str) -> _Detail:
    return details[row.protocol, row.label, first_name(name)]

  return _render(
    'report.html.jinja',
    **_shared(results, claims),
    grids=shown,
    glossary=plain.glossary(
      dict.fromkeys(name for grid in shown for name in grid.columns)
    ),
    overall=overall,
    rules=compared_rules,
    rule_table=rules.table,
    pictures=pictures,
    aligned=aligned,
    claims=_by_protocol(claims),
    details=details.values(),
    detail=detail,
    of_runs=commands.of_runs,
    chosen=_chosen,
    marks=MARKS,
    uri=_uri,
    script=markupsafe.Markup(script),
    digest=digest,
  )


def _shared(results: Results, claims: Iterable[Claim]) -> dict[str, Any]:
  """What both pages show."""
  return {
    'results': results,
    'answers': plain.answers(results),
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


def _chosen(cell: Cell) -> str:
  """Such as '5/5 runs; seed 0: rate 1, epoch 4': what hovering shows."""
  parts = [f'{cell.present}/{cell.expected} runs']
  for seed, (rate, epoch) in (cell.best.chosen if cell.best else {}).items():
    at = '' if epoch is None else f', epoch {epoch}'
    parts.append(f'seed {seed}: rate {rate:g}{at}')
  return '; '.join(parts)


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
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {'md': _markdown, 'code': _code}
  values |= {'how': HOW, 'number': number, 'interval': interval}
  values |= {'command': commands.of_run}
  return environment.get_template(template).render(values).rstrip() + '\n'
