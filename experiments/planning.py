"""What a list of runs costs: floating point operations, and hours."""

import time
from collections.abc import Callable, Sequence

from experiments.datasets import Dataset
from experiments.grid import Run
from experiments.models import multiply_adds, training_flops

_STEPS = 5


def run_flops(run: Run, data: Dataset) -> float:
  """Operations of all training steps and evaluations of a run."""
  architecture, classes = data.spec.architecture, len(data.classes)
  trained = len(data.y_train) * (1 - run.protocol.holdout)
  evaluated = len(data.y_test) + len(data.y_train) - trained
  forward = 2 * sum(multiply_adds(architecture, classes))
  return run.protocol.epochs * (
    trained * training_flops(architecture, classes) + evaluated * forward
  )


def flops_per_second(run: Run, data: Dataset) -> float:
  """Measures a few training steps of a run's network."""
  import jax
  import numpy as np

  from experiments import train

  parts = train.place(data, run)
  functions = train.program(train.Setup.of(run, data))
  state = train.start(run, data, parts)
  size = min(run.batch_size(1), len(parts.train.y))
  index = np.arange(size, dtype=np.int32)
  began = 0.0
  for step in range(_STEPS + 1):
    if step == 1:  # the first one compiles
      jax.block_until_ready(state)
      began = time.perf_counter()
    state, _ = functions.step(
      state, parts, index, np.float32(0), jax.random.key(0)
    )
  jax.block_until_ready(state)
  seconds = (time.perf_counter() - began) / _STEPS
  flops = size * training_flops(data.spec.architecture, len(data.classes))
  return flops / seconds


def plan_text(
  runs: Sequence[Run],
  missing: Sequence[Run],
  load_for: Callable[[Run], Dataset],
  calibrate: bool,
) -> str:
  """A line for every dataset and rule that has runs missing, and the sum.

  Args:
    runs: all runs that are wanted.
    missing: those that have no result.
    load_for: gives the dataset of a run.
    calibrate: whether to time some steps, for an estimate of hours.
  """
  groups: dict[tuple[str, ...], list[Run]] = {}
  for run in missing:
    key = (run.dataset, run.rule, run.batch_norm, str(run.batch_manhattan))
    groups.setdefault(key, []).append(run)
  lines = [f'{len(runs) - len(missing)} of {len(runs)} runs are finished']
  total_flops = total_hours = 0.0
  for (dataset, rule, norm, setting), members in groups.items():
    flops = sum(run_flops(run, load_for(run)) for run in members)
    total_flops += flops
    text = (
      f'{dataset:<12} {rule:<10} BN {norm:<7} BM {setting}  '
      f'{len(members):>4} runs  {flops:.2e} FLOP'
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
