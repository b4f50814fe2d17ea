"""Checkpoints: the state after an epoch, by Orbax, whole or not used.

Orbax writes a folder beside its place and moves it there; with the state it
keeps a digest of it, so that a file that was damaged later is noticed, too.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.files import StoreError

_KEPT = 2


def save(folder: Path, epoch: int, state: Any) -> None:
  """Writes the state after an epoch and drops all but the last two.

  Raises:
    StoreError: if it can't be written.
  """
  import orbax.checkpoint as ocp

  folder = folder.absolute()
  state = jax.device_get(state)
  try:
    folder.mkdir(exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
      tree = {'state': state, 'digest': _digest(state)}
      checkpointer.save(folder / str(epoch), tree, force=True)
  except Exception as error:  # Orbax and its storage have errors of their own
    _remove_unfinished(folder)
    raise StoreError(
      f'the checkpoint {folder / str(epoch)} could not be written: '
      f'{_first_line(error)}. Nothing finished is lost; make room or choose '
      'another folder with --results, and repeat the command.'
    ) from error
  for old in _epochs(folder)[_KEPT:]:
    shutil.rmtree(folder / str(old), ignore_errors=True)


def restore(folder: Path, like: Any, last: int) -> tuple[int, Any, list[str]]:
  """The last checkpoint that is whole; those after it are removed.

  Args:
    folder: of the checkpoints.
    like: a state of the same structure, shapes and dtypes.
    last: epoch after which there can't be one.

  Returns:
    The epoch (0 if there is none), the state (``like`` then), and what could
    not be used, in words.

  Raises:
    StoreError: if the folder is a link.
  """
  if folder.is_symlink():
    raise StoreError(f'{folder} is a link, which is not followed. Remove it.')
  folder = folder.absolute()
  _remove_unfinished(folder)
  problems = []
  for epoch in _epochs(folder):
    path = folder / str(epoch)
    try:
      if epoch > last:
        raise ValueError(f'there are metrics of {last} epochs only')
      return epoch, _read(path, like), problems
    except Exception as error:  # damaged files raise whatever they lead to
      problems.append(f'checkpoint {path} is not used: {_first_line(error)}')
      shutil.rmtree(path, ignore_errors=True)
  return 0, like, problems


def _read(path: Path, like: Any) -> Any:
  """The state in a checkpoint, checked."""
  import orbax.checkpoint as ocp

  wanted = {'state': like, 'digest': jnp.zeros(32, jnp.uint8)}
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(path, abstract)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
  if not np.array_equal(found['digest'], _digest(found['state'])):
    raise ValueError('its arrays are damaged')
  return found['state']


def _epochs(folder: Path) -> list[int]:
  """Epochs that have a checkpoint, the last first."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _remove_unfinished(folder: Path) -> None:
  """Removes what Orbax had not yet moved to its place."""
  for path in folder.iterdir() if folder.is_dir() else ():
    if not path.name.isdigit():
      shutil.rmtree(path, ignore_errors=True)


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).split('\n')[0]


def _digest(state: Any) -> np.ndarray:
  """SHA-256 of all arrays, uint8 (32,)."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(state):
    total.update(np.ascontiguousarray(leaf).tobytes())
  return np.frombuffer(total.digest(), np.uint8)
