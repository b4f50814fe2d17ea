"""Data parallel: mini-batches divided over a mesh of devices, ``data``.

Parameters, feedback weights, the optimizer's state and the images are whole on
every device; of a mini-batch each device computes its part, and XLA sums the
gradients before anything else is done with them. One device has no mesh, and
then nothing here does anything.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.paper.protocol import Run

AXIS = 'data'


def mesh_for(runs: Iterable[Run], devices: int | None) -> Mesh | None:
  """The mesh of all processes for some runs; None for a single device.

  Args:
    runs: what it is for.
    devices: of each process; None is as many as divide every mini-batch, on a
      CPU one.

  Raises:
    ValueError: if there are not so many, or they don't divide a mini-batch.
  """
  sizes = {size for run in runs for _, size in run.batch_plan}
  processes, here = jax.process_count(), jax.local_device_count()
  if devices is None:
    most = 1 if jax.default_backend() == 'cpu' else here
    dividing = [
      n for n in range(1, most + 1) if math.gcd(*sizes) % (n * processes) == 0
    ]
    devices = max(dividing, default=1)
  if not 1 <= devices <= here:
    raise ValueError(
      f'devices is {devices}, but must be from 1 to {here}, the number of '
      f'{jax.default_backend()} devices of each process.'
    )
  if devices * processes == 1:
    return None
  chosen = [
    device
    for process in range(processes)
    for device in [d for d in jax.devices() if d.process_index == process][
      :devices
    ]
  ]
  mesh = Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))
  for size in sorted(sizes):
    check_divides(mesh, size)
  return mesh


def count(mesh: Mesh | None) -> int:
  """The number of devices."""
  return 1 if mesh is None else mesh.size


def check_divides(mesh: Mesh | None, size: int) -> None:
  """Checks that every device gets as much of a mini-batch.

  Raises:
    ValueError: if not.
  """
  if size % count(mesh):
    raise ValueError(
      f'a mini-batch of {size} can not be divided over {count(mesh)} devices '
      f'(--devices times the number of processes): choose a divisor of {size}.'
    )


def compiler(mesh: Mesh | None) -> Any:
  """``jax.jit``, with what it returns whole on every device of a mesh."""
  if mesh is None:
    return jax.jit
  whole = NamedSharding(mesh, PartitionSpec())
  jit = functools.partial(jax.jit, out_shardings=whole)
  if mesh.devices.flat[0].platform != 'cpu':
    return jit

  def waiting(function, **options):
    # On CPUs two programs at a time, each with its collectives, can wait for
    # each other's threads for ever.
    compiled = jit(function, **options)
    return lambda *arrays: jax.block_until_ready(compiled(*arrays))

  return waiting


def replicate(mesh: Mesh | None, tree: Any) -> Any:
  """Arrays whole on every device; without a mesh on the default device.

  Every process must have the same arrays.
  """
  if mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  return jax.tree.map(lambda x: _put(mesh, x, PartitionSpec()), tree)


def split(mesh: Mesh | None, rows: np.ndarray) -> Any:
  """Rows of images divided by their last axis; every process gives them all."""
  if mesh is None:
    return rows
  return _put(mesh, rows, PartitionSpec(*(None,) * (rows.ndim - 1), AXIS))


def _put(mesh: Mesh, x: Any, spec: PartitionSpec) -> jax.Array:
  # Unlike device_put, it asks the other processes nothing.
  x = np.asarray(x)
  sharding = NamedSharding(mesh, spec)
  return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])
