"""Pictures of measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.bench.results import Result
from experiments.report.plots import (
  COLORS,
  Picture,
  look,
  panels,
  picture,
  style,
)


def steps(results: Sequence[Result]) -> Picture:
  """Time of a step, a panel for each architecture, a line for each program."""
  title = 'Time of a training step: median and quartiles'
  by_architecture: dict[str, list[Result]] = {}
  for result in results:
    by_architecture.setdefault(result.workload.architecture, []).append(result)
  names = list(dict.fromkeys(row.name for r in results for row in r.rows))
  norms = list(dict.fromkeys(r.workload.batch_norm for r in results))
  size = 2.9 + 0.075 * max(map(len, names)), 0.2 * len(names) + 0.8
  with style('bench'):
    figure, axes = panels(title, len(by_architecture), size)
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
            color=COLORS[norm],
            marker='os'[norm % 2],
            markersize=4,
            linewidth=1.2,
          )
      panel.set_yticks(range(len(names)), names)
      panel.set_ylim(len(names) - 0.5, -0.5)
      panel.set_xlim(0, None)
      panel.set_xlabel('ms')
      panel.set_title(f'{architecture}, batch {members[0].workload.batch}')
    handles = [
      Line2D(
        [],
        [],
        color=COLORS[at],
        marker='os'[at % 2],
        linestyle='',
        label='without batch norm' if norm == 'none' else 'with batch norm',
      )
      for at, norm in enumerate(norms)
    ]
    figure.legend(handles=handles, loc='outside lower left', ncols=2)
    return picture(figure, 'bench', title, png=True)


def scaling(
  points: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]
) -> Picture:
  """Step time by batch, width and depth; time of a grid by number of runs."""
  title = 'How cost grows'
  axes_names = list(dict.fromkeys(point['axis'] for point in points))
  with style('scaling'):
    figure, (*step_axes, grid_axes) = panels(
      title, len(axes_names) + 1, (4.0, 3.0), across=2
    )
    for panel, axis in zip(step_axes, axes_names, strict=True):
      members = [point for point in points if point['axis'] == axis]
      for position, name in enumerate(members[0]['seconds']):
        panel.plot(
          [member[axis] for member in members],
          [1e3 * member['seconds'][name] for member in members],
          label=name,
          **look(position),
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
        **look(position),
      )
    grid_axes.set_xlabel('runs')
    grid_axes.set_ylabel('seconds')
    grid_axes.set_xlim(0, None)
    grid_axes.set_ylim(0, None)
    grid_axes.legend(fontsize=8)
    return picture(figure, 'scaling', title, png=True)
