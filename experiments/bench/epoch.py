"""Where the time of an epoch goes: training, evaluation, statistics, the rest.

Nothing here imports JAX before it is set up.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper.conditions import names_of
from experiments.paper.protocol import Protocol
from experiments.runs.selection import Selection
from experiments.training import machine

_EVALUATED = (100, 250, 500, 1000, 2500)  # images in a batch


def epoch(
  selection: Selection = Selection(),  # noqa: B008
  protocol: Protocol = Protocol(layer_metrics=True),  # noqa: B008
  repeats: int = 5,
) -> None:
  """The parts of an epoch, and evaluation in batches of several sizes.

  Seconds are the fastest of a few, of one run after the other.

  Args:
    selection: the conditions; of each, the first rate and seed.
    protocol: what they all share; its number of epochs does not matter.
    repeats: how often each part is timed.
  """
  if repeats < 1:
    raise ValueError(f'repeats must be at least 1, not {repeats}.')
  machine.start_jax()  # before a plugin imports JAX
  runs = selection.runs(protocol)
  machine.warn_if_busy()
  from experiments.bench import output

  first: dict[Any, Any] = {}
  for run in runs:
    first.setdefault((run.dataset.name, run.condition), run)
  for run in first.values():
    data = selection.loader()(run.dataset.name, protocol.train_size)
    parts, evaluated = _parts(run, data, repeats)
    total = sum(parts.values())
    print(f'\n{run.dataset.name} {names_of(run.condition)[0]}')
    print(output.table([
      {'part': part, 'seconds': f'{seconds:.3f}',
       'share': f'{100 * seconds / total:.0f} %'}
      for part, seconds in parts.items()
    ]))  # fmt: skip
    print(output.table([
      {'images in a batch': str(size), 'seconds to evaluate': f'{seconds:.3f}'}
      for size, seconds in evaluated.items()
    ]))  # fmt: skip


def _parts(
  run: Any, data: Any, repeats: int
) -> tuple[dict[str, float], dict[int, float]]:
  """Seconds by part, and of evaluating the test images by size of a batch."""
  import jax

  from experiments.runs import checkpoints
  from experiments.training import data as device
  from experiments.training import loop
  from experiments.training.step import Setup, program

  def seconds(function: Callable[[], Any]) -> float:
    jax.block_until_ready(function())  # compiles
    times = []
    for _ in range(repeats):
      began = time.perf_counter()
      jax.block_until_ready(function())
      times.append(time.perf_counter() - began)
    return min(times)

  placed = device.split(device.put(data), run)
  arrays, functions = placed.arrays, program(Setup.of(run, placed))
  rows, state = loop.Rows.of(run, placed, 1), loop.start(run, placed)

  def train():
    nonlocal state
    for index in rows.trained:
      # At rate 0 an epoch takes as long, and no weights diverge.
      state, _ = functions.step(state, arrays, index, np.float32(0))
    return state

  parts = {'training': seconds(train)}
  params = state['params']
  variables = functions.statistics(params, arrays, [*rows.calibration])

  def evaluate(images, index, weight):
    return [
      functions.evaluate(variables, arrays, images, *batch)
      for batch in zip(index, weight, strict=True)
    ]

  for name, batches in rows.evaluated.items():
    images = arrays.test if name == 'test' else arrays.train
    words = 'evaluation, test' if name == 'test' else 'evaluation, held out'
    parts[words] = seconds(lambda b=batches, i=images: evaluate(i, *b))
  if run.condition.batch_norm != 'none':
    parts['statistics for testing'] = seconds(
      lambda: functions.statistics(params, arrays, [*rows.calibration])
    )
  if run.protocol.layer_metrics:
    parts['angles of layers'] = seconds(
      lambda: functions.align(state, arrays, rows.trained[0])
    )
  with tempfile.TemporaryDirectory() as folder:
    parts['a checkpoint'] = seconds(
      lambda: checkpoints.save(Path(folder), 1, jax.device_get(state))
    )
  test = np.arange(len(arrays.test.y), dtype=np.int32)
  evaluated = {
    size: seconds(
      lambda size=size: evaluate(arrays.test, *loop.batches(test, 1, size))
    )
    for size in _EVALUATED
    if size <= len(test)
  }
  return parts, evaluated
