"""Feedback rules compared: errors beside backpropagation's, and angles.

Only conditions whose layers were recorded (`--layer-metrics`) are shown.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.paper import statistics
from experiments.paper.conditions import find_exactly, plain_name, setting_of
from experiments.report import plots
from experiments.report.frame import Cell, Frame, Results, Row, column_order
from experiments.report.plots import Picture

_STEP = 0.047  # between labels, of a panel's height
_LEAST = 4  # rules of a setting, for a comparison to be worth a table
_ANGLES = {
  'angle': 'V and W (°)',
  'update_angle': 'updates (°)',
  'error_angle': 'error signals (°)',
}
# What a rule's feedback comes from; the color of its points.
_KINDS = {
  'weights': ('BP',),
  'their signs': ('uSF', 'NuSF', 'brSF', 'frSF'),
  'the start, or chance': ('RndF', 'FrozenSign', 'TiedNorm'),
  'learning': ('KP', 'PFA', 'LowRank', 'Mirror'),
  'the output (direct)': ('DFA', 'SignDFA', 'CenteredDFA', 'DRTP'),
}


@dataclasses.dataclass(frozen=True)
class Rule:
  """A rule under a norm and an update, on a row.

  Attributes:
    name: of the condition.
    rule: of the feedback.
    setting: norm and update, such as 'BN+BM'.
    cell: its errors.
    difference: best test error less backpropagation's, in points, over the
      seeds that both have; None without such a seed.
    interval: of the difference, 95 %, seeds drawn together.
    angles: in degrees after the last epoch at the best rate, a row per layer
      from the input on; the last layer, whose error is exact, is left out.
  """

  name: str
  rule: str
  setting: str
  cell: Cell
  difference: float | None
  interval: statistics.Interval | None
  angles: Frame

  def mean_angle(self, name: str) -> float:
    """Mean over layers in degrees; NaN where it does not apply."""
    return float(self.angles[name].mean(skipna=False))


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The rules of a row, the best first within a setting."""

  row: Row
  rules: tuple[Rule, ...]

  @property
  def settings(self) -> list[str]:
    """Norms and updates, in the order of the rules."""
    return list(dict.fromkeys(rule.setting for rule in self.rules))


def compare(results: Results) -> list[Comparison]:
  """The rows with a few rules of one setting whose layers were recorded."""
  found = []
  for row in results.rows.values():
    rules = list(_rules(results, row))
    counts = collections.Counter(rule.setting for rule in rules)
    rules = [rule for rule in rules if counts[rule.setting] >= _LEAST]
    if rules:
      rules.sort(key=lambda of: (column_order(of.setting), of.cell.error))
      found.append(Comparison(row, tuple(rules)))
  return found


def _rules(results: Results, row: Row) -> Iterable[Rule]:
  runs, cells = results.runs_of(row), results.cells_of(row)
  for name, cell in cells.items():
    column = find_exactly(name)
    table = plots.layer_table(plots.at_best_rate(name, runs))
    if column is None or table.empty:
      continue
    condition = column.conditions[0]
    last = table.xs(table.index.unique('epoch').max(), level='epoch').iloc[:-1]
    plain = cells.get(plain_name(condition))
    yield Rule(
      name, condition.rule, setting_of(condition), cell, *_paired(cell, plain),
      last.reindex(columns=[*_ANGLES]),
    )  # fmt: skip


def _paired(
  cell: Cell, plain: Cell | None
) -> tuple[float | None, statistics.Interval | None]:
  """The difference to backpropagation over the seeds that both have."""
  if plain is None or not plain.best or not cell.best or plain is cell:
    return None, None
  ours, theirs = cell.best.values, plain.best.values
  seeds = sorted(set(ours) & set(theirs))
  if not seeds:
    return None, None
  samples = [[of[seed] for seed in seeds] for of in (ours, theirs)]
  difference = float(np.mean(samples[0]) - np.mean(samples[1]))
  return difference, statistics.effect_interval(samples, lambda a, b: a - b)


def table(comparison: Comparison) -> Frame:
  """A row per rule and setting, as text."""
  rows = []
  for rule in comparison.rules:
    best, held = rule.cell.best, rule.cell.held_out
    rows.append({
      'condition': rule.name,
      'best test error': _number(rule.cell.error),
      'held-out test error': _number(held and held.mean),
      'minus backpropagation': _difference(rule),
      'seeds': str(len(best.values) if best else 0),
      **{
        name: _number(rule.mean_angle(key)) for key, name in _ANGLES.items()
      },
    })  # fmt: skip
  return pd.DataFrame(rows).set_index('condition')


def summary(comparison: Comparison) -> Frame:
  """A row per rule, the settings side by side, as text of a few lines."""
  by_setting = {
    setting: {of.rule: of for of in comparison.rules if of.setting == setting}
    for setting in comparison.settings
  }
  # In the order of the setting that most rules have; then those of the others.
  order = sorted(by_setting, key=lambda setting: -len(by_setting[setting]))
  rules = dict.fromkeys(rule for s in order for rule in by_setting[s])
  columns = {
    setting: [_lines(found[rule]) if rule in found else '' for rule in rules]
    for setting, found in by_setting.items()
  }
  table: Frame = pd.DataFrame(columns, index=[*rules])
  table.loc['rank correlation of error and angle'] = [
    _correlation(found.values()) for found in by_setting.values()
  ]
  return table


