"""Tables and claims as text, Markdown and HTML."""

import base64
import dataclasses
import hashlib
import itertools
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import pandas as pd

from experiments.paper import published as paper
from experiments.paper.protocol import RATES
from experiments.report import commands, plain
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
from experiments.terminal import as_typed, filled

if typing.TYPE_CHECKING:
  from experiments.report.plots import Picture

HOW = (
  "Errors in %, ours | the paper's. The first number of a cell is the best "
  'test error: the lowest over epochs and rates, as in the paper. The held-out '
  'test error is the one at the epoch and rate with the lowest error on a '
  'held-out part of the training set (ties: the first epoch, the highest '
  'rate). [a, b] is a 95 % bootstrap interval over seeds, or over datasets for '
  'a mean over datasets; for two or three values it is their range. ▲: 3 '
  'points or more worse than the baseline of the row (yellow in the paper). '
  '▼: 3 points or more better (blue).'
)
# The legend on a terminal explains only the signs that are shown.
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


def text_tables(
  results: Results, names: Sequence[str] | None = None, width: int = _WIDTH
) -> str:
  """Returns the tables as text of that width, by protocol; see `grids`."""
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


def _underlined(title: str, line: str, width: int) -> list[str]:
  return [filled(title, width), line * min(len(title), width)]


def notes(results: Results) -> list[str]:
  """Returns remarks on datasets and runs, a line each."""
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
      having = [entry.cell.expected > 0 for entry in line.of(grid.columns)]
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
  """A row of a table as a frame: a row per condition, no empty columns."""
  entries = line.of(conditions)
  frame = pd.DataFrame(
    {
      _BEST: [_both(entry) for entry in entries],
      '95 %': [interval(entry) for entry in entries],
      'held-out': [_held_out(entry) for entry in entries],
      'incomplete': [entry.cell.mark for entry in entries],
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
  """Returns the paper's conclusions with their verdicts, by protocol."""
  text = _render(
    'claims.txt.jinja',
    warnings=results.warnings,
    by_protocol=_by_protocol(claims),
  )
  return '\n'.join(
    line
    if line in results.warnings
    else filled(line, width, ' ' * (len(line) - len(line.lstrip()) + 4))
    for line in text.split('\n')
  )


def _by_protocol(claims: Iterable[Claim]) -> dict[str, list[Claim]]:
  groups = itertools.groupby(claims, key=lambda claim: claim.protocol)
  return {protocol: list(of) for protocol, of in groups}


def markdown(
  results: Results,
  claims: Sequence[Claim],
  pictures: 'Sequence[Picture]',
  compared_rules: 'Sequence[tuple[Row, Frame, Picture]]',
) -> str:
  """Returns RESULTS.md; protocols with other settings have their own table."""
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
    pictures=pictures,
    claims=decided,
    statements=list(zip(*decided.values(), strict=True)),
    other=[
      (line, entry)
      for line, entry in compared(shown)
      if entry.cell.settled and _differs(entry)
    ],
    both=_both,
    held_out=_held_out,
  )


def html(
  results: Results,
  claims: Sequence[Claim],
  overall: 'Sequence[Picture]',
  compared_rules: 'Sequence[tuple[Row, Frame, Picture]]',
  pictures: 'Mapping[tuple[str, str], Picture]',
  aligned: 'Sequence[Picture]',
) -> str:
  """Returns the page, which needs no network and no other file.

  Its script sorts tables, filters cells, draws learning curves and opens the
  target of a link. The page's policy names the digest of this script and so
  forbids all others.

  Args:
    results: from `frame.read`.
    claims: from `claims.judge`.
    overall: pictures of all results.
    compared_rules: rules by error and angle.
    pictures: learning curves by table and title of a row.
    aligned: alignment by layer and epoch.
  """
  details = _details(results)
  shown = grids(results)
  script = (_TEMPLATES / 'page.js').read_text(encoding='utf-8')
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
    pictures=pictures,
    aligned=aligned,
    claims=_by_protocol(claims),
    details=details.values(),
    detail=detail,
    of_runs=commands.of_runs,
    of_run=commands.of_run,
    chosen=_chosen,
    marks=MARKS,
    inline=_inline,
    parts=_parts,
    rates=rates,
    script=markupsafe.Markup(script),
    digest=digest,
  )


