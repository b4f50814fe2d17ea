"""The part of the training images that chooses rate and epoch."""

import numpy as np

from experiments.datasets import splits
from experiments.grid import Protocol, Run


def held_out_size(count: int, protocol: Protocol) -> int:
  """How many of ``count`` training images are held out."""
  return round(protocol.holdout * count)


def check_holdout(y_train: np.ndarray, run: Run) -> None:
  """Checks that both sides have room for every class.

  Raises:
    ValueError: if there are too few images.
  """
  size, count = held_out_size(len(y_train), run.protocol), len(y_train)
  classes = len(np.unique(y_train))
  if size and not classes <= size <= count - classes:
    raise ValueError(
      f'holdout is {run.protocol.holdout}: {size} of the {count} training '
      f'images of {run.dataset}, which has {classes} classes. Both sides must '
      'have at least as many images; change --holdout (0 holds out none) or '
      '--train-size.'
    )


def held_out_rows(y_train: np.ndarray, run: Run) -> np.ndarray:
  """Rows of the held-out images: rising, int32, as many of each class.

  Of a class with few images all but one, which is left to train on.

  Raises:
    ValueError: as ``check_holdout``.
  """
  check_holdout(y_train, run)
  size = held_out_size(len(y_train), run.protocol)
  if size == 0:
    return np.zeros(0, np.int32)
  rows = splits.balanced_rows(y_train, size, run.seed, spared=1)
  return rows.astype(np.int32)
