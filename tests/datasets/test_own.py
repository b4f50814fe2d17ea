"""A dataset of one's own: any npz file or image folder in the data folder."""

import shutil

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import DatasetError
from tests.datasets import archives


def _load(path, name='birds', **options):
  return archives.load(path, name, **options)


def _flat(path, counts=(4, 6, 10)):
  """An image folder without parts."""
  files = {
    f'class {label}/{i:03d}.png': archives.picture(20 * label + i, (20, 30))
    for label, count in enumerate(counts)
    for i in range(count)
  }
  return archives.folder(path, {name: archives.encoded(x)
                                for name, x in files.items()})  # fmt: skip


@pytest.mark.parametrize('form', ['npz', 'joined', 'folder'])
def test_its_spec_says_what_is_there(tmp_path, arrays, form):
  if form == 'folder':
    archives.image_folder(tmp_path / 'my birds', arrays)
  else:
    stored = arrays if form == 'npz' else archives.joined(arrays)
    archives.save(tmp_path / 'my birds.npz', stored)
  data = _load(tmp_path, 'My Birds')
  assert data.spec == datasets.find('My Birds', tmp_path)
  assert data.spec.name == 'my birds'
  assert data.spec.architecture == 'cifar'
  assert data.classes == ('class 0', 'class 1', 'class 2')
  assert data.note == "not one of the paper's datasets; network cifar (32x32x3)"


@pytest.mark.parametrize(
  ('shape', 'architecture'),
  [
    ((8, 8), 'mnist'),
    ((28, 28, 3), 'cifar'),
    ((32, 32, 1), 'cifar'),
    ((20, 33, 3), 'general'),
    ((1845,), 'timit'),
  ],
)
def test_the_network_fits_the_pictures(tmp_path, shape, architecture):
  rng = np.random.default_rng(0)
  arrays = {'classes': np.array(['a', 'b'])}
  for part in ('train', 'test'):
    x = rng.integers(0, 256, (4, *shape)).astype(np.uint8)
    arrays[f'x_{part}'] = x.astype(np.float32) if x.ndim == 2 else x
    arrays[f'y_{part}'] = np.array([0, 1, 0, 1])
  archives.save(tmp_path / 'birds.npz', arrays)
  spec = datasets.find('birds', tmp_path)
  assert spec.architecture == architecture
  assert _load(tmp_path).x_train.shape == (4, *datasets.SHAPES[architecture])


def test_the_network_may_be_named(tmp_path):
  archives.save(tmp_path / 'birds.npz', archives.raw_arrays(size=40))
  data = _load(tmp_path, architecture='svhn')
  assert data.spec == datasets.find('birds', tmp_path, architecture='svhn')
  assert data.x_train.shape == (12, 32, 32, 3)
  assert 'network svhn (32x32x3)' in data.note


@pytest.mark.parametrize('form', ['flat', 'train', 'npz'])
def test_a_share_of_each_class_is_drawn_to_test_on(tmp_path, form):
  root = tmp_path / 'birds'
  _flat(root / 'train' if form == 'train' else root)
  if form == 'npz':
    shutil.rmtree(root)
    arrays = archives.raw_arrays(1, 20)
    arrays['y_train'] = np.repeat(np.arange(3), (4, 6, 10))
    arrays['classes'] = np.array(['class 0', 'class 1', 'class 2'])
    del arrays['x_test'], arrays['y_test']
    archives.save(tmp_path / 'birds.npz', arrays)
  data = _load(tmp_path, test_share=0.25)
  assert np.bincount(data.y_test).tolist() == [1, 2, 2]
  assert np.bincount(data.y_train).tolist() == [3, 4, 8]
  names = [*data.files_train, *data.files_test]
  assert len(set(names)) == 20
  if form != 'npz':
    for name, label in zip(data.files_test, data.y_test, strict=True):
      assert data.classes[label] in name
  assert '0.25 of each class drawn to test on' in data.note
  assert data.spec == datasets.find('birds', tmp_path, test_share=0.25)
  assert _load(tmp_path, test_share=0.25).digest == data.digest
  others = [{'test_share': 0.5}, {'test_share': 0.25, 'seed': 1}]
  assert all(_load(tmp_path, **o).digest != data.digest for o in others)


