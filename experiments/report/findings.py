"""What a statement comes to on each row of a study, and on all of them."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from experiments.report import naming, statistics
from experiments.report.statistics import Interval

HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not enough runs'


@dataclasses.dataclass(frozen=True)
class Finding:
  """The verdict on a row, or over several.

  Attributes:
    label: the row's, or how many there are.
    datasets: the names of what it is about.
    effect: in the unit of the conclusion.
    interval: of the effect.
    seeds: how many it is from, those that all conditions share; 0 where that
      has no meaning.
    of_seeds: how many the condition with most of them has.
    holds: the verdict.
  """

  label: str
  datasets: tuple[str, ...]
  effect: float
  interval: Interval | None
  seeds: int
  of_seeds: int
  holds: bool

  @property
  def verdict(self) -> str:
    """'holds' or 'does not hold'."""
    return HOLDS if self.holds else FAILS

  @property
  def fewer_seeds(self) -> str:
    """Such as ' (1 of 3 seeds)' if a mean in the tables is over more."""
    if self.seeds == self.of_seeds:
      return ''
    return f' ({self.seeds} of {self.of_seeds} seeds)'

  def text(self, unit: str) -> str:
    """Such as 'holds, 0.85 points [0.51, 1.20] (3 seeds)'."""
    seeds = f' ({self.seeds} seeds)' if self.seeds > 1 else ''
    amount = _amount(self.effect, self.interval, unit)
    return f'{self.verdict}, {amount}{self.fewer_seeds or seeds}'


@dataclasses.dataclass(frozen=True)
class Judgement:
  """Findings by row; holds if it does on more than half of the datasets.

  Copies of a dataset have one vote, and one effect: their mean.
  """

  findings: tuple[Finding, ...]

  @functools.cached_property
  def _by_dataset(self) -> Mapping[tuple[str, ...], Sequence[Finding]]:
    copies = defaultdict(list)
    for finding in self.findings:
      copies[finding.datasets].append(finding)
    return copies

  @property
  def held(self) -> int:
    """On how many datasets it holds."""
    return sum(
      2 * sum(copy.holds for copy in copies) > len(copies)
      for copies in self._by_dataset.values()
    )

  @property
  def verdict(self) -> str:
    """'holds', 'does not hold' or 'not enough runs'."""
    if not self.findings:
      return OPEN
    return HOLDS if 2 * self.held > len(self._by_dataset) else FAILS

  @functools.cached_property
  def _effects(self) -> tuple[float, ...]:
    return tuple(
      sum(copy.effect for copy in copies) / len(copies)
      for copies in self._by_dataset.values()
    )

  @property
  def effect(self) -> float | None:
    """Mean over datasets."""
    return sum(self._effects) / len(self._effects) if self.findings else None

  @property
  def interval(self) -> Interval | None:
    """Bootstrap over datasets; for a single dataset over its seeds."""
    if len(self.findings) == 1:
      return self.findings[0].interval
    return statistics.mean_interval(self._effects)

  @property
  def brief(self) -> str:
    """Such as 'holds (12 of 15 datasets)'."""
    if not self.findings:
      return self.verdict
    if len(self.findings) == 1:
      return f'{self.verdict} ({self.findings[0].label})'
    datasets = naming.counted(len(self._by_dataset), 'dataset')
    return f'{self.verdict} ({self.held} of {datasets})'

  def summary(self, unit: str) -> str:
    """Such as 'holds (12 of 15 datasets), mean 1.20 points [0.51, 1.86]'."""
    if self.effect is None:
      return self.brief
    amount = _amount(self.effect, self.interval, unit)
    first, *others = self.findings
    if others:
      return f'{self.brief}, mean {amount}'
    return f'{self.brief}, {amount}{first.fewer_seeds}'


def _amount(effect: float, interval: Interval | None, unit: str) -> str:
  ends = f' [{interval[0]:.2f}, {interval[1]:.2f}]' if interval else ''
  return f'{effect:.2f} {unit}{ends}'
