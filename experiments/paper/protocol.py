"""A run: condition, dataset, protocol, rate and seed, and its identity."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.paper.conditions import Column, Condition

VERSION = 2  # of the configuration in files
RATES = (100.0, 10.0, 1.0, 0.1, 0.01)


def _check(
  name: str, value: float, allowed: str, holds: Callable[[float], bool]
) -> None:
  """Raises unless ``value`` is finite and ``holds`` is true of it."""
  if not (math.isfinite(value) and holds(value)):
    raise ValueError(f'{name} must be {allowed}, not {value!r}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """The settings that all runs of a comparison share.

  Attributes:
    epochs: number of epochs. The paper trains 65: 50 at the rate, 10 at a
      tenth and 5 at a hundredth of it. Other numbers keep these proportions.
    train_size: size of a class-balanced subset of the training images (default:
      all).
    holdout: share of the training images that choose rate and epoch.
    base_rate: the learning rate that `--rate` multiplies.
    momentum: momentum of every update.
    weight_decay: weight decay of weights and biases, not of batch
      normalization.
    initial_std: standard deviation of the initial weights; biases are 0.
      Several values are for the layers in order, the last one for all that
      remain.
    input_scale: factor on pixels (0 to 255) minus the training mean image.
    reduction: 'mean' or 'sum' of the gradient over the mini-batch.
    batch_norm_epsilon: added to the variance in batch normalization.
    batch_norm_groups: parts of a mini-batch that are normalized separately.
      With one group per device, each device uses its own statistics.
    calibration_batches: mini-batches averaged for the test statistics.
    layer_metrics: also record signs and angles of every layer, each epoch.
  """

  epochs: int = 65
  train_size: int | None = None
  holdout: float = 0.1
  base_rate: float = 5e-4
  momentum: float = 0.9
  weight_decay: float = 5e-4
  initial_std: float | tuple[float, ...] = 0.01
  input_scale: float = 1.0
  reduction: str = 'mean'
  batch_norm_epsilon: float = 1e-4
  batch_norm_groups: int = 1
  calibration_batches: int = 20
  layer_metrics: bool = False

  def check(self) -> None:
    """Checks the range of every number.

    Raises:
      ValueError: if one is out of its range; names it.
    """
    positive = (
      'epochs', 'base_rate', 'input_scale', 'batch_norm_epsilon',
      'batch_norm_groups', 'calibration_batches',
    )  # fmt: skip
    for name in positive:
      _check(name, getattr(self, name), 'positive', lambda x: x > 0)
    for std in self.initial_stds or (0.0,):
      _check('initial_std', std, 'positive', lambda x: x > 0)
    for name in ('holdout', 'momentum'):
      _check(name, getattr(self, name), 'in [0, 1)', lambda x: 0 <= x < 1)
    _check('weight_decay', self.weight_decay, 'at least 0', lambda x: x >= 0)
    if self.train_size is not None:
      _check('train_size', self.train_size, 'at least 2', lambda x: x >= 2)
    if self.reduction not in ('mean', 'sum'):
      raise ValueError(
        f"reduction must be 'mean' or 'sum', not {self.reduction!r}."
      )

  @property
  def initial_stds(self) -> tuple[float, ...]:
    """``initial_std`` from the input on; the last is for remaining layers."""
    std = self.initial_std
    return std if isinstance(std, tuple) else (std,)

  def held_out(self, images: int) -> int:
    """How many of so many training images are held out."""
    return round(self.holdout * images)

  def rate_factor(self, epoch: int) -> float:
    """The factor on the rate in an epoch, counted from 1.

    The last 15 and the last 5 of 65 epochs (rounded, at least one each where
    there are three epochs or more) have a tenth and a hundredth of the rate.
    """
    last = max(round(self.epochs * 5 / 65), 1)
    middle = max(round(self.epochs * 10 / 65), 1)
    if self.epochs < 3:
      last = middle = 0
    if epoch > self.epochs - last:
      return 0.01
    return 0.1 if epoch > self.epochs - last - middle else 1.0


@dataclasses.dataclass(frozen=True)
class Data:
  """The identity of a dataset.

  Attributes:
    name: the paper's name, or that of one's own dataset.
    digest: identifies images, labels and split.
    source: where the data came from, in words.
    note: how the data differ from the paper's; empty if they do not.
  """

  name: str
  digest: str
  source: str = ''
  note: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training run.

  Attributes:
    condition: how the network is trained.
    dataset: what it is trained on.
    protocol: what all runs of the comparison share.
    rate: multiple of the protocol's base rate.
    seed: of initial weights, order of images, feedback and held-out part.
    network: architecture; empty for the dataset's own.
    plugin: source of the Python file that defines the rule or the network;
      empty if both are built in.
  """

  condition: Condition
  dataset: Data
  protocol: Protocol
  rate: float
  seed: int = 0
  network: str = ''
  plugin: str = ''

  def check(self) -> None:
    """Checks the range of every number.

    Raises:
      ValueError: if one is out of its range; names it.
    """
    self.protocol.check()
    _check('rate', self.rate, 'positive', lambda x: x > 0)
    _check('seed', self.seed, 'from 0 to 2**32 - 1', lambda x: 0 <= x < 2**32)

  def config(self) -> dict[str, Any]:
    """The configuration as it is stored: flat, in JSON's types."""
    data = dataclasses.asdict(self.dataset)
    own = {'network': self.network, 'plugin': self.plugin}
    config = {
      'version': VERSION,
      'dataset': data.pop('name'),
      **data,
      **self.condition.config(),
      'rate': self.rate,
      'seed': self.seed,
      **dataclasses.asdict(self.protocol),
      **{name: value for name, value in own.items() if value},
    }
    return json.loads(json.dumps(config))

  @functools.cached_property
  def run_id(self) -> str:
    """Hash of everything that can change the result."""
    return run_id(self.config())

  def batch_size(self, epoch: int, images: int) -> int:
    """The mini-batch size in an epoch, from 1; at most ``images``."""
    plan = self.condition.batch_plan
    for epochs, size in plan:
      if epochs is None or epoch <= epochs:
        return min(size, images)
      epoch -= epochs
    return min(plan[-1][1], images)

  def statistics_size(self, epoch: int, images: int) -> int:
    """Images per batch-norm mean: one group of a mini-batch."""
    return self.batch_size(epoch, images) // self.protocol.batch_norm_groups

  def batch_sizes(self, images: int) -> list[int]:
    """All mini-batch sizes of the run with so many images, rising."""
    return sorted({min(size, images) for _, size in self.condition.batch_plan})


def run_id(config: Mapping[str, Any]) -> str:
  """The name of a run's folder, from its stored configuration."""
  identity = {k: v for k, v in config.items() if k not in ('source', 'note')}
  # 1 and 1.0 are the same number, and the same run.
  identity = json.loads(json.dumps(identity), parse_int=float)
  text = json.dumps(identity, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:20]


def runs_of(
  column: Column,
  rates: Sequence[float] = RATES,
  seeds: Sequence[int] = (0,),
  **fields: Any,
) -> Iterator[Run]:
  """All runs of one cell: seeds x conditions x rates."""
  for seed in seeds:
    for condition in column.conditions:
      for rate in rates:
        yield Run(condition=condition, rate=float(rate), seed=seed, **fields)


def unique(runs: Iterable[Run]) -> list[Run]:
  """Runs in order without repeats: BM, BM1 and BM-100 are the same runs."""
  return list({run.run_id: run for run in runs}.values())
