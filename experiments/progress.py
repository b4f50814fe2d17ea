"""How far things are: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from experiments.paper.conditions import names_of
from experiments.paper.protocol import Run

_LINE_EVERY = 10.0  # seconds between lines when the output is no terminal


def describe(run: Run) -> str:
  """A run in a few words, by the paper's name of its condition."""
  text = f'{run.dataset} {names_of(run)[0]}'
  if len(run.batch_plan) > 1:
    text += ', batch ' + ' then '.join(
      f'{size}' if epochs is None else f'{size} for {epochs} epochs'
      for epochs, size in run.batch_plan
    )
  return f'{text}, rate x{run.rate:g}, seed {run.seed}'


class Reporter:
  """Listens to the runner."""

  def __init__(self, console: Console, progress: Progress | None, total: int):
    """Shows on the console; the bars too if there are any."""
    self._console = console
    self._progress = progress
    self._done = 0
    self._total = total
    self._best: dict[str, float] = {}  # of the runs at work
    self._share: dict[str, float] = {}
    self._said = time.monotonic()
    if progress is not None:
      self._runs = progress.add_task('runs', total=total)
      self._epochs = progress.add_task('epochs', total=1)

  def run_started(self, run: Run, first_epoch: int) -> None:
    """A run begins, or goes on."""
    self._best[run.run_id] = float('inf')
    if first_epoch > 1:
      self.message(f'{describe(run)}: goes on with epoch {first_epoch}')
    self._show(run, first_epoch - 1, describe(run))

  def epoch_finished(self, run: Run, line: dict[str, Any]) -> None:
    """An epoch has been recorded."""
    best = min(self._best[run.run_id], line['test_error'])
    self._best[run.run_id] = best
    text = f'{describe(run)}: best error {best:.2f} %'
    if self._progress is not None:
      self._show(run, line['epoch'], text)
    elif time.monotonic() - self._said > _LINE_EVERY:
      self._said = time.monotonic()
      self.message(
        f'{text} after epoch {line["epoch"]} of {run.protocol.epochs}'
      )

  def run_finished(self, run: Run, result: dict[str, Any]) -> None:
    """A run has its result."""
    self._ended(run)
    text = f'best validation error {result["paper_error"]:.2f} %'
    if result['honest_error'] is not None:
      text += f', held-out choice {result["honest_error"]:.2f} %'
    if result['diverged']:
      text += f', diverged in epoch {result["epochs_run"]}'
    self.message(f'{self._place()} {describe(run)}: {text}')

  def run_failed(self, run: Run, error: str, again: bool) -> None:
    """A run has come to an end without result."""
    if again:
      self.message(f'{describe(run)}: {error}; it is tried again')
      return
    self._ended(run)
    self.message(
      f'[{self._done}/{self._total}] {describe(run)}: FAILED: {error}'
    )

  def message(self, text: str) -> None:
    """Something the user should know."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def _place(self) -> str:
    return f'[{self._done}/{self._total}]'

  def _ended(self, run: Run) -> None:
    self._done += 1
    self._share.pop(run.run_id, None)
    self._count()

  def _show(self, run: Run, epoch: int, text: str) -> None:
    """The bar of epochs is that of the run which was last heard of."""
    if self._progress is None:
      return
    self._share[run.run_id] = epoch / run.protocol.epochs
    self._progress.update(
      self._epochs,
      total=run.protocol.epochs,
      completed=epoch,
      description=text,
    )
    self._count()

  def _count(self) -> None:
    if self._progress is not None:
      done = self._done + sum(self._share.values())
      self._progress.update(self._runs, completed=done)


@contextlib.contextmanager
def reporter(total: int) -> Iterator[Reporter]:
  """A reporter for ``total`` runs on standard output."""
  console = Console()
  if not console.is_terminal:
    yield Reporter(console, None, total)
    return
  columns = (
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console) as progress:
    yield Reporter(console, progress, total)
