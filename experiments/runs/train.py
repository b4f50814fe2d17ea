"""Trains runs in this process, which alone writes their folders."""

import contextlib
import dataclasses
import itertools
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments.datasets import DatasetError, Loader
from experiments.paper.protocol import Run
from experiments.paper.results import result as result_of
from experiments.runs.files import StoreError
from experiments.runs.store import RunFolder

_FIRST_CHECKPOINT = 0.5  # seconds; the guess before any was written


@dataclasses.dataclass(frozen=True)
class Options:
  """How runs are trained.

  Attributes:
    results: results folder.
    load: loads a dataset.
    devices: over which mini-batches are divided; None is as many accelerators
      as divide them, and one CPU.
    scan: compile an epoch as one loop; None: not on a CPU.
    checkpoint_share: of a run's time that checkpoints may take; 1 writes one
      after every epoch.
  """

  results: Path
  load: Loader = Loader()
  devices: int | None = None
  scan: bool | None = None
  checkpoint_share: float = 0.03


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an attempt to train a run ended.

  Attributes:
    status: 'done', 'skipped' (finished before), 'elsewhere' (another process
      trains it), 'stopped' or 'failed'.
    error: why it failed.
    in_group: whether it failed with others, any of which may be the cause.
  """

  status: str
  error: str = ''
  in_group: bool = False


class Listener(Protocol):
  """Receives the progress of runs and of a launch."""

  def run_started(self, run: Run, first_epoch: int) -> None:
    """A run begins, or resumes."""

  def epoch_finished(self, run: Run, line: dict[str, Any]) -> None:
    """An epoch has been recorded."""

  def run_finished(self, run: Run, result: dict[str, Any]) -> None:
    """A run has its result."""

  def run_failed(self, run: Run, error: str, again: bool) -> None:
    """A run has failed; it may be tried again."""

  def message(self, text: str) -> None:
    """Something the user should know."""


class Forwarder:
  """A listener that sends on what it receives, as (method, arguments)."""

  def __init__(self, send: Callable[[tuple[str, tuple]], Any]):
    self._send = send

  def __getattr__(self, name: str) -> Any:
    return lambda *arguments: self._send((name, arguments))


class _Pace:
  """Decides when a checkpoint is due: as often as a share of time allows."""

  def __init__(self, share: float):
    self._share, self._cost = share, _FIRST_CHECKPOINT
    self._began, self._spent = time.perf_counter(), 0.0

  def due(self) -> bool:
    elapsed = time.perf_counter() - self._began
    within = self._spent + self._cost <= self._share * elapsed
    return within or self._share >= 1

  def took(self, seconds: float) -> None:
    self._cost = seconds
    self._spent += seconds


def train_runs(
  runs: Sequence[Run],
  options: Options,
  listener: Listener,
  stopping: Callable[[], bool],
) -> list[tuple[Run, Outcome]]:
  """Trains, or resumes, runs that differ in rate and seed only, as one program.

  Runs that are finished, or that another process trains, are left alone. Runs
  that stand at different epochs are trained one group after the other.

  Args:
    runs: usually one.
    options: how.
    listener: receives their progress.
    stopping: whether to stop; called before every step.

  Returns:
    Each run and its outcome.

  Raises:
    StoreError: if a folder cannot be read or written.
    DatasetError: if the dataset cannot be loaded.
  """
  outcomes, begun = [], []
  with contextlib.ExitStack() as locks:
    for run in runs:
      folder = RunFolder(options.results, run.run_id)
      if not locks.enter_context(folder.claimed()):
        outcomes.append((run, Outcome('elsewhere')))
      elif folder.result():
        outcomes.append((run, Outcome('skipped')))
      else:
        try:
          begun.append(_begin(run, folder, options, listener))
        except (StoreError, DatasetError):
          raise
        except Exception as error:
          outcomes.append((run, Outcome('failed', _in_words(error))))
    begun.sort(key=lambda each: len(each.lines))
    for _, group in itertools.groupby(begun, lambda each: len(each.lines)):
      outcomes += _train([*group], options, listener, stopping)
  return outcomes


@dataclasses.dataclass
class _Begun:
  """A run in training: its folder, dataset, state and lines of metrics."""

  run: Run
  folder: RunFolder
  data: Any
  state: Any
  lines: list[dict[str, Any]]
  saved: int  # epoch of the last checkpoint
  ended: bool = False


def _begin(
  run: Run, folder: RunFolder, options: Options, listener: Listener
) -> _Begun:
  from experiments.runs import checkpoints
  from experiments.training import data, devices, loop

  folder.begin(run.config())
  mesh = devices.mesh_for([run], options.devices)
  on_device = data.device_data(run, options.load, mesh)
  state = loop.start(run, on_device)
  lines = folder.metrics()
  epoch, restored, problems = checkpoints.restore(
    folder.checkpoints, len(lines), state
  )
  folder.cut(epoch)
  for problem in problems:
    listener.message(problem)
  listener.run_started(run, epoch + 1)
  state = state if restored is None else restored
  return _Begun(run, folder, on_device, state, lines[:epoch], epoch)


def _train(
  group: list[_Begun],
  options: Options,
  listener: Listener,
  stopping: Callable[[], bool],
) -> list[tuple[Run, Outcome]]:
  """Trains runs that stand at the same epoch to their ends."""
  from experiments.training import loop, vmapped

  environment = _environment(group)
  pace = _Pace(options.checkpoint_share)
  epochs = vmapped.epochs(
    [each.run for each in group],
    [each.data for each in group],
    [each.state for each in group],
    len(group[0].lines) + 1,
    options.scan,
    stopping,
  )
  outcome, done = Outcome('done'), {}
  while done is not None:
    try:
      done = next(epochs, None)
    except loop.Stopped:
      outcome = Outcome('stopped')
      _save(group)
      break
    except Exception as error:  # which errors there are depends on the device
      outcome = Outcome('failed', _in_words(error), in_group=len(group) > 1)
      break
    for i, (state, line) in (done or {}).items():
      _record(group[i], state, line, environment, listener)
    if done and pace.due():
      began = time.perf_counter()
      _save(group)
      pace.took(time.perf_counter() - began)
  return [
    (each.run, Outcome('done') if each.ended else outcome) for each in group
  ]


def _record(
  each: _Begun,
  state: Any,
  line: dict[str, Any],
  environment: dict[str, str],
  listener: Listener,
) -> None:
  """Records an epoch, and the result after the last one."""
  from experiments.runs import checkpoints

  run = each.run
  each.folder.append(line)
  each.lines.append(line)
  listener.epoch_finished(run, line)
  if line['epoch'] == run.protocol.epochs or not line['finite']:
    result = result_of(
      each.lines,
      classes=each.data.classes,
      train_images=len(each.data.trained),
    )
    each.folder.finish(result, environment)
    each.ended = True
    listener.run_finished(run, result)
  else:  # a copy, because the next epoch consumes the state
    each.state = checkpoints.by_name(state)


def _save(group: list[_Begun]) -> None:
  """Writes the checkpoints of all runs that have trained since their last."""
  from experiments.runs import checkpoints

  for each in group:
    epoch = len(each.lines)
    if not each.ended and epoch > each.saved:
      checkpoints.save(each.folder.checkpoints, epoch, each.state)
      each.saved = epoch


def _environment(group: list[_Begun]) -> dict[str, str]:
  """What the bits of a result may depend on, apart from its run."""
  import jax

  from experiments.training import devices, machine

  return {
    **machine.environment(),
    'device': jax.devices()[0].device_kind,
    'devices': str(devices.count(group[0].data.mesh)),
    'runs together': str(len(group)),
  }


def _in_words(error: Exception) -> str:
  """What was raised and where, in one line."""
  (place,) = traceback.extract_tb(error.__traceback__)[-1:]
  text = ' '.join(str(error).split())
  return (
    f'{type(error).__name__} in line {place.lineno} of {place.filename}: {text}'
  )
