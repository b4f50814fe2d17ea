"""Several runs that differ in rate and seed only, trained as one program.

Their states are stacked along a first axis, and the functions of
``experiments.training.step`` are mapped over it. An accelerator that one small
network leaves idle trains several in little more time. On a CPU this is slower
than one after the other: a convolution with kernels per run becomes a grouped
one. The order of sums may differ, so numbers equal those of single runs up to
rounding.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paper.protocol import Run
from experiments.training import loop
from experiments.training.data import Arrays, DeviceData
from experiments.training.loop import Line, Rows
from experiments.training.step import Program, Setup, State, program

_ON_ACCELERATORS = 32  # runs at once; bounds the memory that they take
_KEPT_PROGRAMS = 8


def group_size(together: int | None, devices: int | None) -> int:
  """The largest number of runs that are trained as one program.

  Args:
    together: as requested; None is many on a single accelerator, else one.
    devices: over which mini-batches are divided; None is all accelerators that
      divide them.

  Raises:
    ValueError: if several runs and several devices are requested.
  """
  accelerated = jax.default_backend() != 'cpu'
  if devices is None:
    devices = jax.local_device_count() if accelerated else 1
  if together is None:
    return _ON_ACCELERATORS if accelerated and devices == 1 else 1
  if together > 1 and devices > 1:
    raise ValueError(
      f'together is {together}, but must be 1 where mini-batches are divided '
      f'over {devices} devices: say --devices 1, or --together 1.'
    )
  return together


def epochs(
  runs: Sequence[Run],
  data: Sequence[DeviceData],
  states: Sequence[State],
  first: int = 1,
  scan: bool | None = None,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[dict[int, tuple[State, Line]]]:
  """Trains a group epoch by epoch; a group of one with ``loop.epochs``.

  A run ends when a parameter is not finite. It stays in the program until all
  have ended, because another number of runs would need another compilation.

  Args:
    runs: at least one; they differ in rate and seed only.
    data: the dataset of each; several runs need a single device.
    states: of each, before epoch ``first``; their buffers are consumed.
    first: number of the epoch to begin with, from 1.
    scan: as for ``loop.epochs``.
    stopping: as for ``loop.epochs``.

  Yields:
    After each epoch, for the index of each run that had not ended before:
    its state, which the next epoch consumes, and its line of metrics. Seconds
    are the run's share.

  Raises:
    Stopped: if ``stopping()`` is true.
  """
  if len(runs) == 1:
    one = loop.epochs(runs[0], data[0], states[0], first, scan, stopping)
    yield from ({0: pair} for pair in one)
    return
  protocol = runs[0].protocol
  means = jnp.stack([each.arrays.mean for each in data])
  arrays = data[0].arrays._replace(mean=means)
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  for leaf in jax.tree.leaves(states):  # no state is in memory twice
    leaf.delete()
  functions = _mapped(Setup.of(runs[0], data[0]))
  trainer = loop.Trainer(functions, None, protocol, scan, stopping)
  learning = list(range(len(runs)))
  for epoch in range(first, protocol.epochs + 1):
    began = time.perf_counter()
    rows = [Rows.of(*each, epoch) for each in zip(runs, data, strict=True)]
    state, measured = trainer.epoch(
      state,
      arrays,
      jax.tree.map(lambda *leaves: np.stack(leaves, 1), *rows),
      np.stack([loop.rate_of(run, epoch) for run in runs]),
    )
    states = jax.device_get(state)
    seconds = (time.perf_counter() - began) / len(learning)
    done = {
      i: (
        _own(states, i),
        loop.line_of(epoch, rows[i], _own(measured, i), seconds),
      )
      for i in learning
    }
    yield done
    learning = [i for i in learning if done[i][1]['finite']]
    if not learning:
      return


def _own(tree, i: int):
  """One run's part of a tree of stacked arrays."""
  return jax.tree.map(lambda leaf: leaf[i], tree)


@functools.lru_cache(maxsize=_KEPT_PROGRAMS)
def _mapped(setup: Setup) -> Program:
  """The functions of a setup for several runs that have begun.

  All arguments but the images have an axis of runs: the first one, or the
  second where there is one of mini-batches.
  """
  functions = program(setup)
  axes = Arrays(train=None, test=None, mean=0)  # type: ignore[arg-type]
  step = jax.vmap(functions.step, (0, axes, 0, 0))
  scan = jax.vmap(functions.scan, (0, axes, 1, 0))

  def align(state, arrays, index):
    # One after the other: jaxlib 0.10.2 compiles jax.vmap of it to wrong
    # numbers on a CPU, for 6 runs of the network for TIMIT.
    return jax.lax.map(
      lambda one: functions.align(one[0], arrays._replace(mean=one[1]), one[2]),
      (state, arrays.mean, index),
    )

  return functions._replace(
    step=jax.jit(step, donate_argnums=0),
    scan=jax.jit(scan, donate_argnums=0),
    evaluate=jax.jit(jax.vmap(functions.evaluate, (0, axes, None, 0, 0))),
    statistics=jax.vmap(functions.statistics, (0, axes, 0)),
    align=jax.jit(align),
    finite=jax.jit(jax.vmap(functions.finite)),
  )
