"""Checkpoints: the state after an epoch, whole or not used.

::

  checkpoints/EPOCH/         the arrays, by Orbax
              EPOCH.sha256   digests of its files, written last (sha256sum -c)

Orbax writes a folder beside its place and moves it there; the digests tell
whether a file was damaged later, so that nothing damaged is ever parsed.
"""

import contextlib
import hashlib
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.runs.files import (
  StoreError,
  read_json,
  read_text,
  write_atomically,
)
from experiments.tasks import Arrays

_KEPT = 2
# Names of arrays, no paths; 'kernel:frsf(p_flip=0.5)' is what a rule keeps.
_NAME = re.compile(r'[\w.:()=]+')
_LARGEST = 2**32  # bytes of a state; the paper's have less than 2**27
_SPARE_BYTES = 2**20  # what Orbax writes beside the arrays, and more


def save(folder: Path, epoch: int, arrays: Arrays) -> None:
  """Writes the state after an epoch and drops all but the last two.

  Args:
    folder: of the checkpoints.
    epoch: the number of the epoch.
    arrays: what ``by_name`` makes of the state.

  Raises:
    StoreError: if it can't be written.
  """
  folder = folder.absolute()
  path = folder / str(epoch)
  try:
    folder.mkdir(exist_ok=True)
    # Orbax on a full disk says more than it is asked, from several threads.
    wanted = sum(array.nbytes for array in arrays.values()) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < wanted:
      raise OSError(f'it needs {wanted} bytes, of which {free} are left')
    with _checkpointer() as checkpointer:
      checkpointer.save(path, dict(arrays), force=True)
  except Exception as error:  # Orbax and its storage have errors of their own
    _remove(folder, keep=_epochs(folder))
    raise StoreError(
      f'the checkpoint {path} could not be written: {_first_line(error)}. '
      'Nothing finished is lost; make room or choose another folder with '
      '--results, and repeat the command.'
    ) from error
  write_atomically(_digest_path(path), _digests(path))
  _remove(folder, keep=_epochs(folder)[:_KEPT])


def restore(folder: Path, last: int) -> tuple[int, Arrays | None, list[str]]:
  """The last checkpoint that is whole; those after it are removed.

  Args:
    folder: of the checkpoints.
    last: epoch after which there can't be one.

  Returns:
    The epoch (0 if there is none), the arrays (None then), and what could not
    be used, in words.

  Raises:
    StoreError: if the folder is a link.
  """
  if folder.is_symlink():
    raise StoreError(f'{folder} is a link, which is not followed. Remove it.')
  folder = folder.absolute()
  problems = []
  epochs = _epochs(folder)
  for i, epoch in enumerate(epochs):
    path = folder / str(epoch)
    try:
      if epoch > last:
        raise ValueError(f'there are metrics of {last} epochs only')
      arrays = _read(path)
    except Exception as error:  # damaged files raise whatever they lead to
      problems.append(f'checkpoint {path} is not used: {_first_line(error)}')
      continue
    _remove(folder, keep=epochs[i:])
    return epoch, arrays, problems
  _remove(folder, keep=[])
  return 0, None, problems


def drop_last(folder: Path) -> None:
  """Removes the last checkpoint, so that the one before is the last."""
  _remove(folder, keep=_epochs(folder)[1:])


def _read(path: Path) -> Arrays:
  """The arrays in a checkpoint, checked."""
  if read_text(_digest_path(path)) != _digests(path):
    raise ValueError('its files are damaged')
  _check_names(path)
  with _checkpointer() as checkpointer:
    arrays = dict(checkpointer.metadata(path).item_metadata)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())
    if size > _LARGEST:  # a short file can ask for any amount of memory
      raise ValueError(f'its arrays would take {size} bytes')
    return checkpointer.restore(path)


def _check_names(path: Path) -> None:
  """Checks that there are arrays alone, whose names are no paths."""
  tree = read_json(path / '_METADATA')['tree_metadata']
  for entry in tree.values():
    names = [str(step['key']) for step in entry['key_metadata']]
    kind = entry['value_metadata']['value_type']
    if kind != 'np.ndarray' or not all(map(_NAME.fullmatch, names)):
      raise ValueError(f'it has {kind} {"/".join(names)!r}, which is no array')


def by_name(state: Any) -> Arrays:
  """A copy on the host of all arrays of a state, by their places in it."""
  return {
    _name(path): np.array(leaf)
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def fit(arrays: Arrays, like: Any) -> Any:
  """The state of which ``by_name`` made the arrays.

  Args:
    arrays: by their places.
    like: a state of the same structure, shapes, dtypes and devices.

  Raises:
    ValueError: if an array is missing or another one than ``like`` has.
  """

  def fitted(path, wanted):
    name = _name(path)
    array = np.asarray(arrays.get(name))
    if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
      raise ValueError(
        f'{name} is {array.dtype} of shape {array.shape}, not {wanted.dtype} '
        f'of shape {wanted.shape}'
      )
    return jax.device_put(array, wanted.sharding)

  return jax.tree.map_with_path(fitted, like)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _epochs(folder: Path) -> list[int]:
  """Epochs that have a checkpoint with its digests, the last first."""
  names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
  whole = [
    name for name in names if name.isdigit() and f'{name}.sha256' in names
  ]
  return sorted(map(int, whole), reverse=True)


def _remove(folder: Path, keep: list[int]) -> None:
  """Removes other checkpoints, and what was never finished."""
  kept = {name for epoch in keep for name in (f'{epoch}', f'{epoch}.sha256')}
  for path in folder.iterdir() if folder.is_dir() else ():
    if path.name in kept:
      continue
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def _digest_path(path: Path) -> Path:
  return path.with_name(f'{path.name}.sha256')


def _digests(path: Path) -> str:
  """A line for each file in a folder, as sha256sum writes it."""
  lines = []
  for file in sorted(path.rglob('*')):
    if file.is_symlink():
      raise ValueError(f'{file.name} is a link')
    if file.is_file():
      digest = hashlib.sha256(file.read_bytes()).hexdigest()
      lines.append(f'{digest}  {file.relative_to(path.parent).as_posix()}\n')
  return ''.join(lines)


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
  """Orbax, for this process alone if there are several.

  What goes wrong is raised, and need not be logged as well.
  """
  import orbax.checkpoint as ocp

  alone = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=alone,
    active_processes={alone},
    barrier_sync_key_prefix=f'process {alone}',
  )
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    with ocp.StandardCheckpointer(
      multiprocessing_options=options
    ) as checkpointer:
      yield checkpointer
  finally:
    logger.setLevel(level)


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).split('\n')[0]
