"""Trains: a task in, events out, in whatever process it is."""

import functools
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from experiments import checkpoints, placement, train
from experiments.datasets import DatasetError
from experiments.grid import Run
from experiments.placement import Placed
from experiments.program import State, program
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

_FIRST_CHECKPOINT = 0.5  # seconds; what one costs before any was written


class Pace:
  """When a checkpoint is due: as often as a share of the time allows."""

  def __init__(self, share: float):
    """Begins with a guess of what one costs."""
    self._share = share
    self._cost = _FIRST_CHECKPOINT  # seconds, of the last one
    self.begin()

  def begin(self) -> None:
    """A run begins."""
    self._began, self._spent = time.perf_counter(), 0.0

  def due(self) -> bool:
    """Whether one more stays within the share."""
    elapsed = time.perf_counter() - self._began
    within = self._spent + self._cost <= self._share * elapsed
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
    return self._placed[1]


@functools.lru_cache(maxsize=1)
def worker(settings: Settings) -> 'Worker':
  """The one worker of a process."""
  return Worker(settings)


class Worker:
  """Carries out one task after the other."""

  def __init__(self, settings: Settings):
    """Loads nothing yet."""
    self._scan = settings.scan
    self._pace = Pace(settings.checkpoint_share)
    self._data = _Data(settings.load, settings.mesh)

  def carry_out(
    self, task: Task, stopping: Callable[[], bool]
  ) -> Iterator[Event]:
    """Trains; the last event is not an epoch.

    Args:
      task: what to do.
      stopping: asked before every step whether to stop.

    Raises:
      DatasetError: if the dataset can't be loaded.
    """
    try:
      placed = self._data(task.run)
      state = train.start(task.run, placed)
      if task.state is not None:
        try:
          state = checkpoints.fit(task.state, state)
        except ValueError as error:
          yield Unfit(str(error))
          return
      yield from self._train(task, placed, state, stopping)
    except DatasetError:
      raise
    # What it is depends on the device; the other runs may not have it.
    except Exception as error:
      yield Failed(_in_words(error))

  def _train(
    self,
    task: Task,
    placed: Placed,
    state: State,
    stopping: Callable[[], bool],
  ) -> Iterator[Event]:
    run, lines = task.run, [*task.lines]
    untold = Stopped()
    self._pace.begin()
    try:
      epochs = train.epochs(
        run, placed, state, len(lines) + 1, self._scan, stopping
      )
      for after, line in epochs:
        lines.append(line)
        if line['epoch'] == run.protocol.epochs or not line['finite']:
          yield Epoch(line)
          break
        # A copy, for the next epoch uses the state up.
        arrays = checkpoints.by_name(after)
        untold = Stopped()
        if self._pace.due():
          began = time.perf_counter()
          yield Epoch(line, arrays)
          self._pace.took(time.perf_counter() - began)
        else:
          untold = Stopped(line['epoch'], arrays)
          yield Epoch(line)
    except train.Stopped:
      yield untold
      return
    yield Finished(train.result(run, placed.classes, lines))


def _in_words(error: Exception) -> str:
  """What was raised and where, in one line."""
  (place,) = traceback.extract_tb(error.__traceback__)[-1:]
  text = ' '.join(str(error).split())
  return (
    f'{type(error).__name__} in line {place.lineno} of {place.filename}: {text}'
  )
