"""An executor with a worker process for each part of this host."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
  FIRST_COMPLETED,
  Future,
  ProcessPoolExecutor,
  wait,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from experiments.executors import POLL
from experiments.paper.protocol import Run
from experiments.tasks import Epoch, Event, Failed, Settings, Stopped, Task
from experiments.training import backend, machine

_GRACE = 8.0  # seconds that a stop may take; pre-emption often gives ten


@dataclasses.dataclass(frozen=True)
class Place:
  """What a worker process has of the host.

  Attributes:
    cores: it may use; empty: all.
    environment: variables to set before JAX starts.
  """

  cores: tuple[int, ...] = ()
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def accelerators() -> list[str]:
  """What CUDA calls the devices that this process may use."""
  if os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
    return []
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return [name for name in visible.split(',') if name.strip()]
  found = Path('/dev').glob('nvidia[0-9]*')
  return [str(number) for number in range(len(list(found)))]


def places(workers: int | None) -> list[Place]:
  """The host in equal parts, one for each worker.

  Args:
    workers: how many; default: one for each accelerator, or else each core.

  Raises:
    ValueError: if it is not positive.
  """
  devices, platforms = accelerators(), os.environ.get('JAX_PLATFORMS', '')
  cores = machine.cores()
  if workers is None:
    workers = len(devices) or len(cores)
  if workers < 1:
    raise ValueError(f'workers must be positive, not {workers}.')
  made = []
  for i in range(workers):
    environment = {'JAX_PLATFORMS': platforms}
    if devices:
      environment['CUDA_VISIBLE_DEVICES'] = devices[i % len(devices)]
    first, end = (len(cores) * k // workers for k in (i, i + 1))
    own = cores[first:end] or [cores[first % len(cores)]]
    made.append(Place(tuple(own), environment))
  return made


class Processes:
  """A process for each place, one task at a time in each."""

  def __init__(self, settings: Settings, places: Sequence[Place]):
    """Starts nothing yet."""
    self._settings = settings
    self._places = places

  def carry_out(
    self, next_task: Callable[[], Task | None], stopping: Callable[[], bool]
  ) -> Iterator[tuple[Run, Event]]:
    """See ``Executor``."""
    idle = [_Process(self._settings, place) for place in self._places]
    busy: list[_Process] = []
    try:
      while True:
        while idle and (task := next_task()) is not None:
          busy.append(idle.pop())
          busy[-1].begin(task)
        if not busy:
          return
        wait(
          [process.coming for process in busy],
          timeout=POLL,
          return_when=FIRST_COMPLETED,
        )
        for process in list(busy):
          if stopping():
            process.stop()
          if not process.coming.done():
            continue
          run, event = process.run, process.event()
          if not isinstance(event, Epoch):
            busy.remove(process)
            idle.append(process)
          yield run, event
    finally:
      for process in idle + busy:
        process.end()


class _Process:
  """A worker process as the driver has it; begun anew when it dies.

  Attributes:
    run: that it is at.
    coming: the next event.
  """

  run: Run
  coming: Future[Event]

  def __init__(self, settings: Settings, place: Place):
    self._settings, self._place = settings, place
    self._pool: ProcessPoolExecutor | None = None

  def begin(self, task: Task) -> None:
    """Begins a task."""
    if self._pool is None:
      self._pool = ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context('spawn'),
        initializer=_begin,
        initargs=(self._place,),
      )
      self._number = self._pool.submit(os.getpid)
    self.run, self._asked = task.run, None
    self.coming = self._submit(_first, self._settings, task)

  def event(self) -> Event:
    """The event that has come; the process goes on with the next."""
    try:
      event = self.coming.result()
      if isinstance(event, Epoch):
        self.coming = self._submit(_next)
      return event
    except BrokenProcessPool:
      self.end()
      if self._asked is not None:
        return Stopped()
      return Failed('its worker process has died (killed, or out of memory)')

  def _submit(self, function: Callable[..., Event], *arguments) -> Future:
    assert self._pool is not None
    try:
      return self._pool.submit(function, *arguments)
    except BrokenProcessPool as error:  # that is seen when the event is wanted
      broken = Future()
      broken.set_exception(error)
      return broken

  def stop(self) -> None:
    """Asks the process to stop; one that does not is ended."""
    if not self._number.done() or self._number.exception() is not None:
      return
    now = time.monotonic()
    if self._asked is None:
      self._asked = now
      os.kill(self._number.result(), signal.SIGTERM)
    elif now - self._asked > _GRACE:
      os.kill(self._number.result(), signal.SIGKILL)

  def end(self) -> None:
    """Ends the process."""
    if self._pool is None:
      return
    if self._number.done() and self._number.exception() is None:
      try:
        os.kill(self._number.result(), signal.SIGKILL)  # it writes nothing
      except ProcessLookupError:
        pass
    self._pool.shutdown(wait=True, cancel_futures=True)
    self._pool = None


class _Child:
  """The state of a worker process."""

  stopping = False
  events: Iterator[Event] = iter(())


def _begin(place: Place) -> None:
  """The first thing that a worker process does."""

  def stop(*_) -> None:
    _Child.stopping = True

  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the driver that asks
  os.environ.update(place.environment)
  if place.cores and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, place.cores)
  backend.keep_memory()
  threading.Thread(target=_end_with_the_driver, daemon=True).start()


def _end_with_the_driver() -> None:
  driver = multiprocessing.parent_process()
  assert driver is not None
  driver.join()
  os._exit(1)


def _first(settings: Settings, task: Task) -> Event:
  from experiments.worker import worker

  _Child.events = worker(settings).carry_out(task, lambda: _Child.stopping)
  return _next()


def _next() -> Event:
  event = next(_Child.events)
  if isinstance(event, Stopped):  # who was asked alone can go on
    _Child.stopping = False
  return event
