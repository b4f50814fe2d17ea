"""The command line: every command is a function, its options its parameters.

Nothing here imports JAX before a command needs it, so ``--help`` is quick.
"""

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import terminal
from experiments.paper.protocol import Protocol, Run
from experiments.runs.selection import Selection, shard_of

# All rates, so that the paper's conclusions on these conditions are decided.
_DEMO = Selection(condition=('SGD', 'uSF', 'uSF+BN', 'uSF+BN+BM'))
_DEMO_PROTOCOL = Protocol(epochs=5, layer_metrics=True)

app = tyro.extras.SubcommandApp()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """Where and how runs are trained.

  Attributes:
    executor: this process, one worker process for each part of this host, or
      Ray tasks.
    workers: number of worker processes (default: one for each accelerator, or
      else each core).
    devices: of this process, over which mini-batches are divided (default: as
      many accelerators as divide them; one CPU).
    together: how many runs that differ in rate or seed only this process trains
      as one program (default: up to 32 on a single accelerator, else 1).
    ray_address: of a Ray cluster (default: one is started on this host).
    cpus_per_run: that a Ray task asks for (default: 1).
    gpus_per_run: that a Ray task asks for (default: 0).
    shard: I/N, the I-th of N equal parts of the runs, such as 1/4.
    retries: how often a run that fails is tried again; then its error is
      recorded, and the others go on.
    scan: compile a whole epoch as one loop (default: not on a CPU).
    checkpoint_share: share of a run's time that checkpoints may take; 1 writes
      one after every epoch.
  """

  executor: Literal['local', 'processes', 'ray'] = 'local'
  workers: int | None = None
  devices: int | None = None
  together: int | None = None
  ray_address: str | None = None
  cpus_per_run: float | None = None
  gpus_per_run: float | None = None
  shard: str | None = None
  retries: int = 2
  scan: bool | None = None
  checkpoint_share: float = 0.03

  def check(self) -> None:
    """Checks ranges, and that each option belongs to the executor.

    Raises:
      ValueError: if not; names the option.
    """
    for name, allowed, holds in (
      ('workers', 'positive', self.workers is None or self.workers > 0),
      ('together', 'positive', self.together is None or self.together > 0),
      ('cpus_per_run', 'at least 0', (self.cpus_per_run or 0) >= 0),
      ('gpus_per_run', 'at least 0', (self.gpus_per_run or 0) >= 0),
      ('retries', 'at least 0', self.retries >= 0),
      ('checkpoint_share', 'in [0, 1]', 0 <= self.checkpoint_share <= 1),
    ):
      if not holds:
        raise ValueError(
          f'{name} must be {allowed}, not {getattr(self, name)!r}.'
        )
    for name, executor in (
      ('workers', 'processes'),
      ('ray_address', 'ray'),
      ('cpus_per_run', 'ray'),
      ('gpus_per_run', 'ray'),
      ('devices', 'local'),
      ('together', 'local'),
    ):
      value = getattr(self, name)
      if value is not None and self.executor != executor:
        raise ValueError(
          f'{name} is {value!r}, but only --executor {executor} has it: add '
          f'that, or leave out --{name.replace("_", "-")}.'
        )


@app.command
def demo(results: Path = Path('results/demo')) -> int:
  """Trains four conditions on embedded data; writes a report. A minute.

  Args:
    results: results folder.
  """
  from experiments import report as reports
  from experiments.studies import load

  print(
    f'{len(_DEMO.condition)} conditions at {len(_DEMO.rate)} learning rates, '
    f"{_DEMO_PROTOCOL.epochs} epochs each, on scikit-learn's\nhandwritten "
    'digits: about a minute on two cores. A demonstration, not the paper.'
  )
  status = _train(_DEMO.runs(_DEMO_PROTOCOL), results, _DEMO, Execution())
  if status:
    return status
  records = load(results)
  page = results / 'report' / 'report.html'
  reports.write_report(records, page.parent)
  print('\n' + reports.text_tables(records, width=_width()))
  print(reports.answers_text(records, _width()))
  print(f"""
Open the page: {page}

Next, from this folder:
  {_typed('list')}
      conditions, datasets and tables to choose from
  {_typed('claims', results)}
      the paper's conclusions, judged by these runs
  {
    _typed(
      'run',
      '--condition',
      'RndF',
      'RndF+BN+BM',
      '--epochs',
      5,
      '--layer-metrics',
      '--results',
      results,
    )
  }
  {_typed('report', results)}
      the same page with random feedback too
  {_typed('run', '--help')}
      all options""")
  return 0


