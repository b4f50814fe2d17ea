"""What a statement comes to on each row of a study, and on all of them."""

import dataclasses

from experiments.report import statistics
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
    seeds: how many; 0 where that has no meaning.
    holds: the verdict.
  """

  label: str
  datasets: tuple[str, ...]
  effect: float
  interval: Interval | None
  seeds: int
  holds: bool

  @property
  def verdict(self) -> str:
    """'holds' or 'does not hold'."""
    return HOLDS if self.holds else FAILS

  def text(self, unit: str) -> str:
    """Such as 'holds, 0.85 points [0.51, 1.20] (3 seeds)'."""
    seeds = f' ({self.seeds} seeds)' if self.seeds > 1 else ''
    return f'{self.verdict}, {_amount(self.effect, self.interval, unit)}{seeds}'


@dataclasses.dataclass(frozen=True)
class Judgement:
  """Findings by dataset; holds if it does on more than half of them."""

  findings: tuple[Finding, ...]

  @property
  def held(self) -> int:
    """On how many datasets it holds."""
    return sum(finding.holds for finding in self.findings)

  @property
  def verdict(self) -> str:
    """'holds', 'does not hold' or 'not enough runs'."""
    if not self.findings:
      return OPEN
    return HOLDS if 2 * self.held > len(self.findings) else FAILS

  @property
  def effect(self) -> float | None:
    """Mean over datasets."""
    if not self.findings:
      return None
    return sum(f.effect for f in self.findings) / len(self.findings)

  @property
  def interval(self) -> Interval | None:
    """Bootstrap over datasets; for a single dataset over its seeds."""
    if len(self.findings) == 1:
      return self.findings[0].interval
    return statistics.mean_interval(tuple(f.effect for f in self.findings))

  @property
  def brief(self) -> str:
    """Such as 'holds (12 of 15 datasets)'."""
    if not self.findings:
      return self.verdict
    if len(self.findings) == 1:
      return f'{self.verdict} ({self.findings[0].label})'
    return f'{self.verdict} ({self.held} of {len(self.findings)} datasets)'

  def summary(self, unit: str) -> str:
    """Such as 'holds (12 of 15 datasets), mean 1.20 points [0.51, 1.86]'."""
    if self.effect is None:
      return self.brief
    mean = 'mean ' if len(self.findings) > 1 else ''
    return f'{self.brief}, {mean}{_amount(self.effect, self.interval, unit)}'


def _amount(effect: float, interval: Interval | None, unit: str) -> str:
  ends = f' [{interval[0]:.2f}, {interval[1]:.2f}]' if interval else ''
  return f'{effect:.2f} {unit}{ends}'
