"""Samples before decoding: what every source of data gives to the loader."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from experiments.datasets.errors import DatasetError

# An encoded picture, or a sample that is an array already.
Sample = bytes | memoryview | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """The training or the test set.

  Attributes:
    sample: gives the sample of a row; called from several threads.
    labels: int32 [N], indices into the class names.
    names: N names, a file name where there is one.
  """

  sample: Callable[[int], Sample]
  labels: np.ndarray
  names: Sequence[str]

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, rows: np.ndarray, labels: np.ndarray) -> 'Part':
    """The rows in the given order, under new labels."""
    return Part(
      sample=lambda i: self.sample(int(rows[i])),
      labels=labels.astype(np.int32),
      names=[self.names[row] for row in map(int, rows)],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Raw:
  """Both parts of a dataset, the class names, and whether JPEG was involved."""

  train: Part
  test: Part
  classes: tuple[str, ...]
  jpeg: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Where a dataset comes from.

  Attributes:
    text: in words, with the path.
    key: changes when the content changes; names the cached arrays.
    read: reads what is needed to decode samples one by one.
  """

  text: str
  key: str
  read: Callable[[], Raw]


def labels_of(
  values: np.ndarray, classes: Sequence[str], at: str
) -> np.ndarray:
  """Labels as int32, every class present.

  Args:
    values: integers [N].
    classes: names; labels are indices into them.
    at: the file and array, for errors.

  Raises:
    DatasetError: wrong type or shape, out of range, or a class without sample.
  """
  if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
    raise DatasetError(
      f'{at}: labels must be integers in one dimension, found {values.dtype} '
      f'of shape {values.shape}; save them as an int64 vector'
    )
  wrong = np.flatnonzero((values < 0) | (values >= len(classes)))
  if len(wrong):
    raise DatasetError(
      f'{at}: label {values[wrong[0]]} in row {wrong[0]} is not in 0 to '
      f'{len(classes) - 1}, the {len(classes)} classes of the set '
      f'({len(wrong)} such rows); correct the label or the class names'
    )
  counts = np.bincount(values, minlength=len(classes))
  if not counts.all():
    empty = [classes[i] for i in np.flatnonzero(counts == 0).tolist()]
    raise DatasetError(
      f'{at}: no sample of class {empty[0]!r} ({len(empty)} empty of '
      f'{len(classes)} classes); add samples or remove the class'
    )
  return values.astype(np.int32)
