"""Trains: tasks in, events out, in whatever process it is."""

import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from experiments.datasets import DatasetError
from experiments.paper.protocol import Run
from experiments.runs import checkpoints
from experiments.tasks import (
  Epoch,
  Event,
  Failed,
  Finished,
  Load,
  Settings,
  Stopped,
  Task,
  Unfit,
)
from experiments.training import devices, machine, placement
from experiments.training import loop as train
from experiments.training import vmapped as together
from experiments.training.placement import Placed
from experiments.training.program import State, program

_FIRST_CHECKPOINT = 0.5  # seconds; what one costs before any was written


class Pace:
  """When a checkpoint is due: as often as a share of the time allows."""

  def __init__(self, share: float):
    """Begins with a guess of what one costs."""
    self._share = share
    self._cost = _FIRST_CHECKPOINT  # seconds, of the last one
    self.begin()

  def begin(self) -> None:
    """A run, or a group of them, begins."""
    self._began, self._spent = time.perf_counter(), 0.0

  def due(self, count: int = 1) -> bool:
    """Whether so many more stay within the share."""
    elapsed = time.perf_counter() - self._began
    within = self._spent + count * self._cost <= self._share * elapsed
    return within or self._share >= 1

  def took(self, seconds: float) -> None:
    """One was written."""
    self._cost = seconds
    self._spent += seconds


class _Data:
  """The last dataset on the device, for the runs that share it."""

  def __init__(self, load: Load, mesh: Mesh | None):
    self._load, self._mesh = load, mesh
    self._uploaded: tuple[str, placement.Uploaded] | None = None
    self._placed: tuple[tuple, Placed] | None = None

  def __call__(self, run: Run) -> Placed:
    if self._uploaded is None or self._uploaded[0] != run.digest:
      if self._uploaded is not None:  # frees memory, of programs too
        self._uploaded = self._placed = None
        program.cache_clear()
        jax.clear_caches()
      data = self._load(run)
      if data.digest != run.digest:
        raise DatasetError(
          f'{run.dataset}: {data.source} has changed since this command '
          'started; repeat the command.'
        )
      self._uploaded = (run.digest, placement.upload(data, self._mesh))
    key = (run.digest, run.seed, run.protocol.holdout)
    if self._placed is None or self._placed[0] != key:
      self._placed = (key, placement.place(self._uploaded[1], run))
    placement.check_divisible(run, self._placed[1])
    return self._placed[1]


@functools.lru_cache(maxsize=1)
def worker(settings: Settings) -> 'Worker':
  """The one worker of a process."""
  return Worker(settings)


@dataclasses.dataclass
class _AtWork:
  """A run that is being trained.

  Attributes:
    run: which.
    placed: its dataset.
    lines: of metrics, of the epochs that are done.
    untold: what to say when it is stopped.
    ended: whether it has its result.
  """

  run: Run
  placed: Placed
  lines: list[train.Line]
  untold: Stopped = Stopped()
  ended: bool = False


class Worker:
  """Carries out one group of tasks after the other."""

  def __init__(self, settings: Settings):
    """Loads nothing yet."""
    self._scan = settings.scan
    self._pace = Pace(settings.checkpoint_share)
    self._mesh = settings.mesh
    self._data = _Data(settings.load, settings.mesh)

  def carry_out(
    self, task: Task, stopping: Callable[[], bool]
  ) -> Iterator[Event]:
    """Trains a run alone; see ``carry_out_group``."""
    for _, event in self.carry_out_group([task], stopping):
      yield event

  def carry_out_group(
    self, tasks: Sequence[Task], stopping: Callable[[], bool]
  ) -> Iterator[tuple[Run, Event]]:
    """Trains runs as one program; the last event of each is not an epoch.

    Args:
      tasks: what to do: one, or several that stand at the same epoch and whose
        runs differ in rate and seed only.
      stopping: asked before every step whether to stop.

    Raises:
      DatasetError: if the dataset can't be loaded.
    """
    group, states = [], []
    for task in tasks:
      try:
        placed = self._data(task.run)
        states.append(_state(task, placed))
        group.append(_AtWork(task.run, placed, [*task.lines]))
      except DatasetError:
        raise
      except _Unfit as error:
        yield task.run, Unfit(str(error))
      except Exception as error:
        yield task.run, Failed(_in_words(error))
    try:
      yield from self._train(group, states, stopping)
    # What it is depends on the device; the other runs may not have it.
    except Exception as error:
      failed = Failed(_in_words(error), of_group=len(group) > 1)
      yield from ((each.run, failed) for each in group if not each.ended)

  def _train(
    self,
    group: Sequence[_AtWork],
    states: Sequence[State],
    stopping: Callable[[], bool],
  ) -> Iterator[tuple[Run, Event]]:
    if not group:
      return
    environment = self._environment(len(group))
    self._pace.begin()
    epochs = together.epochs(
      [each.run for each in group],
      [each.placed for each in group],
      states,
      len(group[0].lines) + 1,
      self._scan,
      stopping,
    )
    try:
      for done in epochs:
        due = self._pace.due(len(done))  # for all, which stay at one epoch
        for i, (after, line) in done.items():
          yield from self._told(group[i], after, line, due, environment)
    except train.Stopped:
      yield from ((each.run, each.untold) for each in group if not each.ended)

  def _environment(self, together: int) -> dict[str, str]:
    """What the bits of a result may depend on, besides its run."""
    return {
      **machine.environment(),
      'device': jax.devices()[0].device_kind,
      'devices': str(devices.count(self._mesh)),
      'runs together': str(together),
    }

  def _told(
    self,
    at_work: _AtWork,
    after: State,
    line: train.Line,
    due: bool,
    environment: dict[str, str],
  ) -> Iterator[tuple[Run, Event]]:
    """What is told of a run after an epoch."""
    run, lines = at_work.run, at_work.lines
    lines.append(line)
    if line['epoch'] == run.protocol.epochs or not line['finite']:
      yield run, Epoch(line)
      placed = at_work.placed
      result = train.result(
        lines, classes=placed.classes, train_images=len(placed.trained)
      )
      yield run, Finished(result, environment)
      at_work.ended = True
      return
    # A copy, for the next epoch uses the state up.
    arrays = checkpoints.by_name(after)
    if due:
      at_work.untold = Stopped()
      began = time.perf_counter()
      yield run, Epoch(line, arrays)
      self._pace.took(time.perf_counter() - began)
    else:
      at_work.untold = Stopped(line['epoch'], arrays)
      yield run, Epoch(line)


class _Unfit(Exception):
  """The state of a task is of other arrays than the run has."""


def _state(task: Task, placed: Placed) -> State:
  """Where a task begins."""
  state = train.start(task.run, placed)
  if task.state is None:
    return state
  try:
    return checkpoints.fit(task.state, state)
  except ValueError as error:
    raise _Unfit(str(error)) from error


def _in_words(error: Exception) -> str:
  """What was raised and where, in one line."""
  (place,) = traceback.extract_tb(error.__traceback__)[-1:]
  text = ' '.join(str(error).split())
  return (
    f'{type(error).__name__} in line {place.lineno} of {place.filename}: {text}'
  )
