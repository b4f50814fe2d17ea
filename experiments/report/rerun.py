"""The commands that make a study's runs again, from their configurations.

On a CPU the bits of a run depend on how many cores it has, as sums are divided
among them. So a command asks for as many as its runs had.
"""

import collections
import dataclasses
import shlex
from collections.abc import Iterable

from experiments.paper.conditions import CONDITIONS, find
from experiments.paper.protocol import RATES, Protocol
from experiments.report import naming
from experiments.report.runs import Run
from experiments.report.studies import Study


def study_commands(study: Study) -> list[str]:
  """Commands that make all runs of a study, and no other rate or seed."""
  rates = collections.defaultdict(set)
  for (label, name), cell in study.cells.items():
    if _runnable(name):
      dataset, name = study.rows[label].dataset, naming.first_name(name)
      for run in cell.runs:
        rates[dataset, _processes(run), name, run.seed].add(run.rate)
  seeds = collections.defaultdict(set)
  for (*cell, seed), of_seed in rates.items():
    seeds[*cell, frozenset(of_seed)].add(seed)
  names = collections.defaultdict(set)
  for (dataset, processes, name, of_seed), of_cell in seeds.items():
    names[dataset, processes, of_seed, frozenset(of_cell)].add(name)
  place = {name: at for at, name in enumerate(CONDITIONS)}
  return [
    _command(
      study,
      dataset,
      sorted(conditions, key=lambda name: (place.get(name, len(place)), name)),
      of_seed,
      of_cell,
      processes,
    )
    for (dataset, processes, of_seed, of_cell), conditions in names.items()
  ]


def run_command(study: Study, name: str, run: Run) -> str:
  """The command for one run; '' if its condition has no name to ask for."""
  if not _runnable(name):
    return ''
  return _command(
    study, run.dataset, [name], [run.rate], [run.seed], _processes(run)
  )


def _command(
  study: Study,
  dataset: str,
  conditions: Iterable[str],
  rates: Iterable[float],
  seeds: Iterable[int],
  processes: int,
) -> str:
  """`python -m experiments run` with what differs from its defaults."""
  words = ['--dataset', dataset, '--condition', *conditions]
  rates = sorted(rates, reverse=True)
  if rates != list(RATES):
    words += ['--rate', *(f'{rate:g}' for rate in rates)]
  if (seeds := sorted(seeds)) != [0]:
    words += ['--seed', *map(str, seeds)]
  for field in dataclasses.fields(Protocol):
    value = study.fields.get(field.name, field.default)
    option = field.name.replace('_', '-')
    if value == field.default:
      continue
    if isinstance(value, bool):
      words.append(f'--{option}' if value else f'--no-{option}')
    else:
      words += [f'--{option}', *naming.words(value)]
  if processes > 1:
    words += ['--executor', 'processes', '--workers', str(processes)]
  return 'python -m experiments run ' + shlex.join(words)


def _processes(run: Run) -> int:
  """Among how many processes the cores of the host were divided."""
  about = dict(run.environment)
  try:
    return int(about['cores of the host']) // int(about['cores'])
  except (KeyError, ValueError, ZeroDivisionError):
    return 1


def _runnable(name: str) -> bool:
  try:
    return find(name).name == name
  except ValueError:
    return False
