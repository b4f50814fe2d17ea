"""Every real set that is at hand trains through the loader and the program."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments import datasets
from experiments.paper import conditions, protocol
from experiments.training import data as device
from experiments.training import loop as train
from experiments.training.step import Setup, program

DATA = Path(
  os.environ.get(
    'SYMJAX_BP_DATA', Path(__file__).parents[2].parent / 'shared' / 'data'
  )
)
SETS = (
  'mnist',
  'cifar10',
  'cifar100_clean10k',
  'caltech101',
  'caltech256_10',
  'flowers102',
)


@pytest.mark.parametrize('name', SETS)
def test_a_few_steps_lower_the_loss(name, tmp_path_factory):
  if not (DATA / f'{name}.npz').exists():
    pytest.skip(
      f'{DATA / name}.npz is not there (SYMJAX_BP_DATA names a folder)'
    )
  cache = tmp_path_factory.getbasetemp() / 'decoded'
  data = datasets.load(name, data_dir=DATA, cache_dir=cache, train_size=204)
  (run,) = protocol.runs_of(
    conditions.find('uSF+BN+BM'),
    rates=[1.0],
    dataset=protocol.Data(data.spec.name, data.digest),
    protocol=protocol.Protocol(epochs=1, train_size=204, holdout=0.0),
  )
  placed = device.split(device.put(data), run)
  functions = program(Setup.of(run, placed))
  state = train.start(run, placed)
  index = placed.trained[:20]
  losses = []
  for _ in range(3):
    rate = np.float32(5e-4)
    state, (loss, _) = functions.step(state, placed.arrays, index, rate)
    losses.append(float(loss) / len(index))
  assert abs(losses[0] - np.log(len(data.classes))) < 0.5
  assert losses[-1] < losses[0]
