"""The paper's conclusions, judged by our cells and by the paper's own numbers.

The same code judges three sources of errors: our best test errors (the paper's
selection), our held-out test errors, and the numbers in the paper.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from experiments.datasets.specs import SPECS
from experiments.paper import published as paper
from experiments.paper import statistics
from experiments.paper.conclusions import (
  CONCLUSIONS,
  AcrossDatasets,
  Conclusion,
)
from experiments.paper.statistics import Interval
from experiments.report.frame import Results

HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not enough runs'


@dataclasses.dataclass(frozen=True)
class Finding:
  """The verdict on a row, or over several datasets.

  Attributes:
    label: the row's, or how many datasets.
    datasets: what it is about.
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
  def fewer_seeds(self) -> str:
    """Such as ' (1 of 3 seeds)' if the tables' means are over more."""
    if self.seeds == self.of_seeds:
      return ''
    return f' ({self.seeds} of {self.of_seeds} seeds)'

  def text(self, unit: str) -> str:
    """Such as 'holds, 0.85 points [0.51, 1.20] (3 seeds)'."""
    verdict = HOLDS if self.holds else FAILS
    seeds = f' ({self.seeds} seeds)' if self.seeds > 1 else ''
    amount = _amount(self.effect, self.interval, unit)
    return f'{verdict}, {amount}{self.fewer_seeds or seeds}'


@dataclasses.dataclass(frozen=True)
class Judgement:
  """Findings by row; holds if it does on more than half of the datasets.

  Copies of a dataset have one vote, and one effect: their mean.
  """

  findings: tuple[Finding, ...]

  @functools.cached_property
  def _by_dataset(self) -> Sequence[Sequence[Finding]]:
    copies = defaultdict(list)
    for finding in self.findings:
      copies[finding.datasets].append(finding)
    return list(copies.values())

  @property
  def held(self) -> int:
    """On how many datasets it holds."""
    return sum(
      2 * sum(copy.holds for copy in copies) > len(copies)
      for copies in self._by_dataset
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
      for copies in self._by_dataset
    )

  @property
  def effect(self) -> float:
    """Mean over datasets, of which there must be findings."""
    return sum(self._effects) / len(self._effects)

  @property
  def interval(self) -> Interval | None:
    """Bootstrap over datasets; for a single dataset over its seeds."""
    if len(self.findings) == 1:
      return self.findings[0].interval
    return statistics.mean_interval(self._effects)

  @property
  def where(self) -> str:
    """Such as 'MNIST' or '12 of 15 datasets'; needs findings."""
    if len(self.findings) == 1:
      return self.findings[0].label
    count = len(self._by_dataset)
    return f'{self.held} of {count} dataset{"" if count == 1 else "s"}'

  def amount(self, unit: str) -> str:
    """Such as 'mean 1.20 points [0.51, 1.86]'; needs findings."""
    first, *others = self.findings
    amount = _amount(self.effect, self.interval, unit)
    return f'mean {amount}' if others else amount + first.fewer_seeds

  def summary(self, unit: str) -> str:
    """Such as 'holds (12 of 15 datasets), mean 1.20 points [0.51, 1.86]'."""
    if not self.findings:
      return OPEN
    return f'{self.verdict} ({self.where}), {self.amount(unit)}'


def _amount(effect: float, interval: Interval | None, unit: str) -> str:
  ends = f' [{interval[0]:.2f}, {interval[1]:.2f}]' if interval else ''
  return f'{effect:.2f} {unit}{ends}'


@dataclasses.dataclass(frozen=True)
class Claim:
  """A conclusion of the paper, judged by one protocol's cells and by the paper.

  `paper_here` is the paper's on the datasets of `best`, and on all if it has
  none of them.
  """

  protocol: str
  row: Conclusion | AcrossDatasets
  best: Judgement
  held_out: Judgement
  paper: Judgement
  paper_here: Judgement

  @property
  def decided(self) -> bool:
    """Whether there are enough runs for a verdict."""
    return self.best.verdict != OPEN

  @property
  def agrees(self) -> bool:
    """Whether the verdict is that of the paper's numbers for the datasets."""
    return self.best.verdict == self.paper_here.verdict

  @property
  def sources(self) -> dict[str, Judgement]:
    """The four judgements by the names that files give them."""
    return {
      'best test error': self.best,
      'held-out test error': self.held_out,
      'paper, same datasets': self.paper_here,
      'paper, all datasets': self.paper,
    }


