"""Data parallelism: mini-batches divided over a mesh of devices, ``data``.

Parameters, feedback weights, optimizer state and images are replicated; each
device computes its part of a mini-batch, and XLA sums the gradients before
anything else uses them. Without a mesh, on one device, nothing here does
anything.
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
  """The mesh for some runs; None for a single device.

  Args:
    runs: to be trained.
    devices: how many; None is as many as divide every mini-batch, on a CPU one.

  Raises:
    ValueError: if there are not so many.
  """
  sizes = {size for run in runs for _, size in run.condition.batch_plan}
  here = jax.local_device_count()
  if devices is None:
    most = 1 if jax.default_backend() == 'cpu' else here
    common = math.gcd(*sizes)
    devices = max(n for n in range(1, most + 1) if common % n == 0)
  if not 1 <= devices <= here:
    raise ValueError(
      f'devices is {devices}, but must be from 1 to {here}, the number of '
      f'{jax.default_backend()} devices here.'
    )
  if devices == 1:
    return None
  chosen = np.array(jax.local_devices()[:devices])
  return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))


def count(mesh: Mesh | None) -> int:
  """The number of devices."""
  return 1 if mesh is None else mesh.size


def compiler(mesh: Mesh | None) -> Any:
  """``jax.jit``, with results replicated over the mesh."""
  if mesh is None:
    return jax.jit
  replicated = NamedSharding(mesh, PartitionSpec())
  jit = functools.partial(jax.jit, out_shardings=replicated)
  if mesh.devices.flat[0].platform != 'cpu':
    return jit

  def waiting(function, **options):
    # On CPUs two concurrent programs with collectives can wait for each
    # other's threads for ever.
    compiled = jit(function, **options)
    return lambda *arrays: jax.block_until_ready(compiled(*arrays))

  return waiting


def replicate(mesh: Mesh | None, tree: Any) -> Any:
  """Arrays on every device; without a mesh on the default device."""
  if mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(mesh: Mesh | None, rows: np.ndarray) -> Any:
  """Rows of images divided over the devices by their last axis.

  Rows that do not divide, a mini-batch of all images, are on every device.
  """
  if mesh is None:
    return rows
  axis = None if rows.shape[-1] % mesh.size else AXIS
  spec = PartitionSpec(*(None,) * (rows.ndim - 1), axis)
  return jax.device_put(rows, NamedSharding(mesh, spec))
