"""Sets that TFDS downloads: its builders under our splits, our own too."""

import contextlib
import shutil
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.image_classification import mnist

from experiments import datasets
from tests.datasets import originals
from tests.datasets.archives import folder, packed, picture


@pytest.fixture(autouse=True, scope='module')
def _needs_tensorflow():
  """TFDS writes through TensorFlow, which takes seconds to import."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TF_CPP_MIN_LOG_LEVEL', '2')
    pytest.importorskip('tensorflow', reason='pip install -e .[prepare]')
  pytest.importorskip('importlib_resources', reason='TFDS imports it')


def _pictures(count, size):
  return np.stack([picture(i, (size, size)) for i in range(count)])


def _mnist(path):
  names = {'train_data': 20, 'test_data': 10}
  files = {}
  for name, count in names.items():
    files[name] = bytes(16) + _pictures(count, 28)[..., 0].tobytes()
    labels = np.arange(count, dtype=np.uint8) % 10
    files[name.replace('data', 'labels')] = bytes(8) + labels.tobytes()
  folder(path, files)
  return {name: str(path / name) for name in files}


def _cifar100(path):
  """Rows of coarse label, label, and channels."""
  x = _pictures(200, 32).transpose(0, 3, 1, 2).reshape(200, -1)
  labels = np.arange(200, dtype=np.uint8)[:, None] % 100
  names = '\n'.join(f'name {i:02d}' for i in range(100)) + '\n'
  coarse = '\n'.join(f'coarse {i}' for i in range(20))
  files = {
    'fine_label_names.txt': names.encode(),
    'coarse_label_names.txt': coarse.encode(),
  }
  stored = np.hstack([labels // 5, labels, x]).tobytes()
  files |= dict.fromkeys(('train.bin', 'test.bin'), stored)
  folder(path / 'cifar-100-binary', files)
  return str(path)


def _stl10(path):
  """Column by column, channel by channel."""
  names = [f'name {i}' for i in range(10)]
  files = {'class_names.txt': '\n'.join(names).encode() + b'\n'}
  x = _pictures(30, 96).transpose(0, 3, 2, 1)
  labels = np.arange(30, dtype=np.uint8) % 10 + 1
  for part, rows in (('train', slice(0, 20)), ('test', slice(20, 30))):
    files[f'{part}_X.bin'] = x[rows].tobytes()
    files[f'{part}_y.bin'] = labels[rows].tobytes()
  files['unlabeled_X.bin'] = x[:4].tobytes()
  folder(path / 'stl10_binary', files)
  return str(path)


def _flowers102(path):
  """Official training and validation lists train."""
  count = 102 * 4
  ids = np.arange(1, count + 1).reshape(4, 1, 102)
  lists = {'trnid': ids[0], 'valid': ids[1], 'tstid': np.hstack(ids[2:])}
  labels = {'labels': np.arange(count)[None] % 102 + 1}
  files = {
    f'images/jpg/image_{i:05d}.jpg': originals.jpeg(i)
    for i in range(1, count + 1)
  }
  files |= {'labels': originals.mat(labels), 'setid': originals.mat(lists)}
  folder(path, files)
  return {name: str(path / name) for name in ('images', 'labels', 'setid')}


def _caltech101(path):
  """Both splits of TFDS, itself drawn, are drawn from anew."""
  files = {
    f'101_ObjectCategories/{name}/image_{i + 1:04d}.jpg': originals.jpeg(i)
    for name in ('accordion', 'BACKGROUND_Google', 'Faces')
    for i in range(33)
  }
  packed(path / 'caltech-101' / '101_ObjectCategories.tar.gz', files)
  return path


def _lfw(path):
  """Its records have no file names, and two pictures may be equal."""
  size = (250, 250)
  files = {
    f'lfw/Person_{p}/Person_{p}_{i:04d}.jpg': originals.jpeg(
      p if i < 2 else 10 * p + i, size
    )
    for p in range(3)
    for i in range(4)
  }
  return str(folder(path, files))


# What writes a set as extracted, training and test samples of each class, and
# the first class.
_SETS = {
  'MNIST': (_mnist, 2, 1, '0'),
  'CIFAR100': (_cifar100, 2, 2, 'name 00'),
  'STL10': (_stl10, 2, 1, 'name 0'),
  'Cal101': (_caltech101, 30, 3, 'accordion'),
  'Flowers102': (_flowers102, 2, 2, 'pink primrose'),
  'LFW-ID': (_lfw, 2, 2, None),
}


@pytest.mark.parametrize('name', _SETS)
def test_sets_of_tfds(tmp_path, monkeypatch, prepare, smaller, name):
  smaller('LFW-ID', classes=2, train=2, test=2)
  smaller('Cal101', classes=3, train=30, test=10)
  monkeypatch.setattr(mnist, '_TRAIN_EXAMPLES', 20)
  monkeypatch.setattr(mnist, '_TEST_EXAMPLES', 10)
  write, train, test, first = _SETS[name]
  stored = write(tmp_path / 'extracted')
  for method in ('download', 'download_and_extract'):
    monkeypatch.setattr(
      tfds.download.DownloadManager, method, lambda self, urls: stored
    )
  data, _ = prepare(name)
  assert set(np.bincount(data.y_train)) == {train}
  assert set(np.bincount(data.y_test)) == {test}
  assert first in (data.classes[0], None)
  assert 'lossy' not in data.note
  if name in ('Flowers102', 'LFW-ID'):
    assert not set(data.files_train) & set(data.files_test)
  if name == 'CIFAR100':
    rows = {x.tobytes() for x in _pictures(200, 32)}
    assert {x.tobytes() for x in data.x_test} == rows
  if name == 'Flowers102':
    numbers = {int(file[6:11]) for file in data.files_train}
    assert numbers == set(range(1, 205))
  if name == 'Cal101':
    # All 33 pictures of a class are used, whichever split of TFDS had them.
    for label in range(3):
      trained = data.files_train[data.y_train == label]
      tested = data.files_test[data.y_test == label]
      assert len({*trained, *tested}) == 33
  if name == 'STL10':
    places = {'data_dir': tmp_path, 'cache_dir': tmp_path / 'cache'}
    assert 'stored sizes: 96x96: 30' in datasets.check('STL10', **places)


@pytest.fixture(name='online')
def _online(monkeypatch):
  """Gives the content that each address has."""
  content = {}

  @contextlib.contextmanager
  def opened(url, **_):
    response = type('Response', (), {'url': url, 'headers': {}})
    name = urllib.parse.urlparse(url).path.rpartition('/')[2]
    yield response, [content.get(name, b'<html>truncated')]

  monkeypatch.setattr(downloader, '_open_url', opened)
  return content


def test_tfds_knows_every_builder():
  specs = datasets.SPECS.values()
  names = {spec.builder for spec in specs if spec.builder}
  assert names <= {*tfds.list_builders(with_community_datasets=False)}


def test_another_file_than_the_original(prepare, online):
  with pytest.raises(
    datasets.DatasetError, match='MNIST: .*could not be prepared.*checksum'
  ):
    prepare('MNIST')


@pytest.mark.parametrize('name', ['Flowers17', 'Cal256-101', 'Scene67'])
def test_originals_are_downloaded(
  tmp_path, prepare, online, monkeypatch, original, name
):
  with pytest.raises(datasets.DatasetError) as caught:  # a page in its place
    prepare(name)
  # The message begins with the file, and says what to delete.
  assert str(tmp_path / 'downloads' / 'manual') in str(caught.value) or (
    'the .INFO file beside a download' in str(caught.value)
  )
  file = Path(str(caught.value).partition(': ')[0])
  for path in (file, file.with_name(f'{file.name}.INFO')):
    path.unlink()
  if name != 'Cal256-101':  # other files were downloaded too
    shutil.rmtree(tmp_path / 'downloads')
  original.write(tmp_path / 'sent')
  online.update(
    {file.name: file.read_bytes() for file in (tmp_path / 'sent').iterdir()}
  )
  data, _ = prepare(name)
  original.write(tmp_path / 'put' / 'downloads' / 'manual')
  assert prepare(name, tmp_path / 'put')[0].digest == data.digest


def test_a_failed_download_says_what_a_person_can_do(
  tmp_path, monkeypatch, prepare
):
  def offline(self, urls):
    raise OSError('no route to host')

  monkeypatch.setattr(tfds.download.DownloadManager, 'download', offline)
  with pytest.raises(
    datasets.DatasetError,
    match=r'could not be prepared .*: no route to host; .* put 17flowers\.tgz',
  ):
    prepare('Flowers17')
  assert datasets.status('Flowers17', tmp_path).state == 'downloadable'
