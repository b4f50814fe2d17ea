"""A folder that stands for the user's data folder, apart from the real one."""

import dataclasses

import pytest

from experiments import datasets
from experiments.datasets import SPECS, archives
from tests.datasets import originals
from tests.datasets.archives import raw_arrays


@pytest.fixture(autouse=True)
def _no_folder_of_the_user(monkeypatch, tmp_path_factory):
  """Keeps data and caches of the person who runs the tests out of them."""
  from tensorflow_datasets.core import constants

  base = tmp_path_factory.getbasetemp()
  monkeypatch.setattr(constants, 'DATA_DIR', str(base / 'no_tfds'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(base / 'cache_home'))


@pytest.fixture(name='arrays')
def _arrays():
  return raw_arrays()


@pytest.fixture(name='manual')
def _manual(tmp_path):
  """Where a person puts original files, in the data folder `tmp_path`."""
  path = tmp_path / 'downloads' / 'manual'
  path.mkdir(parents=True)
  return path


@pytest.fixture(name='smaller')
def _smaller(monkeypatch):
  """Replaces fields of a spec's draw."""

  def change(name, **fields):
    spec = SPECS[name]
    draw = dataclasses.replace(spec.draw, **fields)
    monkeypatch.setitem(SPECS, name, dataclasses.replace(spec, draw=draw))

  return change


@pytest.fixture(name='small')
def _small(monkeypatch, smaller):
  """Specs and builders of the size of `originals`, without checksums."""
  from experiments.datasets import builders

  smaller('Cal256-101', classes=4, train=3, test=2)
  smaller('PubFig83-ID', classes=4, train=4, test=2)
  smaller('SUFR-W-ID', classes=4, train=2, test=1)
  smaller('TIMIT80', classes=6, train=20, test=5)
  monkeypatch.setattr(
    builders.TimitSubphones, 'SPEAKERS', frozenset({'faks0', 'mgwt0'})
  )
  lists = {'train': ('trn1', 3), 'validation': ('val1', 2), 'test': ('tst1', 1)}
  monkeypatch.setattr(builders.OxfordFlowers17, 'EACH', 6)
  monkeypatch.setattr(builders.OxfordFlowers17, 'LISTS', lists)
  original = archives.ORIGINALS['caltech256']
  original = dataclasses.replace(original, md5='')
  monkeypatch.setitem(archives.ORIGINALS, 'caltech256', original)


@pytest.fixture(name='prepare')
def _prepare(tmp_path):
  """Prepares a set in the data folder `tmp_path`, or another, and loads it."""

  def run(name, root=tmp_path):
    places = {'data_dir': root, 'cache_dir': root / 'cache'}
    lines = [*datasets.prepare(name, **places)]
    assert lines[-1].startswith(f'{name}: ready')
    return datasets.load(name, **places), lines

  return run


@pytest.fixture(name='original')
def _original(request, small):
  """The original files of the set that the test is parametrized with."""
  return originals.MAKERS[request.getfixturevalue('name')]()
