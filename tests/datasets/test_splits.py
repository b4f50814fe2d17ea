"""Draws depend on names and the seed, on nothing else."""

import numpy as np
import pytest

from experiments.datasets import SPECS, DatasetError, Draw
from experiments.datasets.splits import balanced_rows, draw_split


def _set(counts):
  """Names, labels and class names of a set with so many samples per class."""
  classes = [f'class {i:02d}' for i in range(len(counts))]
  labels = np.repeat(np.arange(len(counts)), counts)
  names = [f'{i:04d}.jpg' for count in counts for i in range(count)]
  return names, labels, classes


def _chosen(split, names):
  """The samples of a split in order, as (part, class, name)."""
  return [
    (part, split.classes[label], names[row])
    for part, rows, labels in (
      ('train', split.train, split.train_labels),
      ('test', split.test, split.test_labels),
    )
    for row, label in zip(rows, labels, strict=True)
  ]


def test_the_order_of_files_and_classes_does_not_matter():
  names, labels, classes = _set([9, 12, 30, 8, 11])
  draw = Draw(classes=3, train=5, test=3)
  expected = draw_split(names, labels, classes, draw, 7)
  rng = np.random.default_rng(0)
  files = rng.permutation(len(names))
  order = rng.permutation(len(classes))
  shuffled_names = [names[i] for i in files]
  other = draw_split(
    shuffled_names,
    np.argsort(order)[labels[files]],
    [classes[i] for i in order],
    draw,
    7,
  )
  assert other.classes == expected.classes
  assert _chosen(other, shuffled_names) == _chosen(expected, names)
  assert np.bincount(other.train_labels).tolist() == [5] * 3
  assert np.bincount(other.test_labels).tolist() == [3] * 3
  assert len({*other.train, *other.test}) == 24
  for row, label in zip(expected.train, expected.train_labels, strict=True):
    assert classes[labels[row]] == expected.classes[label]
  assert list(expected.classes) == sorted(expected.classes)


def test_every_class_and_sample_can_be_drawn():
  names, labels, classes = _set([6] * 6)
  seen = set()
  for seed in range(120):
    draw = Draw(classes=2, train=1, test=1)
    seen |= {*_chosen(draw_split(names, labels, classes, draw, seed), names)}
  assert len(seen) == 2 * 6 * 6


def test_samples_of_a_class_do_not_depend_on_other_classes():
  names, labels, classes = _set([9, 12])
  draw = Draw(classes=1, train=4, test=2)
  alone = draw_split(names[9:], labels[9:] - 1, classes[1:], draw, 0)
  both = draw_split(names, labels, classes, Draw(classes=2, train=4, test=2), 0)
  assert {*_chosen(alone, names[9:])} < {*_chosen(both, names)}


_CALTECH101 = SPECS['Cal101'].draw
# The real set has 31 images of a class at least, and 40 of most.
_AS_CALTECH101 = [31, 33, 39, 40, 800] + [45] * 97


@pytest.mark.parametrize(
  ('counts', 'draw', 'train', 'test'),
  [
    # Classes with too few samples are not drawn.
    ([7, 8, 20, 6, 8], Draw(classes=3, train=5, test=3), [5] * 3, [3] * 3),
    # What is left tests, where there are fewer than wanted.
    (_AS_CALTECH101, _CALTECH101, [30] * 102, [1, 3, 9] + [10] * 99),
    # The rest trains, where no number is given.
    ([9, 7], Draw(classes=2, train=None, test=3), [6, 4], [3, 3]),
    # A share of each class, but at least one sample.
    ([2, 9, 100], Draw(train=None, test=0.25), [1, 7, 75], [1, 2, 25]),
    ([2, 9, 100], Draw(train=None, test=0.01), [1, 8, 99], [1, 1, 1]),
    ([2, 9, 100], Draw(train=None, test=0.99), [1, 1, 1], [1, 8, 99]),
  ],
)
def test_samples_of_each_class(counts, draw, train, test):
  names, labels, classes = _set(counts)
  split = draw_split(names, labels, classes, draw, 0)
  drawn = sorted(classes[i] for i, n in enumerate(counts) if n >= draw.least)
  assert list(split.classes) == drawn
  assert np.bincount(split.train_labels).tolist() == train
  assert np.bincount(split.test_labels).tolist() == test
  assert len({*split.train, *split.test}) == sum(train) + sum(test)


def test_too_few_samples_are_refused():
  message = "102 classes .* at least 31 .* 101 of 102 have .*'class 00' has 30"
  with pytest.raises(DatasetError, match=message):
    draw_split(*_set([30] + [40] * 101), _CALTECH101, 0)


def test_two_samples_of_one_name_are_refused():
  names, labels, classes = _set([9, 9])
  names[3] = names[4]
  with pytest.raises(DatasetError, match="two samples named '0004.jpg'"):
    draw_split(names, labels, classes, Draw(classes=2, train=5, test=3), 0)


@pytest.mark.parametrize(
  ('counts', 'size', 'expected'),
  [
    ([5, 5, 5], 9, [3, 3, 3]),
    ([5, 5, 5], 10, [4, 3, 3]),
    ([1, 9, 9], 9, [1, 4, 4]),
    ([1, 2, 9], 10, [1, 2, 7]),
    ([5, 5, 5], 15, [5, 5, 5]),
    ([5, 5, 5], 3, [1, 1, 1]),
  ],
)
def test_subsets_are_as_balanced_as_they_can_be(counts, size, expected):
  labels = np.random.default_rng(0).permutation(
    np.repeat(np.arange(3, dtype=np.int32), counts)
  )
  rows = balanced_rows(labels, size, 0)
  assert np.bincount(labels[rows]).tolist() == expected
  assert (np.diff(rows) > 0).all()