@app.command
def run(
  selection: Selection = Selection(),  # noqa: B008
  protocol: Protocol = Protocol(),  # noqa: B008
  execution: Execution = Execution(),  # noqa: B008
  results: Path = Path('results'),
  verbose: Annotated[
    bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=['-v'])
  ] = False,
) -> int:
  """Runs a part of the grid; finished runs are not run again.

  Args:
    selection: which cells.
    protocol: what they all share.
    execution: where and how.
    results: results folder.
    verbose: also print what is set for JAX, XLA and malloc.
  """
  execution.check()
  runs = selection.runs(protocol, execution.devices or 1)
  runs = shard_of(runs, execution.shard)
  if not runs:
    print(f'shard {execution.shard} has no runs: nothing to do.')
    return 0
  status = _train(runs, results, selection, execution, verbose)
  if status in (0, 1):
    from experiments import report as reports
    from experiments.studies import load

    ids = {each.run_id for each in runs}
    records = [record for record in load(results) if record.run_id in ids]
    tables = [table.name for table in selection.tables()]
    if any(record.result for record in records):
      print(reports.text_tables(records, tables or None, _width()))
    print(f'report: {_typed("report", results)}')
  return status


@app.command
def plan(
  selection: Selection = Selection(),  # noqa: B008
  protocol: Protocol = Protocol(),  # noqa: B008
  results: Path = Path('results'),
  calibrate: bool = False,
) -> int:
  """Says which runs are missing and what they cost; runs nothing.

  Args:
    selection: which cells.
    protocol: what they all share.
    results: results folder.
    calibrate: time a few steps of each network and estimate hours.
  """
  from experiments.paper.conditions import names_of
  from experiments.training import machine

  runs = selection.runs(protocol)
  missing = _missing(runs, results)
  machine.start_jax()
  from experiments.training import cost

  load = selection.loader()
  print(f'{len(runs) - len(missing)} of {len(runs)} runs are finished')
  cells: dict[tuple[str, str], list[Run]] = {}
  for each in missing:
    key = each.dataset.name, names_of(each.condition)[0]
    cells.setdefault(key, []).append(each)
  total_flops = total_hours = 0.0
  for (name, condition), members in cells.items():
    dataset = load(name, protocol.train_size)
    flops = sum(cost.run_flops(each, dataset) for each in members)
    total_flops += flops
    line = (
      f'{name:<12} {condition:<18} {len(members):>4} runs  {flops:.2e} FLOP'
    )
    if calibrate:
      speed = cost.flops_per_second(members[0], dataset)
      total_hours += flops / speed / 3600
      line += f'  {speed / 1e9:6.1f} GFLOP/s  {flops / speed / 3600:8.2f} h'
    print(line)
  total = f'{len(missing)} runs missing: {total_flops:.2e} FLOP'
  if calibrate:
    total += f', about {total_hours:.2f} h on this machine'
  elif missing:
    total += ' (--calibrate estimates the time)'
  print(total)
  return 0


