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

from experiments.conditions import names_of
from experiments.grid import Run

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
    self._best = float('inf')
    self._said = 0.0
    if progress is not None:
      self._runs = progress.add_task('runs', total=total)
      self._epochs = progress.add_task('epochs', total=1)

  def run_started(self, run: Run, first_epoch: int) -> None:
    """A run begins, or goes on."""
    self._best = float('inf')
    self._said = time.monotonic()
    if first_epoch > 1:
      self.message(f'{describe(run)}: goes on with epoch {first_epoch}')
    if self._progress is not None:
      self._progress.reset(
        self._epochs,
        total=run.protocol.epochs,
        completed=first_epoch - 1,
        description=describe(run),
      )

  def epoch_finished(self, run: Run, line: dict[str, Any]) -> None:
    """An epoch has been recorded."""
    self._best = min(self._best, line['test_error'])
    text = f'{describe(run)}: best error {self._best:.2f} %'
    if self._progress is not None:
      self._progress.update(self._epochs, advance=1, description=text)
      share = line['epoch'] / run.protocol.epochs
      self._progress.update(self._runs, completed=self._done + share)
    elif time.monotonic() - self._said > _LINE_EVERY:
      self._said = time.monotonic()
      self.message(
        f'{text} after epoch {line["epoch"]} of {run.protocol.epochs}'
      )

  def run_finished(self, run: Run, result: dict[str, Any]) -> None:
    """A run has its result."""
    self._done += 1
    text = f'best validation error {result["paper_error"]:.2f} %'
    if result['honest_error'] is not None:
      text += f', held-out choice {result["honest_error"]:.2f} %'
    if result['diverged']:
      text += f', diverged in epoch {result["epochs_run"]}'
    self.message(f'[{self._done}/{self._total}] {describe(run)}: {text}')
    if self._progress is not None:
      self._progress.update(self._runs, completed=self._done)

  def message(self, text: str) -> None:
    """Something the user should know."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)


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
