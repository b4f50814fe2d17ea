"""Every rule, plain Flax, torch and biotorch, side by side."""

import itertools
from collections.abc import Sequence

import jax

from experiments import cli
from experiments.bench import files, in_jax, in_torch, operations, plots, tables
from experiments.bench.contenders import Contender, check_steps, take_turns
from experiments.bench.results import Result, summarized
from experiments.bench.workload import Workload
from experiments.datasets import SHAPES
from experiments.training import machine, models
from symjax_bp import from_name


def carry_out(command: cli.Bench) -> None:
  """Network by network: measures, prints, and writes what there is so far.

  Raises:
    ValueError: if an option is not among what is allowed.
  """
  if not command.batch_norm:
    raise ValueError("batch_norm must name one or more of 'none' and 'plain'.")
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
  check_steps(command.steps)
  out = files.folder(command.out)
  machine.warn_if_busy()
  # Compilation is measured, too.
  jax.config.update('jax_enable_compilation_cache', False)
  results: list[Result] = []
  for workload in workloads:
    result = compare(workload, command.rule, command.steps, command.seconds)
    results.append(result)
    print(f'{tables.details(result)}\n', flush=True)
    written = files.write(
      out,
      {'results': [each.as_json() for each in results]},
      plots.steps(results),
      tables.markdown(results),
    )
  print('written:', *written, sep='\n  ')


def compare(
  workload: Workload, rules: Sequence[str], steps: int, seconds: float
) -> Result:
  """All programs on one network; see ``take_turns``."""
  contenders: list[Contender] = [
    in_jax.product(),
    in_jax.contender(workload, None),
    *(in_jax.contender(workload, rule) for rule in rules),
    operations.contender(workload),
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
