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
  """The split as a set of (part, class, name)."""
  return {
    (part, split.classes[label], names[row])
    for part, rows, labels in (
      ('train', split.train, split.train_labels),
      ('test', split.test, split.test_labels),
    )
    for row, label in zip(rows, labels, strict=True)
  }


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
  np.testing.assert_array_equal(other.train_labels, expected.train_labels)
  assert [shuffled_names[i] for i in other.train] == [
    names[i] for i in expected.train
  ]
  assert np.bincount(other.train_labels).tolist() == [5] * 3
  assert np.bincount(other.test_labels).tolist() == [3] * 3
  assert len({*other.train, *other.test}) == 24
  for row, label in zip(expected.train, expected.train_labels, strict=True):
    assert classes[labels[row]] == expected.classes[label]
  assert list(expected.classes) == sorted(expected.classes)


def test_another_seed_draws_other_classes_and_samples():
  names, labels, classes = _set([40] * 30)
  draw = Draw(classes=10, train=5, test=3)
  splits = [draw_split(names, labels, classes, draw, s) for s in range(5)]
  assert len({split.classes for split in splits}) == 5
  draw = Draw(classes=30, train=5, test=3)
  splits = [draw_split(names, labels, classes, draw, s) for s in range(5)]
  assert len({tuple(split.train) for split in splits}) == 5


def test_every_class_and_sample_can_be_drawn():
  names, labels, classes = _set([6] * 6)
  seen = set()
  for seed in range(120):
    draw = Draw(classes=2, train=1, test=1)
    seen |= _chosen(draw_split(names, labels, classes, draw, seed), names)
  assert len(seen) == 2 * 6 * 6


def test_samples_of_a_class_do_not_depend_on_other_classes():
  names, labels, classes = _set([9, 12])
  draw = Draw(classes=1, train=4, test=2)
  alone = draw_split(names[9:], labels[9:] - 1, classes[1:], draw, 0)
  both = draw_split(names, labels, classes, Draw(classes=2, train=4, test=2), 0)
  assert _chosen(alone, names[9:]) < _chosen(both, names)


def test_classes_with_too_few_samples_are_not_drawn():
  names, labels, classes = _set([7, 8, 20, 6, 8])
  draw = Draw(classes=3, train=5, test=3)
  for seed in range(5):
    split = draw_split(names, labels, classes, draw, seed)
    assert split.classes == ('class 01', 'class 02', 'class 04')
  with pytest.raises(
    DatasetError,
    match="4 classes with at least 8 .* 3 of 5 have .*'class 03' has 6",
  ):
    draw_split(names, labels, classes, Draw(classes=4, train=5, test=3), 0)


def test_caltech101_gives_what_is_left_for_testing():
  # As the real set: 31 images at least, 40 in most classes.
  names, labels, classes = _set([31, 33, 39, 40, 800] + [45] * 97)
  split = draw_split(names, labels, classes, SPECS['Cal101'].draw, 0)
  assert np.bincount(split.train_labels).tolist() == [30] * 102
  assert np.bincount(split.test_labels)[:6].tolist() == [1, 3, 9, 10, 10, 10]
  names, labels, classes = _set([30] + [40] * 101)
  with pytest.raises(DatasetError, match='at least 31 samples'):
    draw_split(names, labels, classes, SPECS['Cal101'].draw, 0)


def test_clutter_is_never_drawn():
  names, labels, classes = _set([40] * 103)
  classes[50] = '257.clutter'
  draw = SPECS['Cal256-101'].draw
  for seed in range(3):
    split = draw_split(names, labels, classes, draw, seed)
    assert '257.clutter' not in split.classes
    assert len(split.classes) == 102


def test_the_rest_trains_where_no_number_is_given():
  names, labels, classes = _set([9, 7])
  split = draw_split(
    names, labels, classes, Draw(classes=2, train=None, test=3), 0
  )
  assert np.bincount(split.train_labels).tolist() == [6, 4]
  assert np.bincount(split.test_labels).tolist() == [3, 3]
  assert len({*split.train, *split.test}) == 16


@pytest.mark.parametrize(
  ('share', 'tested'),
  [(0.25, [1, 2, 25]), (0.01, [1, 1, 1]), (0.99, [1, 8, 99])],
)
def test_a_share_of_each_class_is_tested_on(share, tested):
  names, labels, classes = _set([2, 9, 100])
  draw = Draw(train=None, test=share)
  split = draw_split(names, labels, classes, draw, 0)
  assert np.bincount(split.test_labels).tolist() == tested
  assert len({*split.train, *split.test}) == 111
  assert list(split.classes) == classes


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
