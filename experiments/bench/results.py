"""What a comparison found: medians, spreads and ratios within rounds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.bench.contenders import Contender
from experiments.bench.workload import Workload

FLAX, TORCH, PRODUCT = 'Flax', 'torch', 'product'
OPERATIONS = 'operations alone'
# The rule of which each of biotorch's modes is a variant.
BIOTORCH = {
  'BP': 'backpropagation',
  'uSF': 'usf',
  'brSF': 'brsf',
  'frSF': 'frsf',
  'RndF': 'fa',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One program; seconds are of whole steps, one per round.

  Attributes:
    name: a rule, or ``FLAX``, ``TORCH``, ``OPERATIONS``, or 'biotorch ' and
      its mode.
    variant: memory layout; the fastest one.
    seconds: of each step.
    median: of the seconds.
    quartiles: of the seconds, lower and upper.
    to: median of the ratios to other programs in the same round, by name.
    peak_share: of the rate of a matrix product in the same rounds, the median.
    compile_seconds: None where nothing is compiled.
    bytes: memory at its peak; None where it is not known.
    memory_to_flax: the same without stored draws, as a ratio to plain Flax.
    is_rule: whether it is ours.
  """

  name: str
  variant: str
  seconds: tuple[float, ...]
  median: float
  quartiles: tuple[float, float]
  to: Mapping[str, float]
  peak_share: float
  compile_seconds: float | None
  bytes: int | None
  memory_to_flax: float | None
  is_rule: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """The programs on one network.

  Attributes:
    workload: what they trained.
    flops: floating point operations of a step.
    product_rate: of a matrix product, operations a second, the median.
    rows: program by program, those with our rules first.
  """

  workload: Workload
  flops: int
  product_rate: float
  rows: tuple[Row, ...]

  def row(self, name: str) -> Row | None:
    """The program of a name, if it took part."""
    return next((row for row in self.rows if row.name == name), None)

  def as_json(self) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return dataclasses.asdict(self)


def rival(rule: str) -> str:
  """The name of biotorch's program for a rule."""
  return f'biotorch {BIOTORCH.get(rule, "")}'


def summarized(
  workload: Workload,
  contenders: Sequence[Contender],
  times: np.ndarray,
  *,
  flops: int,
  product_flops: int,
) -> Result:
  """The result of a comparison, with the fastest variant of each name.

  Args:
    workload: what was trained.
    contenders: the programs, ``PRODUCT`` among them.
    times: seconds, (rounds, contenders).
    flops: floating point operations of a step.
    product_flops: of a step of ``PRODUCT``.
  """
  fastest: dict[str, tuple[Contender, np.ndarray]] = {}
  for contender, seconds in zip(contenders, times.T, strict=True):
    best = fastest.get(contender.name)
    if best is None or np.median(seconds) < np.median(best[1]):
      fastest[contender.name] = contender, seconds
  _, product = fastest.pop(PRODUCT)
  columns = {name: seconds for name, (_, seconds) in fastest.items()}
  plain = fastest[FLAX][0].bytes
  return Result(
    workload=workload,
    flops=flops,
    product_rate=product_flops / float(np.median(product)),
    rows=tuple(
      _row(contender, columns, plain, flops / product_flops * product / seconds)
      for contender, seconds in fastest.values()
    ),
  )


def _row(
  contender: Contender,
  columns: Mapping[str, np.ndarray],
  plain_bytes: int | None,
  shares: np.ndarray,
) -> Row:
  """One program's row; ``columns`` are the seconds of all by name."""
  memory = None
  if contender.bytes is not None and plain_bytes:
    memory = (contender.bytes - contender.draw_bytes) / plain_bytes
  seconds = columns[contender.name]
  lower, upper = map(float, np.percentile(seconds, (25, 75)))
  return Row(
    name=contender.name,
    variant=contender.variant,
    seconds=tuple(map(float, seconds)),
    median=float(np.median(seconds)),
    quartiles=(lower, upper),
    to={
      other: float(np.median(seconds / columns[other]))
      for other in (FLAX, TORCH, rival(contender.name))
      if other in columns
    },
    peak_share=float(np.median(shares)),
    compile_seconds=contender.compile_seconds,
    bytes=contender.bytes,
    memory_to_flax=memory,
    is_rule=contender.bytes is not None and contender.name != FLAX,
  )
