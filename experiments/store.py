"""The results folder: one folder per run, named by its configuration.

::

  RESULTS/RUN_ID/config.json     the full configuration
                 metrics.jsonl   a line per epoch
                 checkpoints/    the state after the last epochs (Orbax)
                 result.json     written last, atomically: the run is finished

Files are written beside their place and moved there, so a reader never sees
half a file. A line of metrics that was torn by a crash is dropped; a checkpoint
that can't be read gives way to the one before. Everything here may come from
someone else: it is read as JSON and arrays, never as code.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from experiments.grid import VERSION, Run

_RUN_ID = re.compile('[0-9a-f]{20}')
_KEPT_CHECKPOINTS = 2


class StoreError(ValueError):
  """A results folder, or a file in it, that can't be used."""


@dataclasses.dataclass(frozen=True)
class Record:
  """One run as it is on disk.

  Attributes:
    run_id: hash of the configuration.
    config: the configuration, flat.
    metrics: a dictionary per epoch.
    result: both results; None while unfinished.
    error: why it failed for good; None if it did not.
  """

  run_id: str
  config: dict[str, Any]
  metrics: list[dict[str, Any]]
  result: dict[str, Any] | None
  error: str | None = None


def write_atomically(path: Path, text: str) -> None:
  """Writes a whole file or nothing.

  Raises:
    StoreError: if it can't be written; what was there is still there.
  """
  try:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix='.writing-')
    try:
      with os.fdopen(descriptor, 'w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.chmod(name, 0o644)
      os.replace(name, path)
    except BaseException:
      Path(name).unlink(missing_ok=True)
      raise
  except OSError as error:
    raise StoreError(
      f'{path} could not be written: {error.strerror}. Nothing finished is '
      'lost; make room or choose another folder with --results and repeat '
      'the command.'
    ) from error


def _json(path: Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise StoreError(
      f'{path} can not be read ({error}). Remove the folder '
      f'{path.parent} to do that run again.'
    ) from error


def _metrics(path: Path) -> list[dict[str, Any]]:
  """The lines up to the first that is torn or out of turn."""
  lines: list[dict[str, Any]] = []
  try:
    text = path.read_text(encoding='utf-8', errors='replace')
  except FileNotFoundError:
    return lines
  except OSError as error:
    raise StoreError(f'{path} can not be read: {error.strerror}.') from error
  for row in text.split('\n'):
    try:
      line = json.loads(row)
    except ValueError:
      break
    if not isinstance(line, dict) or line.get('epoch') != len(lines) + 1:
      break
    lines.append(line)
  return lines


class RunFolder:
  """The folder of one run, for the process that holds its lock."""

  def __init__(self, path: Path, run: Run):
    """Creates the folder or checks that it is this run's."""
    self.path = path
    config = run.config()
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise StoreError(
        f'{path} could not be made: {error.strerror}. Choose another folder '
        'with --results.'
      ) from error
    found = _json(path / 'config.json')
    if found is None:
      text = json.dumps(config, indent=1, sort_keys=True) + '\n'
      write_atomically(path / 'config.json', text)
    elif found.get('version') != VERSION:
      raise StoreError(
        f'{path}/config.json is of version {found.get("version")!r}; this '
        f'program writes version {VERSION}. Use another folder with --results.'
      )

  @property
  def finished(self) -> bool:
    """Whether there is a result."""
    return (self.path / 'result.json').exists()

  def metrics(self) -> list[dict[str, Any]]:
    """The lines of metrics so far."""
    return _metrics(self.path / 'metrics.jsonl')

  def append(self, line: dict[str, Any]) -> None:
    """Adds the line of an epoch."""
    path = self.path / 'metrics.jsonl'
    try:
      with path.open('a', encoding='utf-8') as file:
        file.write(json.dumps(line, allow_nan=False) + '\n')
    except OSError as error:
      raise StoreError(
        f'{path} can not be written: {error.strerror}.'
      ) from error

  def finish(self, result: dict[str, Any]) -> None:
    """Writes the result; checkpoints are no longer needed."""
    text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(self.path / 'result.json', text + '\n')
    shutil.rmtree(self.path / 'checkpoints', ignore_errors=True)

  def save(self, epoch: int, state: Any) -> None:
    """Writes the state after an epoch and drops all but the last two."""
    import orbax.checkpoint as ocp

    folder = (self.path / 'checkpoints').absolute()
    try:
      folder.mkdir(exist_ok=True)
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / str(epoch), state, force=True)
    except Exception as error:  # Orbax and its storage have errors of their own
      raise StoreError(
        f'the checkpoint {folder / str(epoch)} could not be written: {error}'
      ) from error
    for old in self._checkpoints()[_KEPT_CHECKPOINTS:]:
      shutil.rmtree(folder / str(old), ignore_errors=True)

  def _checkpoints(self) -> list[int]:
    """Epochs that have a checkpoint, the last first."""
    folder = self.path / 'checkpoints'
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)

  def restore(self, like: Any) -> tuple[int, Any, list[str]]:
    """The last epoch whose state and metrics are whole.

    What comes after it is removed, so that training goes on from there.

    Args:
      like: a state of the same structure, shapes and dtypes.

    Returns:
      The epoch (0 if there is none), the state (``like`` then), and what could
      not be used, in words.
    """
    import jax
    import orbax.checkpoint as ocp

    lines, problems = self.metrics(), []
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    epoch, state = 0, like
    for candidate in self._checkpoints():
      if candidate > len(lines):
        continue
      folder = (self.path / 'checkpoints' / str(candidate)).absolute()
      try:
        with ocp.StandardCheckpointer() as checkpointer:
          state = checkpointer.restore(folder, abstract)
        epoch = candidate
        break
      except Exception as error:  # torn files raise whatever they lead to
        reason = str(error).split('\n')[0]
        problems.append(f'{folder} can not be restored: {reason}')
        shutil.rmtree(folder, ignore_errors=True)
    rows = ''.join(json.dumps(line) + '\n' for line in lines[:epoch])
    write_atomically(self.path / 'metrics.jsonl', rows)
    return epoch, state, problems


