"""Training of one run, epoch by epoch, and its two results.

On a CPU an epoch is a loop over a jitted step, because XLA's convolutions are
several times slower inside a compiled loop there; elsewhere it is one
``lax.scan``. The numbers are the same.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments import devices
from experiments.grid import Run
from experiments.placement import (
  Images,
  Placed,
  calibration_batches,
  mini_batches,
)
from experiments.program import Program, Setup, State, program

Line = dict[str, Any]  # of metrics, of an epoch
EVALUATION_BATCH = 250


class Stopped(Exception):
  """Asked to stop in the middle of an epoch, which is then as not begun."""


def start(run: Run, placed: Placed) -> State:
  """The state before the first epoch."""
  key = jax.random.key(run.seed)
  return program(Setup.of(run, placed)).initialize(key)


def epochs(
  run: Run,
  placed: Placed,
  state: State,
  first: int = 1,
  scan: bool | None = None,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[State, Line]]:
  """Trains epoch by epoch; ends early once a parameter is not finite.

  Args:
    run: what to do.
    placed: its dataset.
    state: before epoch ``first``, on whatever device; its buffers are used up.
    first: number of the epoch to begin with, from 1.
    scan: whether an epoch is one compiled loop; default: not on a CPU.
    stopping: asked before every step (every epoch with ``scan``) and every
      batch of an evaluation whether to stop.

  Yields:
    The state after each epoch, which the next epoch uses up, and its line of
    metrics: errors in percent, losses in nats (None if not finite), seconds.

  Raises:
    Stopped: if ``stopping()`` says so.
  """
  functions = program(Setup.of(run, placed))
  key = jax.random.fold_in(jax.random.key(run.seed), 1)
  scan = jax.default_backend() != 'cpu' if scan is None else scan
  train = _scanned if scan else _looped
  state = devices.replicate(placed.mesh, state)
  for epoch in range(first, run.protocol.epochs + 1):
    began = time.perf_counter()
    order = mini_batches(run, epoch, placed.trained)
    rate = np.float32(
      run.protocol.base_rate * run.rate * run.protocol.rate_factor(epoch)
    )
    state, scores = train(functions, stopping, state, placed, order, rate, key)
    line = {'epoch': epoch} | _named('train', scores, order.size)
    line |= _evaluated(run, placed, functions, stopping, state, epoch)
    if run.protocol.layer_metrics:
      index = devices.split(placed.mesh, order[0])
      rows = functions.align(state, placed.parts, index, key)
      line['layers'] = {
        layer: {name: _number(x) for name, x in row._asdict().items()}
        for layer, row in rows.items()
      }
    line['finite'] = bool(np.all(functions.finite(state['params'])))
    line['seconds'] = round(time.perf_counter() - began, 3)
    yield state, line
    if not line['finite']:
      return


def _looped(
  functions: Program, stopping, state, placed: Placed, order, rate, key
):
  """An epoch step by step; nothing waits for the device before its end."""
  scores = []
  for index in order:
    if stopping():
      raise Stopped
    index = devices.split(placed.mesh, index)
    state, step_scores = functions.step(state, placed.parts, index, rate, key)
    scores.append(step_scores)
  return state, np.sum(jax.device_get(scores), axis=0, dtype=np.float32)


def _scanned(
  functions: Program, stopping, state, placed: Placed, order, rate, key
):
  """An epoch as one compiled loop."""
  if stopping():
    raise Stopped
  order = devices.split(placed.mesh, order)
  state, scores = functions.scan(state, placed.parts, order, rate, key)
  return state, np.asarray(scores)


def _evaluated(
  run: Run,
  placed: Placed,
  functions: Program,
  stopping: Callable[[], bool],
  state: State,
  epoch: int,
) -> Line:
  """The part of the line that test and held-out images give."""
  parts = placed.parts
  # Whole on every device: they are few, and may be of any size.
  batches = devices.replicate(
    placed.mesh, [*calibration_batches(run, epoch, placed.trained)]
  )
  variables = functions.statistics(state['params'], parts, batches)
  line = {}
  for name, images, rows in (
    ('test', parts.test, np.arange(len(parts.test.y), dtype=np.int32)),
    ('holdout', parts.train, placed.held_out),
  ):
    if len(rows):
      scores = _scores(functions, stopping, variables, placed, images, rows)
      line |= _named(name, np.asarray(scores), len(rows))
  return line


def _scores(
  functions: Program,
  stopping: Callable[[], bool],
  variables,
  placed: Placed,
  images: Images,
  rows: np.ndarray,
) -> jax.Array:
  """Sums of losses and errors over rows, in batches of one size."""
  size = min(EVALUATION_BATCH, len(rows))
  size += -size % devices.count(placed.mesh)
  missing = -len(rows) % size
  index = np.pad(rows, (0, missing), mode='edge').reshape(-1, size)
  weight = np.pad(np.ones(len(rows), np.float32), (0, missing))
  scores = []
  for batch in zip(index, weight.reshape(-1, size), strict=True):
    if stopping():
      raise Stopped
    batch = [devices.split(placed.mesh, each) for each in batch]
    scores.append(functions.evaluate(variables, placed.parts, images, *batch))
  return sum(scores[1:], start=scores[0])


def _named(name: str, scores: np.ndarray, count: int) -> Line:
  """Mean loss and error in percent."""
  loss, errors = map(float, scores)
  return {
    f'{name}_loss': _number(loss / count),
    f'{name}_error': 100 * errors / count,
  }


def _number(value: Any) -> float | None:
  """A float, or None where JSON has no number."""
  return float(value) if math.isfinite(value) else None


def result(run: Run, classes: int, lines: list[Line]) -> dict[str, Any]:
  """Both results of a run from its lines of metrics.

  The paper's: the best test error of all epochs. The honest one: the test
  error of the epoch that is best on the held-out images.
  """
  best = min(lines, key=lambda line: line['test_error'])
  summary = {
    'paper_error': best['test_error'],
    'paper_epoch': best['epoch'],
    'holdout_error': None,
    'honest_epoch': None,
    'honest_error': None,
    'epochs_run': len(lines),
    'diverged': not lines[-1]['finite'],
    'chance_error': 100 * (1 - 1 / classes),
  }
  if 'holdout_error' in lines[0]:
    chosen = min(lines, key=lambda line: line['holdout_error'])
    summary |= {
      'holdout_error': chosen['holdout_error'],
      'honest_epoch': chosen['epoch'],
      'honest_error': chosen['test_error'],
    }
  return summary
