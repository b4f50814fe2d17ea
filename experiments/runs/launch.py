"""Launches runs: a map of ``train_runs`` over them, in one of several places.

A launcher is a function ``(runs, listener, stop) -> iterator of (run,
outcome)``: ``in_this_process`` here, ``experiments.runs.processes`` and
``experiments.runs.ray_tasks``. A Slurm job array runs the same command with
``--shard I/N``.
"""

import collections
import dataclasses
import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

from experiments.paper.protocol import Run
from experiments.runs.store import RunFolder, tidy
from experiments.runs.train import Listener, Options, Outcome, train_runs

HANGUP = getattr(signal, 'SIGHUP', None)  # a closed terminal; not on Windows


class StopRequest:
  """Turns SIGINT, SIGTERM and SIGHUP into a flag that is read between steps.

  Attributes:
    signal: number of the signal; None if there was none.
  """

  def __init__(self):
    """Nothing requested yet."""
    self.signal: int | None = None

  def __call__(self) -> bool:
    """Whether a stop was requested."""
    return self.signal is not None

  def __enter__(self) -> 'StopRequest':
    """Handles the signals; a second one ends the program at once."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # `nohup` ignores it, so that the program goes on.
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
      numbers.append(HANGUP)
    self._before = {
      number: signal.signal(number, self._handle) for number in numbers
    }
    return self

  def __exit__(self, *_) -> None:
    """Restores the handlers."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame) -> None:
    del frame
    if self.signal is not None:
      raise KeyboardInterrupt
    self.signal = number


class Interrupted(Exception):
  """A signal requested a stop.

  Attributes:
    signal: its number.
  """

  def __init__(self, number: int):
    super().__init__(f'stopped by {signal.Signals(number).name}')
    self.signal = number


@dataclasses.dataclass
class Summary:
  """How many runs ended in which way."""

  done: int = 0
  skipped: int = 0  # were finished already
  elsewhere: int = 0  # another process trains them
  failed: int = 0  # for good


Launcher = Callable[
  [Sequence[Run], Listener, StopRequest], Iterator[tuple[Run, Outcome]]
]


def launch(
  runs: Iterable[Run],
  launcher: Launcher,
  options: Options,
  listener: Listener,
  retries: int = 2,
) -> Summary:
  """Trains every run that has no result yet.

  Args:
    runs: in order.
    launcher: where to train.
    options: how to train.
    listener: receives the progress.
    retries: how often a run that fails is tried again; then its error is
      recorded, and the others go on.

  Raises:
    Interrupted: after one of these signals; all finished epochs are recorded.
    StoreError: if the results folder cannot be read or written.
    DatasetError: if a dataset cannot be loaded.
  """
  summary, failures = Summary(), collections.Counter[str]()
  waiting, elsewhere = list(runs), []
  with StopRequest() as stop:
    while waiting:
      again, elsewhere, ended = [], [], 0
      for run, outcome in launcher(waiting, listener, stop):
        ended += outcome.status in ('done', 'failed')
        match outcome.status:
          case 'done':
            summary.done += 1
          case 'skipped':
            summary.skipped += 1
          case 'elsewhere':
            elsewhere.append(run)
          case 'failed':
            failures[run.run_id] += not outcome.in_group
            retry = failures[run.run_id] <= retries
            listener.run_failed(run, outcome.error, retry)
            if retry:
              again.append(run)
            else:
              summary.failed += 1
              RunFolder(options.results, run.run_id).fail(outcome.error)
      if stop.signal is not None:
        raise Interrupted(stop.signal)
      # Another process may have died meanwhile, and left its runs to this one.
      waiting = again + elsewhere if ended else []
    summary.elsewhere = len(elsewhere)
  tidy(options.results)
  return summary


def in_this_process(options: Options, together: int = 1) -> Launcher:
  """Trains runs one group after the other in this process.

  A group is up to ``together`` consecutive runs that differ in rate and seed
  only. A run of a failed group is tried again alone, because the group may have
  failed for want of memory.
  """
  failed: set[str] = set()

  def kind(run: Run) -> Run:
    if run.run_id in failed:
      return run
    return dataclasses.replace(run, rate=1.0, seed=0)

  def launched(runs, listener, stop) -> Iterator[tuple[Run, Outcome]]:
    for _, alike in itertools.groupby(runs, kind):
      members = list(alike)
      for first in range(0, len(members), together):
        if stop():
          return
        group = members[first : first + together]
        for run, outcome in train_runs(group, options, listener, stop):
          if outcome.status == 'failed':
            failed.add(run.run_id)
          yield run, outcome

  return launched
