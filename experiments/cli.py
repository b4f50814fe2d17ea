"""The command line: a command is a function, and its options are parameters.

JAX is imported only by the commands that need it, so ``--help`` is quick.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import report, studies, terminal
from experiments.paper import conditions
from experiments.paper.protocol import Protocol, Run
from experiments.runs import store
from experiments.runs.selection import Selection, shard_of

# All rates: the paper's conclusions need them.
_DEMO = Selection(condition=('SGD', 'uSF', 'uSF+BN', 'uSF+BN+BM'))
_DEMO_PROTOCOL = Protocol(epochs=5, layer_metrics=True)

app = tyro.extras.SubcommandApp()

_Path = Annotated[
  Path | None, tyro.conf.arg(metavar='PATH', help_behavior_hint='')
]
_Text = Annotated[
  str | None, tyro.conf.arg(metavar='STR', help_behavior_hint='')
]
_Share = Annotated[
  float | None, tyro.conf.arg(metavar='FLOAT', help_behavior_hint='')
]
_Verbose = Annotated[
  bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=['-v'])
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """Where and how runs are trained.

  Attributes:
    executor: `local` trains in this process, `processes` in worker processes
      that divide this host, `ray` in Ray tasks.
    workers: number of worker processes (default: one per accelerator, or one
      per core without accelerators).
    devices: devices of this process that share each mini-batch (default: as
      many accelerators as divide every mini-batch; 1 on a CPU).
    together: number of runs that this process trains as one program; they
      differ only in rate or seed (default: up to 32 on a single accelerator,
      else 1).
    ray_address: address of a Ray cluster (default: start one on this host).
    cpus_per_run: CPUs that each Ray task requests (default: 1).
    gpus_per_run: GPUs that each Ray task requests (default: 0).
    shard: I/N trains the I-th of N equal parts of the runs, such as 1/4.
    retries: how often a run that fails is tried again. After that its error is
      recorded and the other runs go on.
    scan: compile a whole epoch as one loop (default: not on a CPU).
    checkpoint_share: largest share of the training time that goes into
      checkpoints; 1 writes one after every epoch.
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
    """Checks the ranges of the options, and that the executor has each.

    Raises:
      ValueError: an option is wrong; names it.
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
  """Trains four conditions on embedded data and writes a report, in a minute.

  Args:
    results: results folder.
  """
  from experiments.training import machine

  machine.configure()
  print(
    f'{len(_DEMO.condition)} conditions at {len(_DEMO.rate)} learning rates, '
    f"{_DEMO_PROTOCOL.epochs} epochs each, on scikit-learn's\nhandwritten "
    'digits: about a minute on two cores. A demonstration, not the paper.'
  )
  status = _train(_DEMO.runs(_DEMO_PROTOCOL), results, _DEMO, Execution())
  if status:
    return status
  records = studies.load(results)
  page = results / 'report' / 'report.html'
  report.write_report(records, page.parent)
  print('\n' + report.text_tables(records, width=terminal.width()))
  print(report.answers_text(records, terminal.width()))
  print(f'\nOpen the page: {page}\n\nNext, from this folder:')
  folder = shlex.quote(str(results))
  more = '--condition RndF RndF+BN+BM --epochs 5 --layer-metrics'
  for command, why in (
    ('list', 'conditions, datasets and tables to choose from'),
    (f'claims {folder}', "the paper's conclusions, judged by these runs"),
    (f'run {more} --results {folder}', 'adds random feedback to these runs'),
    (f'report {folder}', 'the same page with random feedback too'),
    ('run --help', 'all options'),
  ):
    typed = terminal.as_typed(f'python -m experiments {command}')
    print(f'  {typed}\n      {why}')
  return 0


@app.command
def run(
  selection: Selection = Selection(),  # noqa: B008
  protocol: Protocol = Protocol(),  # noqa: B008
  execution: Execution = Execution(),  # noqa: B008
  results: Path = Path('results'),
  verbose: _Verbose = False,
) -> int:
  """Trains a part of the grid; skips finished runs.

  Args:
    selection: the cells to train.
    protocol: the settings that all runs share.
    execution: where and how to train.
    results: results folder.
    verbose: also print the settings of JAX, XLA and malloc.
  """
  from experiments.training import machine

  execution.check()
  settings = machine.configure(execution.devices)  # before a plugin imports JAX
  runs = selection.runs(protocol, execution.devices or 1)
  runs = shard_of(runs, execution.shard)
  if not runs:
    print(f'shard {execution.shard} has no runs: nothing to do.')
    return 0
  status = _train(
    runs, results, selection, execution, settings if verbose else ()
  )
  if status in (0, 1):
    ids = {each.run_id for each in runs}
    records = [
      record for record in studies.load(results) if record.run_id in ids
    ]
    if any(record.result for record in records):
      tables = [table.name for table in selection.tables()]
      # A condition may be in none of the tables.
      shown = None if selection.condition else tables
      print(report.text_tables(records, shown, terminal.width()))
    command = shlex.join(['report', str(results)])
    print(terminal.as_typed(f'report: python -m experiments {command}'))
  return status


@app.command
def plan(
  selection: Selection = Selection(),  # noqa: B008
  protocol: Protocol = Protocol(),  # noqa: B008
  results: Path = Path('results'),
  calibrate: bool = False,
  verbose: _Verbose = False,
) -> int:
  """Shows which runs are missing and what they cost; trains nothing.

  Args:
    selection: the cells to plan.
    protocol: the settings that all runs share.
    results: results folder.
    calibrate: time a few steps of each network on this machine.
    verbose: also print the settings of JAX, XLA and malloc.
  """
  from experiments.training import machine

  settings = machine.configure()  # before a plugin imports JAX
  runs = selection.runs(protocol)
  missing = _missing(runs, results)
  print(f'{len(runs) - len(missing)} of {len(runs)} runs are finished')
  if not missing:
    return 0
  if verbose:
    print(*(f'set {line}' for line in settings), sep='\n')
  from experiments.training import cost

  load = selection.loader()
  cells: dict[tuple[str, str], list[Run]] = {}
  for each in missing:
    key = each.dataset.name, conditions.names_of(each.condition)[0]
    cells.setdefault(key, []).append(each)
  rows, total_flops, total_hours = [], 0.0, 0.0
  for (name, condition), members in cells.items():
    dataset = load(name, protocol.train_size)
    flops = sum(cost.run_flops(each, dataset) for each in members)
    if calibrate:
      speed = cost.flops_per_second(members[0], dataset)
    else:
      speed = cost.stored_speed(dataset.spec.architecture)
    hours = flops / speed / 3600
    total_flops, total_hours = total_flops + flops, total_hours + hours
    rows.append((
      name, condition, len(members), f'{flops:.2e}', f'{speed / 1e9:.0f}',
      _duration(hours),
    ))  # fmt: skip
  head = 'dataset', 'condition', 'runs', 'FLOP', 'GFLOP/s', 'time'
  terminal.print_table(rows, head)
  where = 'on this machine' if calibrate else f'on {cost.STORED_ON}'
  terminal.say(
    f'{len(missing)} runs missing: {total_flops:.2e} FLOP, about '
    f'{_duration(total_hours)} {where}'
  )
  if not calibrate:
    terminal.say('--calibrate measures the speed of this machine instead.')
  return 0


@app.command(name='list')
def list_all(data_dir: _Path = None) -> int:
  """Lists datasets, conditions and tables.

  Args:
    data_dir: folder with NAME.npz files or image folders.
  """
  from experiments import datasets

  def status_of(name: str) -> str:
    status = datasets.status(name, data_dir)
    is_ready = status.state == 'ready'
    return f'{status.state}: {status.text}' if is_ready else status.state

  print('datasets')
  terminal.print_table(
    (f'  {name}', f'{spec.classes} classes', spec.architecture, status_of(name))
    for name, spec in datasets.SPECS.items()
  )
  command = terminal.as_typed('python -m experiments data')
  terminal.say(f'`{command} NAME` says how to get a dataset.')
  print()
  terminal.say(
    'conditions (any RULE[+BN][+BM[1-3]|+Adam] works, such as frSF-10%+BN)'
  )
  norms = {'none': 'no BN', 'plain': 'BN', 'affine': 'BN, learnable'}
  rows = []
  for column in conditions.COLUMNS.values():
    first = column.conditions[0]
    plans = ' or '.join(
      ', then '.join(conditions.steps_of(condition.batch_plan))
      for condition in column.conditions
    )
    setting = first.batch_manhattan
    update = f'BM setting {setting}' if setting else 'SGD'
    frozen = '' if first.frozen == 'nothing' else f', {first.frozen} frozen'
    rows.append((
      f'  {column.name}', first.rule, update, norms[first.batch_norm],
      f'batch {plans}{frozen}',
    ))  # fmt: skip
  terminal.print_table(rows)
  print()
  terminal.say('rules that the paper does not have, such as KP+BN')
  terminal.print_table(
    (f'  {rule}', text) for rule, text in conditions.FAMILY.items()
  )
  print('\ntables')
  terminal.print_table(
    (f'  {table.name}', f'{table.title}: {", ".join(table.columns)}')
    for table in conditions.TABLES.values()
  )
  return 0


@app.command(name='data')
def show_data(
  words: Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar='[ACTION] NAME', help_behavior_hint=''),
  ],
  data_dir: _Path = None,
  show_split: bool = False,
  grid: _Path = None,
  architecture: _Text = None,
  test_share: _Share = None,
) -> int:
  """Prepares, checks or shows a dataset: data [prepare|check] NAME.

  Args:
    words: NAME, or an action (prepare, check) and NAME.
    data_dir: folder with NAME.npz files or image folders; `prepare` writes to
      it.
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


