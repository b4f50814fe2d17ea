"""Carries out runs and keeps what they give: the one writer of the store."""

import collections
import dataclasses
import signal
import time
from collections.abc import Iterable
from typing import Any, Protocol

from experiments.executors import Executor
from experiments.leases import Lease, Leases
from experiments.paper.protocol import Run
from experiments.runs.store import RunFolder, Store
from experiments.tasks import (
  Epoch,
  Event,
  Failed,
  Finished,
  Stopped,
  Task,
  Unfit,
)

RETRIES = 2
LEASE = 120.0  # seconds
_ASK_AGAIN = 5.0  # seconds after which to see whether others have given up


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

  def run_failed(self, run: Run, error: str, again: bool) -> None:
    """A run has come to an end without result; it may be tried again."""
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
  failed: int = 0  # for good


class StopRequest:
  """Turns SIGINT and SIGTERM into a question to be asked between steps.

  What a stop loses is the epoch at hand.

  Attributes:
    asked: number of the signal; None if there was none.
  """

  def __init__(self):
    """Nothing asked yet."""
    self.asked: int | None = None

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
    if self.asked is not None:
      raise KeyboardInterrupt
    self.asked = number


class Interrupted(Exception):
  """A signal asked to stop.

  Attributes:
    signal: its number.
  """

  def __init__(self, number: int):
    super().__init__(f'stopped by {signal.Signals(number).name}')
    self.signal = number


def carry_out(
  runs: Iterable[Run],
  store: Store,
  executor: Executor,
  listener: Listener,
  *,
  retries: int = RETRIES,
  lease: float = LEASE,
) -> Summary:
  """Does every run that has no result yet.

  Args:
    runs: what to do, in order.
    store: where results go.
    executor: trains.
    listener: is told of every step.
    retries: how often a run that fails is tried again; then its error is
      recorded and the others go on.
    lease: seconds without a sign of life after which another process may take
      over what this one is at, and this one what another is at.

  Raises:
    Interrupted: after SIGINT or SIGTERM; all finished epochs are recorded.
    StoreError: if the store can't be read or written.
    DatasetError: if a dataset can't be loaded.
  """
  with StopRequest() as stop, store.leases(lease) as leases:
    driver = _Driver(runs, store, leases, listener, stop, retries)
    for run, event in executor.carry_out(
      driver.next_task, lambda: stop.asked is not None
    ):
      driver.take(run, event)
    if driver.unfinished and stop.asked is not None:
      raise Interrupted(stop.asked)
    store.tidy()
    return driver.counted()


@dataclasses.dataclass
class _AtWork:
  """A run that is being carried out."""

  folder: RunFolder
  lease: Lease


class _Driver:
  """Hands out tasks and records events."""

  def __init__(
    self,
    runs: Iterable[Run],
    store: Store,
    leases: Leases,
    listener: Listener,
    stop: StopRequest,
    retries: int,
  ):
    self.summary = Summary()
    self._store, self._leases = store, leases
    self._listener, self._stop = listener, stop
    self._retries = retries
    self._waiting = collections.deque(runs)
    self._elsewhere: list[Run] = []
    self._asked = time.monotonic()
    self._failures = collections.Counter[str]()
    self._at_work: dict[str, _AtWork] = {}

  @property
  def unfinished(self) -> bool:
    """Whether there are runs that were not begun, or stopped."""
    return bool(self._waiting)

  def counted(self) -> Summary:
    """What became of the runs, now that no task is left."""
    self.summary.elsewhere += len(self._elsewhere)
    return self.summary

  def next_task(self) -> Task | None:
    """The next run that is this process's to do."""
    if not self._waiting:
      self._ask_again()
    while self._waiting and self._stop.asked is None:
      run = self._waiting.popleft()
      lease = self._leases.acquire(run.run_id)
      if lease is None:
        self._elsewhere.append(run)
        continue
      if self._store.finished(run):
        self._leases.remove(lease)
        self.summary.skipped += 1
        continue
      folder = self._store.open(run)
      epoch, state, problems = folder.restore()
      for problem in problems:
        self._listener.message(problem)
      self._listener.run_started(run, epoch + 1)
      self._at_work[run.run_id] = _AtWork(folder, lease)
      return Task(run, tuple(folder.metrics()), state)
    return None

  def _ask_again(self) -> None:
    """What others were at waits for this process, should they have died."""
    now = time.monotonic()
    if now - self._asked >= _ASK_AGAIN or not self._at_work:
      self._asked = now
      self._waiting.extend(self._elsewhere)
      self._elsewhere.clear()

  def take(self, run: Run, event: Event) -> None:
    """Records an event of a task that was handed out."""
    at_work = self._at_work.get(run.run_id)
    if at_work is None:  # lost, see below
      return
    if not at_work.lease.held():
      self._end(run)
      self.summary.elsewhere += 1
      self._listener.message(
        f'run {run.run_id} was taken over by another process, as this one '
        'gave no sign of life for too long'
      )
      return
    self._record(run, event, at_work.folder)

  def _record(self, run: Run, event: Event, folder: RunFolder) -> None:
    match event:
      case Epoch(line, state):
        folder.append(line)
        self._listener.epoch_finished(run, line)
        if state is not None:
          folder.save(line['epoch'], state)
      case Finished(result, environment):
        folder.finish(result, environment)
        self._leases.remove(self._at_work.pop(run.run_id).lease)
        self.summary.done += 1
        self._listener.run_finished(run, result)
      case Stopped(epoch, state):
        if state is not None:
          folder.save(epoch, state)
        self._again(run)
      case Unfit(why):
        self._listener.message(f'checkpoint of {folder.path} not used: {why}')
        folder.drop_last()
        self._again(run)
      case Failed(error, of_group):
        self._failures[run.run_id] += not of_group
        again = self._failures[run.run_id] <= self._retries
        self._listener.run_failed(run, error, again)
        if again:
          self._again(run)
        else:
          folder.fail(error)
          self.summary.failed += 1
          self._end(run)

  def _again(self, run: Run) -> None:
    self._end(run)
    self._waiting.appendleft(run)

  def _end(self, run: Run) -> None:
    self._leases.give_up(self._at_work.pop(run.run_id).lease)
