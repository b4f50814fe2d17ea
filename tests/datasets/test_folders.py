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
from tests.datasets.archives import load


@pytest.fixture(name='root')
def _root(tmp_path, arrays):
  return archives.image_folder(tmp_path / 'cifar10', arrays)


def test_pictures_come_in_the_order_of_classes(root, arrays):
  root = root.rename(root.with_name('CIFAR-10'))
  data = load(root.parent)
  order = np.argsort(arrays['y_train'], kind='stable')
  np.testing.assert_array_equal(data.x_train, arrays['x_train'][order])
  np.testing.assert_array_equal(data.y_train, arrays['y_train'][order])
  assert data.files_train[0] == 'train/class 0/00000.png'
  assert 'ignored' not in data.note


@pytest.mark.parametrize(
  ('form', 'suffix', 'where', 'lossy'),
  [
    ('PPM', 'ppm', '*', False),
    ('JPEG', 'JPE', 'test', True),
    ('JPEG', 'tif', 'test', True),  # the content decides
  ],
)
def test_a_folder_is_lossy_where_it_has_jpeg(root, form, suffix, where, lossy):
  for file in root.glob(f'{where}/*/*.png'):
    Image.open(file).save(file.with_suffix(f'.{suffix}'), form)
    file.unlink()
  data = load(root.parent)
  assert ('lossy' in data.note) == lossy
  assert len(data.x_train) == 12


def test_every_format_of_pillow_is_used(root):
  forms = 'bmp dib gif jfif jpe jpeg jpg ppm tga tif tiff webp jp2'.split()
  picture = Image.fromarray(archives.picture(9, (32, 32)))
  for suffix in (*forms, *map(str.upper, forms)):
    picture.save(root / 'train' / 'class 1' / f'new.{suffix}')
  data = load(root.parent)
  assert np.bincount(data.y_train).tolist() == [4, 4 + 2 * len(forms), 4]
  assert 'train/class 1/new.JP2' in data.files_train
  assert 'ignored' not in data.note


def test_what_is_no_sample_is_counted(root):
  expected = load(root.parent)
  names = (
    'train/class 0/notes.txt', 'test/class 1/a.TXT', 'train/labels.CSV',
    'train/loose.png', 'val/class 0/00000.png', 'README',
    'train/class 0/drawing.eps', 'train/class 0/.DS_Store',
    'train/class 0/._00000.png', 'test/class 1/Thumbs.db',
    'test/class 1/desktop.ini', 'test/class 1/@eaDir/00000.png',
    'train/.ipynb_checkpoints/0-checkpoint.png',
    'train/__MACOSX/class 0/._0.png',
  )  # fmt: skip
  picture = archives.encoded(archives.picture(0))
  archives.folder(root, dict.fromkeys(names, picture))
  data = load(root.parent)
  assert data.digest == expected.digest
  assert data.note == (
    f'{expected.note}; ignored 14 files: 1 .csv, 1 .eps, 1 .png, 2 .txt, '
    '1 folder val, 7 hidden or system, 1 without extension'
  )


def _cut_short(root):
  path = root / 'test' / 'class 1' / '00001.png'
  path.write_bytes(path.read_bytes()[:-60])


def _move(old, new):
  return lambda root: (root / old).rename(root / new)


def _make(name):
  return lambda root: (root / name).mkdir(parents=True)


def _link(to):
  return lambda root: (root / 'test' / 'class 1' / '9.png').symlink_to(to)


def _link_out(name):
  def change(root):
    path = (root / name).rename(root.parent / 'outside')
    (root / name).symlink_to(path)

  return change


_NOT_A_FILE = r'9\.png: (not a file|a link)'
_REFUSED = {
  'no test part': (_move('test', 'validation'), 'cifar10: has no folder test'),
  'no classes': (
    lambda root: [c.rename(root / c.name) for c in root.glob('train/*')],
    'train: has no class folders',
  ),
  'an empty class': (_make('train/new'), 'train/new: class without pictures'),
  'a class of one part': (
    _move('test/class 2', 'test/class 9'),
    "'class 2' has pictures in only one",
  ),
  'a nested folder': (
    _make('train/class 0/more'),
    'train/class 0/more: a folder in the class folder class 0; move',
  ),
  'a picture cut short': (_cut_short, r'class 1/00001\.png .* cannot be'),
  'a picture elsewhere': (
    _link_out('train/class 0/00000.png'),
    'a link that leads out of',
  ),
  'a class elsewhere': (_link_out('train/class 0'), 'a link that leads out of'),
  'a link to itself': (_link('9.png'), _NOT_A_FILE),
  'a link to nowhere': (_link('../nowhere.png'), _NOT_A_FILE),
  'a pipe': (
    lambda root: os.mkfifo(root / 'test' / 'class 1' / '9.png'),
    _NOT_A_FILE,
  ),
}


@pytest.mark.parametrize('case', _REFUSED)
def test_what_is_not_understood_is_refused(root, case):
  change, message = _REFUSED[case]
  change(root)
  with pytest.raises(DatasetError, match=message):
    load(root.parent)


def test_names_that_are_not_utf8(root):
  first = root / 'train' / 'class 0' / '00000.png'
  first.rename(os.fsdecode(os.fsencode(first.parent) + b'/0caf\xe9.png'))
  for part in ('train', 'test'):
    old = root / part / 'class 2'
    old.rename(os.fsdecode(os.fsencode(old) + b'\xe9'))
  data = load(root.parent)
  assert len(data.x_train) == 12
  assert data.classes[2] == 'class 2\\udce9'
  assert 'train/class 0/0caf\\udce9.png' in data.files_train
  lines = datasets.show_split('cifar10', root.parent, cache_dir=root / 'c')
  assert '\n'.join(lines).encode()  # can be printed


def test_names_in_two_normal_forms_are_one_class(root):
  composed = unicodedata.normalize('NFC', 'cafe\u0301')
  (root / 'train' / 'class 2').rename(root / 'train' / composed)
  (root / 'test' / 'class 2').rename(root / 'test' / 'cafe\u0301')
  assert composed in load(root.parent).classes
  (root / 'test' / 'class 1').rename(root / 'test' / composed)
  with pytest.raises(
    DatasetError, match=r"spelled 'caf\\xe9' and 'cafe\\u0301'"
  ):
    load(root.parent)


@pytest.mark.parametrize('name', ['private', 'class 1'])
def test_a_folder_that_cannot_be_listed(root, monkeypatch, name):
  (root.parent / 'private').mkdir()
  iterdir = Path.iterdir

  def denied(self):
    if self.name == name:
      raise PermissionError(13, 'Permission denied', str(self))
    return iterdir(self)

  monkeypatch.setattr(Path, 'iterdir', denied)
  if name == 'private':  # of no concern to this dataset
    assert len(load(root.parent).x_train) == 12
    return
  with pytest.raises(DatasetError, match='class 1.; give this user access'):
    load(root.parent)


def test_two_datasets_of_one_name(root, arrays):
  # The exact name is taken, and of two files neither.
  archives.image_folder(root.parent / 'CIFAR10', archives.raw_arrays(2))
  assert len(load(root.parent).classes) == 3
  for name in ('cifar_10', 'cifar-10'):
    archives.save(root.parent / f'{name}.npz', arrays)
  with pytest.raises(DatasetError, match="are both 'cifar10'; rename one"):
    load(root.parent)