@app.command(name='report')
def write_report(
  results: tyro.conf.Positional[Path] = Path('results'),
  out: _Path = None,
  markdown_only: bool = False,
) -> int:
  """Writes tables, plots and one HTML page from results.

  Args:
    results: results folder, a study's JSONL file, or a folder of such files.
    out: where to write (default: the folder `report` beside the results).
    markdown_only: write only RESULTS.md and its plots.
  """
  records = studies.load(results)
  print(report.text_tables(records, width=terminal.width()))
  default = (results if results.is_dir() else results.parent) / 'report'
  try:
    paths = report.write_report(
      records, out or default, markdown_only=markdown_only
    )
  except OSError as error:
    raise ValueError(
      f'the report cannot be written: {error}. Make room, or choose another '
      'folder with --out.'
    ) from error
  plots = [path for path in paths if path.parent.name == 'plots']
  print('written:')
  for path in paths:
    if path not in plots:
      print(f'  {path}')
  if plots:
    print(f'  {len(plots)} plots in {plots[0].parent}')
  return 0


@app.command
def claims(
  results: tyro.conf.Positional[Path] = Path('results'),
) -> int:
  """Checks the paper's conclusions against results.

  Args:
    results: results folder, a study's JSONL file, or a folder of such files.
  """
  print(report.claims_text(studies.load(results), terminal.width()))
  return 0