def _shared(results: Results, claims: Iterable[Claim]) -> dict[str, Any]:
  """Returns the values that both templates use."""
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
      command
      for protocol in results.protocols
      for command in commands.of_protocol(results, protocol)
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
  """Compares the runs of each protocol with the paper."""
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
      'shared cells': len(gaps),
      'mean difference': number(sum(gaps) / len(gaps)) if gaps else '',
      'same marks': _part([e.agrees for e in cells if e.flagged]),
      'same verdicts': _part(decided),
    })  # fmt: skip
  return rows


def _part(of: Sequence[bool]) -> str:
  return f'{sum(of)} of {len(of)}' if of else ''


def _differs(entry: Entry) -> bool:
  """Whether comparisons with the baseline are not all the same."""
  held_out = entry.held_out and entry.flag_held_out != entry.flag
  return bool(entry.flagged and (held_out or not entry.agrees))


def _environments(results: Results) -> Frame:
  """Machine and versions: a row for each combination, most runs first."""
  counts = results.runs[results.runs.finished].environment.value_counts()
  order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  rows = [dict(about) for about, _ in order]
  table = pd.DataFrame(rows, [f'{count} runs' for _, count in order])
  return table.sort_index(axis=1).fillna('')


@dataclasses.dataclass(frozen=True)
class _Detail:
  """A cell with all names of its condition."""

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


def _inline(picture: 'Picture') -> markupsafe.Markup:
  """A plot as a part of the page: transparent, and a third of the file's size.

  matplotlib has escaped every text in it, and the ids that it refers to are
  digests that differ between plots.
  """
  text = picture.svg.decode()
  text = text[text.index('<svg') :]
  text = re.sub('<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
  text = re.sub(r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"', '', text)
  text = text.replace('fill: #ffffff', 'fill: none')
  text = re.sub(
    ' (?:d|x|y|points|transform)="[^"]*"',
    lambda found: re.sub(r'(\.\d)\d+', r'\1', found[0]),
    text,
  )
  return markupsafe.Markup(re.sub(r'\s*\n\s*', ' ', text).replace('> <', '><'))


def rates(results: Results, line: Line, conditions: Sequence[str]) -> Frame:
  """Cells of a row by condition and rate, darker for a higher error."""
  assert line.row is not None  # a row of ours
  keys = ['condition', 'plan', 'rate']
  found = results.runs_of(line.row).groupby(keys, as_index=False).agg(
    error=('best', 'mean'), diverged=('diverged', 'any')
  )  # fmt: skip
  # Of several batch plans the better one.
  found = found.sort_values('error').drop_duplicates(['condition', 'rate'])
  found = found[found.condition.isin(conditions)]
  lowest = found.groupby('condition').error.transform('min')
  found['is_best'] = found.error == lowest
  heights = np.log(np.maximum(found.error / max(lowest.min(), 0.01), 1))
  shades = 60 * heights / max(heights.max(), np.log(1.01))
  found['shade'] = shades.round().astype(int)
  found['cell'] = list(found.itertuples())
  table = found.pivot(index='condition', columns='rate', values='cell')
  columns = sorted({*RATES, *found.rate})
  order = [name for name in conditions if name in table.index]
  return table.reindex(index=order, columns=columns).astype(object).where(
    lambda cells: cells.notna(), None
  )  # fmt: skip


def _parts(results: Results, grid: Grid) -> list[Grid]:
  """A table's rows with the default settings, and its other rows."""
  rows = [
    [line for line in grid.rows
     if line.row and (line.row.protocol in results.main) == usual]
    for usual in (True, False)
  ]  # fmt: skip
  return [dataclasses.replace(grid, lines=lines) for lines in rows if lines]


def _markdown(value: Any) -> str:
  """Escapes a text for Markdown; lines stay in their cell of a table."""
  text = str(value)
  text = text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
  text = re.sub(r'([\\`*_\[\]|~#$!])', r'\\\1', text)
  return text.replace('\n', '<br>')


def _code(lines: Iterable[str]) -> str:
  """A fenced block of code, with a fence longer than any in the text."""
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
  environment.filters.update(md=_markdown, code=_code, as_typed=as_typed)
  values |= {'how': HOW, 'number': number, 'interval': interval}
  return environment.get_template(template).render(values).rstrip() + '\n'
