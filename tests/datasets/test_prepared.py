"""Prepared folders are read without TensorFlow, and only when whole."""

import json
import re
import shutil
import sys

import pytest

from experiments import datasets
from experiments.datasets import DatasetError
from tests.datasets import archives, originals
from tests.experiments.command_line import python


def _load(root):
  return archives.load(root, 'Scene67')


@pytest.fixture(name='whole', scope='module')
def _whole(tmp_path_factory):
  """A data folder in which Scene67 is prepared."""
  root = tmp_path_factory.mktemp('prepared')
  originals.scene67().write(root / 'downloads' / 'manual')
  list(datasets.prepare('Scene67', root, cache_dir=root / 'cache'))
  return root


@pytest.fixture(name='root')
def _root(whole, tmp_path):
  """A copy that a test may damage; its version folder is `root / FOLDER`."""
  shutil.copytree(whole / 'mit_indoor67', tmp_path / 'mit_indoor67')
  return tmp_path


_FOLDER = 'mit_indoor67/1.0.0'


def test_importing_is_cheap_and_reading_imports_no_tensorflow(whole, tmp_path):
  script = """
import sys
from experiments import datasets
loaded = lambda *names: [name for name in names if name in sys.modules]
print(loaded('jax', 'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL',
             'scipy'))
data = datasets.load('Scene67', data_dir=sys.argv[1], cache_dir=sys.argv[2])
print(data.x_train.shape, data.digest, loaded('tensorflow', 'jax'))
"""
  wanted = f'[]\n(9, 119, 119, 3) {_load(whole).digest} []\n'
  assert python(script, whole, tmp_path) == wanted


def test_the_own_folder_of_tfds_is_looked_at_last(
  whole, root, monkeypatch, tmp_path
):
  from tensorflow_datasets.core import constants

  monkeypatch.setattr(constants, 'DATA_DIR', str(whole))
  assert _load(root).digest == _load(whole).digest
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert str(whole) in _load(empty).source
  assert str(whole) in datasets.load('Scene67', cache_dir=empty).source
  assert str(root) in _load(root).source


def test_an_unfinished_preparation_is_not_used(root):
  version = root / _FOLDER
  version.rename(version.with_name('incomplete.ABCDEF_1.0.0'))
  with pytest.raises(DatasetError, match='unfinished preparation in .*ABCDEF'):
    _load(root)
  assert datasets.status('Scene67', root).state == 'downloadable'


def test_a_missing_shard_is_named(root):
  (shard,) = (root / _FOLDER).glob('*test*')
  shard.unlink()
  with pytest.raises(DatasetError, match='missing, half prepared') as caught:
    _load(root)
  assert shard.name in str(caught.value)
  command = f'data prepare Scene67 --data-dir {root}`'
  assert command in datasets.status('Scene67', root).text


_COUNT = '{"splits": [{"name": "train", "shardLengths": 3}]}'


@pytest.mark.parametrize(
  'content', ['', '{"splits": 3}', 'no json', '[]', '[' * 100_000, _COUNT]
)
def test_a_damaged_description_is_named(root, content):
  (root / _FOLDER / 'dataset_info.json').write_text(content)
  with pytest.raises(DatasetError, match=r'dataset_info\.json: cannot be read'):
    _load(root)


def test_what_cannot_be_read_is_refused(root, tmp_path):
  (shard,) = (root / _FOLDER).glob('*train*')
  content = shard.read_bytes()
  shard.write_bytes(content[: len(content) // 2])
  with pytest.raises(DatasetError, match=str(root)):
    _load(root)
  shard.rename(tmp_path / 'outside')
  shard.symlink_to(tmp_path / 'outside')
  with pytest.raises(DatasetError, match='a link that leads out of'):
    _load(root)
  path = root / _FOLDER / 'dataset_info.json'
  info = json.loads(path.read_text())
  del info['fileFormat']
  path.write_text(json.dumps(info))
  with pytest.raises(DatasetError, match='prepared as tfrecord'):
    _load(root)


@pytest.mark.parametrize('key', ['filepathTemplate', 'filepath_template'])
def test_files_elsewhere_are_not_read(root, key):
  path = root / _FOLDER / 'dataset_info.json'
  info = json.loads(path.read_text())
  (root / 'x').mkdir()
  for split in info['splits']:
    del split['filepathTemplate']
    split[key] = '../../x/{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    (shard,) = (root / _FOLDER).glob(f'*-{split["name"]}.*')
    shutil.copy(shard, root / 'x' / shard.name.removeprefix('mit_indoor67-'))
  path.write_text(json.dumps(info))
  with pytest.raises(DatasetError, match='names other files for'):
    _load(root)


def test_another_format_in_the_own_folder_of_tfds(root, tmp_path, monkeypatch):
  """The advice to prepare into another folder can be followed."""
  from tensorflow_datasets.core import constants

  path = root / _FOLDER / 'dataset_info.json'
  path.write_text(path.read_text().replace('array_record', 'tfrecord'))
  monkeypatch.setattr(constants, 'DATA_DIR', str(root))
  for folder in (None, root):
    with pytest.raises(DatasetError, match='into another --data-dir'):
      list(datasets.prepare('Scene67', folder))
  new = tmp_path / 'new'
  originals.scene67().write(new / 'downloads' / 'manual')
  lines = list(datasets.prepare('Scene67', new, cache_dir=new))
  assert lines[-1].startswith('Scene67: ready')


def test_the_newest_version_is_taken(root):
  for version in ('1.10.0', '1.9.0', '2..0'):
    shutil.copytree(root / _FOLDER, root / 'mit_indoor67' / version)
  assert '1.10.0' in _load(root).source


@pytest.mark.parametrize('key', ['pythonClassName', 'type'])
def test_modules_that_a_description_names_are_not_imported(root, key):
  (path,) = root.rglob('features.json')
  text = path.read_text()
  assert '"pythonClassName": "tensorflow_datasets.core.features.' in text
  path.write_text(
    re.sub(
      r'"pythonClassName": "tensorflow_datasets[^"]*Image',
      f'"{key}": "antigravity.Image',
      text,
    )
  )
  with pytest.raises(DatasetError, match="names 'antigravity.Image'"):
    _load(root)
  assert 'antigravity' not in sys.modules
