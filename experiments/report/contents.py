"""Everything a report shows, computed once for all of its files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from experiments.report import comparisons, disagreement, plots, protocols
from experiments.report.figures import Picture, drawn
from experiments.report.protocols import Comparison
from experiments.report.studies import Store, Study
from experiments.report.tables import Grid, grids
from experiments.report.verdicts import Claim, claims_of


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
  """A study's part of the report.

  Attributes:
    study: the protocol and its cells.
    grids: tables that have results.
    claims: the paper's conclusions.
    sentences: what does not agree with the paper.
    against_p: error against p, if Experiment B was run.
    pictures: by (table's name, row label): learning curves and error by rate.
  """

  study: Study
  grids: Sequence[Grid]
  claims: Sequence[Claim]
  sentences: Sequence[str]
  against_p: Picture | None
  pictures: Mapping[tuple[str, str], Sequence[Picture]]


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
  """A whole report."""

  store: Store
  story: Picture | None
  comparisons: Sequence[Comparison]
  sections: Sequence[Section]

  def pictures(self) -> Iterator[Picture]:
    """Every picture, once."""
    if self.story:
      yield self.story
    for section in self.sections:
      if section.against_p:
        yield section.against_p
      for made in section.pictures.values():
        yield from made


def contents(store: Store) -> Contents:
  """Computes tables, claims, sentences and pictures."""
  return Contents(
    store,
    comparisons.story(store),
    protocols.side_by_side(store),
    [_section(study) for study in store.studies],
  )


def _section(study: Study) -> Section:
  found, claims = grids(study), claims_of(study)
  plans = {
    (grid.name, line.label): plots.for_line(study, grid, line)
    for grid in found
    for line in grid.lines
    if line.ours
  }
  made = iter(drawn([plan for each in plans.values() for plan in each]))
  return Section(
    study,
    found,
    claims,
    disagreement.sentences(study, found, claims),
    comparisons.against_p(study),
    {key: [next(made) for _ in each] for key, each in plans.items()},
  )
