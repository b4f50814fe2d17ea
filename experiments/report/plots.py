"""Pictures: errors by condition, p and epoch; alignment by layer.

Figures are made without pyplot, so no window system is ever asked for. Text in
an SVG stays text; nothing in a name is read as mathematics or markup. The same
results give the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.paper import published as paper
from experiments.paper.conditions import find_exactly, setting_of
from experiments.report.frame import Cell, Frame, Results, Row
from experiments.report.tables import Grid, Line
from experiments.report.tables import settings as changed_settings

# From plain backpropagation to random feedback, top to bottom.
_OVERVIEW = (
  'SGD', 'uSF', 'NuSF', 'uSF+BN', 'uSF+BN+BM', 'frSF+BN+BM',
  'brSF-50%+BN+BM', 'RndF', 'RndF+BN', 'RndF+BN+BM',
)  # fmt: skip
_P_NAME = re.compile(r'(brSF|frSF)(?:-([0-9.]+)%)?\+BN\+BM')
_USUAL = re.compile('[0-9]+ epochs?(, [0-9]+ images)?')
_P_RULES = {
  'brSF': ('o', '-', 'redrawn at every update'),
  'frSF': ('s', '--', 'drawn once'),
}

# Okabe and Ito's colors, distinct for color-blind readers; no yellow, which is
# too pale for a line.
COLORS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#333333',
)  # fmt: skip
_DASHES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)))
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
_LOOKS = len(COLORS) * len(_DASHES)  # lines that differ
_OURS: dict[str, Any] = {'color': '#0072B2'}
_PAPER: dict[str, Any] = {'color': '#B34700', 'mfc': 'white'}
_CHANCE: dict[str, Any] = {'color': '#777777', 'linestyle': ':', 'linewidth': 1}
_SGD: dict[str, Any] = {'color': '#0072B2', 'linestyle': '-.', 'linewidth': 1}
# A layer's metrics, what they are and the largest value, or None for ratios.
_ALIGNMENT = (
  ('norm_ratio', '|V| / |W|', None),
  ('concordance', 'share of equal signs', 1),
  ('angle', 'angle of V and W (°)', 180),
  ('update_angle', 'angle of updates (°)', 180),
  ('error_angle', 'angle of errors (°)', 180),
)
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_PLAIN = ticker.FuncFormatter(lambda value, _: f'{value:g}')
_LOGARITHMIC = 5.0  # ratio of errors from which an axis is logarithmic

_STYLE = {
  'axes.edgecolor': '#888888',
  'axes.grid': True,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlelocation': 'left',
  'axes.titlesize': 10,
  'figure.titlesize': 10,
  'font.family': ['DejaVu Sans'],
  'font.size': 9,
  'grid.color': '#e4e4e4',
  'grid.linewidth': 0.7,
  'legend.frameon': False,
  'savefig.dpi': 110,
  'svg.fonttype': 'none',
  'text.parse_math': False,
  'xtick.color': '#555555',
  'ytick.color': '#555555',
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot as the contents of files; `png` is empty for most."""

  name: str
  title: str
  svg: bytes
  png: bytes = b''


@contextlib.contextmanager
def style(name: str) -> Iterator[None]:
  """The look of every figure; the name makes the ids of its SVG unique."""
  with mpl.rc_context(cast(Any, {**_STYLE, 'svg.hashsalt': name})):
    yield


