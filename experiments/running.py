"""Carries runs out as options say: where, with what, and what is said of it."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import cluster, executors, processes, runner
from experiments.executors import Executor
from experiments.options import Execution, Hosts
from experiments.paper.protocol import Run
from experiments.progress import reporter
from experiments.runs.store import Store
from experiments.selection import Loader
from experiments.tasks import Settings
from experiments.training import backend


def start_jax(devices: int | None = None) -> None:
  """Sets what JAX reads when it is imported, and says so."""
  for line in backend.configure(devices):
    print(f'set {line}', flush=True)


def _settings(
  runs: Sequence[Run], options: Execution, data_dir: Path | None
) -> Settings:
  """How this process carries out runs."""
  mesh = None
  if options.executor == 'local':
    from experiments.training.devices import mesh_for

    mesh = mesh_for(runs, options.devices)
  return Settings(
    Loader(data_dir and data_dir.absolute()),
    options.scan,
    options.checkpoint_share,
    mesh,
  )


def _executor(settings: Settings, options: Execution) -> Executor:
  """The executor that is asked for."""
  if options.executor == 'local':
    from experiments.training.vmapped import group_size

    return executors.Local(
      settings, group_size(options.together, settings.mesh)
    )
  if options.executor == 'processes':
    executor = processes.Processes(settings, processes.places(options.workers))
  else:
    executor = cluster.Ray(
      settings,
      options.ray_address,
      1.0 if options.cpus_per_run is None else options.cpus_per_run,
      options.gpus_per_run or 0.0,
    )
  backend.leave_accelerators_to_others()
  return executor


def execute(
  runs: Sequence[Run],
  results: Path,
  data_dir: Path | None,
  options: Execution,
  make_executor: Callable[[Settings, Execution], Executor] = _executor,
) -> int:
  """Carries out runs with progress; returns the exit status."""
  store = Store(results)
  missing = store.missing(runs)
  if not missing:
    store.tidy()
    print(f'all {len(runs)} runs are finished in {results}: nothing to do.')
    return 0
  store.create()
  print(f'{len(missing)} of {len(runs)} runs to do; results in {results}')
  start_jax(options.devices)
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


def run_in_step(
  runs: Sequence[Run],
  results: Path,
  data_dir: Path | None,
  options: Execution,
  hosts: Hosts,
) -> tuple[int, bool]:
  """Carries out runs together with other processes.

  Returns:
    The exit status, and whether this process is the one that keeps results.

  Raises:
    ValueError: if an option can't be had in several processes.
  """
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
  start_jax(options.devices)
  from experiments import distributed

  with distributed.joined(hosts, runs) as first:
    if first:
      status = execute(
        runs,
        results,
        data_dir,
        options,
        lambda settings, _: distributed.InStep(settings),
      )
    else:
      status = distributed.follow(runs, _settings(runs, options, data_dir))
  return status, first
