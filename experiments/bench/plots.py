"""Pictures of measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.bench.results import Result
from experiments.report.figures import (
  COLOURS,
  Picture,
  looks,
  panels,
  picture,
  style,
  top_left,
)


def steps(results: Sequence[Result]) -> Picture:
  """Time of a step, a panel for each architecture, a line for each program."""
  title = 'Time of a training step: median and quartiles'
  by_architecture: dict[str, list[Result]] = {}
  for result in results:
    by_architecture.setdefault(result.workload.architecture, []).append(result)
  names = list(dict.fromkeys(row.name for r in results for row in r.rows))
  norms = list(dict.fromkeys(r.workload.batch_norm for r in results))
  size = 2.6, 0.2 * len(names) + 0.1
  left = 0.3 + 0.075 * max(map(len, names))
  with style('bench'):
    figure, axes = panels(
      len(by_architecture), size, across=3, left=left, top=0.85, between=0.95
    )
    for panel, (architecture, members) in zip(
      axes, by_architecture.items(), strict=True
    ):
      for result in members:
        norm = norms.index(result.workload.batch_norm)
        for row in result.rows:
          low, high = row.quartiles
          panel.errorbar(
            1e3 * row.median,
            names.index(row.name) + 0.3 * (norm - (len(norms) - 1) / 2),
            xerr=[[1e3 * (row.median - low)], [1e3 * (high - row.median)]],
            color=COLOURS[norm],
            marker='os'[norm % 2],
            markersize=4,
            linewidth=1.2,
          )
      panel.set_yticks(range(len(names)), names)
      panel.set_ylim(len(names) - 0.5, -0.5)
      panel.set_xlim(0, None)
      panel.set_xlabel('ms')
      panel.set_title(f'{architecture}, batch {members[0].workload.batch}')
    figure.text(*top_left(figure, 0.1), title, va='top', fontsize=11)
    for at, norm in enumerate(norms):
      text = 'without batch norm' if norm == 'none' else 'with batch norm'
      figure.text(
        *top_left(figure, 0.32 + 0.17 * at),
        f'{"●■"[at % 2]} {text}',
        va='top',
        color=COLOURS[at],
      )
    return picture(figure, 'bench', title, png=True)


def scaling(
  points: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]
) -> Picture:
  """Step time by batch, width and depth; time of a grid by number of runs."""
  title = 'How cost grows'
  axes_names = list(dict.fromkeys(point['axis'] for point in points))
  with style('scaling'):
    figure, (*step_axes, grid_axes) = panels(
      len(axes_names) + 1,
      (3.2, 2.2),
      across=2,
      left=0.75,
      top=0.65,
      between=0.85,
    )
    for panel, axis in zip(step_axes, axes_names, strict=True):
      members = [point for point in points if point['axis'] == axis]
      for position, name in enumerate(members[0]['seconds']):
        panel.plot(
          [member[axis] for member in members],
          [1e3 * member['seconds'][name] for member in members],
          label=name,
          **looks(position),
        )
      panel.set_xscale('log', base=2)
      panel.set_yscale('log')
      panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      panel.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f'{ms:g}'))
      panel.yaxis.set_minor_locator(NullLocator())
      panel.set_xticks(
        [member[axis] for member in members],
        [str(member[axis]) for member in members],
      )
      panel.set_xlabel(axis)
      panel.set_ylabel('ms a step')
      panel.legend(fontsize=8)
    runs = [point['runs'] for point in grid['points']]
    for position, (label, name) in enumerate(
      (('whole grid', 'seconds'), ('besides training', 'besides_training'))
    ):
      grid_axes.plot(
        runs,
        [point[name] for point in grid['points']],
        label=label,
        **looks(position),
      )
    grid_axes.set_xlabel('runs')
    grid_axes.set_ylabel('seconds')
    grid_axes.set_xlim(0, None)
    grid_axes.set_ylim(0, None)
    grid_axes.legend(fontsize=8)
    figure.text(*top_left(figure, 0.1), title, va='top', fontsize=11)
    return picture(figure, 'scaling', title, png=True)
