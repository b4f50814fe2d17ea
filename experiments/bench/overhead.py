"""Grid time against the number of runs: what a run costs besides training."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.runs.store import load

RUNS = (1, 2, 4, 8)
_EPOCHS, _IMAGES = 3, 300


def grid_times(counts: Sequence[int]) -> dict[str, Any]:
  """Times a grid of short runs on embedded digits, as a process of its own.

  What an epoch takes is the median over all epochs of all runs; the rest of
  the time is the program's: start, data, compilation or its cache, results.
  A line through it has the fixed cost of the program and that of a run.

  Args:
    counts: numbers of runs, each a grid of its own.
  """
  _grid(1)  # fills the compilation cache
  points = [_grid(count) for count in counts]
  epoch = float(np.median([s for point in points for s in point['epochs']]))
  rest = [point['seconds'] - epoch * len(point['epochs']) for point in points]
  run, start = map(float, np.polyfit(counts, rest, 1))
  return {
    'points': [
      {'runs': count, 'seconds': point['seconds'], 'besides_training': besides}
      for count, point, besides in zip(counts, points, rest, strict=True)
    ],
    'seconds_per_epoch': epoch,
    'seconds_per_start': start,
    'seconds_per_run': run,
  }


def _grid(count: int) -> dict[str, Any]:
  """A grid of ``count`` seeds: its wall time and that of every epoch."""
  with tempfile.TemporaryDirectory() as folder:
    command = (
      '-m', 'experiments', 'run', '--condition', 'uSF+BN', '--rate', '1',
      '--seed', *map(str, range(count)), '--epochs', str(_EPOCHS),
      '--train-size', str(_IMAGES),
      '--results', folder,
    )  # fmt: skip
    began = time.perf_counter()
    subprocess.run(
      [sys.executable, *command], check=True, stdout=subprocess.DEVNULL
    )
    return {
      'seconds': time.perf_counter() - began,
      'epochs': [line['seconds'] for r in load(folder) for line in r.metrics],
    }
