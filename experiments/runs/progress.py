"""The progress of runs: live bars on a terminal, plain lines elsewhere."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TaskID,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.table import Column

from experiments.paper.conditions import names_of, steps_of
from experiments.paper.protocol import Run

_LINE_EVERY = 10.0  # seconds between lines when the output is no terminal


def describe(run: Run) -> str:
  """A run in a few words, by the paper's name of its condition."""
  text = f'{run.dataset.name} {names_of(run.condition)[0]}'
  if run.network:
    text += f', network {run.network}'
  plan = run.condition.batch_plan
  if len(plan) > 1:
    text += ', batch ' + ' then '.join(steps_of(plan))
  return f'{text}, rate x{run.rate:g}, seed {run.seed}'


class _Console(Console):
  """A console that training survives: it falls silent when nobody reads."""

  def on_broken_pipe(self) -> None:
    self.quiet = True


class Reporter:
  """Shows what a launch does; a ``train.Listener``."""

  def __init__(self, console: Console, progress: Progress | None, total: int):
    """Shows messages on the console, and bars if there is a progress."""
    self._console, self._progress = console, progress
    self._done, self._total = 0, total
    self._lowest: dict[str, float] = {}  # test errors of the runs in training
    self._share: dict[str, float] = {}  # of these runs that is trained
    self._programs: set[Run] = set()  # that were compiled
    self._bars: dict[str, TaskID] = {}
    self._last_line = time.monotonic()
    if progress is not None:
      self._all = progress.add_task('runs', total=total)

  def run_started(self, run: Run, first_epoch: int) -> None:
    """A run begins, or resumes."""
    self._lowest[run.run_id] = float('inf')
    if first_epoch > 1:
      self.message(f'{describe(run)}: resumes with epoch {first_epoch}')
    # Rate and seed are arguments of the program.
    program = dataclasses.replace(run, rate=1.0, seed=0)
    if program not in self._programs:
      self._programs.add(program)
      name = names_of(run.condition)[0]
      self.message(f'{run.dataset.name} {name}: compiling, then training')
    if self._progress is not None:
      self._remove_bar(run)
      self._bars[run.run_id] = self._progress.add_task(
        describe(run), total=run.protocol.epochs, completed=first_epoch - 1
      )

  def epoch_finished(self, run: Run, line: dict[str, Any]) -> None:
    """An epoch has been recorded."""
    lowest = min(self._lowest[run.run_id], line['test_error'])
    self._lowest[run.run_id] = lowest
    text = f'{describe(run)}: best test error {lowest:.2f} %'
    if self._progress is not None:
      bar = self._bars[run.run_id]
      self._progress.update(bar, completed=line['epoch'], description=text)
      self._share[run.run_id] = line['epoch'] / run.protocol.epochs
      self._update_all()
    elif time.monotonic() - self._last_line > _LINE_EVERY:
      self._last_line = time.monotonic()
      self.message(
        f'{text} after epoch {line["epoch"]} of {run.protocol.epochs}'
      )

  def run_finished(self, run: Run, result: dict[str, Any]) -> None:
    """A run has its result."""
    text = f'best test error {result["best_test_error"]:.2f} %'
    if result['held_out_test_error'] is not None:
      text += f', held-out test error {result["held_out_test_error"]:.2f} %'
    if result['diverged']:
      text += f', diverged in epoch {result["epochs_run"]}'
    self._ended(run, text)

  def run_failed(self, run: Run, error: str, again: bool) -> None:
    """A run has failed; it may be tried again."""
    if again:
      self._remove_bar(run)
      self.message(f'{describe(run)}: {error}; it will be tried again')
    else:
      self._ended(run, f'FAILED: {error}')

  def message(self, text: str) -> None:
    """Something the user should know."""
    try:
      # Lines of a file stay whole; a terminal breaks them between words.
      self._console.print(
        text,
        markup=False,
        highlight=False,
        soft_wrap=not self._console.is_terminal,
      )
    except OSError:  # such as a full disk
      self._console.quiet = True

  def _ended(self, run: Run, text: str) -> None:
    self._done += 1
    self._remove_bar(run)
    self._update_all()
    self.message(f'[{self._done}/{self._total}] {describe(run)}: {text}')

  def _update_all(self) -> None:
    """Counts parts of runs too, so that the estimate is there early."""
    if self._progress is not None:
      completed = self._done + sum(self._share.values())
      self._progress.update(self._all, completed=completed)

  def _remove_bar(self, run: Run) -> None:
    self._share.pop(run.run_id, None)
    bar = self._bars.pop(run.run_id, None)
    if self._progress is not None and bar is not None:
      self._progress.remove_task(bar)


@contextlib.contextmanager
def reporter(total: int) -> Iterator[Reporter]:
  """A reporter for ``total`` runs on standard output."""
  console = _Console()
  if not console.is_terminal:
    yield Reporter(console, None, total)
    return
  columns = (
    # On a narrow terminal, these two give way to the numbers.
    TextColumn(
      '{task.description}',
      table_column=Column(ratio=3, no_wrap=True, overflow='ellipsis'),
    ),
    BarColumn(bar_width=None, table_column=Column(ratio=1)),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
  )
  # An estimate from all that was trained leaps less.
  with Progress(
    *columns, console=console, speed_estimate_period=math.inf, expand=True
  ) as progress:
    yield Reporter(console, progress, total)
