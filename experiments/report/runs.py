"""Store records as checked runs.

A record that is torn (a field is missing or of the wrong type) is left out of
the report and named in a warning, so that one bad file can't hide the rest;
many of them are counted, so that they can't either.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

from experiments.paper.conditions import BatchPlan

_NAMED = 20  # torn records

# Fields that say which run it is; all others are the protocol.
IDENTITY = (
  'version', 'dataset', 'digest', 'source', 'note', 'rule', 'batch_manhattan',
  'batch_norm', 'batch_plan', 'frozen', 'rate', 'seed',
)  # fmt: skip


class Record(Protocol):
  """What the report reads of a stored run."""

  @property
  def run_id(self) -> str: ...  # noqa: D102
  @property
  def config(self) -> Mapping[str, Any]: ...  # noqa: D102
  @property
  def metrics(self) -> Sequence[Mapping[str, Any]]: ...  # noqa: D102
  @property
  def result(self) -> Mapping[str, Any] | None: ...  # noqa: D102
  @property
  def environment(self) -> Any: ...  # noqa: D102
  @property
  def error(self) -> str | None: ...  # noqa: D102
  @property
  def problem(self) -> str | None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended; errors in percent.

  Attributes:
    best_validation: best test error over epochs, the paper's result.
    best_epoch: its epoch; None if the run diverged before any.
    holdout: best error on the held-out part of the training set, or None.
    honest: test error at the epoch with the best held-out error, or None.
    honest_epoch: that epoch.
    epochs: how many epochs ran.
    diverged: whether the run ended because a parameter was not finite.
    chance: error of guessing.
    train_images: how many images it was trained on.
  """

  best_validation: float
  best_epoch: int | None
  holdout: float | None
  honest: float | None
  honest_epoch: int | None
  epochs: int
  diverged: bool
  chance: float
  train_images: int


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """One run of the grid; `outcome` is None while it is unfinished.

  The environment is that of its last epochs, empty if it was not recorded.
  """

  run_id: str
  dataset: str
  digest: str
  source: str
  note: str
  rule: str
  batch_manhattan: int
  batch_norm: str
  batch_plan: BatchPlan
  frozen: str
  rate: float
  seed: int
  protocol: str
  config: Mapping[str, Any]
  epochs: tuple[int, ...]
  test_errors: tuple[float | None, ...]
  seconds: float
  outcome: Outcome | None
  environment: tuple[tuple[str, str], ...]
  failure: str | None


def read(records: Iterable[Record]) -> tuple[list[Run], list[str]]:
  """Returns the runs, sorted by id, and warnings of the torn records."""
  runs, warnings = [], []
  for record in sorted(records, key=lambda record: str(record.run_id)):
    try:
      if record.problem is not None:
        raise _Torn(printable(record.problem))
      runs.append(_run(record))
    except _Torn as torn:
      run_id = printable(str(record.run_id))
      warnings.append(f'run {run_id} is left out: {torn}')
  if more := len(warnings[_NAMED:]):
    warnings[_NAMED:] = [f'{more} more of the runs are left out']
  return runs, warnings


def printable(text: str) -> str:
  """Replaces what a terminal or an XML reader might act on."""
  return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}'
                 for c in text)  # fmt: skip


class _Torn(Exception):
  """A record with a missing or wrong field."""


_MISSING = object()


def _torn(field: str, value: object, wanted: str) -> _Torn:
  if value is _MISSING:
    return _Torn(f'{field} is missing ({wanted} expected)')
  return _Torn(f'{field} is {printable(repr(value))[:60]}, not {wanted}')


def _text(
  holder: Mapping, where: str, key: str, default: object = _MISSING
) -> str:
  value = holder.get(key, default)
  if not isinstance(value, str):
    raise _torn(f'{where}.{key}', value, 'a text')
  return printable(value)


def _integer(holder: Mapping, where: str, key: str) -> int:
  value = holder.get(key, _MISSING)
  if not isinstance(value, int) or isinstance(value, bool):
    raise _torn(f'{where}.{key}', value, 'an integer')
  return value


def _number(
  holder: Mapping, where: str, key: str, default: object = _MISSING
) -> float | None:
  """A number; None for null, NaN and infinity."""
  value = holder.get(key, default)
  if value is None:
    return None
  if not isinstance(value, (int, float)) or isinstance(value, bool):
    raise _torn(f'{where}.{key}', value, 'a number')
  return float(value) if math.isfinite(value) else None


