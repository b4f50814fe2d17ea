"""Broken data gets an error that names the file, the fault and the remedy."""

import os

import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from experiments.datasets import DatasetError
from tests.datasets import archives


def _load(path, name='cifar10'):
  return datasets.load(name, data_dir=path, cache_dir=path / 'cache')


def _without(key):
  def change(arrays):
    del arrays[key]

  return change


def _with(**values):
  return lambda arrays: arrays.update(values)


_RAW = {
  'no classes': (_without('classes'), 'has no classes'),
  'no labels': (_without('y_test'), 'has no y_test'),
  'no pictures': (_without('x_train'), 'has no jpeg_train, off_train'),
  'objects': (
    _with(classes=np.array(['a', None, 3], object)),
    'classes is stored as Python objects',
  ),
  'label too large': (
    _with(y_train=np.arange(12) % 4),
    r'y_train: label 3 in row 3 is not in 0 to 2',
  ),
  'label below 0': (_with(y_test=np.arange(6) - 1), 'label -1 in row 0'),
  'empty class': (
    _with(y_train=np.arange(12) % 2),
    "y_train: no sample of class 'class 2'",
  ),
  'float labels': (_with(y_train=np.zeros(12)), 'labels must be integers'),
  'too few labels': (
    _with(y_train=np.arange(9) % 3),
    'y_train has 9 entries for 12 train samples',
  ),
  'float pictures': (
    _with(x_train=np.zeros((12, 32, 32, 3))),
    'x_train must be uint8 .* found float64 of shape',
  ),
  'four channels': (
    _with(x_test=np.zeros((6, 8, 8, 4), np.uint8)),
    'with 1 or 3 channels',
  ),
  'no area': (_with(x_test=np.zeros((6, 0, 8, 3), np.uint8)), 'must be uint8'),
  'scalar classes': (
    _with(classes=np.array('cat')),
    'classes must be a vector',
  ),
}

_JOINED = {
  'not rising': (
    _with(off_test=np.array([0, 9, 5])),
    'off_test must be rising',
  ),
  'past the end': (
    _with(off_train=np.arange(13) * 10**6),
    'off_train must be rising integers from 0 to',
  ),
  'float limits': (
    _with(off_train=np.arange(13.0)),
    'off_train must be rising',
  ),
  'wide bytes': (_with(jpeg_test=np.zeros(9, np.int32)), 'a uint8 vector'),
  'too few names': (
    _with(file_test=np.array(['a'])),
    'file_test has 1 entries',
  ),
}


@pytest.mark.parametrize('case', _RAW)
def test_raw_file(tmp_path, case):
  change, message = _RAW[case]
  arrays = archives.raw_arrays()
  change(arrays)
  path = archives.save(tmp_path / 'cifar10.npz', arrays)
  with pytest.raises(DatasetError, match=message) as caught:
    _load(tmp_path)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize('case', _JOINED)
def test_file_of_joined_pictures(tmp_path, case):
  change, message = _JOINED[case]
  arrays = archives.joined(archives.raw_arrays())
  change(arrays)
  path = archives.save(tmp_path / 'cifar10.npz', arrays)
  with pytest.raises(DatasetError, match=message) as caught:
    _load(tmp_path)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize('keep', [0, 3, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, keep):
  path = archives.save(tmp_path / 'cifar10.npz', archives.raw_arrays())
  content = path.read_bytes()
  size = keep if isinstance(keep, int) else int(keep * len(content))
  path.write_bytes(content[:size])
  with pytest.raises(DatasetError, match='cifar10.npz: broken or truncated'):
    _load(tmp_path)


def test_damaged_bytes_within(tmp_path):
  path = archives.save(tmp_path / 'cifar10.npz', archives.raw_arrays())
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 40] = bytes(40)
  path.write_bytes(content)
  with pytest.raises(DatasetError, match='broken or truncated npz file at'):
    _load(tmp_path)


@pytest.mark.parametrize('content', [b'<html>404</html>', b'\x93NUMPY\x01\x00'])
def test_something_else_under_the_name(tmp_path, content):
  (tmp_path / 'cifar10.npz').write_bytes(content)
  with pytest.raises(DatasetError, match='broken or truncated npz file'):
    _load(tmp_path)


def test_a_picture_that_does_not_decode_is_named(tmp_path):
  arrays = archives.joined(archives.raw_arrays())
  start = arrays['off_train'][5]
  arrays['jpeg_train'] = arrays['jpeg_train'].copy()
  arrays['jpeg_train'][start : start + 20] = 0
  archives.save(tmp_path / 'cifar10.npz', arrays)
  with pytest.raises(DatasetError, match=r'train/5\.png \(row 5\) cannot be'):
    _load(tmp_path)


def test_a_picture_cut_short_is_named(tmp_path):
  root = archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays())
  broken = root / 'test' / 'class 1' / '00001.png'
  broken.write_bytes(broken.read_bytes()[:-60])
  with pytest.raises(DatasetError, match=r'class 1/00001\.png .* cannot be'):
    _load(tmp_path)


def test_folder_without_test_part(tmp_path):
  root = archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays())
  (root / 'test').rename(root / 'validation')
  with pytest.raises(DatasetError, match='cifar10: has no folder test'):
    _load(tmp_path)


def test_folder_with_an_empty_class(tmp_path):
  root = archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays())
  (root / 'train' / 'new').mkdir()
  with pytest.raises(DatasetError, match='train/new: class without pictures'):
    _load(tmp_path)


def test_folder_with_a_class_in_one_part_only(tmp_path):
  root = archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays())
  (root / 'test' / 'class 2').rename(root / 'test' / 'class 9')
  with pytest.raises(DatasetError, match="'class 2' has pictures in only one"):
    _load(tmp_path)


def test_folder_without_classes(tmp_path):
  for part in ('train', 'test'):
    (tmp_path / 'cifar10' / part).mkdir(parents=True)
  with pytest.raises(DatasetError, match='train: has no class folders'):
    _load(tmp_path)


def test_missing_data_folder(tmp_path):
  with pytest.raises(DatasetError, match="nowhere' is not a folder"):
    _load(tmp_path / 'nowhere')


def test_missing_dataset_says_how_to_get_it(tmp_path):
  with pytest.raises(DatasetError, match='experiments data prepare SVHN'):
    _load(tmp_path, 'svhn')


def test_unknown_dataset(tmp_path):
  with pytest.raises(DatasetError, match="did you mean 'cifar10'"):
    _load(tmp_path, 'cifr10')


def _image_folder(root):
  for part in ('train', 'test'):
    for name in ('a', 'b'):
      folder = root / 'cifar10' / part / name
      folder.mkdir(parents=True)
      for i in range(3):
        Image.new('RGB', (8, 8)).save(folder / f'{i}.png')
  return root / 'cifar10'


@pytest.mark.parametrize('linked', ['train/a/0.png', 'train/a'])
def test_links_out_of_an_image_folder_are_refused(tmp_path, linked):
  path = _image_folder(tmp_path) / linked
  path.rename(tmp_path / 'outside')
  path.symlink_to(tmp_path / 'outside')
  with pytest.raises(DatasetError, match='a link that leads out of'):
    _load(tmp_path)


def test_pipes_among_pictures_are_not_waited_for(tmp_path):
  os.mkfifo(_image_folder(tmp_path) / 'test' / 'b' / '9.png')
  with pytest.raises(DatasetError, match=r'9.png: not a file'):
    _load(tmp_path)
