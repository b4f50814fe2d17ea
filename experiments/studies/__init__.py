"""Studies: finished runs, one JSONL file per study in ``experiments/results``.

``studies.toml`` says what each study is, why it was made, with which commands,
and what came out. The first line of a file is its head, then a line per run.
The head has what runs share, once: datasets, protocols and environments. A line
has the run's condition, rate and seed, indices into the head, and its epochs as
columns. Names of runs and results follow from that and are not stored.

A study file may come from someone else. A line that can't be read becomes a
record that names its problem; it never hides the others.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper.protocol import run_id
from experiments.paper.results import result
from experiments.runs import store
from experiments.runs.files import StoreError, read_text, write_whole
from experiments.runs.store import Record

__all__ = ['fold', 'load']

_FORMAT = 1
_DATASET = ('dataset', 'digest', 'source', 'note')
_RUN = (
  'rule', 'batch_manhattan', 'batch_norm', 'batch_plan', 'frozen', 'rate',
  'seed',
)  # fmt: skip
_OPTIONAL = ('adam',)  # of a run, where it is used
_SHARED = ('dataset', 'protocol', 'environment')
_BROKEN = (
  ArithmeticError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


def load(path: str | os.PathLike[str]) -> list[Record]:
  """The runs of a study file, a folder of them, or a live results folder.

  A run that is there several times with the same numbers is loaded once.

  Raises:
    StoreError: there is no such file or folder, or it can't be read.
  """
  root = Path(path)
  is_file = root.is_file()
  records = [] if is_file else store.load(root)
  runs = {record.run_id: record for record in records}
  for file in [root] if is_file else sorted(root.glob('*.jsonl')):
    try:
      found = _read(file)
    except StoreError as error:
      if is_file:
        raise
      found = [_broken(file.name, error)]
    for record in found:
      known = runs.setdefault(record.run_id, record)
      if known is record:
        records.append(record)
      elif _numbers(known) != _numbers(record):
        name = f'{file.name}, run {record.run_id}'
        records.append(_broken(name, 'it is there already, with other numbers'))
  return records


def fold(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> int:
  """Adds the finished runs of a live results folder to a study file.

  The bytes of the file depend on its runs alone.

  Args:
    folder: the live results folder; it is not changed.
    path: the study file; runs that are in it stay as they are.

  Returns:
    How many runs the file has now.

  Raises:
    StoreError: a run is not finished, can't be read, or is in the file with
      other numbers, or the file cannot be written. It is not changed.
  """
  file = Path(path)
  if file.is_dir():
    raise StoreError(
      f'study is {file}, a folder, but must be the file to write, such as '
      'NAME.jsonl.'
    )
  live = store.load(folder)
  if not live:
    raise StoreError(f'{folder} has no runs to fold.')
  before = load(file) if file.exists() else []
  runs = {record.run_id: record for record in before}
  for record in runs.values():
    if record.problem is not None:
      raise StoreError(f'{file}, {record.run_id}: {record.problem}.')
  for record in live:
    where = f'{Path(folder) / record.run_id}'
    if record.problem is not None:
      raise StoreError(record.problem)
    if record.result is None:
      raise StoreError(
        f'{where} is not finished. Repeat the command that began it, or move '
        'it away.'
      )
    known = runs.setdefault(record.run_id, record)
    if _numbers(known) != _numbers(record):
      raise StoreError(
        f'{where} has other numbers than the same run in {file}. Fold it into '
        'another file, or move one of them away.'
      )
    if known is record:
      _check(record, where)
  try:
    _write(file, runs.values())
  except OSError as error:
    raise StoreError(
      f'{file} could not be written: {error.strerror}. Make room or name '
      f'another file; {folder} is unchanged.'
    ) from error
  return len(runs)


def _check(record: Record, where: str) -> None:
  """Checks that the study file will give back what the folder says."""
  try:
    classes, images = _counts(record)
    same = (
      run_id(record.config) == record.run_id
      and result(record.metrics, classes=classes, train_images=images)
      == record.result
      and _lines(*_columns(record.metrics)) == record.metrics
    )
  except _BROKEN:
    same = False
  if not same:
    raise StoreError(
      f'{where}: its name or result does not follow from its configuration '
      'and epochs. Move it away.'
    )


def _numbers(record: Record) -> Any:
  """The epochs, without the seconds they took."""
  return [
    {name: value for name, value in line.items() if name != 'seconds'}
    for line in record.metrics
  ]


def _counts(record: Record) -> tuple[int, int]:
  """Classes and training images of a finished run."""
  found = record.result or {}
  return round(100 / (100 - found['chance_error'])), found['train_images']


def _columns(
  lines: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[Any]], bool]:
  """Epochs as columns, and whether the last one diverged."""
  columns = {
    name: [line[name] for line in lines]
    for name in lines[0]
    if name not in ('epoch', 'finite')
  }
  return columns, not lines[-1]['finite']


def _lines(
  columns: Mapping[str, Sequence[Any]], diverged: bool
) -> list[dict[str, Any]]:
  """The inverse of `_columns`."""
  lines = [
    {'epoch': epoch, **dict(zip(columns, values, strict=True)), 'finite': True}
    for epoch, values in enumerate(zip(*columns.values(), strict=True), start=1)
  ]
  lines[-1]['finite'] = not diverged
  return lines


def _write(path: Path, records: Iterable[Record]) -> None:
  """Writes a study file whole; the same runs give the same bytes."""
  rows = []
  for record in records:
    classes, images = _counts(record)
    config = dict(record.config)
    run = {name: config.pop(name) for name in _RUN}
    run |= {name: config.pop(name) for name in _OPTIONAL if name in config}
    dataset = {name: config.pop(name, '') for name in _DATASET}
    dataset |= {'classes': classes, 'train_images': images}
    rows.append((run, (dataset, config, record.environment), record.metrics))
  tables = [
    sorted({_text(shared[at]) for _, shared, _ in rows})
    for at in range(len(_SHARED))
  ]
  head: dict[str, Any] = {'format': _FORMAT, 'study': path.stem}
  for name, table in zip(_SHARED, tables, strict=True):
    head[f'{name}s'] = [json.loads(text) for text in table]
  lines = []
  for run, shared, metrics in rows:
    at = [t.index(_text(s)) for t, s in zip(tables, shared, strict=True)]
    columns, diverged = _columns(metrics)
    line = {**run, **dict(zip(_SHARED, at, strict=True))}
    line |= {'diverged': diverged, 'epochs': columns}
    names = (*_RUN[:5], *_OPTIONAL)
    order = (*at, *(_text(run.get(name, '')) for name in names))
    lines.append(((*order, run['seed'], -run['rate']), line))
  lines.sort(key=lambda line: line[0])
  text = ''.join(
    json.dumps(line, separators=(',', ':'), allow_nan=False) + '\n'
    for line in (head, *(line for _, line in lines))
  )
  write_whole(path, text.encode(), durable=True)


def _text(value: Any) -> str:
  return json.dumps(value, sort_keys=True, allow_nan=False)


def _read(path: Path) -> list[Record]:
  """The runs of a study file.

  Raises:
    StoreError: the file or its head can't be read.
  """
  first, *others = (read_text(path) or '').removesuffix('\n').split('\n')
  try:
    head = _json(first)
    if head['format'] != _FORMAT:
      raise ValueError(f'its format is {head["format"]!r}, not {_FORMAT}')
    shared = [[*head[f'{name}s']] for name in _SHARED]
  except _BROKEN as error:
    raise StoreError(
      f'{path} is not a study file of this version: its first line cannot be '
      f'read ({_words(error)}).'
    ) from error
  records = []
  for number, line in enumerate(others, start=2):
    try:
      records.append(_record(shared, _json(line)))
    except _BROKEN as error:
      records.append(_broken(f'{path.name}, line {number}', _words(error)))
  return records


def _record(shared: Sequence[Sequence[Any]], line: Any) -> Record:
  """The run of a line; an error says what is wrong with it."""
  parts = []
  for name, table in zip(_SHARED, shared, strict=True):
    at = line[name]
    if not isinstance(at, int) or not 0 <= at < len(table):
      raise ValueError(f'{name} is {at!r}, not an index into the head')
    parts.append(table[at])
  dataset, protocol, environment = parts
  config = {
    **protocol,
    **{name: dataset[name] for name in _DATASET},
    **{name: line[name] for name in _RUN},
    **{name: line[name] for name in _OPTIONAL if name in line},
  }
  columns, diverged = line['epochs'], line['diverged']
  if not isinstance(columns, dict) or not columns.get('test_error'):
    raise ValueError('it has no epochs')
  for name in ('test_error', 'holdout_error'):
    for error in columns.get(name, ()):
      if not isinstance(error, int | float) or not 0 <= error <= 100:
        raise ValueError(f'{name} is {error!r}, not a number from 0 to 100')
  if not isinstance(diverged, bool):
    raise ValueError(f'diverged is {diverged!r}, not true or false')
  metrics = _lines(columns, diverged)
  counts = {name: dataset[name] for name in ('classes', 'train_images')}
  for name, count in counts.items():
    if not isinstance(count, int) or count < 2:
      raise ValueError(f'{name} is {count!r}, not an integer from 2 on')
  return Record(
    run_id=run_id(config),
    config=config,
    metrics=metrics,
    result=result(metrics, **counts),
    environment=environment,
  )


def _json(text: str) -> Any:
  def refuse(name: str) -> None:
    raise ValueError(f'{name} is no number')

  return json.loads(text, parse_constant=refuse)


def _words(error: BaseException) -> str:
  if isinstance(error, KeyError):
    return f'{error} is missing'
  return str(error)


def _broken(name: str, problem: object) -> Record:
  return Record(name, {}, [], None, problem=str(problem))
