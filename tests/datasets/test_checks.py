"""`status`, `check` and `show_split` tell what is there."""

import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from tests.datasets import archives, originals
from tests.datasets.archives import load


def _check(root, name='cifar10', **options):
  return [*datasets.check(name, root, cache_dir=root / 'cache', **options)]


def test_counts_sizes_and_duplicates(tmp_path):
  arrays = archives.raw_arrays(size=40)
  archives.save(tmp_path / 'cifar10.npz', arrays)
  lines = _check(tmp_path)
  assert lines[0].startswith('CIFAR: file ')
  assert "3 of the paper's 10 classes" in lines[1]
  assert lines[2] == f'digest: {load(tmp_path).digest}'
  assert lines[3:] == [
    'stored sizes: 40x40: 18',  # as stored, not as resized for the network
    'test samples that are training samples too: 0',
    'class: train, test',
    *(f'  class {i}: 4, 2' for i in range(3)),
  ]
  arrays['x_test'][4] = arrays['x_train'][7]
  archives.save(tmp_path / 'cifar10.npz', archives.joined(arrays))
  assert '  test/4.png = train/7.png' in _check(tmp_path)


@pytest.mark.parametrize('name', ['cifar10', 'mnist'])
def test_the_grid_shows_training_pictures(tmp_path, name):
  arrays = archives.raw_arrays(classes=4, size=119)
  archives.save(tmp_path / f'{name}.npz', arrays)
  grid = tmp_path / 'out' / 'grid.png'
  assert _check(tmp_path, name, grid=grid)[-1] == f'pictures: {grid}'
  data = load(tmp_path, name)
  with Image.open(grid) as sheet:
    pixels = np.asarray(sheet.convert('RGB'))
  height, width = data.x_train.shape[1:3]
  cell = (max(height, 32) + 12, max(width, 64))
  # The second picture of the third class.
  row = np.flatnonzero(data.y_train == 2)[1]
  top, left = 2 * cell[0] + 12, cell[1]
  shown = pixels[top : top + height, left : left + width]
  np.testing.assert_array_equal(
    shown, np.broadcast_to(data.x_train[row], shown.shape)
  )
  # Above it, text.
  assert (pixels[2 * cell[0] : top, left : left + cell[1]] < 128).any()


def test_the_grid_of_vectors(tmp_path):
  archives.save(tmp_path / 'timit.npz', archives.vectors())
  lines = _check(tmp_path, 'timit', grid=tmp_path / 'grid.png')
  assert 'stored sizes: vectors' in lines
  with Image.open(tmp_path / 'grid.png') as sheet:
    assert sheet.width == 10 * 123


def test_the_split_lists_every_sample_once(tmp_path):
  archives.save(
    tmp_path / 'cifar10.npz', archives.joined(archives.raw_arrays())
  )
  lines = list(
    datasets.show_split('cifar10', tmp_path, cache_dir=tmp_path / 'cache')
  )
  head = [line for line in lines if line.startswith('#')]
  assert 'official train and test sets' in head[0]
  assert head[-1] == f'# digest {load(tmp_path).digest}'
  rows = [line.split('\t') for line in lines if not line.startswith('#')]
  assert len(rows) == len({row[2] for row in rows}) == 18
  # Sample 5 has label 5 % 3.
  assert ['train', 'class 2', 'train/5.png'] in rows
  part = datasets.show_split(
    'cifar10', tmp_path, cache_dir=tmp_path / 'cache', train_size=6
  )
  assert sum(line.startswith('train') for line in part) == 6


def test_every_dataset_has_a_status(tmp_path):
  states = {
    name: datasets.status(name, tmp_path).state for name in datasets.SPECS
  }
  assert states.pop('digits') == 'ready'
  manual = {name for name, s in states.items() if s == 'needs a manual step'}
  assert manual == {'iCub', 'PubFig83-ID', 'SUFR-W-ID', 'TIMIT80'}
  assert set(states.values()) == {'needs a manual step', 'downloadable'}


def test_what_is_there_and_what_is_broken(tmp_path):
  (tmp_path / 'svhn' / 'train').mkdir(parents=True)
  status = datasets.status('SVHN', tmp_path)
  assert status.state == 'needs a manual step'
  assert 'has no folder test' in status.text
  path = archives.save(tmp_path / 'svhn.npz', archives.raw_arrays())
  status = datasets.status('SVHN', tmp_path)
  assert status.state == 'ready'
  assert str(path) in status.text


def test_originals_in_place_need_no_further_person(tmp_path, manual):
  command = f'data prepare PubFig83-ID --data-dir {tmp_path}`'
  text = datasets.status('PubFig83-ID', tmp_path).text
  assert 'accept the terms' in text
  assert command in text
  originals.pubfig83().write(manual)
  status = datasets.status('PubFig83-ID', tmp_path)
  assert status.state == 'downloadable'
  assert command in status.text
