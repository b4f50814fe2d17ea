"""A run of the grid: its full configuration, its name, and its neighbours."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.paper.conditions import BatchPlan, Condition

VERSION = 2
RATES = (100.0, 10.0, 1.0, 0.1, 0.01)


def _check(
  name: str, value: float, allowed: str, holds: Callable[[float], bool]
) -> None:
  """Raises unless ``value`` is a finite number of which ``holds`` is true."""
  if not (math.isfinite(value) and holds(value)):
    raise ValueError(f'{name} must be {allowed}, not {value!r}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """What is common to all runs of a comparison; see experiments/README.md.

  Attributes:
    epochs: number of epochs. The paper's 65 are 50 at the rate, 10 at a tenth
      and 5 at a hundredth of it; other numbers are divided in proportion.
    train_size: training images, a class-balanced subset; None takes all.
    holdout: share of the training images that choose rate and epoch.
    base_rate: the rate that the five multiples multiply.
    momentum: of every update.
    weight_decay: of every weight and bias, not of batch normalisation.
    initial_std: standard deviation of the initial weights; biases are 0.
      Several are those of the layers from the input on, the last one of all
      further layers.
    input_scale: factor on pixels (0 to 255) minus the training mean image.
    reduction: of the gradient over the mini-batch, 'mean' or 'sum'.
    batch_norm_epsilon: in units of the variance.
    batch_norm_groups: parts of a mini-batch that are normalised each with its
      own statistics; as many as there are devices: each device its own.
    calibration_batches: mini-batches that the statistics for testing average.
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

  def __post_init__(self):
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
    """``initial_std`` from the input on; the last one of all further layers."""
    std = self.initial_std
    return std if isinstance(std, tuple) else (std,)

  def check_groups(self, size: int) -> None:
    """Checks that a mini-batch can be divided into the groups.

    Raises:
      ValueError: if not.
    """
    if size % self.batch_norm_groups:
      raise ValueError(
        f'batch_norm_groups is {self.batch_norm_groups}, but must divide a '
        f'mini-batch of {size}.'
      )

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training run. Its condition is stated by content, not by name.

  Attributes:
    dataset: the paper's name.
    digest: identifies the data, split included.
    source: where the data came from, in words.
    note: how the data differ from the paper's; empty if they don't.
    rule: name of the feedback rule.
    batch_manhattan: setting of the update.
    batch_norm: 'none', 'plain' or 'affine'.
    batch_plan: (epochs, batch size) in turn.
    frozen: which part does not learn.
    rate: multiple of the protocol's base rate.
    seed: of initial weights, order of images, feedback and held-out part.
    protocol: everything else.
  """

  dataset: str
  digest: str
  source: str = ''
  note: str = ''
  rule: str
  batch_manhattan: int
  batch_norm: str
  batch_plan: BatchPlan
  frozen: str
  rate: float
  seed: int = 0
  protocol: Protocol

  def __post_init__(self):
    _check('rate', self.rate, 'positive', lambda x: x > 0)
    _check('seed', self.seed, 'from 0 to 2**32 - 1', lambda x: 0 <= x < 2**32)
    for _, size in self.batch_plan:
      self.protocol.check_groups(size)

  def config(self) -> dict[str, Any]:
    """The configuration as JSON has it, flat."""
    values = dataclasses.asdict(self)
    protocol = values.pop('protocol')
    config = {'version': VERSION, **values, **protocol}
    return json.loads(json.dumps(config))

  @property
  def run_id(self) -> str:
    """Hash of everything that can change the result."""
    return run_id(self.config())

  def batch_size(self, epoch: int, images: int) -> int:
    """The size of mini-batches of so many images in an epoch, from 1."""
    for epochs, size in self.batch_plan:
      if epochs is None or epoch <= epochs:
        return min(size, images)
      epoch -= epochs
    return min(self.batch_plan[-1][1], images)

  def statistics_size(self, epoch: int, images: int) -> int:
    """Of how many images batch norm takes a mean: a group of a mini-batch."""
    return self.batch_size(epoch, images) // self.protocol.batch_norm_groups

  def batch_sizes(self, images: int) -> list[int]:
    """All sizes that mini-batches of so many images have, rising."""
    return sorted({min(size, images) for _, size in self.batch_plan})


def run_id(config: Mapping[str, Any]) -> str:
  """The name of a run's folder, from its stored configuration."""
  identity = {k: v for k, v in config.items() if k not in ('source', 'note')}
  # 1 and 1.0 are the same number, and the same run.
  identity = json.loads(json.dumps(identity), parse_int=float)
  text = json.dumps(identity, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:20]


def runs_of(
  condition: Condition,
  rates: Sequence[float] = RATES,
  seeds: Sequence[int] = (0,),
  **fields: Any,
) -> Iterator[Run]:
  """All runs of one cell: seeds x batch plans x rates."""
  for seed in seeds:
    for plan in condition.batch_plans:
      for rate in rates:
        yield Run(
          rule=condition.rule,
          batch_manhattan=condition.batch_manhattan,
          batch_norm=condition.batch_norm,
          batch_plan=plan,
          frozen=condition.frozen,
          rate=float(rate),
          seed=seed,
          **fields,
        )


def unique(runs: Iterable[Run]) -> list[Run]:
  """Runs in order without repeats: BM, BM1 and BM-100 are the same runs."""
  return list({run.run_id: run for run in runs}.values())
