"""The results folder: one folder per run, named by its configuration.

::

  RESULTS/RUN_ID/config.json     the full configuration
                 metrics.jsonl   a line per epoch
                 checkpoints/    the state after the last epochs
                 environment.json  versions and machine of the last epochs
                 result.json     written last: the run is finished
                 error.json      why it failed for good; it can be tried again
                 .lock           held by the process that trains the run

The process that trains a run is the only writer of its folder. Files are
written beside their place and moved there, so a reader never sees half a file.
A line of metrics that a crash cut off is dropped. Everything here may come from
a stranger: it is read as JSON and arrays, never as code, and links, which could
lead out of the folder, are refused.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from experiments.paper.protocol import VERSION, run_id
from experiments.runs.files import (
  UNFINISHED,
  StoreError,
  not_written,
  read_json,
  read_text,
  refuse_link,
  write_atomically,
)

_RUN_ID = re.compile('[0-9a-f]{20}')


@dataclasses.dataclass(frozen=True)
class Record:
  """One run as it is on disk.

  Attributes:
    run_id: hash of the configuration.
    config: the configuration, flat.
    metrics: a dictionary per epoch.
    result: both results; None while unfinished.
    environment: versions and machine of its last epochs, as far as recorded.
    error: why it failed for good; None if it did not.
    problem: why it cannot be read, in which case nothing else is known; None if
      it can.
  """

  run_id: str
  config: dict[str, Any]
  metrics: list[dict[str, Any]]
  result: dict[str, Any] | None
  environment: Any = None
  error: str | None = None
  problem: str | None = None


class RunFolder:
  """The folder of one run.

  Attributes:
    path: of the folder.
    checkpoints: folder of the run's checkpoints.
  """

  def __init__(self, results: str | os.PathLike[str], run_id: str):
    """Names the folder; makes nothing."""
    self.path = Path(results) / run_id
    self.checkpoints = self.path / 'checkpoints'

  def config(self) -> dict[str, Any] | None:
    """The configuration of the run; None if there is none.

    Raises:
      StoreError: if the file is no configuration of this version.
    """
    config = read_json(self.path / 'config.json')
    if config is None:
      return None
    if not isinstance(config, dict) or config.get('version') != VERSION:
      raise StoreError(
        f'{self.path}/config.json is not of version {VERSION}: it was written '
        'by another version of this program, or is no configuration. Use that '
        'version, or another folder with --results, or move it away.'
      )
    return config

  def result(self) -> dict[str, Any] | None:
    """Both results of the run; None while it is unfinished.

    Raises:
      StoreError: if the file is no result, or a link.
    """
    refuse_link(self.path)
    result = read_json(self.path / 'result.json')
    if result is None:
      return None
    if not (
      isinstance(result, dict) and _is_percent(result.get('best_test_error'))
    ):
      raise StoreError(
        f'{self.path}/result.json is no result: remove {self.path} to do that '
        'run again.'
      )
    return result

  def metrics(self) -> list[dict[str, Any]]:
    """The lines up to the first that is cut off or out of turn."""
    lines: list[dict[str, Any]] = []
    for row in (read_text(self.path / 'metrics.jsonl') or '').split('\n'):
      try:
        line = json.loads(row)
      except (ValueError, RecursionError):
        break
      if not _is_line(line, len(lines) + 1):
        break
      lines.append(line)
    return lines

  def error(self) -> str | None:
    """Why the run failed for good, or None."""
    error = read_json(self.path / 'error.json')
    if isinstance(error, dict):
      error = error.get('error')
    return None if error is None else str(error)

  @contextlib.contextmanager
  def claimed(self) -> Iterator[bool]:
    """Whether this process may train the run; the lock dies with the process.

    Raises:
      StoreError: if the folder cannot be made or locked.
    """
    refuse_link(self.path)
    path = self.path / '.lock'
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      lock = filelock.FileLock(path, timeout=0)
      lock.acquire()
    except filelock.Timeout:
      yield False
      return
    except OSError as error:
      raise StoreError(
        f'{path} could not be locked: {error.strerror}. Choose another folder '
        'with --results.'
      ) from error
    try:
      yield True
    finally:
      lock.release()
      if (self.path / 'result.json').exists():
        path.unlink(missing_ok=True)

  def begin(self, config: Mapping[str, Any]) -> None:
    """Writes the configuration, or checks that the folder is this run's.

    Raises:
      StoreError: if it is not, or cannot be written.
    """
    (self.path / 'error.json').unlink(missing_ok=True)
    self._remove_unfinished()
    found = self.config()
    if found is None:
      _write_json(self.path / 'config.json', config)
    elif run_id(found) != run_id(config):
      raise StoreError(
        f'{self.path}/config.json is the configuration of another run. Remove '
        f'{self.path} to do this run again.'
      )

  def append(self, line: dict[str, Any]) -> None:
    """Adds the line of an epoch, or nothing.

    Raises:
      StoreError: if it cannot be written.
    """
    path = self.path / 'metrics.jsonl'
    text = json.dumps(line, allow_nan=False) + '\n'
    try:
      with path.open('ab', buffering=0) as file:
        size = file.tell()
        try:
          if file.write(text.encode()) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
          file.truncate(size)
          raise
    except OSError as error:
      raise not_written(path, error) from error

  def finish(
    self, result: Mapping[str, Any], environment: Mapping[str, str]
  ) -> None:
    """Writes the result and removes what else training needed."""
    _write_json(self.path / 'environment.json', environment)
    _write_json(self.path / 'result.json', result)
    self.tidy()

  def fail(self, error: str) -> None:
    """Records why the run failed for good; a new attempt forgets it."""
    _write_json(self.path / 'error.json', {'error': error})

  def cut(self, epochs: int) -> None:
    """Drops the metrics after so many epochs, and half a line at their end."""
    lines = self.metrics()[:epochs]
    rows = ''.join(json.dumps(line) + '\n' for line in lines)
    write_atomically(self.path / 'metrics.jsonl', rows)

  def tidy(self) -> None:
    """Removes what a finished run no longer needs."""
    shutil.rmtree(self.checkpoints, ignore_errors=True)
    self._remove_unfinished()

  def _remove_unfinished(self) -> None:
    for file in self.path.glob(f'{UNFINISHED}*'):
      file.unlink(missing_ok=True)


def create(folder: Path) -> None:
  """Makes a results folder if need be, and checks that it can be written.

  Raises:
    StoreError: if it cannot.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b'0')
  except OSError as error:
    raise StoreError(
      f'results folder {folder} cannot be written: {error.strerror}. Make '
      'room, or choose another with --results.'
    ) from error


