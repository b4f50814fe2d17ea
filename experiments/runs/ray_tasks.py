"""Ray: each run is a task somewhere in a cluster that shares the results."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import filelock

from experiments.paper.protocol import Run
from experiments.runs.files import StoreError
from experiments.runs.launch import Launcher
from experiments.runs.store import RunFolder
from experiments.runs.train import (
  Forwarder,
  Listener,
  Options,
  Outcome,
  train_runs,
)
from experiments.training import machine

_Call = tuple[str, tuple]  # of a listener: method and arguments
_POLL = 0.5  # seconds between checks for a stop request
# Ray's own switch to a cluster of this host alone: it listens on loopback.
_ONE_HOST = {'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0'}
_SOURCES = Path(__file__).parents[2]
# Set by ``machine.configure`` or the user; speed and bits depend on them.
_VARIABLES = ('XLA_FLAGS', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS')
_NOT_SHARED = (
  'a Ray node cannot see the results folder {0}. Choose a folder that all '
  'nodes share with --results, or use --shard on each host.'
)


def on_ray(
  options: Options, address: str | None, cpus: float = 1.0, gpus: float = 0.0
) -> Launcher:
  """Trains each run as a Ray task; as many at once as the cluster has room for.

  During a launch, a hidden file is in the results folder, a lock. Tasks stop
  when it is removed, and do not start where they cannot see it.

  Args:
    options: how to train.
    address: of a cluster; None starts one on this host, on loopback.
    cpus: that a run asks for.
    gpus: that a run asks for.
  """
  options = dataclasses.replace(
    options,
    results=options.results.absolute(),
    load=options.load.absolute(),
  )
  platforms = os.environ.get('JAX_PLATFORMS', '')

  def launched(runs, listener, stop) -> Iterator[tuple[Run, Outcome]]:
    ray = _start(address, platforms)
    waiting, tasks, seen = list(runs), {}, {}
    lock = _begin(options.results)
    token = Path(lock.lock_file)
    try:
      remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_task)
      room = _room(ray, address, cpus, gpus)
      while True:
        while waiting and len(tasks) < room and not stop():
          run = waiting.pop(0)
          tasks[remote.remote(run, options, token)] = run
        if not tasks:
          return
        if stop():
          token.unlink(missing_ok=True)
        ready, _ = ray.wait(list(tasks), timeout=_POLL)
        for run in tasks.values():
          _show(run, options, listener, seen)
        for task in ready:
          run = tasks.pop(task)
          seen.pop(run.run_id, None)  # a retry starts anew
          outcome, calls = _outcome(ray, task, stop())
          for name, arguments in calls:
            getattr(listener, name)(*arguments)
          yield run, outcome
    finally:
      token.unlink(missing_ok=True)
      lock.release()
      ray.shutdown()

  return launched


def _begin(results: Path) -> filelock.BaseFileLock:
  """A lock as long as this launch lasts; removes those of dead drivers."""
  for path in results.glob('.launch-*'):
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(path, 0):
      path.unlink(missing_ok=True)
  lock = filelock.FileLock(results / f'.launch-{uuid.uuid4().hex}')
  lock.acquire()
  return lock


def _show(run: Run, options: Options, listener: Any, seen: dict) -> None:
  """Tells the listener of the epochs that a task has recorded."""
  lines = RunFolder(options.results, run.run_id).metrics()
  if run.run_id not in seen:
    seen[run.run_id] = len(lines)
    listener.run_started(run, len(lines) + 1)
  for line in lines[seen[run.run_id] :]:
    listener.epoch_finished(run, line)
  seen[run.run_id] = max(seen[run.run_id], len(lines))


def _room(ray: Any, address: str | None, cpus: float, gpus: float) -> int:
  """How many runs fit at once.

  Raises:
    ValueError: if none fits on this host, where Ray would wait for ever.
  """
  has = ray.cluster_resources()
  fits = []
  for name, wanted in (('cpus', cpus), ('gpus', gpus)):
    there = has.get(name[:3].upper(), 0.0)
    if address is None and wanted > there:
      raise ValueError(
        f'{name}_per_run is {wanted:g}, but this host has {there:g}.'
      )
    if wanted:
      fits.append(int(there // wanted))
  return max(min(fits, default=1), 1)  # a cluster may still grow


def _start(address: str | None, platforms: str) -> Any:
  """Ray, connected to a cluster; ``platforms`` is what JAX may use here."""
  options: dict[str, Any] = {'log_to_driver': False, 'logging_level': 'ERROR'}
  if address is None:
    os.environ.update(_ONE_HOST)  # read when Ray is imported
    options |= {'address': 'local', 'include_dashboard': False}
    # By default, Ray's workers yield to everything else on the host.
    options |= {'_system_config': {'worker_niceness': 0}}
  else:
    options |= {'address': address}
  try:
    import ray
  except ImportError as error:
    raise ValueError(
      "--executor ray needs Ray: install it with pip install -e '.[ray]'."
    ) from error
  before = signal.getsignal(signal.SIGTERM)
  try:
    ray.init(runtime_env=_runtime(address, platforms), **options)
  except (ConnectionError, OSError, RuntimeError) as error:
    raise ValueError(
      f'there is no Ray cluster at {address}: {error}. Give another address '
      'with --ray-address, or none to start one on this host.'
    ) from error
  signal.signal(signal.SIGTERM, before)  # Ray's handler would just exit
  return ray


def _runtime(address: str | None, platforms: str) -> dict[str, Any]:
  """The sources and the settings of the tasks."""
  variables = {
    name: os.environ[name] for name in _VARIABLES if name in os.environ
  }
  if address is None:
    variables |= {'PYTHONPATH': str(_SOURCES), 'JAX_PLATFORMS': platforms}
    return {'env_vars': variables}
  names = ('experiments', 'symjax_bp')
  return {
    'py_modules': [str(_SOURCES / name) for name in names],
    'excludes': ['results/'],
    'env_vars': variables,
  }


def _outcome(
  ray: Any, task: Any, stopping: bool
) -> tuple[Outcome, Sequence[_Call]]:
  """The outcome of a task, and what it tells the listener at its end."""
  try:
    outcome, calls = ray.get(task)
  except ray.exceptions.RayTaskError as error:
    raise error.cause from None
  except ray.exceptions.RayError as error:
    if stopping:
      return Outcome('stopped'), ()
    reason = str(error).splitlines()[0]
    return Outcome('failed', f'its worker has died ({reason})'), ()
  if outcome.status != 'unseen':
    return outcome, calls
  if stopping:  # which has removed the lock
    return Outcome('stopped'), ()
  raise StoreError(outcome.error)


def _task(
  run: Run, options: Options, token: Path
) -> tuple[Outcome, Sequence[_Call]]:
  """Trains a run in a Ray worker, which has not imported JAX before."""
  import ray

  if not token.exists():
    return Outcome('unseen', _NOT_SHARED.format(options.results)), ()
  assigned = ray.get_runtime_context().get_assigned_resources()
  stop, done = threading.Event(), threading.Event()

  def watch() -> None:
    while not done.wait(_POLL) and not stop.is_set():
      if not token.exists():
        stop.set()

  threading.Thread(target=watch, daemon=True).start()
  with _own_cores(assigned.get('CPU', 0.0)):
    machine.configure()  # memory, and a compilation cache on that host
    calls: list[_Call] = []

    def keep(call: _Call) -> None:
      # The driver finds the epochs in the run's folder.
      if call[0] in ('message', 'run_finished'):
        calls.append(call)

    listener = cast(Listener, Forwarder(keep))
    try:
      ((_, outcome),) = train_runs([run], options, listener, stop.is_set)
      return outcome, calls
    finally:
      done.set()


@functools.cache
def _cores() -> tuple[int, ...]:
  """The cores of this process before it was limited to some of them."""
  return tuple(machine.cores())


@contextlib.contextmanager
def _own_cores(cpus: float) -> Iterator[None]:
  """Limits this process to a part of the host that no other task uses.

  The host is divided into parts of as many cores as a task asks for. A process
  holds a part as long as it has bound the name that belongs to it, which the
  system frees when the process dies. If all are taken, because a cluster was
  declared to have more cores than there are, one is shared.

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
    # Includes JAX's threads, which an earlier task may have started.
    for thread in os.listdir('/proc/self/task'):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(int(thread), own)
    yield
