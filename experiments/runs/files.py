"""Files that are written whole or not at all, and read with care."""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

UNFINISHED = '.writing-'  # prefix of files that are being written


class StoreError(ValueError):
  """A results folder, or a file in it, that cannot be used."""


def write_whole(path: Path, body: bytes, *, durable: bool = False) -> Path:
  """Writes a whole file or nothing; returns its path.

  Args:
    path: of the file.
    body: its content.
    durable: wait until it is on the disk, for data that cannot be made again.

  Raises:
    OSError: if it cannot be written; the previous file is still there.
  """
  descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(body)
      if durable:
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    Path(name).unlink(missing_ok=True)
    raise
  return path


def write_atomically(path: Path, body: str | bytes) -> None:
  """Writes a file of the results folder durably, whole or not at all.

  Raises:
    StoreError: if it cannot be written; says what to do.
  """
  try:
    body = body.encode() if isinstance(body, str) else body
    write_whole(path, body, durable=True)
  except OSError as error:
    raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> StoreError:
  """The error to raise where a file could not be written."""
  return StoreError(
    f'{path} could not be written: {error.strerror}. Nothing finished is lost; '
    'make room or choose another folder with --results, and repeat the '
    'command.'
  )


def refuse_link(path: Path) -> None:
  """Checks that a path is no link, which could lead out of the folder.

  Raises:
    StoreError: if it is a link, or cannot be read.
  """
  try:
    is_link = path.is_symlink()
  except OSError as error:
    raise StoreError(
      f'{path} cannot be read: {error.strerror}. Choose another folder with '
      '--results.'
    ) from error
  if is_link:
    raise StoreError(f'{path} is a link, which is not followed. Remove it.')


def read_bytes(path: Path) -> bytes | None:
  """The content of a file; None if there is none.

  Raises:
    StoreError: if it is a link, is no ordinary file, or cannot be read.
  """
  refuse_link(path)
  try:
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
      raise StoreError(f'{path} is not an ordinary file. Remove it.')
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise StoreError(f'{path} cannot be read: {error.strerror}.') from error


def read_text(path: Path) -> str | None:
  """The text of a file; None if there is none.

  Raises:
    StoreError: as ``read_bytes``.
  """
  body = read_bytes(path)
  return None if body is None else body.decode('utf-8', errors='replace')


def read_json(path: Path) -> Any:
  """The value of a JSON file; None if there is none.

  Raises:
    StoreError: if it cannot be read, or is no JSON.
  """
  text = read_text(path)
  if text is None:
    return None
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise StoreError(
      f'{path} is broken ({error}). Remove the folder {path.parent} to do that '
      'run again.'
    ) from error
