"""Learning curves, error against rate, and error against p."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from experiments.paper import published as paper
from experiments.paper.protocol import RATES
from experiments.report.cells import Cell, mean_error
from experiments.report.figures import (
  ErrorAxis,
  Picture,
  error_colours,
  label_ends,
  labelled_axes,
  looks,
  panels,
  picture,
  short,
  style,
  top_left,
)
from experiments.report.runs import Run
from experiments.report.studies import Study
from experiments.report.tables import Grid, Line


def slug(text: str) -> str:
  """A text as part of a file name; different texts stay different."""
  plain = re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:40]
  if plain == text.lower():
    return plain
  import hashlib

  return f'{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}'.strip('-')


def for_line(
  study: Study, grid: Grid, line: Line
) -> list[Callable[[], Picture]]:
  """Learning curves and error against rate of one row of a table.

  What draws them has names and numbers alone, so that any process can do it.
  """
  cells = {
    entry.condition: entry.cell
    for entry in line.entries
    if entry.cell and entry.cell.best_setting
  }
  if not cells:
    return []
  name = f'protocol-{study.number}-{slug(line.label)}-table-{grid.table.name}'
  about = f'{short(line.label)}, {grid.name}'
  plans = []
  if curves := _curves_of(cells):
    plans.append(
      functools.partial(_curves, f'{name}-curves'.lower(), about, curves)
    )
  by_rate = {condition: _by_rate(cell) for condition, cell in cells.items()}
  plans.append(
    functools.partial(_rates, f'{name}-rates'.lower(), about, by_rate)
  )
  return plans


def mean_curve(runs: Sequence[Run]) -> list[tuple[int, float]]:
  """Mean test error over seeds by epoch, as far as all runs have one."""
  by_epoch = [
    {e: error for e, error in zip(run.epochs, run.test_errors, strict=True)
     if error is not None}
    for run in runs
  ]  # fmt: skip
  shared = set(by_epoch[0]).intersection(*by_epoch[1:])
  return [
    (epoch, sum(errors[epoch] for errors in by_epoch) / len(by_epoch))
    for epoch in sorted(shared)
  ]


_Curve = tuple[Sequence[tuple[int, float]], bool]  # and whether one diverged


def _curves_of(cells: Mapping[str, Cell]) -> dict[str, _Curve]:
  """The mean curve at the best setting of each condition that has one."""
  curves = {}
  for condition, cell in cells.items():
    assert cell.best_setting
    runs = cell.by_setting[cell.best_setting]
    if curve := mean_curve(runs):
      curves[condition] = (curve, any(r.outcome.diverged for r in runs
                                      if r.outcome))  # fmt: skip
  return curves


def _curves(name: str, about: str, lines: Mapping[str, _Curve]) -> Picture:
  title = f'Test error by epoch, best rate: {about}'
  with style(name):
    figure, axes = labelled_axes(title, list(lines))
    axis = ErrorAxis(axes, [e for curve, _ in lines.values() for _, e in curve])
    last = max(epoch for curve, _ in lines.values() for epoch, _ in curve)
    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    ends = []
    for position, (condition, (curve, diverged)) in enumerate(lines.items()):
      look = {**looks(position), 'markevery': [-1]}
      if diverged:
        look.update(marker='x', markersize=7)
      drawn = [(epoch, axis.at(error)) for epoch, error in curve]
      axes.plot(*zip(*drawn, strict=True), **look)
      ends.append((*drawn[-1], condition, look['color']))
    axes.set_xlabel('epoch (×: diverged there)')
    axes.set_ylabel('test error (%)')
    label_ends(axes, ends)
    return picture(figure, name, title)


def _by_rate(cell: Cell) -> dict[float, tuple[float, bool]]:
  """Error (best plan, mean over seeds) and whether a run diverged, by rate."""
  found = {}
  for (rate, _), runs in cell.by_setting.items():
    error = mean_error(runs)
    if rate not in found or error < found[rate][0]:
      found[rate] = error, any(r.outcome.diverged for r in runs if r.outcome)
  return dict(sorted(found.items()))


def _rates(
  name: str, about: str, lines: Mapping[str, dict[float, tuple[float, bool]]]
) -> Picture:
  """A row per condition, a column per rate, the best one framed."""
  title = f'Best validation error (%) by learning rate: {about}'
  rates = sorted({*RATES, *(rate for line in lines.values() for rate in line)})
  errors = [error for line in lines.values() for error, _ in line.values()]
  colour = error_colours(errors)
  room = 0.25 + 0.075 * max(len(short(condition)) for condition in lines)
  size = 0.72 * len(rates), 0.27 * len(lines)
  with style(name):
    figure, (axes,) = panels(1, size, across=1, left=room, top=0.5, between=1)
    squares, faces, frames, inks = [], [], [], []
    for row, line in enumerate(lines.values()):
      best = min(error for error, _ in line.values())
      for rate, (error, diverged) in line.items():
        face, ink = colour(error)
        at = rates.index(rate)
        squares.append(Rectangle((at - 0.5, row - 0.5), 1, 1))
        faces.append(face)
        axes.text(at, row, f'{error:.2f}{" ×" * diverged}', color=ink,
                  ha='center', va='center', fontsize=8.5,
                  fontweight='bold' if error == best else 'normal')  # fmt: skip
        if error == best:
          frames.append(Rectangle((at - 0.47, row - 0.45), 0.94, 0.9))
          inks.append(ink)
    # One collection is drawn several times as fast as its patches.
    axes.add_collection(PatchCollection(squares, facecolors=faces, lw=0))
    axes.add_collection(
      PatchCollection(frames, facecolors='none', edgecolors=inks, lw=1.3)
    )
    axes.set_xlim(-0.5, len(rates) - 0.5)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates])
    axes.set_yticks(range(len(lines)), [short(c) for c in lines])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_xlabel('learning rate, times the base rate\n'
                    'framed: the best mean; ×: a run diverged')  # fmt: skip
    figure.text(*top_left(figure, 0.1), title, va='top', fontsize=10)
    return picture(figure, name, title)


P_RULE = re.compile(r'(brSF|frSF)(?:-([0-9.]+)%)?\+BN\+BM')


def ours_by_p(study: Study, label: str) -> dict[str, dict[float, Cell]]:
  """Cells of Experiment B by rule and p in %; any p, not only the paper's."""
  found: dict[str, dict[float, Cell]] = {'brSF': {}, 'frSF': {}}
  for (row, condition), cell in study.cells.items():
    match = P_RULE.fullmatch(condition)
    if row == label and match and cell.best_validation:
      found[match[1]][float(match[2] or 0)] = cell
  return {rule: dict(sorted(cells.items())) for rule, cells in found.items()}


def paper_by_p(dataset: str) -> dict[str, dict[float, float]]:
  """The paper's errors in % by rule and p in %."""
  found: dict[str, dict[float, float]] = {'brSF': {}, 'frSF': {}}
  for (name, condition), error in paper.by_condition().items():
    match = P_RULE.fullmatch(condition)
    if name == dataset and match:
      found[match[1]][float(match[2] or 0)] = error
  return {rule: dict(sorted(errors.items())) for rule, errors in found.items()}