class Store:
  """A results folder."""

  def __init__(self, folder: str | os.PathLike[str]):
    """Makes the folder if need be."""
    self.folder = Path(folder)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=self.folder):
        pass
    except OSError as error:
      raise StoreError(
        f'results folder {self.folder} can not be written: {error.strerror}. '
        'Choose another with --results.'
      ) from error

  def finished(self, run: Run) -> bool:
    """Whether the run has a result."""
    return (self.folder / run.run_id / 'result.json').exists()

  def open(self, run: Run) -> RunFolder:
    """The folder of a run; hold its lock."""
    return RunFolder(self.folder / run.run_id, run)

  def lock(self, run: Run) -> filelock.BaseFileLock:
    """A lock that the system frees when the process that holds it dies."""
    folder = self.folder / '.locks'
    folder.mkdir(exist_ok=True)
    return filelock.FileLock(folder / f'{run.run_id}.lock', timeout=0)


def load(folder: str | os.PathLike[str]) -> list[Record]:
  """All runs in a results folder, in order of their names.

  Raises:
    StoreError: if there is no such folder, or a file in it can't be read.
  """
  root = Path(folder)
  if not root.is_dir():
    raise StoreError(
      f'there is no results folder {root}; `python -m experiments run` makes '
      'one.'
    )
  return list(_records(root))


def _records(root: Path) -> Iterator[Record]:
  for path in sorted(root.iterdir()):
    if not _RUN_ID.fullmatch(path.name) or path.is_symlink():
      continue
    config = _json(path / 'config.json')
    if config is None:
      continue
    if not isinstance(config, dict) or config.get('version') != VERSION:
      raise StoreError(
        f'{path}/config.json is not of version {VERSION}: it was written by '
        'another version of this program, or is no configuration. Report it '
        'with that version, or move it away.'
      )
    result = _json(path / 'result.json')
    if result is not None and not _is_result(result):
      raise StoreError(
        f'{path}/result.json is no result: remove {path} to do that run again.'
      )
    yield Record(
      run_id=path.name,
      config=config,
      metrics=_metrics(path / 'metrics.jsonl'),
      result=result,
    )


def _is_result(result: Any) -> bool:
  error = result.get('paper_error') if isinstance(result, dict) else None
  return isinstance(error, int | float) and math.isfinite(error)
