"""Plain words: a sentence with the answer per dataset, a line per condition."""

from collections.abc import Iterable

from experiments.paper.conclusions import POINTS
from experiments.paper.conditions import (
  BATCH_100,
  find_exactly,
  in_words,
  steps_of,
)
from experiments.report.frame import Cell, Results, Row

# How much symmetry is needed, in the order of a sentence.
_FAMILIES = (
  ('uSF', ('uSF', 'uSF+BN', 'uSF+BM', 'uSF+BN+BM')),
  ('random feedback', ('RndF', 'RndF+BN', 'RndF+BM', 'RndF+BN+BM')),
  ('backpropagation', ('SGD',)),
)
_ADDED = {
  'BN': 'with batch norm',
  'BM': 'with Batch Manhattan',
  'BN+BM': 'with batch norm and Batch Manhattan',
}
_ANSWERING = {name for _, names in _FAMILIES for name in names}

_RULES = {
  'BP': 'errors travel back through the weights (backpropagation)',
  'uSF': 'feedback is the signs of the weights, each of magnitude 1',
  'NuSF': 'feedback is the signs of the weights, divided by the fan-in',
  'brSF': 'feedback has random magnitudes, redrawn at every update, and the '
  'signs of the weights',
  'frSF': 'feedback has random magnitudes, drawn once, and the signs of the '
  'weights',
  'RndF': 'feedback is random, drawn once (feedback alignment)',
}
_NORMS = {
  'none': '',
  'plain': 'batch norm without learnable parameters',
  'affine': 'batch norm with learnable parameters',
}
_UPDATES = {
  0: '',
  1: 'Batch Manhattan: the update uses only the signs of the gradient',
  2: 'Batch Manhattan, setting 2: the sign is also taken after momentum and '
  'fed back',
  3: 'Batch Manhattan, setting 3: the sign is also taken after momentum',
}
_FROZEN = {
  'nothing': '',
  'last layer': 'the last layer is frozen',
  'before last layer': 'only the last layer learns',
}


def answers(results: Results) -> list[str]:
  """Returns a sentence per dataset.

  It is about the row with most training of those with most of the conditions
  that the sentence names. A row with other settings is used only if the dataset
  has no row with the default settings.
  """
  main = results.main_rows
  known = {row.label for row in main}
  others = [row for row in results.rows.values() if row.label not in known]
  return [
    f'{row.label} ({row.protocol}): {_answer(row, cells)}.'
    for row, cells in results.fullest((*main, *others), _ANSWERING)
  ]


def _answer(row: Row, cells: dict[str, Cell]) -> str:
  parts = []
  for subject, names in _FAMILIES:
    found = [name for name in names if name in cells]
    for at, name in enumerate(found):
      added = _ADDED.get(name.partition('+')[2], '')
      alone = 'alone' if not added and len(found) > 1 else added
      whose = f'{subject} {alone}'.strip() if at == 0 else added
      parts.append(f'{whose} {_error(row, cells[name])}')
  if not parts:
    name = min(cells, key=lambda name: cells[name].error)
    error = _error(row, cells[name])
    if len(cells) == 1:
      return f'{name} {error}'
    return f'of {len(cells)} conditions {name} has the lowest error: {error}'
  return '; '.join(parts)


def _error(row: Row, cell: Cell) -> str:
  error, mark = cell.error, f' ({cell.mark})' if cell.mark else ''
  if row.chance is not None and row.chance - error < POINTS:
    return f'stays at chance{mark}'
  return f'{error:.{1 if error >= 1 else 2}f}\N{NO-BREAK SPACE}%{mark}'


def glossary(names: Iterable[str]) -> dict[str, str]:
  """What each condition is, in a line."""
  return {name: _line(name) for name in names}


def _line(name: str) -> str:
  found = find_exactly(name)
  if found is None:
    return "not one of the paper's conditions"
  condition = found.conditions[0]
  rule, _, percent = condition.rule.partition('-')
  plans = [of.batch_plan for of in found.conditions]
  sizes = ', or '.join(', then '.join(steps_of(plan)) for plan in plans)
  parts = [
    in_words(rule) or _RULES[rule],
    f'each sign is wrong with probability {percent}' if percent else '',
    _NORMS[condition.batch_norm],
    _UPDATES[condition.batch_manhattan],
    'updates by Adam' if condition.adam else '',
    _FROZEN[condition.frozen],
    '' if plans == [BATCH_100] else f'mini-batches of {sizes}',
  ]
  return '; '.join(filter(None, parts))
