"""What the commands do; see ``experiments.cli`` for their options."""

import sys
from collections.abc import Sequence
from typing import Any

from experiments import cli, datasets, listing
from experiments.datasets import Dataset, DatasetError
from experiments.options import Execution, Selection
from experiments.paper.protocol import Run
from experiments.running import execute, run_in_step, start_jax
from experiments.runs.store import Store, StoreError
from experiments.selection import Loader, selected_runs, selected_tables
from experiments.studies import load

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


def _demo(command: cli.Demo) -> int:
  selection = Selection(condition=_DEMO_CONDITIONS, rate=_DEMO_RATES)
  runs = selected_runs(selection, cli.DEMO_PROTOCOL)
  status = execute(runs, command.results, None, Execution())
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
  devices = (options.devices or 1) * (command.hosts.process_count or 1)
  runs = options.part_of(
    selected_runs(command.selection, command.protocol.checked(), devices)
  )
  if not runs:
    print(f'shard {options.shard} has no runs: nothing to do.')
    return 0
  where, first = (runs, command.results, data_dir, options), True
  if command.hosts.several():
    status, first = run_in_step(*where, command.hosts)
  else:
    status = execute(*where)
  if first and status in (0, 1):
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
  start_jax()
  from experiments import planning

  load = Loader(command.selection.data_dir)
  loaded: dict[str, Dataset] = {}

  def load_for(run: Run) -> Dataset:
    if run.digest not in loaded:  # runs come dataset by dataset
      loaded.clear()
      loaded[run.digest] = load(run)
    return loaded[run.digest]

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
  results = command.results
  folder = results if results.is_dir() else results.parent
  paths = report.write_report(
    records,
    command.out or folder / 'report',
    markdown_only=command.markdown_only,
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
  start_jax()
  from experiments.bench import comparison

  comparison.carry_out(command)
  return 0


def _scaling(command: cli.Scaling) -> int:
  start_jax()
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
