"""The real data beside the repository are what they say, and train."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments import datasets
from experiments.paper import conditions, protocol
from experiments.training import data as device
from experiments.training import loop
from experiments.training.step import Setup, program

_FOLDER = Path(
  os.environ.get(
    'SYMJAX_BP_DATA', Path(__file__).parents[2].parent / 'shared' / 'data'
  )
)
# Training and test samples, classes, and a part of the note; of each network
# that the embedded digits do not have one is trained.
_SETS = {
  'mnist': (60000, 10000, 10, ''),
  'cifar10': (50000, 10000, 10, 'lossy'),
  'cifar100_clean10k': (8000, 1999, 100, '8000 / 1999'),
  'caltech101': (3060, 949, 102, ''),
  'caltech256_10': (600, 250, 10, "10 of the paper's 102"),
  'flowers102': (2040, 2040, 102, '2040 / 6149'),
}
_TRAINED = ('cifar10', 'flowers102')


@pytest.mark.parametrize('name', _SETS)
def test_real_sets(name, tmp_path):
  if not (_FOLDER / f'{name}.npz').exists():
    pytest.skip(
      f'{_FOLDER / name}.npz is not there (SYMJAX_BP_DATA names a folder)'
    )
  train, test, classes, note = _SETS[name]
  data = datasets.load(name, data_dir=_FOLDER, cache_dir=tmp_path)
  assert data.x_train.shape == (train, *data.spec.shape)
  assert data.x_test.shape == (test, *data.spec.shape)
  assert data.x_train.dtype == np.uint8
  for labels in (data.y_train, data.y_test):
    assert np.unique(labels).tolist() == list(range(classes))
  assert note in data.note if note else data.note == ''
  # Pictures: neither constant nor noise around one value.
  assert data.x_train[::10].std() > 40
  if name == 'mnist':
    assert data.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    np.testing.assert_allclose(data.x_train.mean(), 33.318, atol=1e-3)
  if name in _TRAINED:
    _assert_that_steps_lower_the_loss(data)


def _assert_that_steps_lower_the_loss(data):
  (run,) = protocol.runs_of(
    conditions.find('uSF+BN+BM'),
    rates=[1.0],
    dataset=protocol.Data(data.spec.name, data.digest),
    protocol=protocol.Protocol(epochs=1, holdout=0.0),
  )
  placed = device.split(device.put(data), run)
  functions = program(Setup.of(run, placed))
  state = loop.start(run, placed)
  index = placed.trained[:20]
  losses = []
  for _ in range(3):
    state, (loss, _) = functions.step(
      state, placed.arrays, index, np.float32(5e-4)
    )
    losses.append(float(loss) / len(index))
  assert abs(losses[0] - np.log(len(data.classes))) < 0.5
  assert losses[-1] < losses[0]
