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
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.files import StoreError, read_text, write_atomically

_KEPT = 2
_SPARE_BYTES = 2**20  # what Orbax writes beside the arrays, and more


def save(folder: Path, epoch: int, state: Any) -> None:
  """Writes the state after an epoch and drops all but the last two.

  Raises:
    StoreError: if it can't be written.
  """
  folder = folder.absolute()
  path = folder / str(epoch)
  arrays = _by_name(jax.device_get(state))
  try:
    folder.mkdir(exist_ok=True)
    # Orbax on a full disk says more than it is asked, from several threads.
    wanted = sum(array.nbytes for array in arrays.values()) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < wanted:
      raise OSError(f'it needs {wanted} bytes, of which {free} are left')
    with _checkpointer() as checkpointer:
      checkpointer.save(path, arrays, force=True)
  except Exception as error:  # Orbax and its storage have errors of their own
    _remove(folder, keep=_epochs(folder))
    raise StoreError(
      f'the checkpoint {path} could not be written: {_first_line(error)}. '
      'Nothing finished is lost; make room or choose another folder with '
      '--results, and repeat the command.'
    ) from error
  write_atomically(_digest_path(path), _digests(path))
  _remove(folder, keep=_epochs(folder)[:_KEPT])


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
  problems = []
  epochs = _epochs(folder)
  for i, epoch in enumerate(epochs):
    path = folder / str(epoch)
    try:
      if epoch > last:
        raise ValueError(f'there are metrics of {last} epochs only')
      state = _read(path, like)
    except Exception as error:  # damaged files raise whatever they lead to
      problems.append(f'checkpoint {path} is not used: {_first_line(error)}')
      continue
    _remove(folder, keep=epochs[i:])
    return epoch, state, problems
  _remove(folder, keep=[])
  return 0, like, problems


def _read(path: Path, like: Any) -> Any:
  """The state in a checkpoint, checked."""
  if read_text(_digest_path(path)) != _digests(path):
    raise ValueError('its files are damaged')
  with _checkpointer() as checkpointer:
    found = checkpointer.restore(path)

  def checked(name, wanted):
    array = found[name]
    if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
      raise ValueError(
        f'{name} is {array.dtype} of shape {array.shape}, not {wanted.dtype} '
        f'of shape {wanted.shape}'
      )
    return jax.device_put(array, wanted.sharding)

  state = [checked(name, array) for name, array in _by_name(like).items()]
  return jax.tree.unflatten(jax.tree.structure(like), state)


def _by_name(state: Any) -> dict[str, Any]:
  """All arrays by their place in the state."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    if isinstance(leaf, jax.Array)
    else np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(state)
  }


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