def _lines(rule: Rule) -> str:
  """Such as '1.69, held-out 2.20', '-0.12 [-0.30, +0.05]' and '23°'."""
  held, angle = rule.cell.held_out, rule.mean_angle('error_angle')
  errors = _number(rule.cell.error) + (
    f', held-out {_number(held.mean)}' if held else ''
  )
  degrees = f'{angle:.0f}°' if np.isfinite(angle) else ''
  return '\n'.join(filter(None, (errors, _difference(rule), degrees)))


def _correlation(rules: Iterable[Rule]) -> str:
  """Such as '0.94 (16 rules)': best test error and angle of error signals."""
  pairs = [(of.cell.error, of.mean_angle('error_angle')) for of in rules]
  pairs = [pair for pair in pairs if np.isfinite(pair[1])]
  errors, angles = zip(*pairs, strict=True) if pairs else ((), ())
  found = statistics.rank_correlation(errors, angles)
  return '' if found is None else f'{found:.2f} ({len(pairs)} rules)'


def _number(value: float | None, sign: str = '') -> str:
  known = value is not None and np.isfinite(value)
  return f'{value:{sign}.2f}' if known else ''


def _difference(rule: Rule) -> str:
  ends = rule.interval
  interval = f' [{ends[0]:+.2f}, {ends[1]:+.2f}]' if ends else ''
  return _number(rule.difference, '+') + interval


def figure(comparison: Comparison) -> Picture:
  """Error against the final angle of the error signal, by rule and depth."""
  row, settings = comparison.row, comparison.settings
  layers = list(dict.fromkeys(
    layer for rule in comparison.rules for layer in rule.angles.index
  ))  # fmt: skip
  markers = {layer: plots.look(at)['marker'] for at, layer in enumerate(layers)}
  kinds = {rule: at for at, of in enumerate(_KINDS.values()) for rule in of}
  title = "Error against the error signal's angle to backpropagation"
  name = plots.file_name(row, 'angles')
  with plots.style(name):
    drawing, all_axes = plots.panels(
      f'{title}\n{row.label}, {row.protocol}', len(settings), (4.6, 4.4), 2
    )
    for axes, setting in zip(all_axes, settings, strict=True):
      rules = [rule for rule in comparison.rules if rule.setting == setting]
      at = plots.error_axis(axes, [rule.cell.error for rule in rules])
      labels = []
      for rule in rules:
        kind = kinds.get(re.sub(r'(-.*|\d+)$', '', rule.rule), -1)
        color, height = plots.COLORS[kind], at(rule.cell.error)
        labels.append((rule.rule, height, color))
        angles = rule.angles.error_angle.reindex(layers)
        axes.plot(angles, [height] * len(angles), color=color, linewidth=0.8)
        for layer, angle in angles.items():
          axes.plot(angle, height, markers[layer], color=color, markersize=4.5)
      _labels(axes, labels)
      axes.set_xlim(-3, max(100, axes.get_xlim()[1]))
      axes.axvline(90, color='#777777', linestyle=':', linewidth=1)
      axes.set_xticks([0, 30, 60, 90])
      axes.set_xlabel('angle of the error signal (°)')
      axes.set_ylabel('best test error (%)')
      axes.set_title(setting)
    plots.legend(drawing, [
      *((f'feedback from {kind}', {'color': plots.COLORS[at]})
        for at, kind in enumerate(_KINDS)),
      *((layer, {'marker': marker, 'ls': '', 'color': '#555555'})
        for layer, marker in markers.items()),
    ])  # fmt: skip
    return plots.picture(drawing, name, f'{title}: {row.label}', png=True)


def _labels(axes: Axes, rules: list[tuple[str, float, str]]) -> None:
  """Names at the right, none over another, each with a line to its error."""
  low, high = axes.transData.transform([(0, y) for y in axes.get_ylim()])[:, 1]
  rules = sorted(rules, key=lambda of: of[1])
  heights = [
    float((axes.transData.transform((0, error))[1] - low) / (high - low))
    for _, error, _ in rules
  ]
  places: list[float] = []
  for height in heights:  # upwards, then back down from the top
    places.append(max([height, *(place + _STEP for place in places[-1:])]))
  ceiling = 1.0
  for at in reversed(range(len(places))):
    places[at] = min(places[at], ceiling)
    ceiling = places[at] - _STEP
  for (name, _, color), height, place in zip(
    rules, heights, places, strict=True
  ):
    axes.annotate(
      name, (1.0, height), (1.07, place), xycoords='axes fraction',
      fontsize=7.5, va='center', color=color, annotation_clip=False,
      arrowprops={'arrowstyle': '-', 'linewidth': 0.5, 'color': '#999999',
                  'relpos': (0, 0.5), 'shrinkA': 1, 'shrinkB': 0},
    )  # fmt: skip
