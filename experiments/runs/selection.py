"""The runs that options select, checked before anything runs."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.paper import conditions
from experiments.paper.conditions import Column
from experiments.paper.protocol import (
  RATES,
  Data,
  Protocol,
  Run,
  runs_of,
  unique,
)
from experiments.training import plugins

if TYPE_CHECKING:
  from experiments.datasets import Dataset, Loader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """Cells of the grid.

  Attributes:
    table: tables of the paper with all their conditions: 2, 3, 4 (or 4-C1 and
      4-C2), 5, 6.
    condition: names of conditions, such as uSF+BN or frSF-10%+BN+BM.
    dataset: names of datasets, such as mnist; see `list`.
    rate: learning rates as multiples of the base rate.
    seed: seeds; several of them give means and intervals.
    data_dir: folder with NAME.npz files or image folders.
    architecture: network for datasets of your own: mnist, cifar, svhn, general
      or timit (default: by the size of the pictures).
    test_share: share of each class to test on, for datasets of your own without
      a test part.
    plugin: Python file with conditions, rules or networks of your own.
    network: network of the plugin to use instead of the dataset's own.
  """

  table: tuple[str, ...] = ()
  condition: tuple[str, ...] = ()
  dataset: tuple[str, ...] = ('digits',)
  rate: tuple[float, ...] = RATES
  seed: tuple[int, ...] = (0,)
  data_dir: Path | None = None
  architecture: str | None = None
  test_share: float | None = None
  plugin: Path | None = None
  network: str | None = None

  def loader(self) -> 'Loader':
    """Loads the selected datasets."""
    from experiments.datasets import Loader

    return Loader(self.data_dir, self.architecture, self.test_share)

  @functools.cached_property
  def _source(self) -> str:
    """The plugin's source, read once so that all runs have the same."""
    return plugins.read(self.plugin)

  def tables(self) -> list[conditions.Table]:
    """The tables by name.

    Raises:
      ValueError: for an unknown name.
    """
    return [
      table for name in self.table for table in conditions.find_tables(name)
    ]

  def columns(self) -> list[Column]:
    """The columns by name; those of the plugin come first.

    Raises:
      ValueError: for an unknown name.
    """
    own = plugins.load(self._source)
    chosen = [
      Column(name, (own.conditions[name],))
      if name in own.conditions
      else conditions.find(name, own.rules)
      for name in self.condition
    ]
    for table in self.tables():
      chosen += map(conditions.find, (table.baseline, *table.columns))
    return chosen

  def runs(self, protocol: Protocol, devices: int = 1) -> list[Run]:
    """The runs, dataset by dataset, condition by condition.

    Prints which of them have smaller mini-batches than planned.

    Args:
      protocol: of all.
      devices: over which mini-batches are divided.

    Raises:
      ValueError: for an unknown name or an impossible number.
      DatasetError: for a dataset that is missing or broken.
    """
    from experiments import datasets

    protocol.check()
    columns = self.columns()
    for name in self.dataset:  # before the first one is loaded
      if name not in datasets.SPECS and self.data_dir is None:
        datasets.find(name)
    if not columns:
      raise ValueError(
        'nothing is selected: say --table (2, 3, 4-C1, ...) or --condition '
        '(uSF+BN, ...); `python -m experiments list` shows all.'
      )
    for option in ('dataset', 'rate', 'seed'):
      if not getattr(self, option):
        raise ValueError(f'nothing is selected: --{option} names none.')
    return unique(
      run
      for name in self.dataset
      for run in self._runs_on(name, columns, protocol, devices)
    )

  def _runs_on(
    self, name: str, columns: Sequence[Column], protocol: Protocol, devices: int
  ) -> Iterator[Run]:
    """The runs on one dataset, after checking that they fit it."""
    from experiments import datasets

    source = self._source
    own = plugins.load(source)
    if self.network is not None and self.network not in own.networks:
      raise ValueError(
        f'network is {self.network!r}, but must be one of those in NETWORKS of '
        f'the plugin: {", ".join(own.networks) or "it has none"}.'
      )
    if callable(own.networks.get(self.network or '')):
      for option in ('initial_std', 'batch_norm_epsilon'):
        if getattr(protocol, option) != getattr(Protocol, option):
          raise ValueError(
            f'{option} is {getattr(protocol, option)}, but network '
            f'{self.network!r} of the plugin is a function, whose module has '
            f'its own: leave out --{option.replace("_", "-")}.'
          )
    data = self.loader()(name, protocol.train_size)
    # The digest of a dataset of one's own does not say which network it has.
    known = data.spec.name in datasets.SPECS
    network = self.network or ('' if known else data.spec.architecture)
    given = protocol.initial_stds
    layers = datasets.WEIGHT_LAYERS[data.spec.architecture]
    if self.network is None and len(given) > layers:
      raise ValueError(
        f'initial_std is {given}, one for each of {len(given)} layers, but the '
        f'network of {data.spec.name} has {layers} layers of weights; give at '
        'most so many (the last one is for all remaining layers).'
      )
    warned = set()  # the same for all rates and seeds
    for column in columns:
      uses_plugin = self.network is not None or any(
        condition.rule in own.rules for condition in column.conditions
      )
      for run in runs_of(
        column,
        self.rate,
        self.seed,
        dataset=Data(data.spec.name, data.digest, data.source, data.note),
        protocol=protocol,
        network=network,
        plugin=source if uses_plugin else '',
      ):
        run.check()
        warning = check_images(run, data, column.name, devices)
        if warning and warning not in warned:
          warned.add(warning)
          print(warning, flush=True)
        yield run


