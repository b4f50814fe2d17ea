"""The part of the training images that chooses rate and epoch, and the rest."""

import numpy as np

from experiments.datasets import splits
from experiments.paper.protocol import Protocol, Run


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


def check_batches(
  count: int, run: Run, condition: str, devices: int = 1
) -> str | None:
  """Checks that there are images enough for the mini-batches of a run.

  A run must have the mini-batches that it begins with. Larger ones later on,
  which no name can change, are of all images where there are fewer.

  Args:
    count: training images, held-out ones among them.
    run: what is to be done.
    condition: its name.
    devices: of all processes, to divide mini-batches over.

  Returns:
    What is to be said of mini-batches that are smaller than planned.

  Raises:
    ValueError: if there are too few images to begin with, or what is left of a
      mini-batch can't be divided as asked.
  """
  held_out = held_out_size(count, run.protocol)
  trained, first = count - held_out, run.batch_plan[0][1]
  images = (
    f'the images of {run.dataset} to train on ({count}, less {held_out} held '
    'out)'
  )
  if first > trained:
    raise ValueError(
      f'condition is {condition!r}, with mini-batches of {first}, but they '
      f'can have at most {trained}, {images}. Put a smaller number at the end '
      'of its name (as in SGD-10), or change --train-size or --holdout.'
    )
  cut = sorted({size for _, size in run.batch_plan if size > trained})
  for size in run.batch_sizes(trained):
    for name, parts in (
      ('batch_norm_groups', run.protocol.batch_norm_groups),
      ('devices', devices),
    ):
      if size % parts:
        less = f' ({", ".join(map(str, cut))} are planned)' if cut else ''
        raise ValueError(
          f'{name} is {parts}, but must divide every mini-batch of condition '
          f'{condition!r}, and one has {size} images{less}, of {trained}, '
          f'{images}. Change --{name.replace("_", "-")}, --train-size or '
          '--holdout.'
        )
  if not cut:
    return None
  return (
    f'{condition}: the mini-batches of {" and ".join(map(str, cut))} that '
    f'follow those of {first} have only {trained}, all of {images}.'
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
