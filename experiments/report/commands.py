"""Commands that repeat runs, derived from their configurations.

On a CPU the bits of a run depend on its number of cores, because they divide
sums. A command therefore asks for as many cores as its runs had. FILE stands
for a plugin: runs record its content, not its path.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.datasets.specs import SPECS
from experiments.paper.conditions import find_exactly
from experiments.paper.protocol import RATES, Protocol
from experiments.report.frame import (
  Frame,
  Results,
  column_order,
  first_name,
  words,
)


def of_protocol(results: Results, protocol: str) -> list[str]:
  """Returns commands that repeat exactly the runs of a protocol."""
  return of_runs(results.runs[results.runs.protocol == protocol])


def of_runs(runs: Frame) -> list[str]:
  """Returns commands that repeat exactly these runs of one protocol."""
  fields = runs.fields.iloc[0]
  runs = runs.explode('condition', ignore_index=True)
  runs['condition'] = [first_name(str(name)) for name in runs.condition]
  runs['processes'] = [_processes(about) for about in runs.environment]
  runs = runs[[*map(_runnable, runs.condition, runs.config)]]
  runs = runs.sort_values(
    ['dataset', 'condition', 'seed', 'rate'],
    ascending=[True, True, True, False],
    key=lambda of: [*map(column_order, of)] if of.name == 'condition' else of,
  )
  keys = ['dataset', 'condition', 'rate', 'seed', 'processes']
  table = runs[keys].drop_duplicates()
  for column in ('rate', 'seed', 'condition'):
    # Joins rows that differ only in this column.
    others = [key for key in keys if key != column]
    table = table.groupby(others, sort=False, as_index=False)[column].agg(tuple)
  return [_command(fields, *row) for row in table[keys].itertuples(index=False)]


def of_run(run: Any) -> str:
  """Returns the command for one run; '' if its condition has no name."""
  name = first_name(str(run.condition[0]))
  if not _runnable(name, run.config):
    return ''
  processes = _processes(run.environment)
  return _command(
    run.fields, run.dataset, (name,), (run.rate,), (run.seed,), processes
  )


def _command(
  fields: Mapping[str, Any],
  dataset: str,
  conditions: Sequence[str],
  rates: Sequence[float],
  seeds: Sequence[int],
  processes: int,
) -> str:
  """`python -m experiments run` with the options that differ from defaults."""
  parts = ['--dataset', dataset, '--condition', *conditions]
  if rates != RATES:
    parts += ['--rate', *(f'{rate:g}' for rate in rates)]
  if seeds != (0,):
    parts += ['--seed', *map(str, seeds)]
  for field in dataclasses.fields(Protocol):
    value = fields[field.name]
    option = field.name.replace('_', '-')
    if isinstance(value, bool) and value != field.default:
      parts.append(f'--{option}' if value else f'--no-{option}')
    elif value != field.default:
      parts += [f'--{option}', *words(value)]
  if fields.get('plugin'):
    parts += ['--plugin', 'FILE']
  if network := fields.get('network'):
    known = {spec.architecture for spec in SPECS.values()}
    option = '--architecture' if network in known else '--network'
    parts += [option, str(network)]
  if processes > 1:
    parts += ['--executor', 'processes', '--workers', str(processes)]
  return 'python -m experiments run ' + shlex.join(parts)


def _processes(environment: Iterable[tuple[str, str]]) -> int:
  """The number of processes that divided the cores of the host."""
  about = dict(environment)
  try:
    return int(about['cores of the host']) // int(about['cores'])
  except (KeyError, ValueError, ZeroDivisionError):
    return 1


def _runnable(name: str, config: Mapping[str, Any]) -> bool:
  own = [config['rule']] if config.get('plugin') else []
  return find_exactly(name, own) is not None
