"""A dataset on the device: uploaded once, split and batched for each run.

The images stay on the device, held-out ones among the training images; a
training step receives only the rows of its mini-batch.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.datasets import Dataset, DatasetError, Loader, splits
from experiments.paper.protocol import Data, Run
from experiments.training import devices

_ROWS_AT_ONCE = 1000  # bounds the memory of a sum over images


class Images(NamedTuple):
  """Images and their labels on the device."""

  x: jax.Array  # uint8 (n, height, width, channels), or float32 (n, features)
  y: jax.Array  # int32 (n,)


class Arrays(NamedTuple):
  """The arrays that the compiled functions take."""

  train: Images  # includes the held-out images
  test: Images
  mean: jax.Array  # mean of the images trained on, float32


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceData:
  """A dataset on the device, split as a run asks.

  Attributes:
    network: key of ``models.NETWORKS``, unless the run names its own.
    classes: number of classes.
    arrays: on the device.
    trained: int32, rows of ``arrays.train`` to train on.
    held_out: int32, the other rows.
    mesh: the devices, if there are several; each has all images.
  """

  network: str
  classes: int
  arrays: Arrays
  trained: np.ndarray
  held_out: np.ndarray
  mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Uploaded:
  """A dataset on the device, not split yet."""

  network: str
  classes: int
  train: Images
  test: Images


def device_data(run: Run, load: Loader, mesh: Mesh | None = None) -> DeviceData:
  """The dataset of a run on the device; runs that share it share memory.

  Args:
    run: what it is for.
    load: loads its dataset.
    mesh: devices that all get all images; None is the default device.

  Raises:
    DatasetError: if the dataset is missing, broken, or not the run's.
  """
  uploaded = _upload(run.dataset, run.protocol.train_size, load, mesh)
  return split(uploaded, run, mesh)


@functools.lru_cache(maxsize=1)
def _upload(
  dataset: Data, train_size: int | None, load: Loader, mesh: Mesh | None
) -> Uploaded:
  _upload.cache_clear()  # one dataset at a time: frees its memory,
  _split.cache_clear()
  jax.clear_caches()  # and that of the programs compiled for it
  data = load(dataset.name, train_size)
  if data.digest != dataset.digest:
    raise DatasetError(
      f'{dataset.name}: {data.source} has changed since this command started; '
      'repeat the command.'
    )
  load.forget()
  return put(data, mesh)


def put(data: Dataset, mesh: Mesh | None = None) -> Uploaded:
  """Copies a dataset to the devices of a mesh, or to the default device."""
  return Uploaded(
    network=data.spec.architecture,
    classes=len(data.classes),
    train=_images(data.x_train, data.y_train, mesh),
    test=_images(data.x_test, data.y_test, mesh),
  )


def _images(x: np.ndarray, y: np.ndarray, mesh: Mesh | None) -> Images:
  return Images(*devices.replicate(mesh, (x, y.astype(np.int32))))


def split(uploaded: Uploaded, run: Run, mesh: Mesh | None = None) -> DeviceData:
  """Sets a run's held-out part aside and takes the mean of the rest."""
  size = run.protocol.held_out(len(uploaded.train.y))
  return _split(uploaded, run.seed, size, mesh)


@functools.lru_cache(maxsize=1)
def _split(
  uploaded: Uploaded, seed: int, held_out_size: int, mesh: Mesh | None
) -> DeviceData:
  x, y = map(np.asarray, uploaded.train)
  held_out = held_out_rows(y, seed, held_out_size)
  trained = np.setdiff1d(np.arange(len(y), dtype=np.int32), held_out)
  # On the host, in float64: the same on every device.
  total = np.zeros(x.shape[1:], np.float64)
  for first in range(0, len(trained), _ROWS_AT_ONCE):
    chunk = x[trained[first : first + _ROWS_AT_ONCE]]
    total += chunk.sum(0, dtype=np.float64)
  mean = (total / len(trained)).astype(np.float32)
  return DeviceData(
    network=uploaded.network,
    classes=uploaded.classes,
    arrays=Arrays(uploaded.train, uploaded.test, devices.replicate(mesh, mean)),
    trained=trained,
    held_out=held_out,
    mesh=mesh,
  )


def held_out_rows(labels: np.ndarray, seed: int, size: int) -> np.ndarray:
  """``size`` rows of held-out images: rising, int32, as many of each class.

  A class with few images keeps one to train on.
  """
  if size == 0:
    return np.zeros(0, np.int32)
  rows = splits.balanced_rows(labels, size, seed, spared=1)
  return rows.astype(np.int32)


def mini_batches(run: Run, epoch: int, rows: np.ndarray) -> np.ndarray:
  """The rows of an epoch, shuffled, int32 (batches, batch size).

  The remainder, less than a mini-batch, is left out of this epoch.
  """
  size = run.batch_size(epoch, len(rows))
  order = np.random.default_rng([run.seed, epoch, 0]).permutation(rows)
  return order[: len(rows) // size * size].reshape(-1, size)


def calibration_batches(run: Run, epoch: int, rows: np.ndarray) -> np.ndarray:
  """Mini-batches for the test statistics, int32 (batches, batch size).

  They have the size over which training takes statistics, and repeat the rows
  as often as needed.
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
