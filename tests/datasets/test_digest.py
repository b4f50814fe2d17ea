"""The digest is the identity of the data: same data, same digest, only then."""

import numpy as np
import pytest

from experiments.datasets import DatasetError
from tests.datasets import archives
from tests.datasets.archives import load


def _digest(path, arrays=None, **kwargs):
  if arrays is not None:
    archives.save(path / 'cifar10.npz', arrays)
  return load(path, **kwargs).digest


def _swapped(values):
  return values[[1, 0, *range(2, len(values))]]


@pytest.mark.parametrize(
  ('key', 'change'),
  [
    ('x_test', lambda pixels: pixels ^ 1),
    ('y_train', _swapped),
    ('x_train', _swapped),
    ('classes', np.flip),
  ],
)
def test_any_change_changes_it(tmp_path, arrays, key, change):
  before = _digest(tmp_path, arrays)
  arrays[key] = change(arrays[key])
  assert _digest(tmp_path, arrays) != before


def test_a_subset_is_balanced_and_made_of_the_whole(tmp_path):
  whole = _digest(tmp_path, archives.raw_arrays())
  digests = {
    _digest(tmp_path, train_size=size, seed=seed)
    for size, seed in ((None, 0), (6, 0), (6, 1), (9, 0))
  }
  assert len(digests) == 4
  assert _digest(tmp_path, train_size=12) == whole
  data, part = load(tmp_path), load(tmp_path, train_size=6)
  assert np.bincount(part.y_train).tolist() == [2, 2, 2]
  names = data.files_train.tolist()
  rows = [names.index(name) for name in part.files_train]
  assert rows == sorted(rows)
  np.testing.assert_array_equal(part.x_train, data.x_train[rows])
  np.testing.assert_array_equal(part.y_train, data.y_train[rows])
  np.testing.assert_array_equal(part.x_test, data.x_test)


@pytest.mark.parametrize('size', [2, 13])
def test_impossible_sizes_are_refused(tmp_path, size):
  with pytest.raises(DatasetError, match='from 3 .* to 12'):
    _digest(tmp_path, archives.raw_arrays(), train_size=size)
