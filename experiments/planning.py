"""What a list of runs costs: floating point operations, and hours."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.datasets import Dataset
from experiments.paper.conditions import names_of
from experiments.paper.protocol import Run
from experiments.training import loop as train
from experiments.training import placement
from experiments.training.holdout import held_out_size
from experiments.training.models import multiply_adds, training_flops
from experiments.training.program import Setup, program

_STEPS = 5


def run_flops(run: Run, data: Dataset) -> float:
  """Operations of all training steps and evaluations of a run."""
  architecture, classes = data.spec.architecture, len(data.classes)
  evaluated = held_out_size(len(data.y_train), run.protocol)
  trained = len(data.y_train) - evaluated
  evaluated += len(data.y_test)
  if run.batch_norm != 'none':
    size = run.statistics_size(1, trained)
    evaluated += run.protocol.calibration_batches * size
  forward = 2 * sum(multiply_adds(architecture, classes))
  return run.protocol.epochs * (
    trained * training_flops(architecture, classes) + evaluated * forward
  )


def flops_per_second(run: Run, data: Dataset) -> float:
  """Measures a few training steps of a run's network."""
  placed = placement.place(placement.upload(data), run)
  functions = program(Setup.of(run, placed))
  state = train.start(run, placed)
  index = placement.mini_batches(run, 1, placed.trained)[0]
  began = 0.0
  for step in range(_STEPS + 1):
    if step == 1:  # the first one compiles
      jax.block_until_ready(state)
      began = time.perf_counter()
    state, _ = functions.step(state, placed.parts, index, np.float32(0))
  jax.block_until_ready(state)
  seconds = (time.perf_counter() - began) / _STEPS
  flops = training_flops(placed.architecture, placed.classes)
  return index.size * flops / seconds


def plan_text(
  runs: Sequence[Run],
  missing: Sequence[Run],
  load_for: Callable[[Run], Dataset],
  calibrate: bool,
) -> str:
  """A line for every dataset and condition with runs missing, and the sum.

  Args:
    runs: all runs that are wanted.
    missing: those that have no result.
    load_for: gives the dataset of a run.
    calibrate: whether to time some steps, for an estimate of hours.
  """
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in missing:
    groups.setdefault((run.dataset, names_of(run)[0]), []).append(run)
  lines = [f'{len(runs) - len(missing)} of {len(runs)} runs are finished']
  total_flops = total_hours = 0.0
  for (dataset, condition), members in groups.items():
    flops = sum(run_flops(run, load_for(run)) for run in members)
    total_flops += flops
    text = (
      f'{dataset:<12} {condition:<18} {len(members):>4} runs  {flops:.2e} FLOP'
    )
    if calibrate:
      speed = flops_per_second(members[0], load_for(members[0]))
      hours = flops / speed / 3600
      total_hours += hours
      text += f'  {speed / 1e9:6.1f} GFLOP/s  {hours:8.2f} h'
    lines.append(text)
  total = f'{len(missing)} runs missing: {total_flops:.2e} FLOP'
  if calibrate:
    total += f', about {total_hours:.2f} h on this machine'
  elif missing:
    total += ' (--calibrate estimates the time)'
  return '\n'.join([*lines, total])
