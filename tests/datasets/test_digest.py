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


def test_same_data_elsewhere_has_the_same_digest(tmp_path):
  first, second = tmp_path / 'a', tmp_path / 'b'
  for folder in (first, second):
    folder.mkdir()
  digest = _digest(first, archives.raw_arrays())
  assert _digest(second, archives.raw_arrays()) == digest
  assert _digest(first) == digest  # from the cache


def _pixel(arrays):
  arrays['x_test'][0, 0, 0, 0] ^= 1


def _label(arrays):
  arrays['y_train'][:2] = arrays['y_train'][[1, 0]]


def _order(arrays):
  arrays['x_train'][:2] = arrays['x_train'][[1, 0]]


def _name(arrays):
  arrays['classes'][0] = 'other'


@pytest.mark.parametrize('change', [_pixel, _label, _order, _name])
def test_any_change_changes_it(tmp_path, change):
  arrays = archives.raw_arrays()
  before = _digest(tmp_path, arrays)
  change(arrays)
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


@pytest.mark.parametrize('size', [-1, 0, 2, 13])
def test_impossible_sizes_are_refused(tmp_path, size):
  with pytest.raises(DatasetError, match='from 3 .* to 12'):
    _digest(tmp_path, archives.raw_arrays(), train_size=size)
