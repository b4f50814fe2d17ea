"""Pictures with our results beside the paper's: the story, error against p."""

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.paper import published as paper
from experiments.report.cells import Cell
from experiments.report.figures import (
  OURS,
  PAPER,
  QUIET,
  ErrorAxis,
  Picture,
  panels,
  picture,
  short,
  style,
  top_left,
)
from experiments.report.plots import ours_by_p, paper_by_p
from experiments.report.studies import Store, Study

# From plain backpropagation to random feedback, top to bottom.
STORY = (
  'SGD', 'uSF', 'NuSF', 'uSF+BN', 'uSF+BN+BM', 'frSF+BN+BM',
  'brSF-50%+BN+BM', 'RndF', 'RndF+BN', 'RndF+BN+BM',
)  # fmt: skip


def _settled(cell: Cell | None) -> bool:
  return bool(cell and cell.best_validation)


def story(store: Store) -> Picture | None:
  """Error per condition, ours and the paper's, a panel per dataset.

  A dataset of several protocols is shown under the one that trains most.
  """
  most: dict[str, Study] = {}
  for study in sorted(store.studies, key=_training):
    for label in study.rows:
      if sum(_settled(study.cells.get((label, c))) for c in STORY) >= 3:
        most.setdefault(label, study)
  found = [(study, label) for label, study in most.items()]
  name, title = 'story', 'How much weight symmetry does backpropagation need?'
  if not found:
    return None
  shown = [
    condition
    for condition in STORY
    if any(_settled(s.cells.get((label, condition))) for s, label in found)
  ]
  with style(name):
    figure, all_axes = panels(
      len(found), (2.5, 0.26 * len(shown) + 0.1),
      across=3, left=1.45, top=1.15 + 0.2 * (len(found) == 1),
      between=1.1,
    )  # fmt: skip
    for axes, (study, label) in zip(all_axes, found, strict=True):
      _story_panel(axes, study, label, shown)
    figure.text(
      *top_left(figure, 0.12), f'{title}\nBest validation error by condition',
      va='top', fontsize=10, linespacing=1.4,
    )  # fmt: skip
    figure.legend(
      handles=[
        Line2D([], [], color=OURS, marker='o', linestyle='', label='ours'),
        *_missing(study.cells.get((label, c)) for study, label in found
                  for c in shown),
        Line2D([], [], color=PAPER, marker='D', linestyle='', mfc='white',
               label="paper's"),
        Line2D([], [], color=QUIET, linestyle=':', label='chance'),
      ],
      loc='upper left', ncols=2 if len(found) == 1 else 4, borderaxespad=0,
      bbox_to_anchor=top_left(figure, 0.5),
    )  # fmt: skip
    return picture(figure, name, title, png=True)


def _training(study: Study) -> tuple[float, float]:
  """Sorts by images, then epochs, most first."""
  fields = study.fields
  size = fields.get('train_size')
  return (-math.inf if size is None else -size, -fields.get('epochs', 0))


def _missing(cells: Iterable[Cell | None]) -> list[Line2D]:
  """The legend's line for hollow dots, if there are any."""
  if not any(cell and cell.best_validation and not cell.complete
             for cell in cells):  # fmt: skip
    return []
  return [Line2D([], [], color=OURS, marker='o', linestyle='', mfc='none',
                 label='ours, some runs missing')]  # fmt: skip


def _story_panel(
  axes: Axes, study: Study, label: str, shown: Sequence[str]
) -> None:
  dataset, chance = study.rows[label].name, study.chance(label)
  ours = {c: study.cells.get((label, c)) for c in shown}
  theirs = {c: paper.by_condition().get((dataset, c)) for c in shown}
  values = [c.best_validation.mean for c in ours.values()
            if c and c.best_validation]  # fmt: skip
  values += [error for error in theirs.values() if error is not None]
  axis = ErrorAxis(axes, [*values, *([chance] if chance else [])], 'x')
  if chance:
    axes.axvline(chance, color=QUIET, linestyle=':', linewidth=1)
  for at, condition in enumerate(shown):
    published, cell = theirs[condition], ours[condition]
    if published is not None:
      axes.plot(axis.at(published), at, 'D', color=PAPER, mfc='white',
                markersize=6, markeredgewidth=1.2)  # fmt: skip
    if cell and cell.best_validation:
      _dot(axes, axis, cell, at)
  axes.set_yticks(range(len(shown)), shown)
  axes.set_ylim(len(shown) - 0.4, -0.6)
  axes.tick_params(axis='y', length=0, labelcolor='#222222')
  axes.set_xlabel('error (%)')
  axes.set_title(short(label, 30), pad=18, fontweight='bold')
  size = study.fields.get('train_size')
  about = f'{study.fields.get("epochs", "?")} epochs, ' + (
    'all training images' if size is None else f'{size} training images'
  )
  axes.annotate(
    about, (0, 1), (0, 5), xycoords='axes fraction',
    textcoords='offset points', color='#555555', fontsize=8,
  )  # fmt: skip


