"""The tables and claims in Markdown."""

import re
from collections.abc import Sequence

from experiments.report.findings import Judgement
from experiments.report.protocols import Comparison
from experiments.report.studies import Store
from experiments.report.tables import (
  LEGEND,
  MARKS,
  Agreement,
  Entry,
  Grid,
  grids,
  notes,
)
from experiments.report.text import HELD_OUT, INTERVALS, interval, number
from experiments.report.verdicts import Claim

HOW = (
  "Error in %. First line of a cell: ours | the paper's number. Ours is the "
  '*best validation* error, chosen as in the paper: the lowest test error over '
  f'epochs and rates. *Held-out*: {HELD_OUT}. {INTERVALS} {LEGEND}.'
)


def escape(text: str) -> str:
  """A text that Markdown shows as it is."""
  text = text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
  return re.sub(r'([\\`*_\[\]|~#$!])', r'\\\1', text)


def code(text: str) -> str:
  """A block of code that the text can't end."""
  longest = max((len(ticks) for ticks in re.findall('`+', text)), default=0)
  fence = '`' * max(3, longest + 1)
  return f'{fence}\n{text}\n{fence}'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """A table of ready Markdown cells."""
  lines = [header, ['---'] * len(header), *rows]
  return ['| ' + ' | '.join(line) + ' |' for line in lines]


def tables(store: Store) -> str:
  """All tables with all rows, as a file of its own."""
  parts = ["# Our tables beside the paper's", '', HOW, '', *warnings(store)]
  for study in store.studies:
    parts += [f'## {escape(study.title)}', '']
    parts += [f'- {escape(note)}' for note in notes(study)]
    for found in grids(study):
      parts += ['', *grid(found, all_rows=True)]
    parts.append('')
  return '\n'.join(parts).rstrip() + '\n'


def warnings(store: Store) -> list[str]:
  """A line for each run that is left out."""
  lines = [f'- **warning**: {escape(text)}' for text in store.warnings]
  return [*lines, ''] if lines else []


def grid(found: Grid, *, all_rows: bool) -> list[str]:
  """One table, with the agreement of each row in its last column."""
  header = ['dataset', *map(escape, found.table.columns), 'agreement']
  rows = [
    [
      escape(line.title),
      *(_entry(entry) for entry in line.entries),
      _agreement(line.agreement),
    ]
    for line in found.lines
    if all_rows or line.ours
  ]
  return [f'### {escape(found.heading)}', '', *table(header, rows)]


def _entry(entry: Entry) -> str:
  ours, paper = '', ''
  if entry.best_validation:
    ours = f'**{number(entry.best_validation.mean)}**{MARKS[entry.flag]}'
  if entry.paper is not None:
    paper = f'{number(entry.paper)}{MARKS[entry.flag_paper]}'
  lines = [f'{ours} \\| {paper}'.strip() if paper else ours]
  lines.append(escape(interval(entry)))
  if entry.held_out:
    mark = MARKS[entry.flag_held_out]
    lines.append(f'held-out {number(entry.held_out.mean)}{mark}')
  if entry.cell:
    lines.append(entry.cell.mark)
  return '<br>'.join(line for line in lines if line)


def _agreement(found: Agreement | None) -> str:
  if found is None:
    return ''
  lines = [] if found.rank is None else [f'rank {found.rank:.2f}']
  if found.flags:
    lines.append(f'flags {found.same_flags}/{found.flags}')
  return '<br>'.join(lines)


def comparison(found: Comparison) -> list[str]:
  """A dataset under several protocols."""
  rows = [
    [
      escape(title),
      *(number(errors[c]) if c in errors else '' for c in found.columns),
    ]
    for title, errors in found.rows.items()
  ]
  return table([escape(found.dataset), *map(escape, found.columns)], rows)


def claims(found: Sequence[Claim]) -> list[str]:
  """A table of claims with the three verdicts of each."""
  rows = [
    [
      escape(claim.conclusion),
      escape(claim.statement),
      *(
        _judgement(judgement, claim.unit)
        for judgement in (
          claim.best_validation,
          claim.held_out,
          claim.paper_here,
          claim.paper,
        )
      ),
    ]
    for claim in found
  ]
  header = [
    '', 'statement', 'ours, best validation', 'ours, held-out',
    "the paper's numbers, same datasets", "the paper's numbers, all",
  ]  # fmt: skip
  return table(header, rows)


def _judgement(judgement: Judgement, unit: str) -> str:
  bold = f'**{judgement.verdict}**'
  return escape(judgement.summary(unit)).replace(judgement.verdict, bold, 1)


def details(found: Sequence[Claim]) -> list[str]:
  """How each claim is computed, and the verdict on each dataset."""
  lines = []
  for claim in found:
    lines.append(f'- ({escape(claim.conclusion)}) {escape(claim.statement)} '
                 f'*{escape(claim.how)}.*')  # fmt: skip
    lines += [
      f'  - {escape(finding.label)}: {escape(finding.text(claim.unit))}'
      for finding in claim.best_validation.findings
    ]
  return lines
