"""Which samples train and which test: pure functions of names and a seed.

No draw depends on the order in which files were found: names are sorted, then
permuted by a generator seeded with (seed, what is drawn).
"""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from experiments.datasets.specs import DatasetError, Draw


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """A drawn split.

  Attributes:
    classes: names of the drawn classes, sorted; labels are indices into them.
    train: int64 [N], rows of the training samples, by class and name.
    train_labels: int32 [N].
    test: int64 [M], rows of the test samples, by class and name.
    test_labels: int32 [M].
  """

  classes: tuple[str, ...]
  train: np.ndarray
  train_labels: np.ndarray
  test: np.ndarray
  test_labels: np.ndarray


def draw_split(
  names: Sequence[str],
  labels: np.ndarray,
  classes: Sequence[str],
  draw: Draw,
  seed: int,
) -> Split:
  """Draws classes, then training and test samples of each.

  Args:
    names: N names, no two alike within a class.
    labels: integers [N], indices into `classes`.
    classes: names of all classes.
    draw: how many of what.
    seed: of the draw.
  """
  members: dict[str, list[int]] = {name: [] for name in sorted(classes)}
  for row, label in enumerate(map(int, labels)):
    members[classes[label]].append(row)
  for name in draw.exclude:
    members.pop(name, None)
  wanted = len(members) if draw.classes is None else draw.classes
  fit = [name for name, rows in members.items() if len(rows) >= draw.least]
  if len(fit) < wanted:
    short = min(members, key=lambda name: len(members[name]), default='')
    raise DatasetError(
      f'{wanted} classes with at least {draw.least} samples are needed, '
      f'{len(fit)} of {len(members)} have as many'
      + (f' ({short!r} has {len(members[short])})' if short else '')
      + '; is the set complete?'
    )
  order = generator(seed, 'classes').permutation(len(fit))
  chosen = sorted(fit[i] for i in order[:wanted])
  drawn = [
    _draw_class(name, members[name], names, draw, seed) for name in chosen
  ]
  rows, marks = [], []
  for part in zip(*drawn, strict=True):
    rows.append(np.array([row for of_class in part for row in of_class]))
    index = np.arange(len(chosen), dtype=np.int32)
    marks.append(np.repeat(index, list(map(len, part))))
  return Split(tuple(chosen), rows[0], marks[0], rows[1], marks[1])


def _draw_class(
  name: str, rows: list[int], names: Sequence[str], draw: Draw, seed: int
) -> tuple[list[int], list[int]]:
  rows = sorted(rows, key=lambda row: names[row])
  for first, second in itertools.pairwise(rows):
    if names[first] == names[second]:
      raise DatasetError(
        f'class {name!r} has two samples named {names[first]!r}; a split needs '
        'distinct names'
      )
  order = generator(seed, name).permutation(len(rows))
  test = int(draw.test)
  if draw.test < 1:
    test = min(max(1, round(draw.test * len(rows))), len(rows) - 1)
  if draw.train is None:
    tested, trained = order[:test], order[test:]
  else:
    trained, tested = np.split(order[: draw.train + test], [draw.train])
  return [rows[i] for i in sorted(trained)], [rows[i] for i in sorted(tested)]


def balanced_rows(
  labels: np.ndarray, size: int, seed: int, spared: int = 0
) -> np.ndarray:
  """Rows of a subset with as equal a number of each class as there are.

  Classes with fewer samples than their share give all they may; the others
  share the rest, earlier classes taking one more where it does not divide.

  Args:
    labels: int32 [N], every class 0 to K-1 present.
    size: samples wanted, from K to N.
    seed: of the draw.
    spared: how many samples of each class are never drawn.

  Returns:
    int64 [size], rising.
  """
  counts = np.bincount(labels) - spared
  if not len(counts) <= size <= counts.sum():
    raise DatasetError(
      f'train_size is {size}; it must be from {len(counts)} (one of each '
      f'class) to {counts.sum()} (the training set)'
    )
  most = bisect.bisect_right(
    range(counts.max() + 1), size, key=lambda n: np.minimum(counts, n).sum()
  )
  share = np.minimum(counts, most - 1)
  share[np.flatnonzero(share < counts)[: size - share.sum()]] += 1
  rows = [
    generator(seed, f'subset {label}').permutation(
      np.flatnonzero(labels == label)
    )[:count]
    for label, count in enumerate(share)
  ]
  return np.sort(np.concatenate(rows))


def generator(seed: int, purpose: str) -> np.random.Generator:
  """A generator of its own for each purpose, so that none shifts another."""
  entropy = hashlib.sha256(purpose.encode()).digest()[:8]
  return np.random.default_rng([seed, int.from_bytes(entropy, 'big')])
