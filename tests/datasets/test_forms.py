"""One dataset in three forms: raw npz, joined files, image folder."""

import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from tests.datasets import archives


def _load(path, **kwargs):
  return datasets.load(
    'cifar10', data_dir=path, cache_dir=path / 'cache', **kwargs
  )


@pytest.fixture(name='arrays')
def _arrays():
  return archives.raw_arrays()


def test_raw_arrays_arrive_as_they_are(tmp_path, arrays):
  archives.save(tmp_path / 'cifar10.npz', arrays)
  data = _load(tmp_path)
  np.testing.assert_array_equal(data.x_train, arrays['x_train'])
  np.testing.assert_array_equal(data.x_test, arrays['x_test'])
  np.testing.assert_array_equal(data.y_train, arrays['y_train'])
  np.testing.assert_array_equal(data.y_test, arrays['y_test'])
  assert data.x_train.dtype == data.x_test.dtype == np.uint8
  assert data.y_train.dtype == data.y_test.dtype == np.int32
  assert data.classes == ('class 0', 'class 1', 'class 2')
  assert data.spec is datasets.SPECS['CIFAR']
  assert str(tmp_path / 'cifar10.npz') in data.source


def test_joined_files_give_the_same_pictures(tmp_path, arrays):
  archives.save(tmp_path / 'cifar10.npz', archives.joined(arrays))
  data = _load(tmp_path)
  np.testing.assert_array_equal(data.x_train, arrays['x_train'])
  np.testing.assert_array_equal(data.y_test, arrays['y_test'])
  assert list(data.files_test[:2]) == ['test/0.png', 'test/1.png']
  assert 'lossy' in data.note


def test_image_folder_gives_the_same_pictures_in_class_order(tmp_path, arrays):
  archives.image_folder(tmp_path / 'CIFAR10', arrays)
  data = _load(tmp_path)
  order = np.argsort(arrays['y_train'], kind='stable')
  np.testing.assert_array_equal(data.x_train, arrays['x_train'][order])
  np.testing.assert_array_equal(data.y_train, arrays['y_train'][order])
  assert data.files_train[0] == 'train/class 0/00000.png'


@pytest.mark.parametrize(
  ('form', 'where', 'lossy'),
  [('ppm', '*', False), ('bmp', 'train', False), ('jpg', 'test', True)],
)
def test_a_folder_is_lossy_where_it_has_jpeg(
  tmp_path, arrays, form, where, lossy
):
  archives.image_folder(tmp_path / 'CIFAR10', arrays)
  for file in (tmp_path / 'CIFAR10').glob(f'{where}/*/*.png'):
    Image.open(file).save(file.with_suffix(f'.{form}'))
    file.unlink()
  assert ('lossy' in _load(tmp_path).note) == lossy


def test_an_npz_file_comes_before_a_folder(tmp_path, arrays):
  archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays(classes=2))
  archives.save(tmp_path / 'cifar10.npz', arrays)
  assert len(_load(tmp_path).classes) == 3


def test_the_name_given_comes_before_other_aliases(tmp_path):
  for name, classes in (('cifar100', 3), ('cifar100_clean10k', 4)):
    archives.save(tmp_path / f'{name}.npz', archives.raw_arrays(classes))
  for name, classes in (('cifar100_clean10k', 4), ('CIFAR100', 3)):
    data = datasets.load(name, data_dir=tmp_path, cache_dir=tmp_path)
    assert len(data.classes) == classes


def test_grey_pictures_without_channel_axis(tmp_path, arrays):
  grey = {
    key: value[..., 0] if key.startswith('x_') else value
    for key, value in archives.raw_arrays(size=28).items()
  }
  archives.save(tmp_path / 'mnist.npz', grey)
  data = datasets.load('mnist', data_dir=tmp_path, cache_dir=tmp_path)
  np.testing.assert_array_equal(data.x_train[..., 0], grey['x_train'])
  assert data.x_train.shape == (12, 28, 28, 1)


def test_vectors_stay_float32(tmp_path):
  arrays = archives.raw_arrays()
  rng = np.random.default_rng(0)
  for part, count in (('train', 12), ('test', 6)):
    arrays[f'x_{part}'] = rng.standard_normal((count, 1845), np.float32)
  archives.save(tmp_path / 'timit.npz', arrays)
  data = datasets.load('TIMIT80', data_dir=tmp_path, cache_dir=tmp_path)
  np.testing.assert_array_equal(data.x_train, arrays['x_train'])
  assert data.x_train.dtype == np.float32


def test_the_note_says_what_differs_from_the_paper(tmp_path, arrays):
  archives.save(tmp_path / 'cifar10.npz', arrays)
  note = _load(tmp_path, train_size=6).note
  assert "3 of the paper's 10 classes" in note
  assert "12 / 6 train / test samples, the paper's are 50000 / 10000" in note
  assert 'trained on 6 of 12 samples' in note
  assert 'lossy' not in note


def test_digits_need_no_folder(tmp_path):
  data = datasets.load('digits', cache_dir=tmp_path)
  assert data.x_train.shape == (1437, 28, 28, 1)
  assert data.x_test.shape == (360, 28, 28, 1)
  assert np.bincount(data.y_test).tolist() == [36] * 10
  assert data.x_train.max() > 200
  assert "not one of the paper's datasets" in data.note
  again = datasets.load('digits', cache_dir=tmp_path, seed=1)
  assert again.digest != data.digest
