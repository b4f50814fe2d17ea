"""The real data beside the repository goes through the same loader."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments import datasets

_FOLDER = Path(
  os.environ.get(
    'SYMJAX_BP_DATA', Path(__file__).parents[2].parent / 'shared' / 'data'
  )
)

pytestmark = pytest.mark.skipif(
  not (_FOLDER / 'mnist.npz').is_file(),
  reason=f'no real data in {_FOLDER}; set SYMJAX_BP_DATA to its folder',
)


@pytest.fixture(scope='module', name='cache_dir')
def _cache_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.mark.parametrize(
  ('name', 'train', 'test', 'classes', 'shape', 'note'),
  [
    ('mnist', 60000, 10000, 10, (28, 28, 1), ''),
    ('cifar10', 50000, 10000, 10, (32, 32, 3), 'lossy'),
    ('cifar100_clean10k', 8000, 1999, 100, (32, 32, 3), '8000 / 1999'),
    ('caltech101', 3060, 949, 102, (119, 119, 3), ''),
    ('caltech256_10', 600, 250, 10, (119, 119, 3), "10 of the paper's 102"),
    ('flowers102', 2040, 2040, 102, (119, 119, 3), '2040 / 6149'),
  ],
)
def test_real_set(cache_dir, name, train, test, classes, shape, note):
  data = datasets.load(name, data_dir=_FOLDER, cache_dir=cache_dir)
  assert data.x_train.shape == (train, *shape)
  assert data.x_test.shape == (test, *shape)
  assert data.x_train.dtype == np.uint8
  for labels in (data.y_train, data.y_test):
    assert np.unique(labels).tolist() == list(range(classes))
  assert len(data.classes) == classes
  assert note in data.note if note else data.note == ''
  # Pictures: neither constant nor noise around one value.
  assert data.x_train.std() > 40
  again = datasets.load(name, data_dir=_FOLDER, cache_dir=cache_dir)
  assert again.digest == data.digest
  np.testing.assert_array_equal(again.x_test, data.x_test)


def test_mnist_is_the_original(cache_dir):
  data = datasets.load('MNIST', data_dir=_FOLDER, cache_dir=cache_dir)
  assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
  assert np.bincount(data.y_test)[:3].tolist() == [980, 1135, 1032]
  np.testing.assert_allclose(data.x_train.mean(), 33.318, atol=1e-3)