@app.command(name='list')
def list_all(data_dir: Path | None = None) -> int:
  """Lists datasets and where each would come from, conditions and tables.

  Args:
    data_dir: folder with NAME.npz files or image folders.
  """
  from experiments import datasets
  from experiments.paper import conditions

  print('datasets')
  for name, spec in datasets.SPECS.items():
    status = datasets.status(name, data_dir)
    print(
      f'  {name:<12} {spec.classes:>4} classes  {spec.architecture:<8} '
      f'{status.state}: {status.text}'
    )
  print(
    '\nconditions (any RULE[+BN][+BM[1-3]|+Adam] works, such as frSF-10%+BN)'
  )
  norms = {'none': 'no BN', 'plain': 'BN', 'affine': 'BN, learnable'}
  for column in conditions.COLUMNS.values():
    first = column.conditions[0]
    plans = ' or '.join(
      ', then '.join(conditions.steps_of(condition.batch_plan))
      for condition in column.conditions
    )
    setting = first.batch_manhattan
    update = f'BM setting {setting}' if setting else 'SGD'
    print(
      f'  {column.name:<18} {first.rule:<10} {update:<12} '
      f'{norms[first.batch_norm]:<13} batch {plans}'
      + ('' if first.frozen == 'nothing' else f', {first.frozen} frozen')
    )
  print('\nrules that the paper does not have, such as KP+BN')
  for rule, text in conditions.FAMILY.items():
    print(f'  {rule:<18} {text}')
  print('\ntables')
  for table in conditions.TABLES.values():
    print(f'  {table.name:<5} {table.title}: {", ".join(table.columns)}')
  return 0


@app.command(name='data')
def show_data(
  words: tyro.conf.Positional[tuple[str, ...]],
  data_dir: Path | None = None,
  show_split: bool = False,
  grid: Path | None = None,
  architecture: str | None = None,
  test_share: float | None = None,
) -> int:
  """Prepares, checks or shows a dataset: data [prepare|check] NAME.

  Args:
    words: NAME, or an action (prepare, check) and NAME.
    data_dir: folder with NAME.npz files or image folders, and for prepared
      ones.
    show_split: print the chosen samples of each class.
    grid: where `check` draws a grid of labeled pictures (PNG).
    architecture: network for a dataset of your own.
    test_share: share of each class to test on, for a dataset of your own
      without a test part.
  """
  from experiments import datasets

  *action, name = words or ('',)
  if action not in ([], ['prepare'], ['check']) or not name:
    raise ValueError(
      'say `data NAME`, `data prepare NAME` or `data check NAME`, not '
      f'`data {" ".join(words)}`.'
    )
  if action == ['prepare']:
    for line in datasets.prepare(name, data_dir):
      print(line)
  own = {'architecture': architecture, 'test_share': test_share}
  if action == ['check']:
    lines = datasets.check(name, data_dir, grid=grid, **own)
  elif show_split:
    lines = datasets.show_split(name, data_dir, **own)
  else:
    status = datasets.status(name, data_dir, **own)
    spec = datasets.find(name, data_dir, **own)
    lines = [f'{spec.name}: {status.state}: {status.text}']
  for line in lines:
    print(line)
  return 0


@app.command
def report(
  results: tyro.conf.Positional[Path] = Path('results'),
  out: Path | None = None,
  markdown_only: bool = False,
) -> int:
  """Writes tables, plots and one HTML page from results.

  Args:
    results: results folder, a study's JSONL file, or a folder of them.
    out: where to write; default: the folder `report` in a results folder.
    markdown_only: write RESULTS.md and its plots, nothing else.
  """
  from experiments import report as reports
  from experiments.studies import load

  records = load(results)
  print(reports.text_tables(records, width=_width()))
  default = (results if results.is_dir() else results.parent) / 'report'
  paths = reports.write_report(
    records, out or default, markdown_only=markdown_only
  )
  print('written:')
  for path in paths:
    print(f'  {path}')
  return 0


