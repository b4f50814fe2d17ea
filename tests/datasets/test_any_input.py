"""Whatever files hold: a DatasetError, or the right number of samples."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments import datasets
from experiments.datasets import DatasetError, archives, speech
from experiments.datasets.folders import hidden
from experiments.datasets.specs import find_known
from tests.datasets import originals
from tests.datasets.archives import (
  encoded,
  folder,
  joined,
  packed,
  picture,
  raw_arrays,
  save,
)

settings.register_profile(
  'datasets',
  max_examples=40,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)
_SETTINGS = settings.get_profile('datasets')


@pytest.fixture(name='_quiet', autouse=True)
def _quiet_fixture():
  # Pillow and zipfile warn of damage that is no error.
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    yield


@pytest.fixture(name='root')
def _root(tmp_path):
  """A folder that each example finds empty."""

  def empty():
    shutil.rmtree(tmp_path / 'data', ignore_errors=True)
    (tmp_path / 'data').mkdir()
    return tmp_path / 'data'

  return empty


def _load(root, name='birds', **kwargs):
  """The dataset, or None where it is refused."""
  try:
    return datasets.load(name, data_dir=root, cache_dir=root.parent, **kwargs)
  except DatasetError as error:
    assert str(error)
    return None


# Names that a file system allows: of any characters, some not UTF-8.
_ANY = st.text(
  st.characters(exclude_characters='/\0', exclude_categories=['Cs'])
  | st.sampled_from('\udce9. e\u0301\xe9[*'),
  min_size=1,
  max_size=8,
).filter(lambda name: name not in ('.', '..'))
_NAMES = (
  st.sampled_from(
    ['a', 'B', 'cat', '.hidden', '__MACOSX', '@eaDir', 'Thumbs.db', 'caf\xe9']
  )
  | _ANY
)
_SUFFIXES = st.sampled_from(
  ['.png', '.PNG', '.jpg', '.txt', '', '.webp', '.gz', '.eps', '.db']
)
_FILES = st.builds(str.__add__, _NAMES, _SUFFIXES)
_CONTENTS = st.sampled_from(
  [encoded(picture(1)), encoded(picture(2), 'JPEG'), encoded(picture(3), 'GIF')]
)
_CLASS = st.dictionaries(_FILES, _CONTENTS, min_size=1, max_size=4)
_PART = st.dictionaries(_NAMES, _CLASS, min_size=1, max_size=3)


def _write(path, tree):
  """Writes a tree, its rest where two names are one; returns what is there."""
  for name, value in tree.items():
    try:
      if isinstance(value, dict):
        (path / name).mkdir()
        _write(path / name, value)
      else:
        (path / name).write_bytes(value)
    except OSError:  # too long for this file system
      pass


def _pictures(path):
  """Pictures, in the sense of this test, of all class folders."""
  return [
    file
    for folder_ in path.iterdir()
    if folder_.is_dir() and not hidden(folder_.name)
    for file in folder_.iterdir()
    if not hidden(file.name)
    and file.suffix.lower() in ('.png', '.jpg', '.webp')
  ]


@_SETTINGS
@given(
  parts=st.fixed_dictionaries({'train': _PART, 'test': _PART}),
  beside=st.dictionaries(_FILES, _CONTENTS, max_size=2),
  same=st.booleans(),
)
def test_image_folders(root, parts, beside, same):
  if same:
    parts['test'] = {name: parts['train'][name] for name in parts['train']}
  data_dir = root()
  _write(data_dir, {'birds': {**beside, **parts}})
  path = data_dir / 'birds'
  data = _load(data_dir)
  if data is not None:
    assert len(data.x_train) == len(_pictures(path / 'train'))
    assert len(data.x_test) == len(_pictures(path / 'test'))
    # All others are counted; those in hidden folders with their folder.
    entries = [*path.iterdir(), *path.glob('*/*'), *path.glob('*/*/*')]
    others = [
      entry
      for entry in entries
      if not any(map(hidden, entry.parent.relative_to(path).parts))
      and (entry.is_file() or hidden(entry.name))
    ]
    used = len(data.x_train) + len(data.x_test)
    counted = re.search(r'ignored (\d+) files', data.note)
    assert len(others) - used == (int(counted[1]) if counted else 0)
    assert all(text.encode() for text in (*data.classes, *data.files_train))
    assert np.array_equal(np.unique(data.y_test), range(len(data.classes)))
  path.rename(data_dir / 'rest')
  (data_dir / 'rest' / 'train').rename(path)
  data = _load(data_dir, test_share=0.3)
  if data is not None:
    names = {*data.files_train, *data.files_test}
    assert len(data.x_train) + len(data.x_test) == len(names)
    assert len(names) == len(_pictures(path))


_DTYPES = st.sampled_from(
  'u1 i1 i4 u8 >i4 f4 f8 S2 U2 ? c8 datetime64[s]'.split()
).map(np.dtype)
_ARRAYS = _DTYPES.flatmap(
  lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_side=4))
)
_KEYS = ['classes', 'size']
for _part in ('train', 'test'):
  _KEYS += [f'{key}_{_part}' for key in ('x', 'y', 'jpeg', 'off', 'file')]


@_SETTINGS
@given(
  changes=st.dictionaries(
    st.sampled_from(_KEYS), st.none() | _ARRAYS, min_size=1, max_size=2
  ),
  form=st.sampled_from([lambda arrays: arrays, joined]),
)
def test_members_of_an_npz_file(root, changes, form):
  arrays = form(raw_arrays(size=4)) | changes
  data_dir = root()
  save(
    data_dir / 'birds.npz',
    {key: value for key, value in arrays.items() if value is not None},
  )
  for data in (_load(data_dir), _load(data_dir, test_share=0.5)):
    if data is not None:
      assert len(data.x_train) == len(data.y_train) == len(data.files_train)
      assert set(data.y_train) == set(range(len(data.classes)))


@_SETTINGS
@given(
  name=(st.text(max_size=12) | _ANY).filter(lambda name: not find_known(name))
)
def test_names_of_datasets(root, name):
  data_dir = root()
  save(data_dir / 'birds.npz', raw_arrays(size=4))
  for given_name in (name, f'../{data_dir.name}/birds', f'{name}/birds'):
    assert _load(data_dir, given_name) is None
  try:
    datasets.find(name, data_dir)
  except DatasetError as error:
    assert str(error)


@_SETTINGS
@given(
  names=st.dictionaries(
    st.lists(_NAMES, min_size=1, max_size=3).map('/'.join), _CONTENTS
  ),
  suffix=st.sampled_from(['.zip', '.tar', '.tgz']),
)
def test_members_of_an_archive(root, names, suffix):
  try:
    path = packed(root() / f'a{suffix}', names)
  except UnicodeError:  # not a name that zip files can have
    return
  shown = [
    name
    for name in names
    if not any(part.startswith('.') or hidden(part) for part in name.split('/'))
  ]
  if any(archives.is_archive(name) for name in shown):
    return
  found = [(name, read()) for name, read in archives.members(path)]
  assert sorted(content for _, content in found) == sorted(
    names[name] for name in shown
  )


@st.composite
def _damaged(draw, content):
  """The content with bytes changed, left out or cut off, or any bytes."""
  if draw(st.integers(0, 9)) == 0:
    return draw(st.binary(max_size=600))
  out, size = bytearray(content), len(content)
  for _ in range(draw(st.integers(0, 3))):
    at, new = draw(st.integers(0, size - 1)), draw(st.binary(max_size=4))
    out[at : at + max(1, len(new))] = new
  return bytes(out[: draw(st.integers(0, size) | st.just(size))])


def _bytes_of(write, name):
  with tempfile.TemporaryDirectory() as path:
    return write(Path(path) / name).read_bytes()


def _read_npz(root, content):
  (root / 'birds.npz').write_bytes(content)
  data = _load(root)
  assert data is None or (len(data.x_train), len(data.x_test)) == (4, 2)


def _read_picture(root, content):
  folder(root / 'birds', {'train/a/0.png': content, 'test/a/0.png': content})
  data = _load(root)
  assert data is None or len(data.x_train) == 1


def _read_archive(root, content):
  (root / 'a').write_bytes(content)
  for _, read in archives.members(root / 'a'):
    read()


def _read_audio(root, content):
  speech.features(speech.read_audio(content, 'a.wav'))


def _read_segments(root, content):
  text = content.decode('ascii', 'replace')
  labels = speech.subphones(speech.read_segments(text, 'a.phn'), 9)
  assert len(labels) == 9


_PACKED = {'a/b.png': bytes(99)}
_ZIP = _bytes_of(lambda path: packed(path, _PACKED), 'a.zip')
_READ = {
  'npz': (
    _read_npz,
    [_bytes_of(lambda path: save(path, raw_arrays(2, 2, 1, 4)), 'a.npz')],
  ),
  'picture': (
    _read_picture,
    [encoded(picture(5), form) for form in ('PNG', 'JPEG', 'GIF', 'TIFF')],
  ),
  'archive': (
    _read_archive,
    [_ZIP, _bytes_of(lambda path: packed(path, _PACKED), 'a.tgz')],
  ),
  'audio': (_read_audio, [originals.sphere(np.arange(500))]),
  'segments': (_read_segments, [b'0 100 h#\n100 200 aa\n']),
}


@pytest.mark.parametrize('kind', _READ)
@_SETTINGS
@given(data=st.data())
def test_damaged_files(root, kind, data):
  read, contents = _READ[kind]
  try:
    read(root(), data.draw(st.sampled_from(contents).flatmap(_damaged)))
  except DatasetError as error:
    assert str(error)


def test_a_zip_file_with_a_damaged_signature(tmp_path):
  with pytest.raises(DatasetError, match='damaged'):
    _read_archive(tmp_path, _ZIP[:2] + b'!' + _ZIP[3:])
