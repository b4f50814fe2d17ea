"""Claims: the paper's conclusions judged by a study's cells.

The same code judges three sources: our best-validation errors (the paper's way
of choosing), our held-out errors, and the paper's own numbers.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from experiments.paper import published as paper
from experiments.paper.conclusions import (
  CONCLUSIONS,
  AcrossDatasets,
  Conclusion,
)
from experiments.report import statistics
from experiments.report.findings import Finding, Judgement
from experiments.report.studies import Store, Study

Sample = Mapping[int, float]  # error in % by seed


@dataclasses.dataclass(frozen=True)
class Source:
  """Where errors come from.

  Attributes:
    datasets: by row label, the name of its dataset.
    errors: by (label, condition): error by seed; None if not settled.
    chance: by label: error of guessing.
    size: by label: number of images trained on.
  """

  datasets: Mapping[str, str]
  errors: Callable[[str, str], Sample | None]
  chance: Callable[[str], float | None]
  size: Callable[[str], int | None]

  def of(self, datasets: Collection[str]) -> 'Source':
    """Those rows that are of the named datasets."""
    rows = {
      label: dataset
      for label, dataset in self.datasets.items()
      if dataset in datasets
    }
    return dataclasses.replace(self, datasets=rows)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A conclusion of the paper, judged by a study and by the paper itself.

  `paper_here` is the paper's on the datasets of `best_validation`, and on all
  if it has none of them.
  """

  study: str
  conclusion: str
  key: str
  statement: str
  how: str
  unit: str
  needs: tuple[str, ...]
  best_validation: Judgement
  held_out: Judgement
  paper: Judgement
  paper_here: Judgement

  @property
  def verdict(self) -> str:
    """By best validation error, the paper's own way of choosing."""
    return self.best_validation.verdict


def claims(store: Store) -> list[Claim]:
  """All conclusions for all studies."""
  return [claim for study in store.studies for claim in claims_of(study)]


def claims_of(study: Study) -> list[Claim]:
  """All conclusions for one study, in the paper's order."""
  ours, honest = _ours(study, 'best_validation'), _ours(study, 'held_out')
  return [_claim(study.title, row, ours, honest) for row in CONCLUSIONS]


def _claim(
  study: str, row: Conclusion | AcrossDatasets, ours: Source, honest: Source
) -> Claim:
  judged, everywhere = judge(row, ours), _papers(row)
  here = _papers(
    row,
    frozenset(name for found in judged.findings for name in found.datasets),
  )
  return Claim(
    study=study,
    conclusion=row.conclusion,
    key=row.key,
    statement=row.statement,
    how=row.how,
    unit=row.unit,
    needs=row.needs,
    best_validation=judged,
    held_out=judge(row, honest),
    paper=everywhere,
    paper_here=here if here.findings else everywhere,
  )


@functools.cache
def _papers(
  row: Conclusion | AcrossDatasets, datasets: frozenset[str] | None = None
) -> Judgement:
  """The paper's own numbers judged, on the named datasets or on all."""
  published = _published()
  return judge(row, published if datasets is None else published.of(datasets))


def judge(row: Conclusion | AcrossDatasets, source: Source) -> Judgement:
  """Applies a conclusion to every row that has what it needs."""
  if isinstance(row, AcrossDatasets):
    finding = _across(row, source)
    return Judgement((finding,) if finding else ())
  found = (_finding(row, source, label) for label in source.datasets)
  return Judgement(tuple(finding for finding in found if finding))


def _samples(
  source: Source, label: str, needs: Iterable[str], helps: Iterable[str] = ()
) -> dict[str, list[float]] | None:
  """Errors over the seeds that all conditions share; None if there is none."""
  found = {name: source.errors(label, name) for name in needs}
  needed = {name: sample for name, sample in found.items() if sample}
  if len(needed) < len(found):
    return None
  seeds = sorted(set.intersection(*(set(s) for s in needed.values())))
  if not seeds:
    return None
  for name in helps:
    sample = source.errors(label, name)
    if sample and set(seeds) <= set(sample):
      needed[name] = sample
  return {name: [s[seed] for seed in seeds] for name, s in needed.items()}


def _finding(
  row: Conclusion, source: Source, label: str
) -> Finding | None:  # fmt: skip
  samples = _samples(source, label, row.needs, row.helps)
  chance = source.chance(label)
  if samples is None or chance is None:
    return None

  def effect(*means: np.ndarray) -> np.ndarray:
    return row.effect(dict(zip(samples, means, strict=True)), chance)

  means = {name: float(np.mean(values)) for name, values in samples.items()}
  value = float(effect(*(np.asarray(mean) for mean in means.values())))
  value = round(value, 6)  # 55.15 - 52.15 is 3, not 2.9999...
  return Finding(
    label,
    (source.datasets[label],),
    value,
    statistics.effect_interval(tuple(samples.values()), effect),
    len(next(iter(samples.values()))),
    max(len(source.errors(label, name) or ()) for name in samples),
    bool(row.holds(value, means, chance)),
  )


def _across(row: AcrossDatasets, source: Source) -> Finding | None:
  found = defaultdict(list)
  for label, dataset in source.datasets.items():
    samples = _samples(source, label, row.needs)
    size = source.size(label)
    if samples and size is not None:
      gain = np.mean(samples[row.without]) - np.mean(samples[row.with_bm])
      found[dataset].append((size, float(gain)))
  if not found:
    return None
  # Copies of a dataset are one.
  sizes, gains = np.transpose(
    [np.mean(copies, axis=0) for copies in found.values()]
  )
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


def _ours(study: Study, which: str) -> Source:
  def errors(label: str, condition: str) -> Sample | None:
    cell = study.cells.get((label, condition))
    result = getattr(cell, which) if cell and cell.settled else None
    return result.values if result else None

  return Source(
    {label: row.name for label, row in study.rows.items()},
    errors,
    study.chance,
    study.train_images,
  )


def _published() -> Source:
  def errors(dataset: str, condition: str) -> Sample | None:
    error = paper.by_condition().get((dataset, condition))
    return None if error is None else {0: error}

  return Source(
    {dataset: dataset for dataset in paper.datasets()},
    errors,
    lambda dataset: 100 * (1 - 1 / paper.classes(dataset)),
    paper.train_images,
  )
