"""Decoded arrays on disk: written whole or not at all, rebuilt if damaged."""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = Mapping[str, np.ndarray]


def default_dir() -> Path:
  """The user's cache folder for this program, by the platform's convention.

  Without a home folder: a temporary one of this process.
  """
  variable = 'LOCALAPPDATA' if sys.platform == 'win32' else 'XDG_CACHE_HOME'
  if sys.platform != 'darwin' and os.path.isabs(os.environ.get(variable, '')):
    return Path(os.environ[variable]) / 'symjax_bp'
  try:
    home = Path.home()
  except RuntimeError:
    return Path(_temporary().name)
  parts = {'win32': ('AppData', 'Local'), 'darwin': ('Library', 'Caches')}
  return home.joinpath(*parts.get(sys.platform, ('.cache',)), 'symjax_bp')


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
  return tempfile.TemporaryDirectory(prefix='symjax_bp-')


def fetch(
  folder: Path, name: str, config: object, build: Callable[[], Arrays]
) -> Arrays:
  """The arrays that `build()` makes, from disk if they are there.

  The file name holds a hash of `config`, so another configuration is another
  file. Two processes may fetch the same arrays at once: both may build, the
  later file replaces the earlier one of the same content. A damaged file (its
  checksums tell) is built again. Where nothing can be written, a warning says
  so and the arrays are still returned.

  Args:
    folder: where the file is kept; made if needed.
    name: beginning of the file name.
    config: what decides the content, serializable as JSON.
    build: makes the arrays.
  """
  text = json.dumps(config, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  path = folder / f'{re.sub(r"[^A-Za-z0-9-]", "_", name)[:40]}-{digest}.npz'
  # Absent files, and damage that zip and numpy report in many ways.
  with contextlib.suppress(Exception):
    # numpy leaves a damaged file open if it opened it itself.
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as stored:
      return {key: stored[key] for key in stored.files}
  arrays = build()
  try:
    _write(path, arrays)
  except OSError as error:
    warnings.warn(
      f'cannot keep decoded data in {path} ({error}), it will be decoded again '
      'next time: set XDG_CACHE_HOME (on Windows LOCALAPPDATA) to a writable '
      'folder',
      stacklevel=2,
    )
  return arrays


def _write(path: Path, arrays: Arrays) -> None:
  """Writes an uncompressed npz file atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    with open(temporary, 'xb') as file:
      np.savez(file, allow_pickle=False, **arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
