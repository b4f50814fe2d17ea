"""The commands that make a study's runs again, from their configurations."""

import dataclasses
import shlex
from collections.abc import Iterable

from experiments.conditions import CONDITIONS, find
from experiments.grid import RATES, Protocol
from experiments.report import naming
from experiments.report.runs import Run
from experiments.report.studies import Study


def study_commands(study: Study) -> list[str]:
  """A command for each dataset of a study, with all of its conditions."""
  conditions: dict[str, dict[str, None]] = {}
  runs: dict[str, list[Run]] = {}
  for (label, name), cell in study.cells.items():
    if _runnable(name):
      dataset = study.rows[label].dataset
      conditions.setdefault(dataset, {})[naming.first_name(name)] = None
      runs.setdefault(dataset, []).extend(cell.runs)
  place = {name: at for at, name in enumerate(CONDITIONS)}
  return [
    command(
      study,
      dataset,
      sorted(names, key=lambda name: (place.get(name, len(place)), name)),
      {run.rate for run in runs[dataset]},
      {run.seed for run in runs[dataset]},
    )
    for dataset, names in conditions.items()
  ]


def run_command(study: Study, name: str, run: Run) -> str:
  """The command for one run; '' if its condition has no name to ask for."""
  if not _runnable(name):
    return ''
  return command(study, run.dataset, [name], {run.rate}, {run.seed})


def command(
  study: Study,
  dataset: str,
  conditions: Iterable[str],
  rates: Iterable[float],
  seeds: Iterable[int],
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
      words += [f'--{option}', str(value)]
  return 'python -m experiments run ' + shlex.join(words)


def _runnable(name: str) -> bool:
  try:
    return find(name).name == name
  except ValueError:
    return False
