"""A cell: a condition on a dataset under one protocol, and its two results."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from experiments.paper.conditions import BatchPlan
from experiments.paper.protocol import RATES
from experiments.report import statistics
from experiments.report.runs import Run


@dataclasses.dataclass(frozen=True)
class Result:
  """An error in percent over seeds: mean, values and the runs they are of."""

  chosen: Mapping[int, Run]
  values: Mapping[int, float]

  @property
  def mean(self) -> float:
    """Mean over seeds."""
    return sum(self.values.values()) / len(self.values)

  @property
  def interval(self) -> statistics.Interval | None:
    """95 % bootstrap interval of the mean, None for one seed."""
    return statistics.mean_interval(tuple(self.values.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  """A condition on a dataset, under one protocol.

  A seed counts once all its rates and batch plans are there. While no seed is
  complete, the incomplete ones are shown, and marked.
  """

  dataset: str
  condition: str
  plans: int
  runs: Sequence[Run]

  @functools.cached_property
  def finished(self) -> Mapping[int, list[Run]]:
    """Finished runs by seed."""
    seeds = defaultdict(list)
    for run in self.runs:
      if run.outcome is not None:
        seeds[run.seed].append(run)
    return dict(sorted(seeds.items()))

  @property
  def expected(self) -> int:
    """How many runs make the cell complete for the seeds it has."""
    return len({run.seed for run in self.runs}) * len(RATES) * self.plans

  @functools.cached_property
  def present(self) -> int:
    """How many of the expected runs are finished."""
    return sum(_grid(runs) for runs in self.finished.values())

  @property
  def diverged(self) -> int:
    """How many of the finished runs diverged."""
    return sum(
      run.outcome.diverged
      for runs in self.finished.values()
      for run in runs
      if run.outcome
    )

  @property
  def complete(self) -> bool:
    """Whether every rate and plan of every seed is there."""
    return self.present == self.expected

  @property
  def mark(self) -> str:
    """'' if complete, else such as '4/5 rates' or '12/15 runs'."""
    if self.complete:
      return ''
    what = 'rates' if self.expected == len(RATES) else 'runs'
    return f'{self.present}/{self.expected} {what}'

  @functools.cached_property
  def settled(self) -> bool:
    """Whether at least one seed has all its rates and plans."""
    return any(_grid(r) == self._full for r in self.finished.values())

  @property
  def _full(self) -> int:
    return len(RATES) * self.plans

  @functools.cached_property
  def _counted(self) -> Mapping[int, list[Run]]:
    if not self.settled:
      return self.finished
    return {s: r for s, r in self.finished.items() if _grid(r) == self._full}

  @functools.cached_property
  def best_validation(self) -> Result | None:
    """The paper's: per seed the lowest test error over epochs and rates."""
    return _choose(self._counted, 'best_validation', 'best_validation')

  @functools.cached_property
  def held_out(self) -> Result | None:
    """The honest one: rate and epoch chosen on the held-out part."""
    return _choose(self._counted, 'holdout', 'honest')

  @functools.cached_property
  def by_setting(self) -> Mapping[tuple[float, BatchPlan], list[Run]]:
    """Finished runs by (rate, plan), the highest rate first."""
    settings = defaultdict(list)
    for runs in self.finished.values():
      for run in runs:
        settings[run.rate, run.batch_plan].append(run)
    return dict(sorted(settings.items(), key=lambda item: (
      -item[0][0], str(item[0][1])
    )))  # fmt: skip

  @functools.cached_property
  def best_setting(self) -> tuple[float, BatchPlan] | None:
    """The (rate, plan) with the lowest mean best-validation error."""
    return min(
      self.by_setting,
      key=lambda setting: mean_error(self.by_setting[setting]),
      default=None,
    )


def mean_error(runs: Sequence[Run]) -> float:
  """Mean best-validation error of finished runs, in percent."""
  errors = [run.outcome.best_validation for run in runs if run.outcome]
  return sum(errors) / len(errors)


def _grid(runs: Iterable[Run]) -> int:
  return len({(run.rate, run.batch_plan) for run in runs if run.rate in RATES})


def _choose(
  seeds: Mapping[int, list[Run]], by: str, report: str
) -> Result | None:
  """Per seed the run with the lowest `by`, and its `report`."""
  chosen, values = {}, {}
  for seed, runs in seeds.items():
    known = [run for run in runs if getattr(run.outcome, by) is not None]
    if not known:
      continue
    run = min(known, key=lambda run: (getattr(run.outcome, by), -run.rate))
    if getattr(run.outcome, report) is not None:
      chosen[seed], values[seed] = run, getattr(run.outcome, report)
  return Result(chosen, values) if values else None
