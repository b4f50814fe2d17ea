"""Every rule, plain Flax, torch and biotorch, side by side."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments import cli, models
from experiments.bench import in_jax, in_torch, machine, plots, tables
from experiments.bench.contenders import Contender, take_turns
from experiments.bench.results import Result, summarized
from experiments.bench.workload import Workload
from experiments.datasets import SHAPES
from experiments.report.write import replace
from symjax_bp import from_name


def carry_out(command: cli.Bench) -> None:
  """Network by network: measures, prints, writes what there is so far.

  Raises:
    ValueError: if an option is not among what is allowed.
  """
  workloads = [
    Workload(
      architecture=architecture, batch_norm=batch_norm, batch=command.batch
    )
    for architecture, batch_norm in itertools.product(
      command.architecture or SHAPES, command.batch_norm
    )
  ]
  for rule in command.rule:
    from_name(rule)
  if command.steps < 1:
    raise ValueError(f'steps must be at least 1, not {command.steps}.')
  try:
    command.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'out is {command.out}, which is no folder and can not be made one: '
      f'{error.strerror}.'
    ) from error
  # Compilation is measured, too.
  jax.config.update('jax_enable_compilation_cache', False)
  results: list[Result] = []
  for workload in workloads:
    result = compare(workload, command.rule, command.steps, command.seconds)
    results.append(result)
    print(f'{tables.details(result)}\n', flush=True)
    written = write(results, command.out)
  print('written:', *written, sep='\n  ')


def compare(
  workload: Workload, rules: Sequence[str], steps: int, seconds: float
) -> Result:
  """All programs on one network; see ``take_turns``."""
  contenders: list[Contender] = [
    in_jax.product(),
    in_jax.contender(workload, None),
    *(in_jax.contender(workload, rule) for rule in rules),
    *in_torch.contenders(workload),
  ]
  flops = models.training_flops(workload.architecture, workload.classes)
  return summarized(
    workload,
    contenders,
    take_turns(contenders, steps, seconds),
    flops=workload.batch * flops,
    product_flops=in_jax.PRODUCT_FLOPS,
  )


def write(results: Sequence[Result], folder: Path) -> list[Path]:
  """Writes measurements, their tables and their picture."""
  about = machine.described()
  document = {'machine': about, 'results': [r.as_json() for r in results]}
  picture = plots.steps(results)
  bodies = {
    'bench.json': json.dumps(document, indent=1).encode(),
    'bench.md': tables.markdown(results, about).encode(),
    'bench.svg': picture.svg,
    'bench.png': picture.png,
  }
  return [replace(folder / name, body) for name, body in bodies.items()]
