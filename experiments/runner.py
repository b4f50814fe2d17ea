"""Carries out runs one after the other, resuming what was interrupted."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import filelock

from experiments import train
from experiments.datasets import Dataset
from experiments.grid import Run
from experiments.store import Store

# A checkpoint is due when all of them so far cost less than this share.
_CHECKPOINT_SHARE = 0.03


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

  What a stop loses is the epoch at hand and those since the last checkpoint: by
  the rule for when one is due, an epoch or a second or two.
  """

  def __init__(self):
    """Nothing asked yet."""
    self.asked = False

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
    if self.asked:
      raise KeyboardInterrupt(number)
    self.asked = True


class _Placed:
  """The last dataset that was put on the device, for the runs that share it."""

  def __init__(self, load: Callable[[Run], Dataset]):
    self._load = load
    self._key = None
    self._value: Any = None

  def __call__(self, run: Run) -> tuple[Dataset, train.Parts]:
    protocol = run.protocol
    key = (run.digest, run.seed, protocol.train_size, protocol.holdout)
    if key != self._key:
      self._value = None  # frees the memory first
      data = self._load(run)
      self._value = (data, train.place(data, run))
      self._key = key
    return self._value


def carry_out(
  runs: Iterable[Run],
  store: Store,
  load: Callable[[Run], Dataset],
  listener: Listener,
  *,
  scan: bool | None = None,
) -> Summary:
  """Does every run that has no result yet.

  Args:
    runs: what to do, in order.
    store: where results go.
    load: gives the dataset of a run.
    listener: is told of every step.
    scan: as for ``train.epochs``.

  Raises:
    train.Stopped: after SIGINT or SIGTERM; nothing recorded is lost.
  """
  summary = Summary()
  placed = _Placed(load)
  with StopRequest() as stop:
    for run in runs:
      if stop.asked:
        raise train.Stopped
      if store.finished(run):
        summary.skipped += 1
        continue
      try:
        with store.lock(run):
          if store.finished(run):
            summary.skipped += 1
            continue
          _one(run, store, placed, listener, stop, scan)
          summary.done += 1
      except filelock.Timeout:
        summary.elsewhere += 1
  return summary


def _one(run, store, placed, listener, stop, scan) -> None:
  folder = store.open(run)
  data, parts = placed(run)
  state = train.start(run, data, parts)
  epoch, state, problems = folder.restore(state)
  for problem in problems:
    listener.message(problem + '; going back to what is whole.')
  listener.run_started(run, epoch + 1)
  lines = folder.metrics()
  began, spent = time.perf_counter(), 0.0
  ended = bool(lines) and not lines[-1]['finite']
  epochs = train.epochs(
    run, data, parts, state, epoch + 1, scan, lambda: stop.asked
  )
  for state, line in () if ended else epochs:
    folder.append(line)
    lines.append(line)
    listener.epoch_finished(run, line)
    now = time.perf_counter()
    last = line['epoch'] == run.protocol.epochs or not line['finite']
    if not last and spent <= _CHECKPOINT_SHARE * (now - began):
      folder.save(line['epoch'], state)
      spent += time.perf_counter() - now
  result = train.result(run, len(data.classes), lines)
  folder.finish(result)
  listener.run_finished(run, result)
