"""A dataset and runs so small that a test trains in well under a second."""

import jax
import numpy as np

from experiments.datasets import SPECS, Dataset
from experiments.paper import conditions
from experiments.paper import protocol as grid
from experiments.training import loop as training
from experiments.training import placement

CLASSES = 10


def dataset(train: int = 240, test: int = 60, seed: int = 0) -> Dataset:
  """Noisy prototypes for the fully connected network: it compiles quickly."""
  random = np.random.default_rng(seed)
  prototypes = random.normal(size=(CLASSES, 1845))

  def part(count):
    y = np.arange(count, dtype=np.int32) % CLASSES
    x = prototypes[y] + 3 * random.normal(size=(count, 1845)) + 1
    return x.astype(np.float32), y

  (x_train, y_train), (x_test, y_test) = part(train), part(test)
  names = np.array([f'{i}' for i in range(max(train, test))])
  return Dataset(
    x_train=x_train,
    y_train=y_train,
    x_test=x_test,
    y_test=y_test,
    classes=tuple(map(str, range(CLASSES))),
    spec=SPECS['TIMIT80'],
    digest=f'tiny {train} {test} {seed}',
    source='made by the tests',
    note='not real',
    files_train=names[:train],
    files_test=names[:test],
  )


def run(
  condition: str = 'SGD',
  data: Dataset | None = None,
  *,
  rate: float = 1.0,
  seed: int = 0,
  **protocol,
) -> grid.Run:
  """The first run of a condition; 240 images, 216 of them to train on."""
  data = data or dataset()
  (first, *_) = grid.runs_of(
    conditions.find(condition),
    (rate,),
    (seed,),
    dataset=data.spec.name,
    digest=data.digest,
    source=data.source,
    note=data.note,
    protocol=grid.Protocol(
      **{'epochs': 2, 'initial_std': 0.05, 'base_rate': 0.01, **protocol}
    ),
  )
  return first


def placed(run: grid.Run, data: Dataset | None = None) -> placement.Placed:
  """The dataset on the device, split as the run asks."""
  return placement.place(placement.upload(data or dataset()), run)


def train(run, on=None, scan=None):
  """All states (copied: the next epoch uses them up) and lines of a run."""
  on = on or placed(run)
  states, lines = [], []
  start = training.start(run, on)
  for state, line in training.epochs(run, on, start, 1, scan):
    states.append(jax.tree.map(np.array, state))
    lines.append(line)
  return states, lines


def equal(a, b) -> bool:
  """Whether two trees have the same bits."""
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
