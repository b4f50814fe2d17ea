"""Runs grouped into studies (one per protocol) and cells.

Two runs are comparable when their protocols are equal: such runs make a study,
and different studies are never mixed. A cell is a condition on a dataset.
"""

import dataclasses
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.paper import published as paper
from experiments.paper.conditions import names_of
from experiments.paper.protocol import Protocol
from experiments.report import naming
from experiments.report.cells import Cell
from experiments.report.runs import Outcome, Record, Run, read

_DEFAULTS = dataclasses.asdict(Protocol())


class EmptyStoreError(ValueError):
  """There is nothing to report."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A dataset of a study.

  Attributes:
    label: its name, and where there are several copies which one.
    name: the dataset's; where it has other classes than the paper's, how many.
    dataset: what the runs call it.
    digest: of its images and labels.
    sources: where it was read.
    notes: how it differs from the paper's.
  """

  label: str
  name: str
  dataset: str
  digest: str
  sources: tuple[str, ...]
  notes: tuple[str, ...]

  @property
  def in_paper(self) -> bool:
    """Whether the paper has this dataset, with as many classes."""
    return self.name in paper.datasets()


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """All runs of one protocol.

  Attributes:
    number: 1 for the protocol with most runs.
    fields: the protocol.
    rows: its datasets by label, in the paper's order, others last.
    cells: by (row label, condition).
    runs: all of its runs.
  """

  number: int
  fields: Mapping[str, Any]
  rows: Mapping[str, Row]
  cells: Mapping[tuple[str, str], Cell]
  runs: Sequence[Run]

  @property
  def title(self) -> str:
    """Such as 'Protocol 1: 65 epochs, all training images'.

    Besides these it names what is not as by default.
    """
    size = self.fields.get('train_size')
    parts = [
      f'{self.fields.get("epochs", "?")} epochs',
      'all training images' if size is None else f'{size} training images',
      *(
        f'{key.replace("_", " ")} {" ".join(naming.words(value))}'
        for key, value in sorted(self.fields.items())
        if key not in ('epochs', 'train_size')
        and value != _DEFAULTS.get(key, value)
      ),
    ]
    return f'Protocol {self.number}: ' + ', '.join(parts)

  @property
  def unfinished(self) -> list[Run]:
    """Runs that were interrupted or failed."""
    return [run for run in self.runs if run.outcome is None]

  def chance(self, label: str) -> float | None:
    """Error of guessing on a row, in percent."""
    outcome = self._an_outcome.get(label)
    return outcome and outcome.chance

  def train_images(self, label: str) -> int | None:
    """How many images of a row are trained on."""
    outcome = self._an_outcome.get(label)
    return outcome and outcome.train_images

  @functools.cached_property
  def _an_outcome(self) -> Mapping[str, Outcome]:
    """By label, that of any run: what is asked of it is the same in all."""
    return {
      label: run.outcome
      for (label, _), cell in self.cells.items()
      for run in cell.runs
      if run.outcome
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
  """Everything a report shows: studies, most runs first, and warnings."""

  studies: Sequence[Study]
  warnings: Sequence[str]


def gather(records: Iterable[Record]) -> Store:
  """Reads, checks and groups the records of a results folder.

  Raises:
    EmptyStoreError: there is no readable run; says how to make one.
  """
  runs, warnings = read(records)
  if not runs:
    raise EmptyStoreError(
      '\n'.join(
        (
          *warnings,
          'the results folder has no runs to report. Fill it, for example '
          'with `python -m experiments demo` (minutes, no downloads) or '
          '`python -m experiments run --table 2 --dataset mnist`.',
        )
      )
    )
  groups = defaultdict(list)
  for run in runs:
    groups[run.protocol].append(run)
  fields = {key: json.loads(key) for key in groups}
  order = sorted(groups, key=lambda key: (-len(groups[key]), key))
  studies = [
    _study(number, fields[key], groups[key])
    for number, key in enumerate(order, start=1)
  ]
  return Store(studies, warnings)


def _study(number: int, fields: Mapping, runs: list[Run]) -> Study:
  rows = _rows(runs)
  labels = {(row.dataset, row.digest): row.label for row in rows}
  content = defaultdict(list)
  for run in runs:
    for name in names_of(run):
      content[labels[run.dataset, run.digest], name].append(run)
  cells = {
    (label, name): Cell(label, name, naming.plans(name), members)
    for (label, name), members in content.items()
  }
  return Study(number, fields, {r.label: r for r in rows}, cells, runs)


def _rows(runs: Iterable[Run]) -> list[Row]:
  digests = defaultdict(list)
  for run in runs:
    digests[run.dataset, run.digest].append(run)
  names = {key: _name(key[0], members) for key, members in digests.items()}
  copies = Counter(names.values())
  known = {name: place for place, name in enumerate(paper.datasets())}
  rows = []
  for key in sorted(
    digests, key=lambda key: (known.get(key[0], len(known)), key)
  ):
    (dataset, digest), name, members = key, names[key], digests[key]
    several = f' [{digest[:8]}]' if copies[name] > 1 else ''
    rows.append(
      Row(
        name + several,
        name,
        dataset,
        digest,
        tuple(sorted({run.source for run in members} - {''})),
        tuple(sorted({run.note for run in members} - {''})),
      )
    )
  return rows


def _name(dataset: str, runs: Iterable[Run]) -> str:
  """A part of the paper's classes is easier, and not its dataset."""
  chance = next((run.outcome.chance for run in runs if run.outcome), None)
  if chance is None or dataset not in paper.datasets():
    return dataset
  classes = round(100 / (100 - chance))
  if classes == paper.classes(dataset):
    return dataset
  return f'{dataset} ({classes} classes)'