@app.command
def claims(
  results: tyro.conf.Positional[Path] = Path('results'),
) -> int:
  """Checks the paper's conclusions against results.

  Args:
    results: results folder, a study's JSONL file, or a folder of them.
  """
  from experiments import report as reports
  from experiments.studies import load

  print(reports.claims_text(load(results), _width()))
  return 0


@app.command
def fold(
  results: tyro.conf.Positional[Path], study: tyro.conf.Positional[Path]
) -> int:
  """Adds the finished runs of a results folder to a study's JSONL file.

  Args:
    results: results folder.
    study: file to write, such as experiments/results/NAME.jsonl.
  """
  from experiments import studies

  print(f'{study} has {studies.fold(results, study)} runs.')
  return 0


def _width() -> int:
  """Characters in a line of the terminal, within reason."""
  return max(40, min(shutil.get_terminal_size((120, 24)).columns, 160))


def _typed(*words: object) -> str:
  """A command of this program that works as typed in the current folder."""
  python = Path(sys.executable)
  inside = python.is_relative_to(Path.cwd())
  name = python.relative_to(Path.cwd()) if inside else 'python'
  return shlex.join(map(str, (name, '-m', 'experiments', *words)))


def _missing(runs: Sequence[Run], results: Path) -> list[Run]:
  """The runs without a result."""
  from experiments.runs.store import RunFolder

  return [
    run for run in runs if RunFolder(results, run.run_id).result() is None
  ]


def _train(
  runs: Sequence[Run],
  results: Path,
  selection: Selection,
  execution: Execution,
  verbose: bool = False,
) -> int:
  """Trains runs with progress; returns the exit status."""
  from experiments.runs import launch, store
  from experiments.runs.progress import reporter
  from experiments.runs.train import Options
  from experiments.training import machine

  missing = _missing(runs, results)
  if not missing:
    if results.is_dir():
      store.tidy(results)
    print(f'all {len(runs)} runs are finished in {results}: nothing to do.')
    return 0
  store.create(results)
  options = Options(
    results,
    selection.loader(),
    execution.devices,
    execution.scan,
    execution.checkpoint_share,
  )
  with reporter(len(missing)) as listener:
    listener.message(
      f'{len(missing)} of {len(runs)} runs to do; results in {results}'
    )
    for line in machine.configure(execution.devices):
      if verbose:
        listener.message(f'set {line}')
    launcher = _launcher(execution, options)
    try:
      summary = launch.launch(
        missing, launcher, options, listener, execution.retries
      )
    except launch.Interrupted as stopped:
      listener.message(
        f'{stopped}; nothing recorded is lost. Resume with: '
        f'{_typed(*sys.argv[1:])}'
      )
      return 128 + stopped.signal
  if summary.elsewhere:
    print(
      f'{summary.elsewhere} runs are being trained by another process; repeat '
      'the command once it has finished.'
    )
  if summary.failed:
    print(
      f'{summary.failed} runs failed and are recorded with their errors; '
      'repeat the command to try them again.'
    )
    return 1
  return 0


def _launcher(execution: Execution, options):
  """The launcher that is asked for."""
  if execution.executor == 'local':
    from experiments.runs.launch import in_this_process
    from experiments.training.vmapped import group_size

    together = group_size(execution.together, execution.devices)
    return in_this_process(options, together)
  if execution.executor == 'processes':
    from experiments.runs.processes import in_processes, places

    launcher = in_processes(options, places(execution.workers))
  else:
    from experiments.runs.ray_tasks import on_ray

    cpus = execution.cpus_per_run
    launcher = on_ray(
      options,
      execution.ray_address,
      1.0 if cpus is None else cpus,
      execution.gpus_per_run or 0.0,
    )
  os.environ['JAX_PLATFORMS'] = 'cpu'  # accelerators are for the workers
  return launcher


def main() -> None:
  """Parses the command line and runs the command."""
  terminal.run(
    app,
    'python -m experiments',
    'The paper "How Important Is Weight Symmetry in Backpropagation?" as a '
    'program.',
  )
