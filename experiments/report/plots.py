"""Learning curves, error against rate, and error against p."""

import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.report import paper
from experiments.report.cells import RATES, Cell, mean_error
from experiments.report.figures import (
  OURS,
  ErrorAxis,
  Picture,
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


def for_line(study: Study, grid: Grid, line: Line) -> list[Picture]:
  """Learning curves and error against rate of one row of a table."""
  cells = {
    entry.condition: entry.cell
    for entry in line.entries
    if entry.cell and entry.cell.best_setting
  }
  if not cells:
    return []
  name = f'protocol-{study.number}-{slug(line.label)}-table-{grid.table.name}'
  about = f'{short(line.label)}, table {grid.table.name}'
  return [
    made
    for made in (
      _curves(f'{name}-curves'.lower(), about, cells),
      _rates(f'{name}-rates'.lower(), about, cells),
    )
    if made
  ]


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


def _curves(name: str, about: str, cells: Mapping[str, Cell]) -> Picture | None:
  lines = {}
  for condition, cell in cells.items():
    assert cell.best_setting
    runs = cell.by_setting[cell.best_setting]
    if curve := mean_curve(runs):
      lines[condition] = (curve, any(r.outcome.diverged for r in runs
                                     if r.outcome))  # fmt: skip
  if not lines:
    return None
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


def _rates(name: str, about: str, cells: Mapping[str, Cell]) -> Picture:
  """A panel per condition, the other conditions in grey behind it."""
  lines = {condition: _by_rate(cell) for condition, cell in cells.items()}
  title = f'Best validation error (%) by learning rate: {about}'
  rates = sorted({*RATES, *(rate for line in lines.values() for rate in line)})
  errors = [error for line in lines.values() for error, _ in line.values()]
  with style(name):
    figure, all_axes = panels(
      len(lines), (1.55, 1.15), across=4, left=0.42, top=0.92, between=0.62
    )
    for axes, condition in zip(all_axes, lines, strict=True):
      axis = ErrorAxis(axes, errors)
      for other in sorted(lines, key=lambda other: other == condition):
        points = [(rates.index(rate), axis.at(error), diverged)
                  for rate, (error, diverged) in lines[other].items()]
        _rate_line(axes, points, other == condition)
      axes.set_xlim(-0.3, len(rates) - 0.7)
      axes.set_xticks(range(len(rates)), [f'{rate:g}' for rate in rates])
      axes.tick_params(labelsize=7.5)
      axes.set_title(short(condition, 22), fontsize=9, fontweight='bold')
    figure.text(
      *top_left(figure, 0.1),
      f'{title}\nRates in multiples of the base rate; ×: a run diverged',
      va='top', linespacing=1.4,
    )  # fmt: skip
    return picture(figure, name, title)


def _rate_line(
  axes: Axes, points: Sequence[tuple[float, float, bool]], focus: bool
) -> None:
  places, errors, _ = zip(*points, strict=True)
  if not focus:
    axes.plot(places, errors, color='#c4c4c4', linewidth=0.7)
    return
  axes.plot(places, errors, color=OURS, linewidth=1.4)
  for place, error, diverged in points:
    look = ('x', 7) if diverged else ('o', 4)
    axes.plot(place, error, look[0], color=OURS, markersize=look[1])


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