def tidy(folder: Path) -> None:
  """Removes what a killed process left of finished runs.

  This is safe while others train: nobody writes to a run with a result.

  Raises:
    StoreError: if the folder cannot be read.
  """
  for run in _runs(folder):
    if not run.path.is_symlink() and (run.path / 'result.json').exists():
      with contextlib.suppress(OSError):  # it does no harm if it stays
        run.tidy()
        (run.path / '.lock').unlink(missing_ok=True)


def load(folder: str | os.PathLike[str]) -> list[Record]:
  """All runs in a results folder, in order of their names.

  A run that cannot be read is listed with its problem.

  Raises:
    StoreError: if there is no such folder, or it cannot be read.
  """
  root = Path(folder)
  if not root.is_dir():
    raise StoreError(
      f'there is no results folder {root}; `python -m experiments run` makes '
      'one.'
    )
  records = []
  for run in _runs(root):
    try:
      refuse_link(run.path)
      config = run.config()
      if config is None:
        continue
      result, metrics = run.result(), run.metrics()
      errors = [line['test_error'] for line in metrics]
      if result and errors and result['best_test_error'] != min(errors):
        raise StoreError(
          f'{run.path}/result.json does not follow from metrics.jsonl: one of '
          f'them was replaced. Remove {run.path} to do that run again.'
        )
      record = Record(
        run_id=run.path.name,
        config=config,
        metrics=metrics,
        result=result,
        environment=read_json(run.path / 'environment.json'),
        error=run.error(),
      )
    except StoreError as error:
      record = Record(run.path.name, {}, [], None, problem=str(error))
    records.append(record)
  return records


def _runs(root: Path) -> Iterator[RunFolder]:
  try:
    paths = sorted(root.iterdir())
  except OSError as error:
    raise StoreError(f'{root} cannot be read: {error.strerror}.') from error
  for path in paths:
    if _RUN_ID.fullmatch(path.name):
      yield RunFolder(root, path.name)


def _is_line(line: Any, epoch: int) -> bool:
  return (
    isinstance(line, dict)
    and line.get('epoch') == epoch
    and _is_percent(line.get('test_error'))
    and _is_percent(line.get('holdout_error', 0.0))
    and isinstance(line.get('finite'), bool)
  )


def _is_percent(value: Any) -> bool:
  return isinstance(value, int | float) and 0 <= value <= 100


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
  text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
  write_atomically(path, text + '\n')
