"""A dataset and runs so small that a test trains in well under a second."""

import atexit
import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from experiments import datasets
from experiments.datasets import Dataset, Loader
from experiments.paper import conditions, protocol
from experiments.training import data as device
from experiments.training import loop
from experiments.training.step import Setup, program

CLASSES = 8  # XLA:CPU compiles random numbers in rows of 8 faster than of 10
# Has a network 'small', which compiles in well under a second.
PLUGIN = Path(__file__).with_name('small_network.py')
NETWORK = ('--plugin', str(PLUGIN), '--network', 'small')
# Trains a run of the digits.
COMMAND = (
  'run', '--condition', 'SGD', '--rate', '1', '--epochs', '1',
  '--train-size', '200', *NETWORK,
)  # fmt: skip


@functools.cache
def folder(train: int = 240, test: int = 60) -> Path:
  """A data folder with noisy prototypes for the fully connected network."""
  random = np.random.default_rng(0)
  prototypes = random.normal(size=(CLASSES, 1845))

  def part(count):
    y = np.arange(count, dtype=np.int32) % CLASSES
    x = prototypes[y] + 3 * random.normal(size=(count, 1845)) + 1
    return x.astype(np.float32), y

  (x_train, y_train), (x_test, y_test) = part(train), part(test)
  path = Path(tempfile.mkdtemp(prefix='tiny'))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  np.savez(
    path / 'timit80.npz',
    x_train=x_train,
    y_train=y_train,
    x_test=x_test,
    y_test=y_test,
    classes=np.array([str(i) for i in range(CLASSES)]),
  )
  return path


def loader(train: int = 240, test: int = 60) -> Loader:
  """Loads the dataset of a folder."""
  return Loader(folder(train, test))


@functools.cache
def dataset(train: int = 240, test: int = 60) -> Dataset:
  """The dataset of a folder."""
  path = folder(train, test)
  return datasets.load('timit80', data_dir=path, cache_dir=path)


def run(
  condition: str = 'SGD',
  data: Dataset | None = None,
  *,
  rate: float = 1.0,
  seed: int = 0,
  **fields,
) -> protocol.Run:
  """The first run of a condition; 240 images, 216 of them to train on."""
  data = data or dataset()
  defaults = {
    'epochs': 2, 'initial_std': 0.05, 'base_rate': 0.01,
    'calibration_batches': 2,
  }  # fmt: skip
  (first, *_) = protocol.runs_of(
    conditions.find(condition),
    (rate,),
    (seed,),
    dataset=protocol.Data(data.spec.name, data.digest, data.source, data.note),
    protocol=protocol.Protocol(**defaults | fields),
  )
  return first


def small(*arguments, **changes) -> protocol.Run:
  """The run with a network that compiles in well under a second."""
  return dataclasses.replace(
    run(*arguments, **changes), network='small', plugin=PLUGIN.read_text()
  )


def placed(
  run: protocol.Run, data: Dataset | None = None, mesh=None
) -> device.DeviceData:
  """The dataset on the device, split as the run asks."""
  return device.split(device.put(data or dataset(), mesh), run, mesh)


def train(run, on=None, scan=None):
  """All states (copied: the next epoch consumes them) and lines of a run."""
  on = on or placed(run)
  states, lines = [], []
  start = loop.start(run, on)
  for state, line in loop.epochs(run, on, start, 1, scan):
    states.append(jax.tree.map(np.array, state))
    lines.append(line)
  return states, lines


def first_step(run, rows=None, rate=0.01):
  """The parameters after an update with some images: the first hundred."""
  on = placed(run)
  rows = on.trained[:100] if rows is None else rows
  state, _ = program(Setup.of(run, on)).step(
    loop.start(run, on), on.arrays, rows, np.float32(rate)
  )
  return state['params']


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
  """A list to which the names of functions are added as JAX compiles them."""
  names = []

  def listener(event, duration_secs, **about):
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(about['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


def equal(a, b) -> bool:
  """Whether two trees have the same bits."""
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def assert_close(lines, others, tolerance=1e-3) -> None:
  """Lines are equal up to rounding, which may change the class of an image."""
  images = {'train_error': 200, 'test_error': 60, 'holdout_error': 24}
  for line, other in zip(lines, others, strict=True):
    assert line.keys() == other.keys()
    for name in line.keys() - {'seconds'}:
      one = 100.1 / images[name] if name in images else tolerance
      close = functools.partial(
        np.testing.assert_allclose, rtol=tolerance, atol=one, err_msg=name
      )
      jax.tree.map(close, line[name], other[name])
