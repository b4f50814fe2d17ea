"""Trains a run epoch by epoch.

On a CPU an epoch is a loop over a jitted step, because XLA's convolutions are
several times slower inside a compiled loop there. Elsewhere it is one
``lax.scan``. The numbers are the same.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.paper.protocol import Protocol, Run
from experiments.training import devices
from experiments.training.data import (
  Arrays,
  DeviceData,
  calibration_batches,
  mini_batches,
)
from experiments.training.step import Program, Setup, State, program

Line = dict[str, Any]  # of metrics, of an epoch
Measured = dict[str, Any]  # of an epoch, as arrays
EVALUATION_BATCH = 250


class Stopped(Exception):
  """Stop requested; the current epoch is discarded."""


def start(run: Run, data: DeviceData) -> State:
  """The state before the first epoch."""
  key = jax.random.key(run.seed)
  return program(Setup.of(run, data)).initialize(key)


class Rows(NamedTuple):
  """The rows of the images in an epoch, one entry per mini-batch.

  Attributes:
    trained: to train on, shuffled.
    calibration: for the statistics for testing.
    evaluated: rows and their weights, of 'test' and, if any are, 'holdout'.
  """

  trained: np.ndarray
  calibration: np.ndarray
  evaluated: dict[str, tuple[np.ndarray, np.ndarray]]

  @classmethod
  def of(cls, run: Run, data: DeviceData, epoch: int) -> 'Rows':
    """The rows of a run's epoch, counted from 1."""
    test = np.arange(len(data.arrays.test.y), dtype=np.int32)
    return cls(
      trained=mini_batches(run, epoch, data.trained),
      calibration=calibration_batches(run, epoch, data.trained),
      evaluated={
        name: batches(rows, devices.count(data.mesh))
        for name, rows in (('test', test), ('holdout', data.held_out))
        if len(rows)
      },
    )


def batches(
  rows: np.ndarray, divisor: int, size: int = EVALUATION_BATCH
) -> tuple[np.ndarray, np.ndarray]:
  """Rows in batches of one size, and weights: 0 for padding of the last."""
  size = min(size, len(rows))
  size += -size % divisor
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
  data: DeviceData,
  state: State,
  first: int = 1,
  scan: bool | None = None,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[State, Line]]:
  """Trains epoch by epoch; ends early once a parameter is not finite.

  Args:
    run: what to do.
    data: its dataset.
    state: before epoch ``first``, on any device; its buffers are consumed.
    first: number of the epoch to begin with, from 1.
    scan: whether an epoch is one compiled loop; default: not on a CPU.
    stopping: whether to stop; called before every step (every epoch with
      ``scan``) and every batch of an evaluation.

  Yields:
    The state after each epoch, which the next epoch consumes, and its line of
    metrics: errors in percent, losses in nats (None if not finite), seconds.

  Raises:
    Stopped: if ``stopping()`` is true.
  """
  functions = program(Setup.of(run, data))
  trainer = Trainer(functions, data.mesh, run.protocol, scan, stopping)
  state = devices.replicate(data.mesh, state)
  for epoch in range(first, run.protocol.epochs + 1):
    began = time.perf_counter()
    rows = Rows.of(run, data, epoch)
    state, measured = trainer.epoch(
      state, data.arrays, rows, rate_of(run, epoch)
    )
    line = line_of(epoch, rows, measured, time.perf_counter() - began)
    yield state, line
    if not line['finite']:
      return


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Trains epochs, of one run or of several at once.

  Attributes:
    functions: those of several runs take arrays with a leading axis of runs.
    mesh: devices to divide mini-batches over.
    protocol: of all runs.
    scan: as for ``epochs``.
    stopping: as for ``epochs``.
  """

  functions: Program
  mesh: Mesh | None
  protocol: Protocol
  scan: bool | None
  stopping: Callable[[], bool]

  def epoch(
    self, state: State, arrays: Arrays, rows: Rows, rate: Any
  ) -> tuple[State, Measured]:
    """Trains an epoch and evaluates the result.

    Args:
      state: before it; its buffers are consumed.
      arrays: of the dataset.
      rows: of the epoch.
      rate: of the epoch.

    Returns:
      The state after it, and the measurements.

    Raises:
      Stopped: if ``stopping()`` is true.
    """
    scan = jax.default_backend() != 'cpu' if self.scan is None else self.scan
    train = self._scanned if scan else self._looped
    state, scores = train(state, arrays, rows.trained, rate)
    measured: Measured = {'train': scores}
    measured |= self._evaluated(state['params'], arrays, rows)
    if self.protocol.layer_metrics:
      index = devices.split(self.mesh, rows.trained[0])
      measured['layers'] = self.functions.align(state, arrays, index)
    measured['finite'] = self.functions.finite(state['params'])
    return state, jax.device_get(measured)

  def _looped(self, state, arrays: Arrays, order, rate):
    """An epoch step by step; only its end waits for the device."""
    scores = []
    for index in order:
      (index,) = self._split(index)
      state, step_scores = self.functions.step(state, arrays, index, rate)
      scores.append(step_scores)
    return state, np.sum(jax.device_get(scores), axis=0, dtype=np.float32)

  def _scanned(self, state, arrays: Arrays, order, rate):
    """An epoch as one compiled loop."""
    (order,) = self._split(order)
    return self.functions.scan(state, arrays, order, rate)

  def _evaluated(self, params, arrays: Arrays, rows: Rows) -> Measured:
    """Sums of losses and errors over test and held-out images."""
    # Replicated: they are few, and may be of any size.
    batches = devices.replicate(self.mesh, [*rows.calibration])
    variables = self.functions.statistics(params, arrays, batches)
    measured = {}
    for name, evaluated in rows.evaluated.items():
      images = arrays.test if name == 'test' else arrays.train
      measured[name] = sum(
        self.functions.evaluate(variables, arrays, images, *self._split(*batch))
        for batch in zip(*evaluated, strict=True)
      )
    return measured

  def _split(self, *rows: np.ndarray) -> list[Any]:
    """Divides rows over the devices, unless a stop was requested."""
    if self.stopping():
      raise Stopped
    return [devices.split(self.mesh, each) for each in rows]


def line_of(epoch: int, rows: Rows, measured: Measured, seconds: float) -> Line:
  """The line of metrics of an epoch, from the measurements of one run."""
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
