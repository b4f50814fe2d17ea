"""Several processes, usually one a host, that do the same runs in step.

Each holds the data and computes its part of every mini-batch. Process 0 alone
reads and writes the results folder, and the others are told what it found (see
``experiments.shared_store``); they need no folder, shared or not. Whoever is
asked to stop, all stop. When one of them is lost the others end.
"""

import contextlib
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.cli import Hosts
from experiments.datasets import DatasetError
from experiments.files import StoreError
from experiments.grid import Run

T = TypeVar('T')
LOST = 3  # exit status
_HEARTBEAT = 30  # seconds without a sign of life, then a process is lost
_CHUNK = 4096  # bytes; texts are sent in multiples, for few compilations


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
    try:
      _check_same(runs)
      yield first
    except BaseException as error:
      if jax.distributed.is_initialized():
        _end_alone(error)
      raise
  leave()


def leave() -> None:
  """Takes leave of the others, who do so at the same point."""
  jax.distributed.shutdown()


def told(ask: Callable[[], T]) -> T:
  """What process 0 finds when it asks, as JSON has it, in all processes.

  Raises:
    StoreError: what process 0 raised, in all processes.
  """
  answer: Any = None
  if jax.process_index() == 0:
    try:
      answer = {'found': ask()}
    except StoreError as error:
      answer = {'error': str(error)}
  answer = json.loads(_broadcast_text(json.dumps(answer)))
  if 'error' in answer:
    leave()
    raise StoreError(answer['error'])
  return answer['found']


def broadcast(tree: Any) -> Any:
  """The arrays of process 0; others give arrays of the same shapes."""
  return multihost_utils.broadcast_one_to_all(tree)


def any_signal(number: int | None) -> int | None:
  """The number of a signal that any process got; all ask at the same point."""
  numbers = multihost_utils.process_allgather(np.int32(number or 0))
  return int(np.max(numbers)) or None


def _broadcast_text(text: str) -> str:
  data = np.frombuffer(text.encode(), np.uint8)
  size = int(broadcast(np.int32(data.size)))
  sent = np.zeros(-(-size // _CHUNK) * _CHUNK, np.uint8)
  if jax.process_index() == 0:
    sent[:size] = data
  return broadcast(sent)[:size].tobytes().decode()


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
    leave()
    raise ValueError(
      'the processes were asked for different runs: give all of them the same '
      'options and the same data.'
    )


def _end_alone(error: BaseException) -> None:
  """Says why and ends, without waiting for processes that wait for this one."""
  if isinstance(error, jax.errors.JaxRuntimeError):
    print(
      'error: computing with the other processes failed, most likely because '
      f'one of them was lost: {str(error).splitlines()[0]}\nNothing recorded '
      'is lost; start all processes again with the same commands.',
      file=sys.stderr,
    )
  elif isinstance(error, ValueError | DatasetError):
    print(f'error: {error}', file=sys.stderr)
  elif not isinstance(error, KeyboardInterrupt):
    traceback.print_exception(error)
  sys.stderr.flush()
  os._exit(LOST)
