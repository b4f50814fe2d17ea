"""Checkpoints: the state after an epoch, whole or not used.

A checkpoint is one file, ``EPOCH.msgpack``: the SHA-256 digest of its epoch and
the rest, a newline, and the arrays as ``flax.serialization`` writes them.
Reading executes nothing, and a damaged file is never parsed.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from experiments.runs.files import read_bytes, refuse_link, write_atomically

_KEPT = 2


def save(folder: Path, epoch: int, state: Any) -> None:
  """Writes the state after an epoch and drops all but the last two.

  Raises:
    StoreError: if it cannot be written.
  """
  body = serialization.msgpack_serialize(by_name(state))
  digest = _digest(epoch, body)
  folder.mkdir(exist_ok=True)
  write_atomically(_path(folder, epoch), digest + b'\n' + body)
  # Later ones could not be read: otherwise the run would have resumed there.
  kept = [e for e in _epochs(folder) if e <= epoch][:_KEPT]
  for other in set(_epochs(folder)) - set(kept):
    _path(folder, other).unlink(missing_ok=True)


def restore(
  folder: Path, last: int, like: Any
) -> tuple[int, Any | None, list[str]]:
  """The last checkpoint that can be used; removes none.

  Args:
    folder: of the checkpoints.
    last: epoch with the last metrics; later checkpoints are not used.
    like: a state with the structure, shapes and dtypes to restore.

  Returns:
    The epoch (0 if there is none), the state (None then), and the reasons why
    later checkpoints are not used.

  Raises:
    StoreError: if the folder is a link.
  """
  refuse_link(folder)
  problems = []
  for epoch in _epochs(folder):
    try:
      if epoch > last:
        raise ValueError(f'there are metrics of {last} epochs only')
      return epoch, fit(_read(folder, epoch), like), problems
    except Exception as error:  # damaged files can raise anything
      reason = (str(error).strip() or type(error).__name__).split('\n')[0]
      path = _path(folder, epoch)
      problems.append(f'checkpoint {path} is not used: {reason}')
  return 0, None, problems


def _read(folder: Path, epoch: int) -> Any:
  digest, _, body = (read_bytes(_path(folder, epoch)) or b'').partition(b'\n')
  if digest != _digest(epoch, body):
    raise ValueError('the file is damaged')
  return serialization.msgpack_restore(body)


def _digest(epoch: int, body: bytes) -> bytes:
  return hashlib.sha256(f'{epoch}\n'.encode() + body).hexdigest().encode()


def by_name(state: Any) -> dict[str, np.ndarray]:
  """A copy on the host of all arrays of a state, by their paths."""
  leaves = jax.tree.leaves_with_path(state)
  return {_name(path): np.array(leaf) for path, leaf in leaves}


def fit(arrays: dict[str, Any], like: Any) -> Any:
  """The state whose arrays ``by_name`` returned, on the default device.

  The arrays are not committed to the device, like those of a new state:
  otherwise, JAX would compile all functions again.

  Raises:
    ValueError: if an array is missing or differs from that of ``like``.
  """

  def fitted(path, wanted):
    name = _name(path)
    array = np.asarray(arrays.get(name))
    if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
      raise ValueError(
        f'{name} is {array.dtype} of shape {array.shape}, not {wanted.dtype} '
        f'of shape {wanted.shape}'
      )
    return jax.device_put(array)

  return jax.tree.map_with_path(fitted, like)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _path(folder: Path, epoch: int) -> Path:
  return folder / f'{epoch}.msgpack'


def _epochs(folder: Path) -> list[int]:
  """Epochs with a checkpoint, the last first."""
  names = [path.stem for path in folder.glob('*.msgpack')]
  return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
