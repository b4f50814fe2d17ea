"""A results folder for several processes: process 0 reads and writes it.

What process 0 reads all processes are told, so that they decide alike; what it
writes is its own affair.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax

from experiments import distributed
from experiments.grid import Run
from experiments.store import RunFolder, Store


class SharedFolder:
  """The folder of one run; see ``RunFolder``."""

  def __init__(self, folder: RunFolder | None):
    """Takes the folder; None in processes other than 0."""
    self._folder = folder

  def metrics(self) -> list[dict[str, Any]]:
    """The lines of metrics so far."""
    return distributed.told(lambda: self._own().metrics())

  def restore(self, like: Any) -> tuple[int, Any, list[str]]:
    """The last epoch whose state and metrics are whole."""
    state = like

    def ask():
      nonlocal state
      epoch, state, problems = self._own().restore(like)
      return epoch, problems

    epoch, problems = distributed.told(ask)
    return epoch, distributed.broadcast(state), problems

  def append(self, line: dict[str, Any]) -> None:
    """Adds the line of an epoch."""
    if self._folder is not None:
      self._folder.append(line)

  def save(self, epoch: int, state: Any) -> None:
    """Writes the state after an epoch."""
    if self._folder is not None:
      self._folder.save(epoch, state)

  def finish(self, result: dict[str, Any]) -> None:
    """Writes the result."""
    if self._folder is not None:
      self._folder.finish(result)

  def _own(self) -> RunFolder:
    """What only process 0 asks for."""
    assert self._folder is not None
    return self._folder


class SharedStore:
  """A results folder; see ``Store``. All processes ask the same in turn."""

  def __init__(self, store: Store):
    """Takes the store, which only process 0 uses."""
    self._store = store

  @property
  def folder(self) -> Path:
    """The folder, in process 0."""
    return self._store.folder

  def create(self) -> None:
    """Makes the folder if need be, and checks that it can be written."""
    distributed.told(self._store.create)

  def finished(self, run: Run) -> bool:
    """Whether the run has a result."""
    return distributed.told(lambda: self._store.finished(run))

  def missing(self, runs: Sequence[Run]) -> list[Run]:
    """The runs without a result."""
    missing = distributed.told(
      lambda: [run.run_id for run in self._store.missing(runs)]
    )
    return [run for run in runs if run.run_id in missing]

  def open(self, run: Run) -> SharedFolder:
    """The folder of a run; hold its lock."""
    opened: list[RunFolder] = []
    distributed.told(lambda: opened.append(self._store.open(run)))
    return SharedFolder(opened[0] if jax.process_index() == 0 else None)

  @contextlib.contextmanager
  def lock(self, run: Run) -> Iterator[None]:
    """The lock of process 0, for all.

    Raises:
      filelock.Timeout: in all processes, if it is not to be had.
    """
    with contextlib.ExitStack() as held:

      def take() -> bool:
        try:
          held.enter_context(self._store.lock(run))
        except filelock.Timeout:
          return False
        return True

      if not distributed.told(take):
        raise filelock.Timeout(str(self.folder / run.run_id))
      yield
