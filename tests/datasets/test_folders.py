"""Image folders: each file is used, counted or refused."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from experiments.datasets import DatasetError
from tests.datasets import archives


def _load(path, **kwargs):
  return datasets.load(
    'cifar10', data_dir=path, cache_dir=path / 'cache', **kwargs
  )


@pytest.fixture(name='arrays')
def _arrays():
  return archives.raw_arrays()


@pytest.fixture(name='root')
def _root(tmp_path, arrays):
  return archives.image_folder(tmp_path / 'cifar10', arrays)


def test_pictures_come_in_the_order_of_classes(root, arrays):
  root = root.rename(root.with_name('CIFAR-10'))
  data = _load(root.parent)
  order = np.argsort(arrays['y_train'], kind='stable')
  np.testing.assert_array_equal(data.x_train, arrays['x_train'][order])
  np.testing.assert_array_equal(data.y_train, arrays['y_train'][order])
  assert data.files_train[0] == 'train/class 0/00000.png'
  assert 'ignored' not in data.note


@pytest.mark.parametrize(
  ('form', 'where', 'lossy'),
  [('ppm', '*', False), ('bmp', 'train', False), ('JPE', 'test', True)],
)
def test_a_folder_is_lossy_where_it_has_jpeg(root, form, where, lossy):
  for file in root.glob(f'{where}/*/*.png'):
    Image.open(file).save(file.with_suffix(f'.{form}'))
    file.unlink()
  data = _load(root.parent)
  assert ('lossy' in data.note) == lossy
  assert len(data.x_train) == 12


_FORMATS = 'bmp dib gif jfif jpe jpeg jpg png ppm tga tif tiff webp jp2'.split()


@pytest.mark.parametrize('suffix', [*_FORMATS, *map(str.upper, _FORMATS)])
def test_every_format_of_pillow_is_used(root, suffix):
  picture = Image.fromarray(archives.picture(9, (32, 32)))
  picture.save(root / 'train' / 'class 1' / f'new.{suffix}')
  data = _load(root.parent)
  assert np.bincount(data.y_train).tolist() == [4, 5, 4]
  assert data.files_train[8] == f'train/class 1/new.{suffix}'
  assert 'ignored' not in data.note


_FILES = {
  'train/class 0/notes.txt': '1 .txt',
  'train/class 0/.DS_Store': '1 hidden or system',
  'train/class 0/._00000.png': '1 hidden or system',
  'test/class 1/Thumbs.db': '1 hidden or system',
  'test/class 1/desktop.ini': '1 hidden or system',
  'test/class 1/@eaDir/00000.png': '1 hidden or system',
  'train/.ipynb_checkpoints/0-checkpoint.png': '1 hidden or system',
  'train/__MACOSX/class 0/._0.png': '1 hidden or system',
  'train/labels.CSV': '1 .csv',
  'train/loose.png': '1 .png',
  'val/class 0/00000.png': '1 folder val',
  'README': '1 without extension',
  'train/class 0/drawing.eps': '1 .eps',
}


@pytest.mark.parametrize('name', _FILES)
def test_what_is_no_sample_is_counted(root, name):
  expected = _load(root.parent)
  archives.folder(root, {name: archives.encoded(archives.picture(0))})
  data = _load(root.parent)
  assert data.digest == expected.digest
  assert data.note == f'{expected.note}; ignored 1 files: {_FILES[name]}'


def test_counts_are_of_each_kind(root):
  expected = _load(root.parent).note
  names = ('train/class 0/a.txt', 'test/class 1/a.TXT', 'test/b.csv', 'x/.y')
  archives.folder(root, dict.fromkeys(names, b''))
  assert _load(root.parent).note == (
    f'{expected}; ignored 4 files: 1 .csv, 2 .txt, 1 folder x'
  )


def _move(old, new):
  return lambda root: (root / old).rename(root / new)


def _make(name):
  return lambda root: (root / name).mkdir(parents=True)


_REFUSED = {
  'no test part': (_move('test', 'validation'), 'cifar10: has no folder test'),
  'an empty class': (_make('train/new'), 'train/new: class without pictures'),
  'a class of one part': (
    _move('test/class 2', 'test/class 9'),
    "'class 2' has pictures in only one",
  ),
  'a nested folder': (
    _make('train/class 0/more'),
    'train/class 0/more: a folder in the class folder class 0; move',
  ),
}


@pytest.mark.parametrize('case', _REFUSED)
def test_what_is_not_understood_is_refused(root, case):
  change, message = _REFUSED[case]
  change(root)
  with pytest.raises(DatasetError, match=message):
    _load(root.parent)


def test_folder_without_classes(tmp_path):
  for part in ('train', 'test'):
    (tmp_path / 'cifar10' / part).mkdir(parents=True)
  with pytest.raises(DatasetError, match='train: has no class folders'):
    _load(tmp_path)


def test_a_picture_cut_short_is_named(root):
  broken = root / 'test' / 'class 1' / '00001.png'
  broken.write_bytes(broken.read_bytes()[:-60])
  with pytest.raises(DatasetError, match=r'class 1/00001\.png .* cannot be'):
    _load(root.parent)


def test_names_that_are_not_utf8(root):
  expected = _load(root.parent)
  first = root / 'train' / 'class 0' / '00000.png'
  first.rename(os.fsdecode(os.fsencode(first.parent) + b'/0caf\xe9.png'))
  for part in ('train', 'test'):
    old = root / part / 'class 2'
    old.rename(os.fsdecode(os.fsencode(old) + b'\xe9'))
  data = _load(root.parent)
  assert len(data.x_train) == len(expected.x_train)
  assert data.classes[2] == 'class 2\\udce9'
  assert 'train/class 0/0caf\\udce9.png' in data.files_train
  lines = datasets.show_split('cifar10', root.parent, cache_dir=root / 'c')
  assert '\n'.join(lines).encode()  # can be printed


def test_names_in_two_normal_forms_are_one_class(root):
  composed = unicodedata.normalize('NFC', 'cafe\u0301')
  (root / 'train' / 'class 2').rename(root / 'train' / composed)
  (root / 'test' / 'class 2').rename(root / 'test' / 'cafe\u0301')
  assert composed in _load(root.parent).classes
  (root / 'test' / 'class 1').rename(root / 'test' / composed)
  with pytest.raises(
    DatasetError, match=r"spelled 'caf\\xe9' and 'cafe\\u0301'"
  ):
    _load(root.parent)


def test_a_folder_that_cannot_be_listed(root, monkeypatch):
  iterdir = Path.iterdir

  def denied(self):
    if self.name == 'class 1':
      raise PermissionError(13, 'Permission denied', str(self))
    return iterdir(self)

  monkeypatch.setattr(Path, 'iterdir', denied)
  with pytest.raises(DatasetError, match='class 1.; give this user access'):
    _load(root.parent)


@pytest.mark.parametrize('linked', ['train/class 0/00000.png', 'train/class 0'])
def test_links_out_of_an_image_folder_are_refused(root, tmp_path, linked):
  path = root / linked
  path.rename(tmp_path / 'outside')
  path.symlink_to(tmp_path / 'outside')
  with pytest.raises(DatasetError, match='a link that leads out of'):
    _load(tmp_path)


@pytest.mark.parametrize('to', ['9.png', '../nowhere.png'])
def test_links_to_nowhere_are_refused(root, to):
  (root / 'test' / 'class 1' / '9.png').symlink_to(to)
  with pytest.raises(DatasetError, match=r'9\.png: (not a file|a link)'):
    _load(root.parent)


def test_pipes_among_pictures_are_not_waited_for(root):
  os.mkfifo(root / 'test' / 'class 1' / '9.png')
  with pytest.raises(DatasetError, match=r'9.png: not a file'):
    _load(root.parent)


@pytest.mark.parametrize('name', ['cifar10', 'cifar_10.npz'])
def test_two_datasets_of_one_name(root, arrays, name):
  path = root.parent / name
  if path.suffix:
    archives.save(path, arrays)
    path = archives.save(root.parent / 'cifar-10.npz', arrays)
    with pytest.raises(DatasetError, match="are both 'cifar10'; rename one"):
      _load(root.parent)
  else:
    # The exact name is taken.
    archives.image_folder(root.parent / 'CIFAR10', archives.raw_arrays(2))
    assert len(_load(root.parent).classes) == 3
