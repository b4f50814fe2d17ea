"""What the commands do; see ``experiments.cli`` for their options."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import (
  backend,
  cli,
  cluster,
  conditions,
  datasets,
  executors,
  grid,
  listing,
  runner,
)
from experiments.datasets import Dataset, DatasetError
from experiments.executors import Executor
from experiments.grid import Run
from experiments.holdout import check_holdout
from experiments.progress import reporter
from experiments.store import Store, StoreError, load
from experiments.tasks import Settings

_DEMO_CONDITIONS = (
  'SGD',
  'uSF',
  'uSF+BN',
  'uSF+BN+BM',
  'brSF-50%+BN+BM',
  'RndF',
  'RndF+BN+BM',
)
_DEMO_RATES = (10.0, 1.0)


def carry_out(command: Any) -> int:
  """Carries out a command; returns the exit status."""
  try:
    return _COMMANDS[type(command)](command) or 0
  except (DatasetError, StoreError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


@dataclasses.dataclass(frozen=True)
class Loader:
  """Loads the dataset of a run; nothing is kept in memory."""

  data_dir: Path | None

  def __call__(self, run: Run) -> Dataset:
    """The dataset.

    Raises:
      DatasetError: if it is missing or broken.
    """
    return datasets.load(
      run.dataset,
      data_dir=self.data_dir,
      train_size=run.protocol.train_size,
    )


def selected_tables(selection: cli.Selection) -> list[conditions.Table]:
  """The tables of a selection.

  Raises:
    ValueError: for an unknown name.
  """
  return [
    table for name in selection.table for table in conditions.find_tables(name)
  ]


def selected_runs(
  selection: cli.Selection, protocol: grid.Protocol
) -> list[Run]:
  """The runs of a selection, dataset by dataset, condition by condition.

  Raises:
    ValueError: for an unknown name or an impossible number.
  """
  chosen = [conditions.find(name) for name in selection.condition]
  for table in selected_tables(selection):
    chosen += map(conditions.find, (table.baseline, *table.columns))
  specs = [datasets.find(name) for name in selection.dataset]
  if not chosen:
    raise ValueError(
      'nothing is selected: say --table (2, 3, 4-C1, ...) or --condition '
      '(uSF+BN, ...); `python -m experiments list` shows all.'
    )
  for option in ('dataset', 'rate', 'seed'):
    if not getattr(selection, option):
      raise ValueError(f'nothing is selected: --{option} names none.')
  return grid.unique(
    run
    for name, spec in zip(selection.dataset, specs, strict=True)
    for run in _runs_on(name, spec.name, selection, protocol, chosen)
  )


def _runs_on(
  name: str,
  dataset: str,
  selection: cli.Selection,
  protocol: grid.Protocol,
  chosen: Sequence[conditions.Condition],
) -> Iterator[Run]:
  """The runs on one dataset, once it is sure that they can be done."""
  data = datasets.load(
    name, data_dir=selection.data_dir, train_size=protocol.train_size
  )
  for condition in chosen:
    runs = grid.runs_of(
      condition,
      selection.rate,
      selection.seed,
      dataset=dataset,
      digest=data.digest,
      source=data.source,
      note=data.note,
      protocol=protocol,
    )
    for run in runs:
      check_holdout(data.y_train, run)
      yield run


def _start_jax(devices: int | None = None) -> None:
  """Sets what JAX reads when it is imported, and says so."""
  for line in backend.configure(devices):
    print(f'set {line}', flush=True)


def _settings(
  runs: Sequence[Run], options: cli.Execution, data_dir: Path | None
) -> Settings:
  """How this process carries out runs."""
  mesh = None
  if options.executor == 'local':
    from experiments.devices import mesh_for

    mesh = mesh_for(runs, options.devices)
  return Settings(
    Loader(data_dir and data_dir.absolute()),
    options.scan,
    options.checkpoint_share,
    mesh,
  )


def _executor(settings: Settings, options: cli.Execution) -> Executor:
  """The executor that is asked for."""
  if options.executor == 'local':
    from experiments.together import group_size

    return executors.Local(
      settings, group_size(options.together, settings.mesh)
    )
  if options.executor == 'processes':
    executor = executors.Processes(settings, executors.places(options.workers))
  else:
    executor = cluster.Ray(
      settings,
      options.ray_address,
      options.cpus_per_run,
      options.gpus_per_run,
    )
  backend.leave_accelerators_to_others()
  return executor


def _execute(
  runs: Sequence[Run],
  results: Path,
  data_dir: Path | None,
  options: cli.Execution,
  make_executor: Callable[[Settings, cli.Execution], Executor] = _executor,
) -> int:
  """Carries out runs with progress; returns the exit status."""
  store = Store(results)
  missing = store.missing(runs)
  if not missing:
    print(f'all {len(runs)} runs are finished in {results}: nothing to do.')
    return 0
  store.create()
  print(f'{len(missing)} of {len(runs)} runs to do; results in {results}')
  _start_jax(options.devices)
  executor = make_executor(_settings(runs, options, data_dir), options)
  with reporter(len(missing)) as listener:
    try:
      summary = runner.carry_out(
        missing,
        store,
        executor,
        listener,
        retries=options.retries,
        lease=options.lease,
      )
    except runner.Interrupted as stopped:
      again = shlex.join(['python', '-m', 'experiments', *sys.argv[1:]])
      listener.message(
        f'{stopped}; nothing recorded is lost. Go on with: {again}'
      )
      return 128 + stopped.signal
  if summary.elsewhere:
    print(
      f'{summary.elsewhere} runs are being done by another process; repeat '
      'the command once it has finished.'
    )
  if summary.failed:
    print(
      f'{summary.failed} runs failed and are recorded with their errors; '
      'repeat the command to try them again.'
    )
    return 1
  return 0


def _demo(command: cli.Demo) -> int:
  selection = cli.Selection(condition=_DEMO_CONDITIONS, rate=_DEMO_RATES)
  runs = selected_runs(selection, cli.DEMO_PROTOCOL)
  status = _execute(runs, command.results, None, cli.Execution())
  if status == 0:
    status = _report(cli.Report(command.results))
    print(
      f"scikit-learn's digits, {cli.DEMO_PROTOCOL.epochs} epochs and "
      f'{len(_DEMO_RATES)} rates: a demonstration, not the paper. Next: '
      'python -m experiments list'
    )
  return status


def _run(command: cli.RunCommand) -> int:
  options, data_dir = command.execution, command.selection.data_dir
  options.check()
  runs = options.part_of(
    selected_runs(command.selection, command.protocol.checked())
  )
  if command.hosts.several():
    return _run_in_step(command, runs)
  status = _execute(runs, command.results, data_dir, options)
  if status in (0, 1):
    _show(command, runs)
  return status


def _run_in_step(command: cli.RunCommand, runs: Sequence[Run]) -> int:
  """Carries out runs together with other processes."""
  options, data_dir = command.execution, command.selection.data_dir
  if options.executor != 'local':
    raise ValueError(
      f'executor is {options.executor!r}, but must be local where several '
      'processes do the same runs.'
    )
  if (options.together or 1) > 1:
    raise ValueError(
      f'together is {options.together}, but must be 1 where several processes '
      'do the same runs.'
    )
  _start_jax(options.devices)
  from experiments import distributed

  with distributed.joined(command.hosts, runs) as first:
    if not first:
      return distributed.follow(runs, _settings(runs, options, data_dir))
    status = _execute(
      runs,
      command.results,
      data_dir,
      options,
      lambda settings, _: distributed.InStep(settings),
    )
    if status in (0, 1):
      _show(command, runs)
    return status


def _show(command: cli.RunCommand, runs: Sequence[Run]) -> None:
  """Prints the tables that have results of the runs."""
  from experiments import report

  wanted = {run.run_id for run in runs}
  records = [r for r in load(command.results) if r.run_id in wanted]
  tables = [table.name for table in selected_tables(command.selection)]
  if any(record.result for record in records):
    print(report.text_tables(records, tables or None))
  print(f'report: python -m experiments report {command.results}')


def _plan(command: cli.Plan) -> int:
  runs = selected_runs(command.selection, command.protocol.checked())
  missing = Store(command.results).missing(runs)
  _start_jax()
  from experiments import planning

  # Runs come dataset by dataset.
  load_for = functools.lru_cache(maxsize=1)(Loader(command.selection.data_dir))
  print(planning.plan_text(runs, missing, load_for, command.calibrate))
  return 0


def _list(command: cli.List) -> int:
  listing.list_all(command.data_dir)
  return 0


def _data(command: cli.Data) -> int:
  *action, name = command.words or ('',)
  if action not in ([], ['prepare'], ['check']) or not name:
    raise ValueError(
      'say `data NAME`, `data prepare NAME` or `data check NAME`, not '
      f'`data {" ".join(command.words)}`.'
    )
  if action == ['prepare']:
    datasets.prepare(name, command.data_dir)
  if action == ['check']:
    found = datasets.check(name, command.data_dir, grid=command.grid)
    print('\n'.join(listing.check_lines(found)))
    return 0
  if command.show_split:
    for line in datasets.show_split(name, command.data_dir):
      print(line)
    return 0
  status = datasets.status(name, command.data_dir)
  print(f'{datasets.find(name).name}: {status.state}: {status.text}')
  return 0


def _report(command: cli.Report) -> int:
  from experiments import report

  records = load(command.results)
  print(report.text_tables(records))
  paths = report.write_report(
    records, command.out or command.results / 'report'
  )
  print('written:')
  for path in paths:
    print(f'  {path}')
  return 0


def _claims(command: cli.Claims) -> int:
  from experiments import report

  print(report.claims_text(load(command.results)))
  return 0


def _bench(command: cli.Bench) -> int:
  _start_jax()
  from experiments.bench import comparison

  comparison.carry_out(command)
  return 0


def _scaling(command: cli.Scaling) -> int:
  _start_jax()
  from experiments.bench import scaling

  scaling.carry_out(command)
  return 0


_COMMANDS = {
  cli.Demo: _demo,
  cli.RunCommand: _run,
  cli.Plan: _plan,
  cli.List: _list,
  cli.Data: _data,
  cli.Report: _report,
  cli.Claims: _claims,
  cli.Bench: _bench,
  cli.Scaling: _scaling,
}
