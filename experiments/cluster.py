"""Ray: each run is a task somewhere in a cluster, its events a stream."""

import contextlib
import functools
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.executors import POLL
from experiments.paper.protocol import Run
from experiments.tasks import Epoch, Event, Failed, Settings, Stopped, Task
from experiments.training import backend, machine

# Ray's own switch to a cluster of this host alone: it listens on loopback.
_ONE_HOST = {'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0'}
_AHEAD = 2  # events that a task may be ahead of what the driver has written
_SOURCES = Path(__file__).parents[1]
# Set by ``backend.configure`` or the user; speed and bits depend on them.
_VARIABLES = ('XLA_FLAGS', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')


class Ray:
  """As many tasks at once as the cluster has room for."""

  def __init__(
    self,
    settings: Settings,
    address: str | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
  ):
    """Starts nothing yet.

    Args:
      settings: how runs are carried out.
      address: of a cluster; None starts one on this host, on loopback.
      cpus: that a run asks for.
      gpus: that a run asks for.
    """
    self._settings = settings
    self._address = address
    self._cpus, self._gpus = cpus, gpus
    self._platforms = os.environ.get('JAX_PLATFORMS', '')

  def carry_out(
    self, next_task: Callable[[], Task | None], stopping: Callable[[], bool]
  ) -> Iterator[tuple[Run, Event]]:
    """See ``executors.Executor``."""
    ray = _start(self._address, self._platforms)
    try:
      flag = ray.remote(num_cpus=0)(_Flag).remote()
      remote = ray.remote(
        num_cpus=self._cpus,
        num_gpus=self._gpus,
        max_retries=0,  # the driver's, who knows the last state
        _generator_backpressure_num_objects=_AHEAD,
      )(_stream)
      streams: dict[Any, Run] = {}
      asked = False
      while True:
        while len(streams) < self._room(ray):
          if (task := next_task()) is None:
            break
          streams[remote.remote(self._settings, task, flag)] = task.run
        if not streams:
          return
        if stopping() and not asked:
          asked = True
          flag.lift.remote()
        ready, _ = ray.wait(list(streams), timeout=POLL)
        for stream in ready:
          run, event = streams[stream], _event(ray, stream, asked)
          if not isinstance(event, Epoch):
            del streams[stream]
          yield run, event
    finally:
      ray.shutdown()

  def _room(self, ray: Any) -> int:
    """How many runs fit at once.

    Raises:
      ValueError: if none fits on this host, which Ray would wait for.
    """
    has = ray.cluster_resources()
    fits = []
    for name, wanted in (('cpus', self._cpus), ('gpus', self._gpus)):
      there = has.get(name[:3].upper(), 0.0)
      if self._address is None and wanted > there:
        raise ValueError(
          f'{name}_per_run is {wanted:g}, but this host has {there:g}.'
        )
      if wanted:
        fits.append(int(there // wanted))
    return max(min(fits, default=1), 1)  # a cluster may have yet to grow


def _start(address: str | None, platforms: str) -> Any:
  """Ray, connected to a cluster; ``platforms`` is what JAX may use here."""
  options: dict[str, Any] = {'log_to_driver': False, 'logging_level': 'ERROR'}
  if address is None:
    os.environ.update(_ONE_HOST)  # read when Ray is imported
    options |= {'address': 'local', 'include_dashboard': False}
    # Ray would give way to whatever else the host does.
    options |= {'_system_config': {'worker_niceness': 0}}
  else:
    options |= {'address': address}
  try:
    import ray
  except ImportError as error:
    raise ValueError(
      "--executor ray needs Ray: install it with pip install -e '.[ray]'."
    ) from error
  asked_to_stop = signal.getsignal(signal.SIGTERM)
  try:
    ray.init(runtime_env=_runtime(address, platforms), **options)
  except (ConnectionError, OSError, RuntimeError) as error:
    raise ValueError(
      f'there is no Ray cluster at {address}: {error}. Give another address '
      'with --ray-address, or none to start one on this host.'
    ) from error
  signal.signal(signal.SIGTERM, asked_to_stop)  # Ray's would just exit
  return ray


def _runtime(address: str | None, platforms: str) -> dict[str, Any]:
  """What tasks find where they run: our sources, and the driver's settings."""
  variables = {
    name: os.environ[name] for name in _VARIABLES if name in os.environ
  }
  if address is None:
    variables |= {'PYTHONPATH': str(_SOURCES), 'JAX_PLATFORMS': platforms}
    return {'env_vars': variables}
  names = ('experiments', 'symjax_bp')
  return {
    'py_modules': [str(_SOURCES / name) for name in names],
    'excludes': ['results/', 'choices/', 'plots/'],
    'env_vars': variables,
  }


def _event(ray: Any, stream: Any, asked: bool) -> Event:
  """The next event of a stream."""
  try:
    return ray.get(next(stream))
  except ray.exceptions.RayTaskError as error:
    raise error.cause from None
  except ray.exceptions.RayError as error:
    if asked:
      return Stopped()
    return Failed(f'its worker has died ({str(error).splitlines()[0]})')


class _Flag:
  """Told to all tasks of a cluster; an actor."""

  def __init__(self):
    self._lifted = False

  def lift(self) -> None:
    """Sets the flag."""
    self._lifted = True

  def lifted(self) -> bool:
    """Whether it was set."""
    return self._lifted


@functools.cache
def _cores() -> tuple[int, ...]:
  """The cores that this process had before it kept to some of them."""
  return tuple(machine.cores())


@contextlib.contextmanager
def _own_cores(cpus: float) -> Iterator[None]:
  """Keeps this process to its part of the host, which no other task has.

  The host is divided in parts of as many cores as a task asks for; a process is
  at one of them as long as it has bound a name that belongs to the part. The
  system takes the name back from whoever dies. If all are taken, as a cluster
  may have been told of more cores than there are, one is shared.

  Args:
    cpus: that Ray has assigned; 0 leaves all cores.
  """
  cores = _cores()
  if not (cpus and cores and hasattr(os, 'sched_setaffinity')):
    yield
    return
  parts = max(int(len(cores) / cpus), 1)
  with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as name:
    chosen = os.getpid() % parts
    for part in range(parts):
      try:
        name.bind(f'\0symjax_bp {cores[0]} {cpus:g} {part}')
      except OSError:
        continue
      chosen = part
      break
    first = math.floor(chosen * cpus)
    own = cores[first : first + max(math.floor(cpus), 1)]
    # JAX's threads too, which a task before this one may have started.
    for thread in os.listdir('/proc/self/task'):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(int(thread), own)
    yield


def _stream(settings: Settings, task: Task, flag: Any) -> Iterator[Event]:
  """What runs in the cluster."""
  import ray

  assigned = ray.get_runtime_context().get_assigned_resources()
  with _own_cores(assigned.get('CPU', 0.0)):
    backend.configure()  # memory, and a compilation cache on that host
    yield from _trained(ray, settings, task, flag)


def _trained(
  ray: Any, settings: Settings, task: Task, flag: Any
) -> Iterator[Event]:
  """Trains in this process, which has not imported JAX before."""
  from experiments.worker import worker

  stop, done = threading.Event(), threading.Event()

  def watch() -> None:
    while not done.wait(POLL) and not stop.is_set():
      if ray.get(flag.lifted.remote()):
        stop.set()

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield from worker(settings).carry_out(task, stop.is_set)
  finally:
    done.set()
