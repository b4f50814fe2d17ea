"""Runs that differ in rate and seed only, trained as one program.

Their states are stacked along a first axis, and the functions of
``experiments.program`` mapped over it: an accelerator that one small network
leaves idle does several in little more time. On a CPU it takes longer than one
after the other, for there a convolution with kernels per run is a grouped one.
Sums may be taken in another order: the numbers are those of the runs alone
within rounding. What is recorded is the same.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.paper.protocol import Run
from experiments.training import devices
from experiments.training import loop as train
from experiments.training.loop import Line, Rows
from experiments.training.placement import Parts, Placed
from experiments.training.program import Program, Setup, State, program

_ON_ACCELERATORS = 32  # runs at once; bounds the memory that they take
_KEPT_PROGRAMS = 8


def group_size(together: int | None, mesh: Mesh | None) -> int:
  """How many runs are trained as one program, at most.

  Args:
    together: what is asked for; None is many on an accelerator, one on a CPU or
      where mini-batches are divided over several devices.
    mesh: devices that mini-batches are divided over.

  Raises:
    ValueError: if several runs and several devices are asked for.
  """
  several = devices.count(mesh) > 1
  if together is None:
    one = several or jax.default_backend() == 'cpu'
    return 1 if one else _ON_ACCELERATORS
  if together > 1 and several:
    raise ValueError(
      f'together is {together}, but must be 1 where mini-batches are divided '
      f'over {devices.count(mesh)} devices: say --devices 1, or --together 1.'
    )
  return together


def epochs(
  runs: Sequence[Run],
  placed: Sequence[Placed],
  states: Sequence[State],
  first: int = 1,
  scan: bool | None = None,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[dict[int, tuple[State, Line]]]:
  """Trains a group epoch by epoch; a group of one as ``train.epochs`` does.

  A run of which a parameter is not finite ends there. It stays in the program
  until all have ended, as another number of runs would be another compilation.

  Args:
    runs: at least one; they differ in rate and seed only.
    placed: the dataset of each; of several, on one device.
    states: of each, before epoch ``first``; their buffers are used up.
    first: as for ``train.epochs``, and so are the others.
    scan: whether an epoch is one compiled loop; default: not on a CPU.
    stopping: asked as by ``train.epochs``.

  Yields:
    After each epoch, by the index of those runs that had not ended before it:
    state, which the next epoch uses up, and line of metrics. Seconds are the
    run's share.

  Raises:
    Stopped: if ``stopping()`` says so.
  """
  if len(runs) == 1:
    one = train.epochs(runs[0], placed[0], states[0], first, scan, stopping)
    yield from ({0: pair} for pair in one)
    return
  protocol = runs[0].protocol
  means = jnp.stack([each.parts.mean for each in placed])
  parts = placed[0].parts._replace(mean=means)
  state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  for leaf in jax.tree.leaves(states):  # no state is in memory twice
    leaf.delete()
  functions = _mapped(Setup.of(runs[0], placed[0]))
  trainer = train.Trainer(functions, None, protocol, scan, stopping)
  learning = list(range(len(runs)))
  for epoch in range(first, protocol.epochs + 1):
    began = time.perf_counter()
    rows = [Rows.of(*each, epoch) for each in zip(runs, placed, strict=True)]
    state, measured = trainer.epoch(
      state,
      parts,
      jax.tree.map(lambda *arrays: np.stack(arrays, 1), *rows),
      np.stack([train.rate_of(run, epoch) for run in runs]),
    )
    arrays = jax.device_get(state)
    seconds = (time.perf_counter() - began) / len(learning)
    done = {
      i: (
        _own(arrays, i),
        train.line_of(epoch, rows[i], _own(measured, i), seconds),
      )
      for i in learning
    }
    yield done
    learning = [i for i in learning if done[i][1]['finite']]
    if not learning:
      return


def _own(tree, i: int):
  """What is of one run in a tree of stacked arrays."""
  return jax.tree.map(lambda array: array[i], tree)


@functools.lru_cache(maxsize=_KEPT_PROGRAMS)
def _mapped(setup: Setup) -> Program:
  """The functions of a setup for several runs that have begun.

  All arguments but the images have an axis of runs: the first one, or the
  second where there is one of mini-batches.
  """
  functions = program(setup)
  parts = Parts(train=None, test=None, mean=0)  # type: ignore[arg-type]
  step = jax.vmap(functions.step, (0, parts, 0, 0))
  scan = jax.vmap(functions.scan, (0, parts, 1, 0))
  return functions._replace(
    step=jax.jit(step, donate_argnums=0),
    scan=jax.jit(scan, donate_argnums=0),
    evaluate=jax.jit(jax.vmap(functions.evaluate, (0, parts, None, 0, 0))),
    statistics=jax.vmap(functions.statistics, (0, parts, 0)),
    align=jax.jit(functools.partial(_aligned, functions.align)),
    finite=jax.jit(jax.vmap(functions.finite)),
  )


def _aligned(align, state, parts: Parts, index) -> dict[str, Any]:
  """``align`` of several runs."""
  # One after the other: jaxlib 0.10.2 compiles jax.vmap of it to wrong numbers
  # on a CPU, for 6 runs of the network for TIMIT.
  return jax.lax.map(
    lambda one: align(one[0], parts._replace(mean=one[1]), one[2]),
    (state, parts.mean, index),
  )