@app.command
def fold(
  results: tyro.conf.Positional[Path], study: tyro.conf.Positional[Path]
) -> int:
  """Adds the finished runs of a results folder to a study's JSONL file.

  Args:
    results: results folder.
    study: the file to write, such as experiments/results/NAME.jsonl.
  """
  print(f'{study} has {studies.fold(results, study)} runs.')
  return 0


def _duration(hours: float) -> str:
  """Such as '40 s', '12 min' or '3.5 h'."""
  if hours >= 1:
    return f'{hours:.1f} h'
  seconds = max(round(3600 * hours), 1)
  return f'{seconds} s' if seconds < 60 else f'{round(seconds / 60)} min'


def _missing(runs: Sequence[Run], results: Path) -> list[Run]:
  """The runs without a result."""
  return [
    run for run in runs if store.RunFolder(results, run.run_id).result() is None
  ]


def _train(
  runs: Sequence[Run],
  results: Path,
  selection: Selection,
  execution: Execution,
  settings: Sequence[str] = (),
) -> int:
  """Prints the settings and trains the runs; returns the exit status."""
  from experiments.runs import launch
  from experiments.runs.progress import reporter
  from experiments.runs.train import Options

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
    for line in settings:
      listener.message(f'set {line}')
    launcher = _launcher(execution, options)
    try:
      summary = launch.launch(
        missing, launcher, options, listener, execution.retries
      )
    except launch.Interrupted as stopped:
      listener.message(
        f'{stopped}; nothing recorded is lost. Resume with: '
        + terminal.as_typed(f'python -m experiments {shlex.join(sys.argv[1:])}')
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
  os.environ['JAX_PLATFORMS'] = 'cpu'  # leaves accelerators to the workers
  return launcher


def main() -> None:
  """Parses the command line and runs the command."""
  terminal.run(
    app,
    'python -m experiments',
    'The paper "How Important Is Weight Symmetry in Backpropagation?" as a '
    'program.',
  )