def shard_of(runs: Sequence[Run], shard: str | None) -> Sequence[Run]:
  """The I-th of N equal parts of the runs, for a shard such as 1/4.

  Raises:
    ValueError: if the shard is not of this form.
  """
  if shard is None:
    return runs
  found = re.fullmatch(r'(\d+)/(\d+)', shard)
  part, parts = map(int, found.groups()) if found else (0, 0)
  if not 1 <= part <= parts:
    raise ValueError(
      f'shard must be I/N with I from 1 to N, such as 1/4, not {shard!r}.'
    )
  return runs[part - 1 :: parts]


def check_images(
  run: Run, data: 'Dataset', name: str, devices: int = 1
) -> str | None:
  """Checks, before anything runs, that a run fits its dataset.

  The first mini-batches must have the planned size. Later, larger ones, which
  no name can change, use all images where there are fewer.

  Args:
    run: what is to be done.
    data: its dataset.
    name: of its condition.
    devices: over which mini-batches are divided.

  Returns:
    A warning if mini-batches are smaller than planned.

  Raises:
    ValueError: if a class would have no image on one side of the held-out
      split, there are too few images for the first mini-batches, or one cannot
      be divided into groups or over devices.
  """
  count, classes = len(data.y_train), len(set(data.y_train.tolist()))
  held_out = run.protocol.held_out(count)
  if held_out and not classes <= held_out <= count - classes:
    raise ValueError(
      f'holdout is {run.protocol.holdout}: {held_out} of the {count} training '
      f'images of {run.dataset.name}, which has {classes} classes. Both sides '
      'must have at least as many images; change --holdout (0 holds out none) '
      'or --train-size.'
    )
  trained, plan = count - held_out, run.condition.batch_plan
  images = (
    f'the images of {run.dataset.name} to train on ({count}, less {held_out} '
    'held out)'
  )
  if plan[0][1] > trained:
    raise ValueError(
      f'condition is {name!r}, with mini-batches of {plan[0][1]}, but they can '
      f'have at most {trained}, {images}. Put a smaller number at the end of '
      'its name (as in SGD-10), or change --train-size or --holdout.'
    )
  cut = sorted({size for _, size in plan if size > trained})
  for size in run.batch_sizes(trained):
    for option, parts in (
      ('batch_norm_groups', run.protocol.batch_norm_groups),
      ('devices', devices),
    ):
      if size % parts:
        less = f' ({", ".join(map(str, cut))} are planned)' if cut else ''
        raise ValueError(
          f'{option} is {parts}, but must divide every mini-batch of condition '
          f'{name!r}, and one has {size} images{less}, of {trained}, {images}. '
          f'Change --{option.replace("_", "-")}, --train-size or --holdout.'
        )
  if not cut:
    return None
  return (
    f'{name}: the mini-batches of {" and ".join(map(str, cut))} that follow '
    f'those of {plan[0][1]} have only {trained}, all of {images}.'
  )
