"""Cached arrays are whole or absent, and damage is repaired."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from experiments.datasets import cache
from tests.datasets import archives
from tests.datasets.archives import load

_ARRAYS = {'a': np.arange(50_000), 'b': np.array([b'x', b'yz'])}


def _build():
  """Makes the arrays, and counts how often."""
  return mock.Mock(return_value=_ARRAYS)


def _fetch(folder, build, config: object = 'config'):
  found = cache.fetch(folder, 'name', config, build)
  assert found.keys() == _ARRAYS.keys()
  for key, value in _ARRAYS.items():
    np.testing.assert_array_equal(found[key], value)


def test_built_once_per_config(tmp_path):
  build = _build()
  for config in ('a', 'a', {'b': 1}, 'a', {'b': 1}):
    _fetch(tmp_path / 'new' / 'folder', build, config)
  assert build.call_count == 2
  assert len(list((tmp_path / 'new' / 'folder').iterdir())) == 2


@pytest.mark.parametrize('damage', ['empty', 'cut', 'flip', 'text'])
def test_a_damaged_file_is_built_again(tmp_path, damage):
  build = _build()
  _fetch(tmp_path, build)
  (path,) = tmp_path.iterdir()
  content = bytearray(path.read_bytes())
  if damage == 'flip':
    content[len(content) // 2] ^= 1
  else:
    content = {'empty': b'', 'cut': content[:-999], 'text': b'hello'}[damage]
  path.write_bytes(content)
  _fetch(tmp_path, build)
  _fetch(tmp_path, build)
  assert build.call_count == 2


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
  def full_disk(file, **_):
    file.write(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', full_disk)
  with pytest.warns(UserWarning, match='No space left .* XDG_CACHE_HOME'):
    _fetch(tmp_path, _build())
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.warns(UserWarning, match='cannot keep decoded data'):
    _fetch(tmp_path / 'file', _build())


def test_several_writers_at_once(tmp_path):
  with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda i: _fetch(tmp_path, _build(), i % 20), range(160)))
  assert len(list(tmp_path.iterdir())) == 20
  build = _build()
  for config in range(20):
    _fetch(tmp_path, build, config)
  assert build.call_count == 0


def test_the_users_cache_folder(monkeypatch, tmp_path):
  monkeypatch.setattr('sys.platform', 'linux')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert cache.default_dir() == tmp_path / 'symjax_bp'
  monkeypatch.setattr(Path, 'home', lambda: tmp_path)
  for value in ('', 'relative'):  # to be ignored, by the convention
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    assert cache.default_dir() == tmp_path / '.cache' / 'symjax_bp'
  monkeypatch.setattr('sys.platform', 'darwin')
  assert cache.default_dir() == tmp_path / 'Library' / 'Caches' / 'symjax_bp'
  monkeypatch.setattr('sys.platform', 'win32')
  monkeypatch.setenv('LOCALAPPDATA', str(tmp_path / 'local'))
  assert cache.default_dir() == tmp_path / 'local' / 'symjax_bp'

  def no_home():
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.setattr('sys.platform', 'linux')
  monkeypatch.setattr(Path, 'home', no_home)
  monkeypatch.delenv('XDG_CACHE_HOME')
  assert cache.default_dir().is_dir()
  assert cache.default_dir() == cache.default_dir()


def test_the_name_of_the_file_is_safe(tmp_path):
  for name in ('a/../b', '.', 'x' * 300, '\udce9\n', ''):
    cache.fetch(tmp_path / 'cache', name, name, _build())
  files = [path.name for path in (tmp_path / 'cache').iterdir()]
  assert len(files) == 5
  assert all(name.isascii() and len(name) < 70 for name in files)


def test_a_changed_dataset_is_decoded_again(tmp_path, arrays):
  root = archives.image_folder(tmp_path / 'cifar10', arrays)
  before = load(tmp_path).x_train[0]
  first = root / 'train' / 'class 0' / '00000.png'
  first.write_bytes(archives.encoded(archives.picture(99, (32, 32))))
  assert (load(tmp_path).x_train[0] != before).any()
