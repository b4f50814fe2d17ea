"""Measures speed and memory: ``python -m experiments.bench COMMAND``.

Nothing imports JAX before a command has set it up, as in ``experiments.cli``.
"""

import itertools
import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from experiments import terminal
from experiments.bench import epoch, scaling
from experiments.runs.launch import Interrupted
from experiments.training import machine

Architecture = Literal[
  'mnist', 'cifar', 'svhn', 'general', 'timit', 'resnet18', 'vit'
]
BatchNorm = Literal['none', 'plain']
Precision = Literal['float32', 'tensorfloat32', 'bfloat16']
_OUT = Path('results/bench')

app = tyro.extras.SubcommandApp()
app.command(name='epoch')(epoch.epoch)
app.command(name='grid')(scaling.grid)


@app.command(name='steps')
def compare_steps(
  architecture: tuple[Architecture, ...] = (),
  batch_norm: tuple[BatchNorm, ...] = ('none', 'plain'),
  rule: tuple[str, ...] = (
    'BP', 'uSF', 'NuSF', 'brSF', 'brSF-50%', 'frSF', 'RndF',
  ),
  batch: tuple[int, ...] = (100,),
  precision: tuple[Precision, ...] = ('float32',),
  repeat: int = 1,
  steps: int = 15,
  seconds: float = 20.0,
  resume: bool = False,
  limit: float | None = None,
  out: Path = _OUT,
) -> None:  # fmt: skip
  """Training steps of every rule beside plain Flax, torch and biotorch.

  All programs make steps in turn. torch and biotorch take part where they are
  installed: pip install -e '.[bench]'.

  Args:
    architecture: columns of Table 1, such as cifar (default: all five), or
      resnet18 and vit for pictures of 224 x 224.
    batch_norm: none, plain (without learnable parameters) or both.
    rule: feedback rules by name, such as brSF-50%.
    batch: examples in a mini-batch, one number or several.
    precision: of products on a GPU: float32, tensorfloat32 or bfloat16 (JAX's
      convolutions are in tensorfloat32 then).
    repeat: steps that each program makes in a row; several are one compiled
      loop in JAX, as in `run` on an accelerator.
    steps: the least number of measured rounds of each program.
    seconds: measure each network for at least this long.
    resume: continue the measurements in the folder: skip networks that were
      measured on this kind of device.
    limit: start no further network after this many seconds.
    out: folder for the measurements, their tables and their plot.
  """
  machine.start_jax()
  import jax

  from experiments.bench import contenders, in_torch, output
  from experiments.datasets import SHAPES
  from experiments.training.backward import rule_of

  if not batch_norm:
    raise ValueError("batch_norm must name one or more of 'none' and 'plain'.")
  if repeat < 1:
    raise ValueError(f'repeat must be at least 1, not {repeat}.')
  workloads = [
    contenders.of_network(name, norm, size, precision=mode, repeat=repeat)
    for size, mode, name, norm in itertools.product(
      batch, precision, architecture or SHAPES, batch_norm
    )
  ]
  for name in rule:
    rule_of(name)
  _prepare(steps, out)
  for name in ('torch', 'biotorch'):
    if in_torch.installed(name) is None:
      print(f"{name} is not installed and left out: pip install -e '.[bench]'")
  # Compilation is measured, too.
  jax.config.update('jax_enable_compilation_cache', False)
  results = output.read(out, 'bench') if resume else []
  began, before = time.monotonic(), len(results)
  for workload in workloads:
    described = output.described(workload).items()
    if any(described <= result.items() for result in results):
      continue
    contenders.set_precision(workload.precision)
    programs = [
      contenders.product(),
      *contenders.all_in_jax(workload, (None, *rule)),
      *in_torch.contenders(workload),
    ]
    times = contenders.take_turns(programs, steps, seconds)
    results.append(output.summarize(workload, programs, times))
    print(output.details(results[-1]), end='\n\n', flush=True)
    document = {'results': results}, output.steps_markdown(results)
    output.write(out, 'bench', *document)
    if limit is not None and time.monotonic() - began > limit:
      print('the limit is reached: --resume continues with the next network.')
      break
  if len(results) == before:
    print('everything is measured already: nothing to do.')
    return
  document = {'results': results}, output.steps_markdown(results)
  written = output.write(out, 'bench', *document, output.steps_figure(results))
  print(f'written:\n{written}')


@app.command(name='scaling')
def measure_scaling(steps: int = 10, out: Path = _OUT) -> None:
  """How cost grows with batch, width, depth and number of runs.

  Args:
    steps: measured steps of each program.
    out: folder for the measurements and their plot.
  """
  machine.start_jax()
  from experiments.bench import output

  _prepare(steps, out)
  points = []
  for point in scaling.step_times(steps):
    points.append(point)
    times = (f'{k} {1e3 * x:.2f} ms' for k, x in point['seconds'].items())
    print(f'{point["axis"]} {point[point["axis"]]}:', *times, flush=True)
  grid = scaling.grid_times()
  markdown = output.scaling_markdown(points, grid)
  print(markdown.rpartition('\n')[2])
  figure = output.scaling_figure(points, grid)
  measured = {'steps': points, 'grid': grid}
  print(f'written:\n{output.write(out, "scaling", measured, markdown, figure)}')


def _prepare(steps: int, out: Path) -> None:
  """Checks the steps and the output folder before anything is measured."""
  if steps < 1:
    raise ValueError(f'steps must be at least 1, not {steps}.')
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'out must be a folder, or a path where one can be made, not {out}: '
      f'{error.strerror}.'
    ) from error
  machine.warn_if_busy()


def main() -> None:
  """Parses the command line and runs the command."""
  try:
    terminal.run(
      app,
      'python -m experiments.bench',
      'Measures the speed and memory of training steps and runs.',
    )
  except Interrupted as stopped:
    print(f'{stopped}.', file=sys.stderr)
    sys.exit(128 + stopped.signal)


if __name__ == '__main__':
  main()
