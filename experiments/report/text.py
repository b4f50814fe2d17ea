"""Tables and claims as plain text, for the terminal and for files."""

import textwrap
from collections.abc import Iterable, Sequence

from experiments.paper.conditions import find_table
from experiments.report.findings import OPEN
from experiments.report.studies import Store
from experiments.report.tables import (
  LEGEND,
  MARKS,
  Agreement,
  Entry,
  Grid,
  Line,
  grids,
  notes,
)
from experiments.report.verdicts import Claim, claims_of

HELD_OUT = (
  'rate and epoch chosen on a held-out part of the training set (of equals the '
  'first epoch and the highest rate), test error at that point'
)
INTERVALS = (
  '[a, b]: 95 % bootstrap interval over seeds (where there is a mean over '
  'datasets, over datasets); with two or three of them it is their range.'
)
HOW = (
  "Error in %, ours | the paper's number. The first line of a row is the best "
  "validation error, chosen the paper's way: the lowest test error over epochs "
  f'and rates. Held-out: {HELD_OUT}. {INTERVALS} {LEGEND}.'
)


def tables(
  store: Store,
  names: Iterable[str] | None = None,
  *,
  all_rows: bool = False,
  width: int = 120,
) -> str:
  """The tables of every study.

  Args:
    store: what `gather` returns.
    names: which tables; None for those that have results.
    all_rows: also the rows without any result of ours.
    width: columns are broken into blocks of at most that many characters.

  Raises:
    ValueError: no table of that name; names the nearest.
  """
  if names is not None:
    names = [find_table(name).name for name in names]
  parts = [*store.warnings, textwrap.fill(HOW, min(width, 80)), '']
  for study in store.studies:
    parts += [study.title, '=' * len(study.title), '']
    parts += notes(study)
    for grid in grids(study, names):
      parts += ['', *_grid(grid, all_rows, width)]
    parts.append('')
  return '\n'.join(parts).rstrip() + '\n'


def _grid(grid: Grid, all_rows: bool, width: int) -> list[str]:
  lines = [line for line in grid.lines if all_rows or line.ours]
  parts = [grid.heading, '-' * len(grid.heading)]
  stub = max([len(line.title) for line in lines] + [len('  incomplete')])
  columns = [
    [name] + [text for line in lines for text in _entry(line, at)]
    for at, name in enumerate(grid.table.columns)
  ]
  labels = [''] + [text for line in lines for text in _labels(line)]
  filled = [column for column in columns if all_rows or any(column[1:])]
  for block in _blocks(filled, width - stub):
    sizes = [max(map(len, column)) for column in block]
    for at, label in enumerate(labels):
      cells = (c[at].ljust(size) for c, size in zip(block, sizes, strict=True))
      parts.append('  '.join([label.ljust(stub), *cells]).rstrip())
    parts.append('')
  missing = [line.label for line in grid.lines if line not in lines]
  if missing:
    text = f'No results yet: {", ".join(missing)}.'
    parts.append(textwrap.fill(text, width, break_on_hyphens=False))
  agreeing = [
    f'  {line.label}: {agreement(line.agreement)}'
    for line in lines
    if line.agreement
  ]
  if agreeing:
    parts += ['Agreement with the paper (best validation):', *agreeing]
  return parts


def _blocks(columns: Sequence[list[str]], room: int) -> list[list[list[str]]]:
  blocks, used = [[]], 0
  for column in columns:
    size = max(map(len, column)) + 2
    if blocks[-1] and used + size > room:
      blocks.append([])
      used = 0
    blocks[-1].append(column)
    used += size
  return blocks


def _extras(line: Line) -> dict[str, list[str]]:
  """The lines below a row that have anything in them, by label."""
  extras = {
    '  95 %': [interval(entry) for entry in line.entries],
    '  held-out': [_held_out(entry) for entry in line.entries],
    '  incomplete': [e.cell.mark if e.cell else '' for e in line.entries],
  }
  return {label: texts for label, texts in extras.items() if any(texts)}


def _labels(line: Line) -> list[str]:
  return [line.title, *_extras(line)]


def _entry(line: Line, at: int) -> list[str]:
  entry = line.entries[at]
  return [_both(entry), *(texts[at] for texts in _extras(line).values())]


def _both(entry: Entry) -> str:
  ours, paper = '', ''
  if entry.best_validation:
    ours = number(entry.best_validation.mean) + MARKS[entry.flag]
  if entry.paper is not None:
    paper = number(entry.paper) + MARKS[entry.flag_paper]
  return f'{ours:>6} | {paper}' if paper else f'{ours:>6}'.rstrip()


def _held_out(entry: Entry) -> str:
  if not entry.held_out:
    return ''
  return f'{number(entry.held_out.mean) + MARKS[entry.flag_held_out]:>6}'


def number(value: float) -> str:
  """An error as the paper prints it."""
  return f'{value:.2f}'


def interval(entry: Entry) -> str:
  """'[a, b]' of our best validation error, or ''."""
  found = entry.best_validation and entry.best_validation.interval
  return f'[{found[0]:.2f}, {found[1]:.2f}]' if found else ''


def agreement(found: Agreement) -> str:
  """Such as 'rank correlation 0.93 over 11 columns, equal flags 9 of 10'."""
  rank = 'not defined' if found.rank is None else f'{found.rank:.2f}'
  text = f'rank correlation {rank} over {found.columns} columns'
  if found.flags:
    text += f', equal flags {found.same_flags} of {found.flags}'
  if found.incomplete:
    text += f' ({found.incomplete} of our cells are incomplete)'
  return text


def claims(store: Store) -> str:
  """Every conclusion of the paper with its verdict, per study."""
  parts = [*store.warnings]
  for study in store.studies:
    parts += [study.title, '=' * len(study.title), '']
    found = claims_of(study)
    for claim in found:
      if claim.verdict != OPEN:
        parts += [*_claim(claim), '']
    undecided = [claim for claim in found if claim.verdict == OPEN]
    if undecided:
      parts += ['Not enough runs (a dataset needs all rates of all of these):']
    for claim in undecided:
      parts.append(f'  ({claim.conclusion}) {claim.statement}')
      parts.append(f'      needs {", ".join(claim.needs)}')
    parts.append('')
  return '\n'.join(parts).rstrip() + '\n'


def _claim(claim: Claim) -> list[str]:
  unit = claim.unit
  findings = claim.best_validation.findings
  several = findings if len(findings) > 1 else ()
  each = [f'    {f.label}: {f.text(unit)}' for f in several]
  return [
    f'({claim.conclusion}) {claim.statement}',
    f'  {claim.how}',
    f'  best validation:  {claim.best_validation.summary(unit)}',
    *each,
    f'  held-out:         {claim.held_out.summary(unit)}',
    f'  paper, same rows: {claim.paper_here.summary(unit)}',
    f'  paper, all rows:  {claim.paper.summary(unit)}',
  ]