def _finite(holder: Mapping, where: str, key: str) -> float:
  value = _number(holder, where, key)
  if value is None:
    raise _torn(f'{where}.{key}', holder[key], 'a finite number')
  return value


def _mapping(value: object, where: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise _torn(where, value, 'an object')
  return cast(Mapping[str, Any], value)


def _run(record: Record) -> Run:
  config = _mapping(record.config, 'config')
  epochs, test_errors, seconds = _curve(record.metrics)
  outcome = None
  if record.result is not None:
    outcome = _outcome(_mapping(record.result, 'result'))
  rest = {key: config[key] for key in config if key not in IDENTITY}
  return Run(
    run_id=printable(str(record.run_id)),
    dataset=_text(config, 'config', 'dataset'),
    digest=_text(config, 'config', 'digest', ''),
    source=_text(config, 'config', 'source', ''),
    note=_text(config, 'config', 'note', ''),
    rule=_text(config, 'config', 'rule'),
    batch_manhattan=_integer(config, 'config', 'batch_manhattan'),
    batch_norm=_text(config, 'config', 'batch_norm'),
    batch_plan=_plan(config),
    frozen=_text(config, 'config', 'frozen'),
    rate=_finite(config, 'config', 'rate'),
    seed=_integer(config, 'config', 'seed'),
    protocol=json.dumps(rest, sort_keys=True, default=str),
    config=config,
    epochs=epochs,
    test_errors=test_errors,
    seconds=seconds,
    outcome=outcome,
    environment=_environment(record.environment),
    failure=None if record.error is None else printable(str(record.error)),
  )


def _environment(found: object) -> tuple[tuple[str, str], ...]:
  about = _mapping({} if found is None else found, 'environment')
  return tuple(
    (printable(str(name)), _text(about, 'environment', name)) for name in about
  )


def _plan(config: Mapping[str, Any]) -> BatchPlan:
  plan = config.get('batch_plan', _MISSING)
  try:
    steps = tuple(
      (None if epochs is None else int(epochs), int(size))
      for epochs, size in cast(Any, plan)
    )
  except (TypeError, ValueError):
    steps = ()
  if not steps:
    raise _torn('config.batch_plan', plan, 'a list of [epochs, batch size]')
  return steps


def _curve(
  metrics: object,
) -> tuple[tuple[int, ...], tuple[float | None, ...], float]:
  if not isinstance(metrics, Sequence) or isinstance(metrics, str):
    raise _torn('metrics', metrics, 'a list of epochs')
  epochs, errors, seconds = [], [], 0.0
  for position, value in enumerate(metrics):
    where = f'metrics[{position}]'
    line = _mapping(value, where)
    epochs.append(_integer(line, where, 'epoch'))
    errors.append(_number(line, where, 'test_error'))
    seconds += _number(line, where, 'seconds', None) or 0.0
  return tuple(epochs), tuple(errors), seconds


def _outcome(result: Mapping[str, Any]) -> Outcome:
  """A diverged run without an error of its own counts as chance."""
  diverged = result.get('diverged', _MISSING)
  if not isinstance(diverged, bool):
    raise _torn('result.diverged', diverged, 'true or false')
  chance = _finite(result, 'result', 'chance_error')
  if not 0 <= chance < 100:
    raise _torn('result.chance_error', chance, 'an error of guessing in %')
  best, holdout, honest = (
    _number(result, 'result', key)
    for key in ('paper_error', 'holdout_error', 'honest_error')
  )
  if diverged:
    best, holdout, honest = (
      chance if error is None else error for error in (best, holdout, honest)
    )
  if best is None:
    best = _finite(result, 'result', 'paper_error')  # names the field
  return Outcome(
    best_validation=best,
    best_epoch=_epoch(result, 'paper_epoch'),
    holdout=holdout,
    honest=honest,
    honest_epoch=_epoch(result, 'honest_epoch'),
    epochs=_integer(result, 'result', 'epochs_run'),
    diverged=diverged,
    chance=chance,
    train_images=_integer(result, 'result', 'train_images'),
  )


def _epoch(result: Mapping[str, Any], key: str) -> int | None:
  if result.get(key, _MISSING) is None:
    return None
  return _integer(result, 'result', key)
