"""A folder that stands for the user's data folder, apart from the real one."""

import dataclasses

import pytest

from experiments.datasets import SPECS, archives


@pytest.fixture(autouse=True)
def _no_folder_of_the_user(monkeypatch, tmp_path_factory):
  """Keeps data and caches of the person who runs the tests out of them."""
  from tensorflow_datasets.core import constants

  monkeypatch.setattr(
    constants, 'DATA_DIR', str(tmp_path_factory.getbasetemp() / 'no_tfds')
  )
  monkeypatch.setenv(
    'XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp() / 'cache_home')
  )


@pytest.fixture(name='manual')
def _manual(tmp_path):
  """Where a person puts original files, in the data folder `tmp_path`."""
  path = tmp_path / 'downloads' / 'manual'
  path.mkdir(parents=True)
  return path


@pytest.fixture(name='smaller')
def _smaller(monkeypatch):
  """Replaces fields of a spec's draw, and drops checksums of real archives."""

  def change(name, **fields):
    spec = SPECS[name]
    draw = dataclasses.replace(spec.draw, **fields)
    monkeypatch.setitem(SPECS, name, dataclasses.replace(spec, draw=draw))

  original = archives.ORIGINALS['caltech256']
  unchecked = tuple(
    dataclasses.replace(archive, md5=None) for archive in original.archives
  )
  monkeypatch.setitem(
    archives.ORIGINALS,
    'caltech256',
    dataclasses.replace(original, archives=unchecked),
  )
  return change