def _dot(axes: Axes, axis: ErrorAxis, cell: Cell, at: int) -> None:
  """Ours, with its interval; hollow while some rates are missing."""
  result = cell.best_validation
  assert result
  if result.interval:
    axes.plot([axis.at(end) for end in result.interval], [at, at],
              color=OURS, linewidth=1.6)  # fmt: skip
  face = OURS if cell.complete else 'none'
  axes.plot(axis.at(result.mean), at, 'o', color=OURS, mfc=face, markersize=5)


def against_p(study: Study) -> Picture | None:
  """Experiment B: error against the probability of a wrong sign."""
  labels = [
    label
    for label in study.rows
    if any(
      any(p > 0 for p in cells) for cells in ours_by_p(study, label).values()
    )
  ]
  if not labels:
    return None
  name = f'protocol-{study.number}-error-against-p'
  title = 'Error against the probability p of a wrong sign (with BN and BM)'
  several = len(labels) > 1
  with style(name):
    figure, all_axes = panels(
      len(labels), (2.9, 2.3), across=3, left=0.62,
      top=0.82 if several else 1.6, between=0.9,
    )  # fmt: skip
    for axes, label in zip(all_axes, labels, strict=True):
      _p_panel(axes, study, label)
    figure.legend(
      handles=[*_p_handles()], loc='upper left', borderaxespad=0,
      ncols=3 if several else 1, columnspacing=1.6,
      bbox_to_anchor=top_left(figure, 0.08),
    )  # fmt: skip
    return picture(figure, name, title, png=True)


_RULES = {'brSF': ('o', 'redrawn at every update'), 'frSF': ('s', 'drawn once')}


def _p_handles() -> Iterable[Line2D]:
  for marker, text in _RULES.values():
    dash = '-' if marker == 'o' else '--'
    yield Line2D([], [], color=OURS, marker=marker, linestyle=dash,
                 label=f'ours, {text}')  # fmt: skip
    yield Line2D([], [], color=PAPER, marker=marker, linestyle=dash,
                 mfc='white', label=f"paper's, {text}")  # fmt: skip
  yield Line2D([], [], color=OURS, linestyle='-.', lw=1, label='SGD, ours')
  yield Line2D([], [], color=QUIET, linestyle=':', label='chance')


def _p_panel(axes: Axes, study: Study, label: str) -> None:
  ours = ours_by_p(study, label)
  theirs = paper_by_p(study.rows[label].name)
  chance = study.chance(label)
  sgd = study.cells.get((label, 'SGD'))
  lines = [
    *((rule, 'ours', {p: cell.best_validation.mean for p, cell in cells.items()
                      if cell.best_validation})
      for rule, cells in ours.items()),
    *((rule, 'paper', errors) for rule, errors in theirs.items()),
  ]  # fmt: skip
  values = [error for *_, errors in lines for error in errors.values()]
  base = sgd.best_validation if sgd else None
  axis = ErrorAxis(
    axes,
    [*values, *([chance] if chance else []), *([base.mean] if base else [])],
  )
  for rule, whose, errors in reversed(lines):
    if not errors:
      continue
    colour, face = (OURS, OURS) if whose == 'ours' else (PAPER, 'white')
    axes.plot(
      list(errors), [axis.at(error) for error in errors.values()],
      color=colour, mfc=face, marker=_RULES[rule][0], markersize=5,
      linestyle='-' if rule == 'brSF' else '--', linewidth=1.4,
    )  # fmt: skip
  for cells in ours.values():
    for p, cell in cells.items():
      ends = cell.best_validation and cell.best_validation.interval
      if ends:
        axes.plot([p, p], [axis.at(end) for end in ends], color=OURS, lw=1.6)
  if base:
    axes.axhline(axis.at(base.mean), color=OURS, linestyle='-.', linewidth=1)
  if chance:
    axes.axhline(chance, color=QUIET, linestyle=':', linewidth=1)
  axes.set_xticks([0, 25, 50, 75, 100])
  axes.set_xlabel('p, wrong signs (%)')
  axes.set_ylabel('best validation error (%)')
  axes.set_title(short(label, 36), fontweight='bold')
