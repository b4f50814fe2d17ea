"""How cost grows: with batch, width, depth, and the number of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import cli
from experiments.bench import files, plots
from experiments.bench.contenders import check_steps
from experiments.bench.family import AXES, step_times
from experiments.bench.overhead import RUNS, grid_times
from experiments.bench.tables import table
from experiments.training import machine

_RUN = 30.0  # seconds, of the run to which overhead is compared


def carry_out(command: cli.Scaling) -> None:
  """Measures, prints and writes both.

  Raises:
    ValueError: if an option is not among what is allowed.
  """
  check_steps(command.steps)
  out = files.folder(command.out)
  machine.warn_if_busy()
  points = []
  for point in step_times(AXES, command.steps):
    points.append(point)
    times = (
      f'{name} {1e3 * seconds:.2f} ms'
      for name, seconds in point['seconds'].items()
    )
    print(f'{point["axis"]} {point[point["axis"]]}:', *times, flush=True)
  grid = grid_times(RUNS)
  print(overhead(grid))
  written = files.write(
    out,
    {'steps': points, 'grid': grid},
    plots.scaling(points, grid),
    markdown(points, grid),
  )
  print('written:', *written, sep='\n  ')


def overhead(grid: Mapping[str, Any]) -> str:
  """The fixed cost of a run, in words."""
  run = grid['seconds_per_run']
  return (
    f'A grid takes {grid["seconds_per_start"]:.1f} s to start and, besides '
    f'training, {run:.2f} s a run: {100 * run / _RUN:.1f} % of a run of '
    f'{_RUN:.0f} s.'
  )


def markdown(points: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]):
  """Step times as a table, and the fixed cost of a run."""
  names = list(points[0]['seconds'])
  rows = [
    [
      f'{point["axis"]} {point[point["axis"]]}',
      *(f'{1e3 * seconds:.2f}' for seconds in point['seconds'].values()),
    ]
    for point in points
  ]
  lines = table(('milliseconds a step', *names), rows)
  return '\n'.join([*lines, '', overhead(grid)])
