"""Training of one run, epoch by epoch, and its two results.

On a CPU an epoch is a loop over a jitted step, because XLA's convolutions are
several times slower inside a compiled loop there; elsewhere it is one
``lax.scan``. The numbers are the same.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.paper.protocol import Protocol, Run
from experiments.training import devices
from experiments.training.placement import (
  Parts,
  Placed,
  calibration_batches,
  mini_batches,
)
from experiments.training.program import Program, Setup, State, program

Line = dict[str, Any]  # of metrics, of an epoch
Measured = dict[str, Any]  # of an epoch, as arrays
EVALUATION_BATCH = 250


class Stopped(Exception):
  """Asked to stop in the middle of an epoch, which is then as not begun."""


def start(run: Run, placed: Placed) -> State:
  """The state before the first epoch."""
  key = jax.random.key(run.seed)
  return program(Setup.of(run, placed)).initialize(key)


class Rows(NamedTuple):
  """The images that an epoch meets, an entry for each mini-batch.

  Attributes:
    trained: to train on, shuffled.
    calibration: for the statistics for testing.
    evaluated: rows and their weights, of 'test' and, if any are, 'holdout'.
  """

  trained: np.ndarray
  calibration: np.ndarray
  evaluated: dict[str, tuple[np.ndarray, np.ndarray]]

  @classmethod
  def of(cls, run: Run, placed: Placed, epoch: int) -> 'Rows':
    """The rows of a run's epoch, counted from 1."""
    test = np.arange(len(placed.parts.test.y), dtype=np.int32)
    return cls(
      trained=mini_batches(run, epoch, placed.trained),
      calibration=calibration_batches(run, epoch, placed.trained),
      evaluated={
        name: _batches(rows, devices.count(placed.mesh))
        for name, rows in (('test', test), ('holdout', placed.held_out))
        if len(rows)
      },
    )


def _batches(rows: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows in batches of one size, and weights: 0 for what fills the last."""
  size = min(EVALUATION_BATCH, len(rows))
  size += -size % parts
  missing = -len(rows) % size
  index = np.pad(rows, (0, missing), mode='edge')
  weight = np.pad(np.ones(len(rows), np.float32), (0, missing))
  return index.reshape(-1, size), weight.reshape(-1, size)


def rate_of(run: Run, epoch: int) -> np.float32:
  """The rate of an epoch, counted from 1."""
  protocol = run.protocol
  return np.float32(protocol.base_rate * run.rate * protocol.rate_factor(epoch))


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
  trainer = Trainer(functions, placed.mesh, run.protocol, scan, stopping)
  state = devices.replicate(placed.mesh, state)
  for epoch in range(first, run.protocol.epochs + 1):
    began = time.perf_counter()
    rows = Rows.of(run, placed, epoch)
    state, measured = trainer.epoch(
      state, placed.parts, rows, rate_of(run, epoch)
    )
    line = line_of(epoch, rows, measured, time.perf_counter() - began)
    yield state, line
    if not line['finite']:
      return


class Trainer:
  """Carries out epochs, of one run or of several at once."""

  def __init__(
    self,
    functions: Program,
    mesh: Mesh | None,
    protocol: Protocol,
    scan: bool | None,
    stopping: Callable[[], bool],
  ):
    """Compiles nothing yet.

    Args:
      functions: those of several runs take arrays with an axis more.
      mesh: devices to divide mini-batches over.
      protocol: of all runs.
      scan: as for ``epochs``.
      stopping: as for ``epochs``.
    """
    self._functions = functions
    self._mesh = mesh
    self._aligns = protocol.layer_metrics
    self._scan = jax.default_backend() != 'cpu' if scan is None else scan
    self._stopping = stopping

  def epoch(
    self, state: State, parts: Parts, rows: Rows, rate: Any
  ) -> tuple[State, Measured]:
    """Carries out an epoch.

    Args:
      state: before it, which is used up.
      parts: of the dataset.
      rows: that it meets.
      rate: of the epoch.

    Returns:
      The state after it, and what was measured.

    Raises:
      Stopped: if ``stopping()`` says so.
    """
    train = self._scanned if self._scan else self._looped
    state, scores = train(state, parts, rows.trained, rate)
    measured: Measured = {'train': scores}
    measured |= self._evaluated(state['params'], parts, rows)
    if self._aligns:
      index = devices.split(self._mesh, rows.trained[0])
      measured['layers'] = self._functions.align(state, parts, index)
    measured['finite'] = self._functions.finite(state['params'])
    return state, jax.device_get(measured)

  def _looped(self, state, parts: Parts, order, rate):
    """An epoch step by step; nothing waits for the device before its end."""
    scores = []
    for index in order:
      (index,) = self._split(index)
      state, step_scores = self._functions.step(state, parts, index, rate)
      scores.append(step_scores)
    return state, np.sum(jax.device_get(scores), axis=0, dtype=np.float32)

  def _scanned(self, state, parts: Parts, order, rate):
    """An epoch as one compiled loop."""
    (order,) = self._split(order)
    return self._functions.scan(state, parts, order, rate)

  def _evaluated(self, params, parts: Parts, rows: Rows) -> Measured:
    """Sums of losses and errors over test and held-out images."""
    # Whole on every device: they are few, and may be of any size.
    batches = devices.replicate(self._mesh, [*rows.calibration])
    variables = self._functions.statistics(params, parts, batches)
    measured = {}
    for name, evaluated in rows.evaluated.items():
      images = parts.test if name == 'test' else parts.train
      first, *others = [
        self._functions.evaluate(variables, parts, images, *self._split(*batch))
        for batch in zip(*evaluated, strict=True)
      ]
      measured[name] = sum(others, start=first)
    return measured

  def _split(self, *rows: np.ndarray) -> list[Any]:
    """Rows as the next call takes them, unless it is time to stop."""
    if self._stopping():
      raise Stopped
    return [devices.split(self._mesh, each) for each in rows]


def line_of(epoch: int, rows: Rows, measured: Measured, seconds: float) -> Line:
  """The line of an epoch, from what was measured of one run."""
  line: Line = {'epoch': epoch}
  line |= _named('train', measured['train'], rows.trained.size)
  for name, (_, weight) in rows.evaluated.items():
    line |= _named(name, measured[name], int(weight.sum()))
  if 'layers' in measured:
    line['layers'] = {
      layer: {name: _number(x) for name, x in row._asdict().items()}
      for layer, row in measured['layers'].items()
    }
  line['finite'] = bool(measured['finite'].all())
  line['seconds'] = round(seconds, 3)
  return line


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


def result(
  lines: list[Line], *, classes: int, train_images: int
) -> dict[str, Any]:
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
    'train_images': train_images,
  }
  if 'holdout_error' in lines[0]:
    chosen = min(lines, key=lambda line: line['holdout_error'])
    summary |= {
      'holdout_error': chosen['holdout_error'],
      'honest_epoch': chosen['epoch'],
      'honest_error': chosen['test_error'],
    }
  return summary