def _one_picture(path):
  archives.folder(_flat(path), {'solo/0.png': archives.encoded(np.eye(3) > 0)})


# fmt: off
_REFUSED = {
  'no such set': (lambda path: None, {}, "'birds'.* is none of MNIST, .*npz"),
  'no test part': (_flat, {}, 'birds: has no folder test; .* a test share'),
  'a share beside a test part': (lambda path: archives.image_folder(path,
    archives.raw_arrays()), {'test_share': 0.5},
    'test_share is 0.5, but .*birds has a folder test'),
  'a share beside test arrays': (lambda path: archives.save(
    path.with_suffix('.npz'), archives.raw_arrays()), {'test_share': 0.5},
    'test_share is 0.5, but .* has x_test'),
  'no share': (_flat, {'test_share': 0.0}, 'test_share is 0.0; it must'),
  'all': (_flat, {'test_share': 1.0}, 'test_share is 1.0; it must be between'),
  'a part without classes': (lambda path: [_flat(path / 'train'),
    _flat(path / 'test' / 'a')], {'test_share': 0.5}, 'has a folder test'),
  'a part of another name': (lambda path: _flat(path / 'Training'),
    {'test_share': 0.5}, 'has no folder train, but training'),
  'too few pictures': (_one_picture, {'test_share': 0.5},
    "4 classes with at least 2 samples are needed, 3 of 4 .*'solo' has 1"),
  'one class': (lambda path: archives.image_folder(path, archives.raw_arrays(
    classes=1)), {}, "has the class 'class 0' alone; a network learns to tell"),
  'unknown network': (_flat, {'architecture': 'resnet'},
    "architecture is 'resnet'; it must be one of mnist, cifar, svhn, general"),
  'pictures for a network of vectors': (lambda path: archives.image_folder(path,
    archives.raw_arrays()), {'architecture': 'timit'},
    'expected a vector of 1845 features, found an encoded file'),
  'vectors of another length': (lambda path: archives.save(
    path.with_suffix('.npz'), archives.vectors(9)), {},
    'has vectors of 9 features; the only network for vectors takes 1845'),
}
# fmt: on


@pytest.mark.parametrize('case', _REFUSED)
def test_what_cannot_be(tmp_path, case):
  write, options, message = _REFUSED[case]
  write(tmp_path / 'birds')
  with pytest.raises(DatasetError, match=message):
    _load(tmp_path, **options)


@pytest.mark.parametrize(
  'options', [{'architecture': 'cifar'}, {'test_share': 0.1}]
)
def test_networks_and_splits_of_the_paper_stay(tmp_path, options):
  with pytest.raises(DatasetError, match='MNIST has a network .mnist. and a'):
    _load(tmp_path, 'mnist', **options)
  assert datasets.find('mnist', architecture='mnist') is datasets.SPECS['MNIST']


def test_without_a_data_folder_it_is_unknown():
  with pytest.raises(DatasetError, match="unknown dataset 'birds'"):
    datasets.find('birds')
  with pytest.raises(DatasetError, match="did you mean 'cifar10'"):
    datasets.find('cifr10')


def test_the_commands_know_it(tmp_path):
  _flat(tmp_path / 'birds')
  own = {'architecture': 'cifar', 'test_share': 0.5}
  places = {'data_dir': tmp_path, 'cache_dir': tmp_path / 'cache'}
  assert datasets.status('birds', tmp_path).state == 'needs a manual step'
  assert datasets.status('birds', tmp_path, test_share=0.5).state == 'ready'
  lines = [*datasets.check('birds', **places, **own)]
  assert 'stored sizes: 20x30: 20' in lines
  assert lines[-3:] == ['  class 0: 2, 2', '  class 1: 3, 3', '  class 2: 5, 5']
  lines = list(datasets.show_split('birds', **places, **own))
  assert len([line for line in lines if line.startswith('test\t')]) == 10
  with pytest.raises(DatasetError, match='own needs no preparation'):
    list(datasets.prepare('birds', tmp_path))