def panels(
  title: str, count: int, size: tuple[float, float], across: int = 3
) -> tuple[Figure, list[Axes]]:
  """Makes panels of that size in inches, at most `across` in a row."""
  across = min(count, across)
  down = -(-count // across)
  figure = Figure(
    figsize=(max(across * size[0], 5.6), down * size[1] + 1),
    layout='constrained',
  )
  figure.suptitle(title, x=0.01, ha='left')
  axes = [*figure.subplots(down, across, squeeze=False).flat]
  for empty in axes[count:]:
    empty.remove()
  return figure, axes[:count]


def look(position: int) -> dict[str, Any]:
  """Color, dash and marker of the n-th line; `_LOOKS` differ."""
  return {
    'color': COLORS[position % len(COLORS)],
    'linestyle': _DASHES[position // len(COLORS) % len(_DASHES)],
    'marker': _MARKERS[position % len(_MARKERS)],
    'markersize': 3.5,
    'linewidth': 1.5,
  }


def picture(
  figure: Figure, name: str, title: str, *, png: bool = False
) -> Picture:
  """Renders a figure. A PNG takes longer than everything else."""
  svg, pixels = io.BytesIO(), io.BytesIO()
  with warnings.catch_warnings():
    # A name may have letters that the font lacks, or need much room.
    warnings.filterwarnings('ignore', message='Glyph|constrained_layout')
    figure.savefig(svg, format='svg', metadata={'Date': None, 'Creator': None})
    if png:
      figure.savefig(pixels, format='png', metadata={'Software': None})
  return Picture(name, title, svg.getvalue(), pixels.getvalue())


def _slug(text: str) -> str:
  """Turns a text into a part of a file name; texts that differ stay apart."""
  plain = re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:60]
  known = {name.lower() for name in paper.datasets()}
  if text in paper.datasets() or _USUAL.fullmatch(text) or (
    text == plain and text not in known
  ):  # fmt: skip
    return plain
  return f'{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}'.strip('-')


def file_name(row: Row, what: str) -> str:
  """The name of a picture of a row."""
  return f'{_slug(row.label)}-{_slug(row.protocol)}-{what}'


def _short(text: str, length: int = 34) -> str:
  return text if len(text) <= length else text[: length - 1] + '…'


def error_axis(
  axes: Axes, errors: Iterable[float | None], which: str = 'y'
) -> Callable[[float], float]:
  """Sets up an axis of errors in percent: logarithmic if they differ much.

  Returns:
    Where to draw an error: a logarithmic axis has no 0.
  """
  known = [error for error in errors if error is not None]
  positive = [error for error in known if error > 0] or [1.0]
  low, high, floor = min(positive), max(positive), 0.0
  axis = getattr(axes, f'{which}axis')
  if high > _LOGARITHMIC * low:
    floor = max(low, 0.01) / (1 if low == min(known) else 2)
    getattr(axes, f'set_{which}scale')('log')
    ends = floor / 1.25, min(high * 1.25, 130)
    ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_minor_locator(ticker.NullLocator())
  else:
    margin = max(0.06 * (high - low), 0.02 * high)
    ends = max(min(known) - margin, 0), high + margin
  getattr(axes, f'set_{which}lim')(*ends)
  axis.set_major_formatter(_PLAIN)
  return lambda error: max(error, floor)


def _head(axes: Axes, row: Row) -> None:
  """Names a panel: the dataset and its protocol."""
  axes.set_title(f'{_short(row.label)}\n{_short(row.protocol)}')


def overview(results: Results) -> Picture | None:
  """Error per condition, ours and the paper's, a panel per dataset.

  A dataset of several protocols is shown under the one that trains most of
  those with most of these conditions.
  """
  rows = results.fullest(results.main_rows, _OVERVIEW, least=3)
  shown = [name for name in _OVERVIEW if any(name in of for _, of in rows)]
  if not rows:
    return None
  title = 'How much weight symmetry does backpropagation need?'
  with style('overview'):
    size = 4.0, 0.26 * len(shown) + 1
    figure, all_axes = panels(
      f'{title}\nBest test error by condition', len(rows), size
    )
    for axes, (row, cells) in zip(all_axes, rows, strict=True):
      theirs = {c: paper.by_condition().get((row.name, c)) for c in shown}
      ours = [cells[c].error for c in shown if c in cells]
      at = error_axis(axes, [*ours, *theirs.values(), row.chance], 'x')
      if row.chance:
        axes.axvline(row.chance, **_CHANCE)
      for place, name in enumerate(shown):
        if (published := theirs[name]) is not None:
          axes.plot(at(published), place, 'D', markersize=6, **_PAPER)
        if cell := cells.get(name):
          axes.plot(_bar(cell, at), [place, place], linewidth=1.6, **_OURS)
          face = 'none' if cell.mark else _OURS['color']
          axes.plot(at(cell.error), place, 'o', markersize=5, mfc=face, **_OURS)
      axes.set_yticks(range(len(shown)), shown)
      axes.set_ylim(len(shown) - 0.4, -0.6)
      axes.set_xlabel('error (%)')
      _head(axes, row)
    legend(figure, [
      ('ours (hollow: some runs missing)', {'marker': 'o', 'ls': '', **_OURS}),
      ("paper's", {'marker': 'D', 'ls': '', **_PAPER}),
      ('chance', _CHANCE),
    ])  # fmt: skip
    return picture(figure, 'overview', title, png=True)


def _bar(cell: Cell, at: Callable[[float], float]) -> list[float]:
  """The ends of the interval of a cell's error, where they are drawn."""
  interval = cell.best.interval if cell.best else None
  return [at(end) for end in interval or (cell.error, cell.error)]


def legend(
  figure: Figure, entries: Iterable[tuple[str, Mapping[str, Any]]]
) -> None:
  """Puts a legend of these labels and looks below the panels."""
  handles = [Line2D([], [], label=label, **of) for label, of in entries]
  figure.legend(handles=handles, loc='outside lower left',
                ncols=min(len(figure.axes) + 1, 3),
                handlelength=3)  # fmt: skip


def against_p(results: Results) -> Picture | None:
  """Experiment B: error against the probability of a wrong sign."""
  ours = {row: _by_p(results.cells_of(row)) for row in results.main_rows}
  ours = {row: of for row, of in ours.items()
          if any(p for cells in of.values() for p in cells)}  # fmt: skip
  if not ours:
    return None
  title = 'Error against the probability p of a wrong sign (with BN and BM)'
  with style('error-against-p'):
    figure, all_axes = panels(title, len(ours), (3.5, 3.2))
    for axes, (row, of) in zip(all_axes, ours.items(), strict=True):
      sgd = results.cells_of(row).get('SGD')
      _p_panel(axes, row, of, sgd.error if sgd else None)
    looks = [
      (f'{whose}, {text}', {'marker': marker, 'linestyle': dash, **look})
      for marker, dash, text in _P_RULES.values()
      for whose, look in (('ours', _OURS), ("paper's", _PAPER))
    ]
    legend(figure, [*looks, ('SGD, ours', _SGD), ('chance', _CHANCE)])
    return picture(figure, 'error-against-p', title)


def _by_p(values: Mapping[str, Any]) -> dict[str, dict[float, Any]]:
  """Values of Experiment B by rule and p in %; any p, not only the paper's."""
  found: dict[str, dict[float, Any]] = {rule: {} for rule in _P_RULES}
  for condition, value in values.items():
    if match := _P_NAME.fullmatch(condition):
      found[match[1]][float(match[2] or 0)] = value
  return {rule: dict(sorted(of.items())) for rule, of in found.items()}


def _p_panel(
  axes: Axes,
  row: Row,
  ours: Mapping[str, Mapping[float, Cell]],
  sgd: float | None,
) -> None:
  published = paper.by_condition().items()
  theirs = _by_p({c: error for (name, c), error in published
                  if name == row.name})  # fmt: skip
  means = {rule: {p: cell.error for p, cell in of.items()}
           for rule, of in ours.items()}  # fmt: skip
  lines = [(rule, of, _PAPER) for rule, of in theirs.items()]
  lines += [(rule, of, _OURS) for rule, of in means.items()]
  values = [error for _, of, _ in lines for error in of.values()]
  at = error_axis(axes, [*values, row.chance, sgd])
  for rule, of, look in lines:
    marker, dash, _ = _P_RULES[rule]
    axes.plot(list(of), [at(error) for error in of.values()], markersize=5,
              marker=marker, linestyle=dash, linewidth=1.4, **look)  # fmt: skip
  for p, cell in (item for of in ours.values() for item in of.items()):
    axes.plot([p, p], _bar(cell, at), linewidth=1.6, **_OURS)
  if sgd is not None:
    axes.axhline(at(sgd), **_SGD)
  if row.chance:
    axes.axhline(row.chance, **_CHANCE)
  axes.set_xticks([0, 25, 50, 75, 100])
  axes.set_xlabel('p, wrong signs (%)')
  axes.set_ylabel('best test error (%)')
  _head(axes, row)


def of_settings(results: Results) -> Picture | None:
  """Error per condition where one setting of the protocol is another."""
  tables = changed_settings(results)
  if not tables:
    return None
  title = 'One setting of the protocol changed at a time'
  with style('settings'):
    rows = max(map(len, tables.values()))
    figure, all_axes = panels(
      f'{title}\nBest test error by condition', len(tables), (6.0, 0.4 * rows)
    )
    names = list(dict.fromkeys(c for of in tables.values() for c in of))
    for axes, (dataset, table) in zip(all_axes, tables.items(), strict=True):
      at = error_axis(axes, [*table.stack()], 'x')
      for name in table:
        known = table[name].dropna()
        places = [table.index.get_loc(protocol) for protocol in known.index]
        axes.plot(
          [at(error) for error in known], places,
          **{**look(names.index(name)), 'linestyle': '', 'markersize': 6},
        )  # fmt: skip
      axes.set_yticks(range(len(table)), [_short(p, 64) for p in table.index])
      axes.set_ylim(len(table) - 0.4, -0.6)
      axes.set_xlabel('error (%)')
      axes.set_title(str(dataset))
    legend(figure, [
      (name, {**look(at), 'linestyle': ''}) for at, name in enumerate(names)
    ])  # fmt: skip
    return picture(figure, 'settings', title)


def curves(results: Results, grid: Grid, line: Line) -> Picture:
  """Mean test error by epoch of one row of a table, at the best rates."""
  assert line.row is not None
  runs = results.runs_of(line.row)
  name = file_name(line.row, f'table-{grid.table.name}-curves').lower()
  found = {}
  for entry in line.entries:
    if entry.best:
      mine = at_best_rate(entry.condition, runs)
      table = pd.DataFrame([dict(errors) for errors in mine.errors])
      curve = table.mean(skipna=False).dropna()
      found[entry.condition] = curve, mine.diverged.any()
  title = 'Test error by epoch, best rate'
  about = f'{_short(line.title, 60)}, {grid.name}'
  groups: dict[str, dict[str, Any]] = {}
  for condition, curve in found.items():
    setting = ''
    if len(found) > _LOOKS:  # a panel for each norm and update
      column = find_exactly(condition)
      setting = setting_of(column.conditions[0]) if column else 'other'
    groups.setdefault(setting, {})[condition] = curve
  with style(name):
    size = 7.5, max(2.6, 0.22 * max(map(len, groups.values()), default=0))
    figure, all_axes = panels(f'{title}\n{about}', len(groups), size, 1)
    for axes, (setting, shown) in zip(all_axes, groups.items(), strict=True):
      at = error_axis(axes, [e for curve, _ in shown.values() for e in curve])
      for place, (condition, (curve, diverged)) in enumerate(shown.items()):
        crossed = {'marker': 'x', 'markersize': 7} if diverged else {}
        axes.plot(
          curve.index,
          [at(error) for error in curve],
          label=_short(condition),
          markevery=[-1],
          **look(place) | crossed,
        )
      axes.xaxis.set_major_locator(
        ticker.MaxNLocator(integer=True, min_n_ticks=1)
      )
      axes.set_xlabel('epoch (×: diverged there)')
      axes.set_ylabel('test error (%)')
      axes.set_title(setting)
      # In the order of the lines' ends.
      ends = sorted(
        axes.lines, key=lambda line: -np.asarray(line.get_ydata())[-1]
      )
      axes.legend(
        handles=ends, loc='upper left', bbox_to_anchor=(1, 1), handlelength=3
      )
    return picture(figure, name, f'{title}: {about}')


def at_best_rate(condition: str, runs: Frame) -> Frame:
  """The runs of a condition at the rate and plan with the lowest mean error."""
  runs = runs[runs.condition == condition]
  means = runs.groupby(['rate', 'plan']).best.mean()
  rate, plan = means[means == means.min()].index[-1]  # ties: the highest rate
  return runs[(runs.rate == rate) & (runs.plan == plan)]


def alignment(results: Results, row: Row) -> Picture | None:
  """Draws the alignment with backpropagation by layer and epoch.

  Each condition is shown at its best rate, as a mean over seeds. Conditions
  without recorded layers and those that backpropagate exactly are left out.
  """
  runs = results.runs_of(row)
  shown: dict[str, Frame] = {}
  for condition in results.cells_of(row):
    table = layer_table(at_best_rate(condition, runs))
    if len(table) and (table.get('angle', pd.Series([1.0])) > 0).any():
      shown[condition] = table
  if not shown:
    return None
  name = file_name(row, 'alignment')
  title = 'Alignment with backpropagation by layer and epoch, best rate'
  about = f'{_short(row.label)}, {_short(row.protocol, 70)}'
  layers = list(dict.fromkeys(
    layer for table in shown.values() for layer in table.index.unique('layer')
  ))  # fmt: skip
  with style(name):
    across = len(_ALIGNMENT)
    figure, all_axes = panels(
      f'{title}\n{about}', across * len(shown), (2.3, 1.7), across
    )
    for at, axes in enumerate(all_axes):
      condition, table = list(shown.items())[at // across]
      key, words, high = _ALIGNMENT[at % across]
      for place, layer in enumerate(layers):
        if key in table and layer in table.index.unique('layer'):
          line = table[key].xs(layer, level='layer')
          axes.plot(line.index, line.to_numpy(), **look(place))
      if high is None:
        axes.axhline(1, **_CHANCE)
        axes.set_yscale('log')
        # At least a decade, so that rounding is not drawn as a change.
        ends = axes.get_ylim()
        axes.set_ylim(min(ends[0], 0.3), max(ends[1], 3))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(_PLAIN)
      else:
        axes.axhline(high / 2, **_CHANCE)
        axes.set_ylim(-0.04 * high, 1.04 * high)
        axes.set_yticks([0, high / 2, high])
      axes.xaxis.set_major_locator(
        ticker.MaxNLocator(4, integer=True, min_n_ticks=1)
      )
      if at < across:
        axes.set_title(words)
      if at >= across * (len(shown) - 1):
        axes.set_xlabel('epoch')
      if at % across == 0:
        axes.set_ylabel(_short(condition, 20))
    legend(figure, [
      *((_short(layer), look(place)) for place, layer in enumerate(layers)),
      ('equal norms; unrelated (half the signs, 90°)', _CHANCE),
    ])  # fmt: skip
    return picture(figure, name, f'{title}: {about}')


def layer_table(runs: Frame) -> Frame:
  """Means over runs by epoch and layer; empty if no layers were recorded."""
  rows = [
    {**row, 'epoch': epoch, 'layer': layer}
    for layers in runs.layers
    for epoch, of in layers.items()
    for layer, row in of.items()
  ]
  if not rows:
    return pd.DataFrame()
  table: Frame = pd.DataFrame(rows).set_index(['epoch', 'layer'])
  table = table.astype(float)
  table = table.groupby(level=['epoch', 'layer'], sort=False).mean()
  return table.sort_index(level='epoch', sort_remaining=False)
