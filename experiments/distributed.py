"""Several processes, usually one a host, that do the same runs in step.

Each holds the data and computes its part of every mini-batch. Process 0 alone
reads and writes the results folder; it tells the others every task, state
included, so they need no folder, shared or not. Whoever is asked to stop, all
stop. When one of them is lost the others end.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import executors
from experiments.options import Hosts
from experiments.paper.protocol import Run
from experiments.runner import StopRequest
from experiments.tasks import Event, Failed, Settings, Task

LOST = 3  # exit status
_HEARTBEAT = 30  # seconds without a sign of life, then a process is lost
_CHUNK = 4096  # bytes; messages are multiples of it, for few compilations


class _Failure(RuntimeError):
  """A run came to an end in this process, so the others can't go on."""


class InStep(executors.Local):
  """Tasks of process 0, carried out by all processes; see ``follow``."""

  def carry_out(
    self, next_task: Callable[[], Task | None], stopping: Callable[[], bool]
  ) -> Iterator[tuple[Run, Event]]:
    """See ``executors.Executor``."""

    def next_told() -> Task | None:
      task = next_task()
      if task is not None:
        _tell(task)
      return task

    for run, event in super().carry_out(next_told, lambda: _agree(stopping)):
      _check(event)
      yield run, event


def follow(runs: Sequence[Run], settings: Settings) -> int:
  """Carries out what process 0 tells this one; returns the exit status."""
  with StopRequest() as stop:
    for _, event in executors.Local(settings).carry_out(
      lambda: _told(runs), lambda: _agree(lambda: stop.asked is not None)
    ):
      _check(event)
  return 0 if stop.asked is None else 128 + stop.asked


@contextlib.contextmanager
def joined(options: Hosts, runs: Sequence[Run]) -> Iterator[bool]:
  """Joins the other processes; yields whether this one is process 0.

  The others print nothing but errors. An error that only this process knows
  of ends it at once, without waiting for the others, and they end then too.

  Raises:
    ValueError: if they can't be found, or were asked for other runs.
  """
  _initialize(options)
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    if not first:
      silence = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(silence))
    _check_same(runs)
    try:
      yield first
      if first:
        _tell(None)
    except BaseException as error:
      _end_alone(error)
  jax.distributed.shutdown()


def _tell(task: Task | None) -> None:
  """Tells the others what is to be done next."""
  if task is None:
    _broadcast(b'')
    return
  names = None if task.state is None else list(task.state)
  arrays = io.BytesIO()
  np.savez(arrays, *(task.state or {}).values())
  _broadcast(json.dumps([task.run.run_id, task.lines, names]).encode())
  _broadcast(arrays.getvalue())


def _told(runs: Sequence[Run]) -> Task | None:
  """What process 0 tells."""
  about = _broadcast(None)
  if not about:
    return None
  run_id, lines, names = json.loads(about)
  with np.load(io.BytesIO(_broadcast(None)), allow_pickle=False) as arrays:
    values = list(arrays.values())
  state = None if names is None else dict(zip(names, values, strict=True))
  (run,) = (run for run in runs if run.run_id == run_id)
  return Task(run, tuple(lines), state)


def _broadcast(message: bytes | None) -> bytes:
  """The message of process 0; others give None."""
  data = np.frombuffer(message or b'', np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
  sent = np.zeros(-(-size // _CHUNK) * _CHUNK, np.uint8)
  sent[: data.size] = data
  return multihost_utils.broadcast_one_to_all(sent)[:size].tobytes()


def _agree(stopping: Callable[[], bool]) -> bool:
  """Whether any process was asked to stop, which then all are."""
  asked = stopping()
  any_asked = bool(multihost_utils.process_allgather(np.bool_(asked)).any())
  if any_asked and not asked:
    signal.raise_signal(signal.SIGTERM)
  return any_asked


def _check(event: Event) -> None:
  """Raises where a run came to an end in this process, and perhaps here only.

  Raises:
    _Failure: if so.
  """
  if isinstance(event, Failed):
    raise _Failure(
      'computing with the other processes failed, most likely because one of '
      f'them was lost: {event.error}\nNothing recorded is lost; start all '
      'processes again with the same commands.'
    )


def _initialize(options: Hosts) -> None:
  """Finds the other processes."""
  # The runner listens to SIGTERM itself.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator_address=options.coordinator,
      num_processes=options.process_count,
      process_id=options.process_id,
      # Else process 0 listens on all interfaces.
      coordinator_bind_address=os.environ.get(
        'JAX_COORDINATOR_BIND_ADDRESS', options.coordinator
      ),
      heartbeat_timeout_seconds=_HEARTBEAT,
    )
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    raise ValueError(
      f'the other processes were not found: {str(error).splitlines()[0]} Say '
      '--coordinator HOST:PORT (of process 0), --process-id and '
      '--process-count, or start the program by Slurm, Open MPI or on a TPU '
      'with --distributed.'
    ) from error


def _check_same(runs: Sequence[Run]) -> None:
  """Raises in all processes unless all are to do the same."""
  text = ' '.join(run.run_id for run in runs)
  digest = hashlib.sha256(text.encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  if (digests != digests[:1]).any():
    jax.distributed.shutdown()
    raise ValueError(
      'the processes were asked for different runs: give all of them the same '
      'options and the same data.'
    )


def _end_alone(error: BaseException) -> None:
  """Says why and ends, without waiting for processes that wait for this one."""
  try:
    if isinstance(error, ValueError | _Failure):
      print(f'error: {error}', file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
      traceback.print_exception(error)
    sys.stderr.flush()
  finally:
    os._exit(LOST)