@dataclasses.dataclass(frozen=True)
class _Source:
  """A row's errors in percent, ours or the paper's, by condition and seed."""

  label: str
  dataset: str
  chance: float | None
  train_images: int | None
  errors: Mapping[str, Mapping[int, float]]


def judge(results: Results) -> list[Claim]:
  """All conclusions for every protocol, in the paper's order."""
  claims = []
  for protocol in results.protocols:
    ours, held_out = (
      [
        _Source(row.label, row.name, row.chance, row.train_images, {
          name: selection.values
          for (*key, name), cell in results.cells.items()
          if tuple(key) == row.key and cell.settled
          and (selection := getattr(cell, which))
        })
        for row in results.rows.values()
        if row.protocol == protocol
      ]
      for which in ('best', 'held_out')
    )  # fmt: skip
    for row in CONCLUSIONS:
      best, everywhere = _judged(row, ours), _papers(row)
      names = {name for finding in best.findings for name in finding.datasets}
      here = _papers(row, frozenset(names))
      here = here if here.findings else everywhere
      held = _judged(row, held_out)
      claims.append(Claim(protocol, row, best, held, everywhere, here))
  return claims


@functools.cache
def _published() -> list[_Source]:
  """The paper's own numbers."""
  errors = defaultdict(dict)
  for (dataset, condition), error in paper.by_condition().items():
    errors[dataset][condition] = {0: error}
  return [
    _Source(name, name, 100 * (1 - 1 / SPECS[name].classes), SPECS[name].train,
            errors[name])
    for name in paper.datasets()
  ]  # fmt: skip


@functools.cache
def _papers(
  row: Conclusion | AcrossDatasets, datasets: frozenset[str] | None = None
) -> Judgement:
  """The paper's own numbers judged, on the named datasets or on all."""
  named = paper.datasets() if datasets is None else datasets
  return _judged(row, [of for of in _published() if of.dataset in named])


def _judged(
  row: Conclusion | AcrossDatasets, sources: Iterable[_Source]
) -> Judgement:
  """Applies a conclusion to every row that has what it needs."""
  if isinstance(row, AcrossDatasets):
    found = [_across(row, sources)]
  else:
    found = [_finding(row, source) for source in sources]
  return Judgement(tuple(finding for finding in found if finding))


def _samples(
  source: _Source, needs: Iterable[str], helps: Iterable[str] = ()
) -> dict[str, list[float]] | None:
  """Errors over the seeds that all conditions share; None if there is none."""
  found = {name: source.errors.get(name, {}) for name in needs}
  seeds = set.intersection(*(set(sample) for sample in found.values()))
  if not seeds:
    return None
  for name in helps:
    if seeds <= set(source.errors.get(name, {})):
      found[name] = source.errors[name]
  return {
    name: [sample[seed] for seed in sorted(seeds)]
    for name, sample in found.items()
  }


def _finding(row: Conclusion, source: _Source) -> Finding | None:
  samples, chance = _samples(source, row.needs, row.helps), source.chance
  if samples is None or chance is None:
    return None

  def effect(*means: np.ndarray) -> np.ndarray:
    return row.effect(dict(zip(samples, means, strict=True)), chance)

  means = {name: float(np.mean(values)) for name, values in samples.items()}
  value = float(effect(*(np.asarray(mean) for mean in means.values())))
  value = round(value, 6)  # 55.15 - 52.15 is 3, not 2.9999...
  return Finding(
    source.label,
    (source.dataset,),
    value,
    statistics.effect_interval(tuple(samples.values()), effect),
    len(next(iter(samples.values()))),
    max(len(source.errors[name]) for name in samples),
    bool(row.holds(value, means, chance)),
  )


def _across(row: AcrossDatasets, sources: Iterable[_Source]) -> Finding | None:
  found = defaultdict(list)
  for source in sources:
    samples = _samples(source, row.needs)
    if samples and source.train_images is not None:
      gain = np.mean(samples[row.without]) - np.mean(samples[row.with_bm])
      found[source.dataset].append((source.train_images, float(gain)))
  # Copies of a dataset are one.
  pairs = [np.mean(copies, axis=0) for copies in found.values()]
  sizes, gains = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
  effect = statistics.rank_correlation(sizes, gains)
  if effect is None:
    return None
  return Finding(
    f'over {len(found)} datasets',
    tuple(found),
    effect,
    statistics.rank_interval(sizes, gains),
    0,
    0,
    effect <= row.limit,
  )
