"""The commands that make a study's runs again, from their configurations.

On a CPU the bits of a run depend on how many cores it has, as sums are divided
among them. So a command asks for as many as its runs had.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Sequence

from experiments.conditions import CONDITIONS, find
from experiments.grid import RATES, Protocol
from experiments.report import naming
from experiments.report.runs import Run
from experiments.report.studies import Study


def study_commands(study: Study) -> list[str]:
  """A command for each dataset of a study, with all of its conditions."""
  parts: dict[tuple[str, int], list[tuple[str, Run]]] = {}
  for (label, name), cell in study.cells.items():
    if _runnable(name):
      for run in cell.runs:
        part = study.rows[label].dataset, _processes(run)
        parts.setdefault(part, []).append((naming.first_name(name), run))
  place = {name: at for at, name in enumerate(CONDITIONS)}
  return [
    command(
      study,
      dataset,
      sorted(
        {name for name, _ in part},
        key=lambda name: (place.get(name, len(place)), name),
      ),
      [run for _, run in part],
    )
    for (dataset, _), part in parts.items()
  ]


def run_command(study: Study, name: str, run: Run) -> str:
  """The command for one run; '' if its condition has no name to ask for."""
  if not _runnable(name):
    return ''
  return command(study, run.dataset, [name], [run])


def command(
  study: Study,
  dataset: str,
  conditions: Iterable[str],
  runs: Sequence[Run],
) -> str:
  """`python -m experiments run` with what differs from its defaults."""
  words = ['--dataset', dataset, '--condition', *conditions]
  rates = sorted({run.rate for run in runs}, reverse=True)
  if rates != list(RATES):
    words += ['--rate', *(f'{rate:g}' for rate in rates)]
  if (seeds := sorted({run.seed for run in runs})) != [0]:
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
  if (count := _processes(runs[0])) > 1:
    words += ['--executor', 'processes', '--workers', str(count)]
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
