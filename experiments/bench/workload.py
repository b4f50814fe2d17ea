"""What every program trains on: the same network, images and update."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from experiments.datasets import SHAPES
from experiments.paper.protocol import Protocol

PROTOCOL = Protocol()
# Weights that stay where they are take as long as others, and none diverges.
RATE = 0.0
_BATCHES = 4
_CLASSES = {'general': 102, 'timit': 80}  # Flowers102, TIMIT80; others have 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """A network and its mini-batches.

  Attributes:
    architecture: column of the paper's Table 1.
    batch_norm: 'none' or 'plain'.
    batch: examples in a mini-batch.

  Raises:
    ValueError: if there is no such network.
  """

  architecture: str
  batch_norm: str
  batch: int

  def __post_init__(self):
    for name, allowed in (
      ('architecture', tuple(SHAPES)),
      ('batch_norm', ('none', 'plain')),
    ):
      if (value := getattr(self, name)) not in allowed:
        raise ValueError(f'{name} must be one of {allowed}, not {value!r}.')
    if self.batch < 2:
      raise ValueError(f'batch must be at least 2, not {self.batch}.')

  @property
  def classes(self) -> int:
    """The number of classes."""
    return _CLASSES.get(self.architecture, 10)

  def data(self) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (or features, float32), and labels, int32."""
    random = np.random.default_rng(0)
    shape = (_BATCHES * self.batch, *SHAPES[self.architecture])
    if len(shape) == 2:
      x = random.normal(size=shape).astype(np.float32)
    else:
      x = random.integers(0, 256, shape, np.uint8)
    return x, random.integers(0, self.classes, len(x), np.int32)

  def indices(self) -> Iterator[np.ndarray]:
    """The rows of one mini-batch after the other, without end."""
    rows = np.random.default_rng(1).permutation(_BATCHES * self.batch)
    return itertools.cycle(rows.astype(np.int32).reshape(_BATCHES, self.batch))
