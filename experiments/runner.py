"""Carries out runs one after the other, resuming what was interrupted."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import filelock
import jax
import numpy as np
from jax.sharding import Mesh

from experiments import placement, train
from experiments.datasets import Dataset, DatasetError
from experiments.grid import Run
from experiments.placement import Placed
from experiments.program import State, program
from experiments.store import RunFolder, Store

CHECKPOINT_SHARE = 0.03
_FIRST_CHECKPOINT = 0.5  # seconds; what one costs before any was written


class Listener(Protocol):
  """What wants to know how far things are."""

  def run_started(self, run: Run, first_epoch: int) -> None:
    """A run begins, or goes on."""
    ...

  def epoch_finished(self, run: Run, line: dict[str, Any]) -> None:
    """An epoch has been recorded."""
    ...

  def run_finished(self, run: Run, result: dict[str, Any]) -> None:
    """A run has its result."""
    ...

  def message(self, text: str) -> None:
    """Something the user should know."""
    ...


@dataclasses.dataclass
class Summary:
  """What became of a list of runs."""

  done: int = 0
  skipped: int = 0  # were finished already
  elsewhere: int = 0  # another process is at them


class StopRequest:
  """Turns SIGINT and SIGTERM into a question to be asked between steps.

  What a stop loses is the epoch at hand.

  Args:
    agree: gives the signal that all processes stop for, of this one's own;
      called by all of them at the same points.
  """

  def __init__(
    self, agree: Callable[[int | None], int | None] = lambda number: number
  ):
    """Nothing asked yet."""
    self._agree = agree
    self._number: int | None = None

  @property
  def asked(self) -> int | None:
    """Number of the signal; None if there was none."""
    return self._agree(self._number)

  def __enter__(self) -> 'StopRequest':
    """Listens; a second signal ends the program at once."""
    self._before = {
      number: signal.signal(number, self._ask)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *_) -> None:
    """Gives the signals back."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame) -> None:
    del frame
    if self._number is not None:
      raise KeyboardInterrupt
    self._number = number


class Stopped(Exception):
  """A signal asked to stop.

  Attributes:
    signal: its number.
  """

  def __init__(self, number: int):
    super().__init__(f'stopped by {signal.Signals(number).name}')
    self.signal = number


class _Checkpoints:
  """When a checkpoint is due: as often as a share of the time allows."""

  def __init__(self, share: float):
    self._share = share
    self._cost = _FIRST_CHECKPOINT  # seconds, of the last one
    self.begin()

  def begin(self) -> None:
    """A run begins."""
    self._began, self._spent = time.perf_counter(), 0.0

  def due(self) -> bool:
    """Whether one more stays within the share."""
    elapsed = time.perf_counter() - self._began
    within = self._spent + self._cost <= self._share * elapsed
    return within or self._share >= 1

  def save(self, folder: RunFolder, epoch: int, state: State) -> None:
    """Writes one."""
    began = time.perf_counter()
    folder.save(epoch, state)
    self._cost = time.perf_counter() - began
    self._spent += self._cost


class _Data:
  """The last dataset on the device, for the runs that share it."""

  def __init__(self, load: Callable[[Run], Dataset], mesh: Mesh | None):
    self._load = load
    self._mesh = mesh
    self._uploaded: tuple[str, placement.Uploaded] | None = None
    self._placed: tuple[tuple, Placed] | None = None

  def __call__(self, run: Run) -> Placed:
    if self._uploaded is None or self._uploaded[0] != run.digest:
      if self._uploaded is not None:  # frees memory, of programs too
        self._uploaded = self._placed = None
        program.cache_clear()
        jax.clear_caches()
      data = self._load(run)
      if data.digest != run.digest:
        raise DatasetError(
          f'{run.dataset}: {data.source} has changed since this command '
          'started; repeat the command.'
        )
      self._uploaded = (run.digest, placement.upload(data, self._mesh))
    key = (run.digest, run.seed, run.protocol.holdout)
    if self._placed is None or self._placed[0] != key:
      self._placed = (key, placement.place(self._uploaded[1], run))
    return self._placed[1]


def carry_out(
  runs: Iterable[Run],
  store: Store,
  load: Callable[[Run], Dataset],
  listener: Listener,
  *,
  scan: bool | None = None,
  checkpoint_share: float = CHECKPOINT_SHARE,
  mesh: Mesh | None = None,
  agree: Callable[[int | None], int | None] = lambda number: number,
) -> Summary:
  """Does every run that has no result yet.

  Args:
    runs: what to do, in order.
    store: where results go.
    load: gives the dataset of a run.
    listener: is told of every step.
    scan: as for ``train.epochs``.
    checkpoint_share: of a run's time that checkpoints may take; 1 writes one
      after every epoch.
    mesh: devices to divide mini-batches over; None is the default device.
    agree: as for ``StopRequest``.

  Raises:
    Stopped: after SIGINT or SIGTERM; all finished epochs are recorded.
    StoreError: if the store can't be read or written.
    DatasetError: if a dataset can't be loaded.
  """
  summary = Summary()
  data, checkpoints = _Data(load, mesh), _Checkpoints(checkpoint_share)
  with StopRequest(agree) as stop:
    for run in runs:
      if (number := stop.asked) is not None:
        raise Stopped(number)
      try:
        with store.lock(run):
          if store.finished(run):
            summary.skipped += 1
            continue
          _one(run, store, data(run), listener, stop, scan, checkpoints)
          summary.done += 1
      except filelock.Timeout:
        summary.elsewhere += 1
  return summary


def _one(
  run: Run,
  store: Store,
  placed: Placed,
  listener: Listener,
  stop: StopRequest,
  scan: bool | None,
  checkpoints: _Checkpoints,
) -> None:
  """Carries out a run, from where it was interrupted."""
  folder = store.open(run)
  epoch, state, problems = folder.restore(train.start(run, placed))
  for problem in problems:
    listener.message(problem)
  listener.run_started(run, epoch + 1)
  checkpoints.begin()
  lines = folder.metrics()
  unsaved: tuple[int, Any] | None = None
  epochs = train.epochs(
    run, placed, state, epoch + 1, scan, lambda: stop.asked is not None
  )
  try:
    for state, line in epochs:
      folder.append(line)
      lines.append(line)
      listener.epoch_finished(run, line)
      if line['epoch'] == run.protocol.epochs or not line['finite']:
        break
      unsaved = None
      if checkpoints.due():
        checkpoints.save(folder, line['epoch'], state)
      else:  # a copy, for the next epoch uses the state up
        unsaved = line['epoch'], jax.tree.map(np.array, state)
  except train.Stopped:
    if unsaved is not None:
      checkpoints.save(folder, *unsaved)
    number = stop.asked
    assert number is not None
    raise Stopped(number) from None
  result = train.result(run, placed.classes, lines)
  folder.finish(result)
  listener.run_finished(run, result)
