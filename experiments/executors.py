"""Where runs are carried out: what an executor is, and the one of this process.

All executors train with ``experiments.worker``; none writes to the store, which
the driver (``experiments.runner``) does alone. Others are in
``experiments.processes`` (this host), ``cluster`` (Ray) and ``distributed``
(several hosts in step).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from experiments.paper.protocol import Run
from experiments.tasks import Event, Failed, Settings, Stopped, Task

POLL = 0.2  # seconds between questions whether to stop


class Executor(Protocol):
  """Carries out tasks."""

  def carry_out(
    self, next_task: Callable[[], Task | None], stopping: Callable[[], bool]
  ) -> Iterator[tuple[Run, Event]]:
    """Carries out tasks until there are none and all are done.

    Args:
      next_task: the next one, or None; after an event there may be more.
      stopping: whether to stop what is at work.

    Yields:
      Runs and their events in order, those of several runs interleaved; the
      last of a task is not an ``Epoch``.

    Raises:
      DatasetError: if a dataset can't be loaded.
    """
    ...


class Local:
  """One group of tasks after the other in this process.

  A group are tasks in a row whose runs differ in rate and seed only and stand
  at the same epoch. A run that fails is tried again alone, for what failed may
  have been the group: it takes more memory.
  """

  def __init__(self, settings: Settings, together: int = 1):
    """Starts nothing yet.

    Args:
      settings: how runs are carried out.
      together: size of a group, at most.
    """
    self._settings = settings
    self._together = together
    self._failed: set[Run] = set()

  def carry_out(
    self, next_task: Callable[[], Task | None], stopping: Callable[[], bool]
  ) -> Iterator[tuple[Run, Event]]:
    """See ``Executor``."""
    from experiments.worker import worker

    kept: Task | None = None
    while (first := kept or next_task()) is not None:
      group, kept = self._group(first, next_task)
      for run, event in worker(self._settings).carry_out_group(group, stopping):
        if isinstance(event, Failed):
          self._failed.add(run)
        yield run, event
      if kept is not None and stopping():
        yield kept.run, Stopped()
        kept = None

  def _group(
    self, first: Task, next_task: Callable[[], Task | None]
  ) -> tuple[list[Task], Task | None]:
    """A group, and the first task that is not of it, if that was asked for.

    No more is asked for, as other processes may do what this one does not.
    """
    group = [first]
    while len(group) < self._together:
      if (task := next_task()) is None:
        break
      if self._kind(task) != self._kind(first):
        return group, task
      group.append(task)
    return group, None

  def _kind(self, task: Task) -> Any:
    """What the tasks of a group have in common."""
    if task.run in self._failed:
      return task.run
    cell = dataclasses.replace(task.run, rate=1.0, seed=0)
    return cell, len(task.lines)
