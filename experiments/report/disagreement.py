"""What does not agree with the paper, in sentences made from the data."""

from collections.abc import Iterable, Sequence

from experiments.paper.protocol import Protocol
from experiments.report import naming
from experiments.report.findings import OPEN
from experiments.report.naming import counted
from experiments.report.studies import Study
from experiments.report.tables import Entry, Grid, Line
from experiments.report.verdicts import Claim

_SHOWN = 8
_WEAK = 0.7  # rank correlations below it are worth a sentence


def sentences(
  study: Study, grids: Sequence[Grid], claims: Sequence[Claim]
) -> list[str]:
  """Plain sentences on a study, most general first."""
  cells = list(_cells(grids))
  if not cells:
    return [
      'None of these cells is in the paper, so there is nothing to compare.'
    ]
  return [
    *_on_training(study),
    *_on_claims(claims),
    *_on_flags(cells),
    *_on_ranks(grids),
    *_on_errors(cells),
    *_on_choice(cells),
    *_on_missing(study),
  ]


def _on_training(study: Study) -> list[str]:
  """Less training than the paper's, which makes for higher errors."""
  fields, paper = study.fields, Protocol()
  less = []
  if fields.get('epochs', paper.epochs) < paper.epochs:
    less.append(f'{fields["epochs"]} epochs instead of {paper.epochs}')
  if fields.get('train_size') is not None:
    less.append(f'at most {fields["train_size"]} training images')
  if held_out := fields.get('holdout'):
    less.append(f'{100 * held_out:g} % of the training images held out')
  return (
    [f'Less training than in the paper: {", ".join(less)}.'] if less else []
  )


def _cells(grids: Iterable[Grid]) -> Iterable[tuple[Line, Entry]]:
  """Cells that we and the paper have, each once."""
  seen = set()
  for grid in grids:
    for line in grid.lines:
      for entry in line.entries:
        key = line.label, naming.first_name(entry.condition)
        both = entry.best_validation and entry.paper is not None
        if both and key not in seen:
          seen.add(key)
          yield line, entry


def _some(items: Sequence[str]) -> str:
  shown = '; '.join(items[:_SHOWN])
  more = len(items) - _SHOWN
  return shown + (f'; and {more} more' if more > 0 else '')


def on_verdicts(claims: Sequence[Claim]) -> str:
  """How many of the paper's conclusions get the verdict of its own numbers."""
  decided = [claim for claim in claims if claim.verdict != OPEN]
  if not decided:
    return "These runs decide none of the paper's conclusions yet."
  return (
    f'Of {counted(len(decided), "statement")} these runs decide, '
    f"{len(decided) - len(_other(claims))} have the verdict that the paper's "
    'own numbers for the same datasets give.'
  )


def _other(claims: Sequence[Claim]) -> list[Claim]:
  return [
    claim
    for claim in claims
    if claim.verdict not in (OPEN, claim.paper_here.verdict)
  ]


def _on_claims(claims: Sequence[Claim]) -> list[str]:
  text, other = on_verdicts(claims), _other(claims)
  if not other:
    return [text]
  listed = [
    f'({c.conclusion}) "{c.statement}" {c.best_validation.brief}, in the paper '
    f'{c.paper_here.brief}'
    for c in other
  ]
  return [f'{text} Different: {_some(listed)}.']


def _on_flags(cells: Sequence[tuple[Line, Entry]]) -> list[str]:
  flagged = [(line, entry) for line, entry in cells if entry.flagged]
  if not flagged:
    return []
  of_all = f'Of {counted(len(flagged), "cell")} with a baseline'
  other = [
    f'{line.label} {entry.condition} ({entry.flag or "alike"}, in the paper '
    f'{entry.flag_paper or "alike"})'
    for line, entry in flagged
    if entry.flag != entry.flag_paper
  ]
  if not other:
    return [f'{of_all} none stands otherwise to it than in the paper.']
  return [
    f'{of_all} {len(other)} stand{"s" if len(other) == 1 else ""} otherwise to '
    f'it than in the paper: {_some(other)}.'
  ]


def _on_ranks(grids: Sequence[Grid]) -> list[str]:
  weak = [
    f'{line.label} in table {grid.table.name} ({line.agreement.rank:.2f})'
    for grid in grids
    for line in grid.lines
    if line.agreement
    and line.agreement.rank is not None
    and line.agreement.rank < _WEAK
  ]
  if not weak:
    return []
  return [f'The order of the columns is another one in: {_some(weak)}.']


def _on_errors(cells: Sequence[tuple[Line, Entry]]) -> list[str]:
  gaps = [
    (entry.best_validation.mean - entry.paper, line.label, entry.condition)
    for line, entry in cells
    if entry.best_validation and entry.paper is not None
  ]
  gaps.sort(key=lambda gap: (-abs(gap[0]), gap[1:]))
  mean = sum(abs(gap) for gap, *_ in gaps) / len(gaps)
  listed = [
    f'{label} {condition} ({gap:+.2f})' for gap, label, condition in gaps[:5]
  ]
  return [
    f"Our errors are {mean:.2f} points from the paper's in the mean (absolute) "
    f'of {counted(len(gaps), "cell")}, farthest in: {"; ".join(listed)}.'
  ]


def _on_choice(cells: Sequence[tuple[Line, Entry]]) -> list[str]:
  other = [
    f'{line.label} {entry.condition} ({entry.flag or "alike"}, held-out '
    f'{entry.flag_held_out or "alike"})'
    for line, entry in cells
    if entry.flagged and entry.held_out and entry.flag != entry.flag_held_out
  ]
  if not other:
    return []
  return [
    'Choosing rate and epoch on held-out images changes how a cell stands to '
    f'the baseline in: {_some(other)}.'
  ]


def _on_missing(study: Study) -> list[str]:
  open_cells = sum(not cell.complete for cell in study.cells.values())
  if not open_cells:
    return []
  return [
    f'{open_cells} of {len(study.cells)} cells lack some of their runs; they '
    'are marked, and decide no claim until one seed has all of them.'
  ]
