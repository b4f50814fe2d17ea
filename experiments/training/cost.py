"""The cost of runs: floating point operations, and hours on this machine."""

import time
from collections.abc import Mapping

import jax
import numpy as np

from experiments.datasets import Dataset
from experiments.paper.protocol import Run
from experiments.training import data as device
from experiments.training import loop, models, plugins
from experiments.training.step import Setup, program

_STEPS = 5
# Median FLOP/s of the committed runs, each on one core.
STORED_ON = 'one core of an AMD EPYC (Zen 5), by our own runs'
_STORED = {'mnist': 77e9, 'cifar': 110e9, 'general': 131e9}


def stored_speed(architecture: str) -> float:
  """FLOP/s of a network on `STORED_ON`; the slowest for one never measured."""
  return _STORED.get(architecture, min(_STORED.values()))


def network_of(
  run: Run, data: Dataset
) -> tuple[models.Layers, tuple[int, ...], int]:
  """The layers of a run's network, the shape of an input, and the classes.

  Raises:
    ValueError: if the network is a module of a plugin, whose cost is unknown.
  """
  own: Mapping = plugins.load(run.plugin).networks
  layers = own.get(run.network) or models.NETWORKS[data.spec.architecture]
  if callable(layers):
    raise ValueError(
      f'network is {run.network!r}, a module, whose cost is not known; `plan` '
      'needs a network given as layers.'
    )
  return layers, data.x_train.shape[1:], len(data.classes)


def run_flops(run: Run, data: Dataset) -> float:
  """Operations of all training steps and evaluations of a run."""
  network = network_of(run, data)
  held_out = run.protocol.held_out(len(data.y_train))
  trained = len(data.y_train) - held_out
  evaluated = held_out + len(data.y_test)
  if run.condition.batch_norm != 'none':
    size = run.statistics_size(1, trained)
    evaluated += run.protocol.calibration_batches * size
  forward = 2 * sum(models.multiply_adds(*network))
  step = models.training_flops(*network)
  return run.protocol.epochs * (trained * step + evaluated * forward)


def flops_per_second(run: Run, data: Dataset) -> float:
  """Measures a few training steps of a run's network."""
  placed = device.split(device.put(data), run)
  functions = program(Setup.of(run, placed))
  state = loop.start(run, placed)
  index = device.mini_batches(run, 1, placed.trained)[0]
  began = 0.0
  for step in range(_STEPS + 1):
    if step == 1:  # the first one compiles
      jax.block_until_ready(state)
      began = time.perf_counter()
    state, _ = functions.step(state, placed.arrays, index, np.float32(0))
  jax.block_until_ready(state)
  seconds = (time.perf_counter() - began) / _STEPS
  flops = models.training_flops(*network_of(run, data))
  return index.size * flops / seconds
