"""How cost grows: with the network, and with the number of runs and workers.

Nothing here imports JAX before it is set up.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper.conditions import Condition
from experiments.paper.protocol import Protocol
from experiments.runs import launch, processes, store
from experiments.runs.progress import reporter
from experiments.runs.selection import Selection
from experiments.runs.train import Options
from experiments.training import machine

AXES = {
  'batch': (10, 25, 50, 100, 200),
  'width': (4, 8, 16, 32, 64),
  'depth': (1, 2, 4, 8, 16),
}
RUNS = (1, 2, 4, 8)
_FAMILY = """
import flax.linen as nn

class Family(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    for _ in range({depth}):
      x = nn.relu(nn.Conv({width}, (3, 3))(x))
    return nn.Dense(10, name='output')(x.mean((1, 2)))

NETWORKS = {{'family': lambda classes, batch_norm: Family()}}
"""


def step_times(steps: int) -> Iterator[dict[str, Any]]:
  """Median seconds of each program's steps, from network to network."""
  from experiments.bench.contenders import Workload, in_jax, take_turns
  from experiments.training.step import Setup

  for axis, values in AXES.items():
    for value in values:
      member = {'batch': 50, 'width': 32, 'depth': 4} | {axis: value}
      plugin = _FAMILY.format(**member)
      setup = Setup(Condition(), Protocol(), 'family', plugin, (16, 16, 3), 10)
      workload = Workload(setup, member['batch'])
      programs = [in_jax(workload, rule) for rule in (None, 'uSF', 'brSF')]
      medians = np.median(take_turns(programs, steps), 0).tolist()
      names = [program.name for program in programs]
      seconds = dict(zip(names, medians, strict=True))
      yield {'axis': axis, **member, 'seconds': seconds}


def grid_times() -> dict[str, Any]:
  """Times grids of short runs on embedded digits, each a process of its own.

  An epoch takes the median over all epochs of all runs. The rest of the time is
  the program's: start, data, compilation or its cache, results. A line through
  the rest gives the fixed cost of the program and of a run.
  """
  _grid(1)  # fills the compilation cache
  grids = [_grid(count) for count in RUNS]
  epoch = float(np.median([s for _, seconds in grids for s in seconds]))
  rest = [whole - epoch * len(seconds) for whole, seconds in grids]
  run, start = np.polyfit(RUNS, rest, 1).tolist()
  return {
    'points': [
      {'runs': count, 'seconds': whole, 'besides_training': besides}
      for count, (whole, _), besides in zip(RUNS, grids, rest, strict=True)
    ],
    'seconds_per_epoch': epoch,
    'seconds_per_start': start,
    'seconds_per_run': run,
  }


def _grid(count: int) -> tuple[float, list[float]]:
  """Seconds of a grid of ``count`` seeds, and of every epoch."""
  with tempfile.TemporaryDirectory() as folder:
    options = (
      f'--condition uSF+BN --rate 1 --seed {" ".join(map(str, range(count)))} '
      f'--epochs 3 --train-size 300 --results {folder}'
    )
    command = [sys.executable, '-m', 'experiments', 'run', *options.split()]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    lines = [line for record in store.load(folder) for line in record.metrics]
  return whole, [line['seconds'] for line in lines]


def grid(repeats: int = 3, epochs: int = 20) -> None:
  """The speed-up of 16 runs by two worker processes, each on half the cores.

  One and two workers are timed in turn, so that other load on the machine meets
  both. The processors' seconds show what two workers cost more than one,
  whatever that load is.

  Args:
    repeats: of each of both.
    epochs: of each run, on the embedded digits.
  """
  if repeats < 1:
    raise ValueError(f'repeats must be at least 1, not {repeats}.')
  machine.start_jax()
  selection = Selection(
    condition=('SGD', 'uSF+BN'), rate=(1.0, 10.0), seed=(0, 1, 2, 3)
  )
  runs = selection.runs(Protocol(epochs=epochs))
  places = processes.places(2)

  def timed(workers: int) -> tuple[float, float]:
    """Of the clock, and of the processors in the workers."""
    with tempfile.TemporaryDirectory() as folder, reporter(16) as listener:
      options = Options(Path(folder))
      launcher = processes.in_processes(options, places[:workers])
      before, began = os.times(), time.perf_counter()
      launch.launch(runs, launcher, options, listener)
      seconds, after = time.perf_counter() - began, os.times()
    return seconds, sum(after[2:4]) - sum(before[2:4])  # of child processes

  timed(1)  # fills the compilation cache
  ratios = []
  for _ in range(repeats):
    (one, used_by_one), (two, used_by_two) = timed(1), timed(2)
    ratios.append(one / two)
    print(
      f'1 worker {one:.1f} s (processor {used_by_one:.1f} s), 2 workers '
      f'{two:.1f} s (processors {used_by_two:.1f} s): {ratios[-1]:.2f}',
      flush=True,
    )
  print(f'{len(runs)} runs, median speed-up {np.median(ratios):.2f}')
