"""A dataset as a run uses it: on the device, split, in mini-batches.

The images stay on the device, held-out ones among the training images; all
that a step is told is the rows of its mini-batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.datasets import Dataset
from experiments.paper.protocol import Run
from experiments.training import devices
from experiments.training.holdout import held_out_rows

_ROWS_AT_ONCE = 1000  # bounds the memory that a sum over images takes


class Images(NamedTuple):
  """The images of a dataset on the device."""

  x: jax.Array  # uint8 (n, height, width, channels), or float32 (n, features)
  y: jax.Array  # int32 (n,)


class Uploaded(NamedTuple):
  """A dataset on the device."""

  architecture: str  # column of the paper's Table 1
  classes: int
  train: Images
  test: Images
  mesh: Mesh | None


class Parts(NamedTuple):
  """What the compiled functions take of a dataset."""

  train: Images  # the held-out ones too: a step gets only rows to train on
  test: Images
  mean: jax.Array  # mean of the images trained on, float32


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
  """A dataset on the device, split as a run asks.

  Attributes:
    architecture: column of the paper's Table 1.
    classes: number of classes.
    parts: the arrays on the device.
    trained: int32, rows of ``parts.train`` to train on.
    held_out: int32, the other rows.
    mesh: the devices that have it all, if they are several.
  """

  architecture: str
  classes: int
  parts: Parts
  trained: np.ndarray
  held_out: np.ndarray
  mesh: Mesh | None = None


def upload(data: Dataset, mesh: Mesh | None = None) -> Uploaded:
  """Puts a dataset on the device; what is in main memory can be forgotten.

  Args:
    data: the dataset.
    mesh: devices to have it all; None is the default device.
  """
  return Uploaded(
    architecture=data.spec.architecture,
    classes=len(data.classes),
    train=_images(data.x_train, data.y_train, mesh),
    test=_images(data.x_test, data.y_test, mesh),
    mesh=mesh,
  )


def _images(x: np.ndarray, y: np.ndarray, mesh: Mesh | None) -> Images:
  return Images(*devices.replicate(mesh, (x, y.astype(np.int32))))


def place(uploaded: Uploaded, run: Run) -> Placed:
  """Sets the held-out part aside and takes the mean of the others."""
  x, y = map(np.asarray, uploaded.train)
  held_out = held_out_rows(y, run)
  trained = np.setdiff1d(np.arange(len(y), dtype=np.int32), held_out)
  # On the host, in float64: the same on every device.
  total = np.zeros(x.shape[1:], np.float64)
  for first in range(0, len(trained), _ROWS_AT_ONCE):
    chunk = x[trained[first : first + _ROWS_AT_ONCE]]
    total += chunk.sum(0, dtype=np.float64)
  mean = (total / len(trained)).astype(np.float32)
  return Placed(
    architecture=uploaded.architecture,
    classes=uploaded.classes,
    parts=Parts(
      uploaded.train,
      uploaded.test,
      devices.replicate(uploaded.mesh, mean),
    ),
    trained=trained,
    held_out=held_out,
    mesh=uploaded.mesh,
  )


def check_divisible(run: Run, placed: Placed) -> None:
  """Checks that each mini-batch can be divided into groups and over devices.

  Of every run: what is placed may be shared by runs of other mini-batches.

  Raises:
    ValueError: if not.
  """
  for size in run.batch_sizes(len(placed.trained)):
    devices.check_divides(placed.mesh, size)
    run.protocol.check_groups(size)


def mini_batches(run: Run, epoch: int, rows: np.ndarray) -> np.ndarray:
  """The rows of an epoch, shuffled, int32 (batches, batch size).

  What is left over, less than a mini-batch, waits for another epoch.
  """
  size = run.batch_size(epoch, len(rows))
  order = np.random.default_rng([run.seed, epoch, 0]).permutation(rows)
  return order[: len(rows) // size * size].reshape(-1, size)


def calibration_batches(run: Run, epoch: int, rows: np.ndarray) -> np.ndarray:
  """As ``mini_batches``, of the number that statistics for testing take.

  Goes round the rows as often as that needs. They are of the size of which
  statistics are taken in training.
  """
  count = len(rows)
  size = run.statistics_size(epoch, count)
  random = np.random.default_rng([run.seed, epoch, 1])
  wanted = run.protocol.calibration_batches
  rounds = -(-wanted // (count // size))
  batches = [
    random.permutation(rows)[: count // size * size].reshape(-1, size)
    for _ in range(rounds)
  ]
  return np.concatenate(batches)[:wanted]
