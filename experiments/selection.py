"""The runs that options select, and what loads their datasets."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import datasets
from experiments.datasets import WEIGHT_LAYERS, Dataset
from experiments.options import Selection
from experiments.paper import conditions
from experiments.paper import protocol as grid
from experiments.paper.protocol import Run
from experiments.training.holdout import check_batches, check_holdout


@dataclasses.dataclass(frozen=True)
class Loader:
  """Loads the dataset of a run; nothing is kept in memory."""

  data_dir: Path | None

  def __call__(self, run: Run) -> Dataset:
    """The dataset.

    Raises:
      DatasetError: if it is missing or broken.
    """
    return datasets.load(
      run.dataset,
      data_dir=self.data_dir,
      train_size=run.protocol.train_size,
    )


def selected_tables(selection: Selection) -> list[conditions.Table]:
  """The tables of a selection.

  Raises:
    ValueError: for an unknown name.
  """
  return [
    table for name in selection.table for table in conditions.find_tables(name)
  ]


def selected_runs(
  selection: Selection, protocol: grid.Protocol, devices: int = 1
) -> list[Run]:
  """The runs of a selection, dataset by dataset, condition by condition.

  Prints which of them have smaller mini-batches than planned.

  Args:
    selection: which.
    protocol: of all.
    devices: of all processes, to divide mini-batches over.

  Raises:
    ValueError: for an unknown name or an impossible number.
  """
  chosen = [conditions.find(name) for name in selection.condition]
  for table in selected_tables(selection):
    chosen += map(conditions.find, (table.baseline, *table.columns))
  specs = [datasets.find(name) for name in selection.dataset]
  if not chosen:
    raise ValueError(
      'nothing is selected: say --table (2, 3, 4-C1, ...) or --condition '
      '(uSF+BN, ...); `python -m experiments list` shows all.'
    )
  for option in ('dataset', 'rate', 'seed'):
    if not getattr(selection, option):
      raise ValueError(f'nothing is selected: --{option} names none.')
  return grid.unique(
    run
    for name, spec in zip(selection.dataset, specs, strict=True)
    for run in _runs_on(name, spec, selection, protocol, chosen, devices)
  )


def _runs_on(
  name: str,
  spec: datasets.Spec,
  selection: Selection,
  protocol: grid.Protocol,
  chosen: Sequence[conditions.Condition],
  devices: int,
) -> Iterator[Run]:
  """The runs on one dataset, once it is sure that they can be done."""
  data = datasets.load(
    name, data_dir=selection.data_dir, train_size=protocol.train_size
  )
  given, layers = protocol.initial_stds, WEIGHT_LAYERS[spec.architecture]
  if len(given) > layers:
    raise ValueError(
      f'initial_std is {given}, one for each of {len(given)} layers, but the '
      f'network of {spec.name} has {layers} layers of weights; give at most so '
      'many (the last one is that of all further layers).'
    )
  said = set()  # the same for all rates and seeds
  for condition in chosen:
    runs = grid.runs_of(
      condition,
      selection.rate,
      selection.seed,
      dataset=spec.name,
      digest=data.digest,
      source=data.source,
      note=data.note,
      protocol=protocol,
    )
    for run in runs:
      check_holdout(data.y_train, run)
      line = check_batches(len(data.y_train), run, condition.name, devices)
      if line and line not in said:
        said.add(line)
        print(line, flush=True)
      yield run
