"""Worker processes: one for each part of this host, one run at a time each."""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any, cast

from experiments.datasets import DatasetError
from experiments.paper.protocol import Run
from experiments.runs.files import StoreError
from experiments.runs.launch import HANGUP, Launcher
from experiments.runs.train import (
  Forwarder,
  Listener,
  Options,
  Outcome,
  train_runs,
)
from experiments.training import machine

_POLL = 0.2  # seconds between checks for a stop request
_GRACE = 8.0  # seconds a stop may take; pre-emption often allows ten


@dataclasses.dataclass(frozen=True)
class Place:
  """A worker process's part of the host.

  Attributes:
    cores: it may use.
    environment: variables to set before JAX starts.
  """

  cores: tuple[int, ...]
  environment: Mapping[str, str]


def places(workers: int | None) -> list[Place]:
  """The host in equal parts, one for each worker.

  Args:
    workers: how many; None is one for each accelerator, or else each core.

  Raises:
    ValueError: if it is not positive.
  """
  devices, cores = machine.accelerators(), machine.cores()
  if workers is None:
    workers = len(devices) or len(cores)
  if workers < 1:
    raise ValueError(f'workers must be positive, not {workers}.')
  shared = {'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', '')}
  if workers > len(devices) > 0:  # the first process would take most memory
    name = 'XLA_PYTHON_CLIENT_PREALLOCATE'
    shared[name] = os.environ.get(name, 'false')
  made = []
  for i in range(workers):
    environment = dict(shared)
    if devices:
      environment['CUDA_VISIBLE_DEVICES'] = devices[i % len(devices)]
    first, end = (len(cores) * k // workers for k in (i, i + 1))
    own = cores[first:end] or [cores[first % len(cores)]]
    made.append(Place(tuple(own), environment))
  return made


def in_processes(options: Options, places: Sequence[Place]) -> Launcher:
  """Trains runs in worker processes, one for each place.

  A worker that dies is replaced; its run has failed and can be tried again.
  """

  def launched(runs, listener, stop) -> Iterator[tuple[Run, Outcome]]:
    waiting = collections.deque(runs)
    idle = [_Worker(place, options) for place in places]
    busy: list[_Worker] = []
    try:
      while True:
        while idle and waiting and not stop():
          busy.append(idle.pop())
          busy[-1].begin(waiting.popleft())
        if not busy:
          return
        connection.wait([worker.pipe for worker in busy], _POLL)
        for worker in list(busy):
          if stop():
            worker.stop()
          outcome = worker.receive(listener)
          if outcome is not None:
            busy.remove(worker)
            idle.append(worker)
            yield worker.run, outcome
    finally:
      for worker in idle + busy:
        worker.end()

  return launched


class _Worker:
  """A worker process as the driver sees it.

  Attributes:
    run: that it trains.
    pipe: to it.
  """

  run: Run
  pipe: Any

  def __init__(self, place: Place, options: Options):
    self._place, self._options = place, options
    self._process: Any = None

  def begin(self, run: Run) -> None:
    """Starts the process if need be, and hands it a run."""
    self.run, self._asked = run, None
    if self._process is None:
      context = multiprocessing.get_context('spawn')
      self.pipe, theirs = context.Pipe()
      self._process = context.Process(
        target=_work, args=(theirs, self._place, self._options), daemon=True
      )
      self._process.start()
      theirs.close()  # so that its death ends the pipe
    with contextlib.suppress(OSError):  # if it has died, ``receive`` says so
      self.pipe.send(run)

  def receive(self, listener: Listener) -> Outcome | None:
    """Passes its messages on; the outcome once the run has ended.

    Raises:
      StoreError, DatasetError: as raised in the process.
    """
    try:
      while self.pipe.poll():
        name, arguments = self.pipe.recv()
        if name == 'outcome':
          return arguments
        if name == 'error':
          raise arguments
        getattr(listener, name)(*arguments)
    except (EOFError, ConnectionError):
      stopped = self._asked is not None
      self.end()
      if stopped:
        return Outcome('stopped')
      return Outcome(
        'failed', 'its worker process has died (killed, or out of memory)'
      )
    return None

  def stop(self) -> None:
    """Asks the process to stop, and kills one that does not."""
    now = time.monotonic()
    if self._asked is None:
      self._asked = now
      self._process.terminate()
    elif now - self._asked > _GRACE:
      self._process.kill()

  def end(self) -> None:
    """Ends the process."""
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self.pipe.close()
      self._process = None


def _work(pipe: Any, place: Place, options: Options) -> None:
  """A worker process: trains the runs that come through the pipe."""
  asked = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: asked.set())
  for number in filter(None, (signal.SIGINT, HANGUP)):
    signal.signal(number, signal.SIG_IGN)  # from the terminal: driver decides
  os.environ.update(place.environment)
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, place.cores)
  machine.configure()
  threading.Thread(target=_end_with_the_driver, daemon=True).start()
  listener = cast(Listener, Forwarder(pipe.send))
  while True:
    run = pipe.recv()
    try:
      ((_, outcome),) = train_runs([run], options, listener, asked.is_set)
      pipe.send(('outcome', outcome))
    except (StoreError, DatasetError) as error:
      pipe.send(('error', error))


def _end_with_the_driver() -> None:
  driver = multiprocessing.parent_process()
  assert driver is not None
  driver.join()
  os._exit(1)
