"""The command line: every command is a dataclass, every option a field.

Nothing here imports JAX, so ``--help`` is quick; the work is in
``experiments.commands``.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.options import Execution, Hosts, ProtocolOptions, Selection
from experiments.paper.protocol import Protocol

Results = Annotated[Path, tyro.conf.arg(metavar='DIR')]
_Flat = tyro.conf.OmitArgPrefixes
DEMO_PROTOCOL = Protocol(epochs=5)


@dataclasses.dataclass(frozen=True)
class Demo:
  """From nothing to a table and a report, on embedded data, in a minute.

  Attributes:
    results: results folder.
  """

  results: Results = Path('results/demo')


@dataclasses.dataclass(frozen=True)
class RunCommand:
  """Runs a part of the grid; what is finished is not run again.

  Attributes:
    selection: which cells.
    protocol: what is common to all of them.
    execution: where and how.
    results: results folder.
    hosts: which processes do it together.
  """

  selection: Selection = Selection()
  protocol: ProtocolOptions = ProtocolOptions()
  execution: Execution = Execution()
  results: Results = Path('results')
  hosts: Hosts = Hosts()


@dataclasses.dataclass(frozen=True)
class Plan:
  """Says which runs are missing and what they cost; runs nothing.

  Attributes:
    selection: which cells.
    protocol: what is common to all of them.
    results: results folder.
    calibrate: time a few steps of each network and estimate hours.
  """

  selection: Selection = Selection()
  protocol: ProtocolOptions = ProtocolOptions()
  results: Results = Path('results')
  calibrate: bool = False


@dataclasses.dataclass(frozen=True)
class List:
  """Lists datasets and where each would come from, conditions and tables.

  Attributes:
    data_dir: folder with NAME.npz files or image folders.
  """

  data_dir: Path | None = None


@dataclasses.dataclass(frozen=True)
class Data:
  """Prepares, checks or shows a dataset: data [prepare|check] NAME.

  Attributes:
    words: NAME, or what to do (prepare, check) and NAME.
    data_dir: folder with NAME.npz files or image folders, and for prepared
      ones.
    show_split: print the chosen samples of each class.
    grid: where `check` draws a grid of labelled pictures (PNG).
  """

  words: tyro.conf.Positional[tuple[str, ...]]
  data_dir: Path | None = None
  show_split: bool = False
  grid: Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
  """Writes tables, plots and one HTML page from a results folder.

  Attributes:
    results: results folder.
    out: where to write; default: the folder `report` in it.
    markdown_only: write RESULTS.md and its plots, nothing else.
  """

  results: tyro.conf.Positional[Results] = Path('results')
  out: Path | None = None
  markdown_only: bool = False


@dataclasses.dataclass(frozen=True)
class Claims:
  """Checks the paper's conclusions against a results folder.

  Attributes:
    results: results folder.
  """

  results: tyro.conf.Positional[Results] = Path('results')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
  """Measures training steps of every rule beside plain Flax, torch, biotorch.

  All programs make steps in turn. torch and biotorch take part where they are
  installed: pip install -e '.[bench]'.

  Attributes:
    architecture: columns of Table 1, such as cifar; default: all five.
    batch_norm: none, plain (without learnable parameters) or both.
    rule: feedback rules by name, such as brSF-50%.
    batch: examples in a mini-batch.
    steps: the least number of measured steps of each program.
    seconds: go on with steps for so long on each network.
    out: folder for the measurements, their tables and their plot.
  """

  architecture: tuple[str, ...] = ()
  batch_norm: tuple[str, ...] = ('none', 'plain')
  rule: tuple[str, ...] = (
    'BP', 'uSF', 'NuSF', 'brSF', 'brSF-50%', 'frSF', 'RndF',
  )  # fmt: skip
  batch: int = 100
  steps: int = 15
  seconds: float = 20.0
  out: Results = Path('results/bench')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
  """Measures how cost grows with batch, width, depth and number of runs.

  Attributes:
    steps: measured steps of each program.
    out: folder for the measurements and their plot.
  """

  steps: int = 10
  out: Results = Path('results/bench')


Command = (
  Annotated[Demo, tyro.conf.subcommand('demo')]
  | Annotated[RunCommand, tyro.conf.subcommand('run')]
  | Annotated[Plan, tyro.conf.subcommand('plan')]
  | Annotated[List, tyro.conf.subcommand('list')]
  | Annotated[Data, tyro.conf.subcommand('data')]
  | Annotated[Report, tyro.conf.subcommand('report')]
  | Annotated[Claims, tyro.conf.subcommand('claims')]
  | Annotated[Bench, tyro.conf.subcommand('bench')]
  | Annotated[Scaling, tyro.conf.subcommand('scaling')]
)


def main() -> None:
  """Parses the command line and carries it out."""
  try:
    command = tyro.cli(
      Command,  # type: ignore[arg-type]
      prog='python -m experiments',
      description='The paper "How Important Is Weight Symmetry in '
      'Backpropagation?" as a program.',
      config=(_Flat,),
    )
    from experiments import commands

    status = commands.carry_out(command)
    sys.stdout.flush()
    sys.exit(status)
  except BrokenPipeError:  # who read the output, such as `head`, has gone
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except KeyboardInterrupt:
    print('stopped; what is finished is kept.', file=sys.stderr)
    sys.exit(130)
