"""The program and its workers as processes: killed, stopped, two at once."""

import contextlib
import dataclasses
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import psutil
import pytest

from experiments.runs import launch, store
from experiments.runs.processes import in_processes, places
from experiments.runs.ray_tasks import on_ray
from experiments.runs.train import Options
from experiments.training import machine
from tests.experiments import folders, halting, tiny
from tests.experiments.command_line import ROOT
from tests.experiments.listener import Listener, terminate

# Ray forks to start its servers, as a driver does before it has loaded JAX.
pytestmark = pytest.mark.filterwarnings('ignore:os.fork')

_EPOCHS = 10
_OPTIONS = (
  '--condition', 'SGD', 'uSF+BN', '--rate', '1', '--train-size', '200',
  '--epochs', str(_EPOCHS), '--checkpoint-share', '1', *tiny.NETWORK,
)  # fmt: skip
_WAIT = 600  # seconds until something is wrong, on a busy machine too
_PREEMPTION = 10  # seconds between SIGTERM and SIGKILL on many clusters
_PROGRAM = (sys.executable, '-m', 'experiments')
_BAD = "def bad(*_): raise RuntimeError('no memory')\nNETWORKS = {'bad': bad}"
# So many that a worker has not trained them all when it is killed.
_RUNS = [tiny.small(epochs=60, seed=seed) for seed in (0, 1)]
_FAILS = dataclasses.replace(_RUNS[0], network='bad', plugin=_BAD)
_SHORT = tiny.small(epochs=3)
_LONG = tiny.small(epochs=100_000)  # never done before a stop


def _start(
  folder: Path,
  *options: str,
  program: Sequence[str] = _PROGRAM,
  stdout: int = subprocess.PIPE,
  stderr: int = subprocess.PIPE,
  **variables: str,
) -> subprocess.Popen:
  """Starts it as a user does: without flags of the tests' own."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
  environment.pop('XLA_FLAGS', None)
  return subprocess.Popen(
    [*program, 'run', *_OPTIONS, '--results', str(folder), *options],
    cwd=ROOT,
    env=environment | variables,
    text=True,
    stdout=stdout,
    stderr=stderr,
  )


def _finish(
  process: subprocess.Popen, status: int = 0, within: float = _WAIT
) -> str:
  output, errors = process.communicate(timeout=within)
  assert process.returncode == status, (output, errors)
  assert 'Traceback' not in errors
  return output


def _halted(folder: Path, epochs: int, *options: str) -> subprocess.Popen:
  """A process that has recorded so many epochs of all runs together."""
  process = _start(folder, *options, program=halting.program(epochs))
  halting.wait(process, _WAIT)
  return process


@pytest.fixture(name='undisturbed', scope='module')
def _undisturbed(tmp_path_factory):
  """The result of a program that nothing happens to: (contents, output)."""
  folder = tmp_path_factory.mktemp('undisturbed')
  output = _finish(_start(folder, '--verbose'))
  return folders.contents(folder), output


def test_an_undisturbed_program(undisturbed):
  contents, output = undisturbed
  assert len(contents) == 2 * 3
  assert '2 of 2 runs to do' in output
  assert '[1/2] digits SGD, network small, rate x1, seed 0: best test' in output
  assert '[2/2] digits uSF+BN, network small, rate x1, seed 0: best' in output
  assert '\x1b' not in output  # plain lines where there is no terminal
  assert 'set XLA_FLAGS' in output


def test_signals_then_a_terminal(tmp_path, undisturbed):
  process = _halted(tmp_path, 2)
  process.send_signal(signal.SIGINT)
  halting.go_on(process)
  output = _finish(process, 130)
  assert 'stopped by SIGINT' in output
  python, *again = shlex.split(output.split('Resume with: ')[1])
  assert python == 'python' or (ROOT / python).exists()
  assert again[:5] == ['-m', 'experiments', 'run', '--condition', 'SGD']
  assert str(tmp_path) in again
  (record,) = store.load(tmp_path)
  done = len(record.metrics)
  assert os.listdir(tmp_path / record.run_id / 'checkpoints')

  process = _halted(tmp_path, _EPOCHS + 2 - done)
  process.send_signal(signal.SIGTERM)
  halting.go_on(process)
  output = _finish(process, 143, within=_PREEMPTION)
  assert f'resumes with epoch {done + 1}' in output
  assert 'stopped by SIGTERM' in output

  output = _on_a_terminal(tmp_path)
  assert '━' in output  # the bar
  assert 'digits uSF+BN, network small, rate x1, seed 0: best' in output
  assert '1/1' in output
  assert folders.contents(tmp_path) == undisturbed[0]


def _on_a_terminal(folder: Path) -> str:
  """The output of the program on a terminal of 200 columns."""
  main, terminal = pty.openpty()
  look = {'COLUMNS': '200', 'TERM': 'xterm-256color'}
  process = _start(folder, stdout=terminal, stderr=terminal, **look)
  os.close(terminal)
  output = b''
  with contextlib.suppress(OSError):  # how Linux says that it is closed
    while select.select([main], [], [], _WAIT)[0]:
      chunk = os.read(main, 65536)
      if not chunk:
        break
      output += chunk
  os.close(main)
  assert process.wait(timeout=_WAIT) == 0
  return output.decode(errors='replace')


def test_two_drivers_share_a_folder(tmp_path, undisturbed):
  # What changes numbers is set before the plugin imports JAX.
  theirs = {'JAX_DEFAULT_PRNG_IMPL': 'rbg'}
  drivers = [_start(tmp_path, **theirs) for _ in range(2)]
  output = ''.join([_finish(driver) for driver in drivers])
  assert folders.contents(tmp_path) == undisturbed[0]
  for condition in ('SGD', 'uSF+BN'):  # each once
    assert len(re.findall(rf'\] digits {re.escape(condition)}, ', output)) == 1


def test_output_that_nobody_reads_loses_no_results(tmp_path, undisturbed):
  reader, writer = os.pipe()
  os.close(reader)
  silent = _start(tmp_path, stdout=writer)
  os.close(writer)
  _, errors = silent.communicate(timeout=_WAIT)
  assert errors == ''
  assert folders.contents(tmp_path) == undisturbed[0]


def test_a_driver_that_dies_takes_its_workers_along(tmp_path):
  long = ('--epochs', '100000', '--condition', 'SGD')  # never done before
  process = _start(tmp_path, *long, '--executor', 'processes', '--workers', '1')
  driver, end = psutil.Process(process.pid), time.monotonic() + _WAIT
  while not any(record.metrics for record in store.load(tmp_path)):
    assert time.monotonic() < end
    time.sleep(0.01)
  workers = driver.children(recursive=True)
  cores = {
    tuple(w.cpu_affinity()) for w in workers if 'spawn_main' in str(w.cmdline())
  }
  process.kill()
  process.communicate()
  _, alive = psutil.wait_procs(workers, timeout=_WAIT)
  assert not alive
  shares = {place.cores for place in places(1)}
  assert shares <= cores  # as many as without workers, for the same bits
  (record,) = store.load(tmp_path)
  with filelock.FileLock(tmp_path / record.run_id / '.lock', timeout=0):
    pass  # nobody waits for its run


def _options(folder, share=1.0):
  store.create(folder)
  return Options(folder, tiny.loader(), checkpoint_share=share)


def _workers() -> list[psutil.Process]:
  """The worker processes of this one."""
  workers = []
  for child in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
      if re.search('spawn_main|ray::_task', ' '.join(child.cmdline())):
        workers.append(child)
  return workers


def _addresses() -> list[str]:
  """The addresses on which this process and its children listen."""
  addresses = []
  for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
      addresses += [
        connection.laddr.ip
        for connection in process.net_connections('inet')
        if connection.status == psutil.CONN_LISTEN
      ]
  return addresses


@pytest.fixture(name='alone', scope='module')
def _alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp('alone')
  options = _options(folder)
  launch.launch(_RUNS, launch.in_this_process(options), options, Listener())
  return folders.contents(folder)


def _kill_the_worker():
  (worker,) = _workers()
  worker.kill()


def test_a_killed_worker_is_replaced_and_a_failing_run_recorded(
  tmp_path, alone
):
  options = _options(tmp_path)
  listener = Listener(count=2, act=_kill_the_worker)
  runs = [_RUNS[0], _FAILS, _RUNS[1]]
  launcher = in_processes(options, places(1))
  summary = launch.launch(runs, launcher, options, listener)
  assert (summary.done, summary.failed, summary.elsewhere) == (2, 1, 0)

  # The worker may have been between two runs; that is a failure too.
  failures = listener.of('failed')
  (killed,) = [failure for failure in failures if 'died' in failure[1]]
  assert killed[2]
  others = [failure for failure in failures if failure != killed]
  assert [run for run, *_ in others] == [_FAILS.run_id] * 3
  assert [again for *_, again in others] == [True, True, False]

  found = folders.contents(tmp_path)
  error = found.pop((_FAILS.run_id, 'error.json'))
  assert 'RuntimeError in line 1 of <plugin>: no memory' in error
  assert {k: v for k, v in found.items() if k[0] != _FAILS.run_id} == alone


def test_ray_tasks_have_their_settings_and_resume_when_killed(
  tmp_path, monkeypatch
):
  class Killer(Listener):
    """Kills the task; stops the launch once it has resumed."""

    addresses: list[str] = []
    stopped = False

    def epoch_finished(self, run, line):
      super().epoch_finished(run, line)
      if self.of('failed') and not self.stopped:
        self.stopped = True
        terminate()

    def run_failed(self, run, error, again):
      self.addresses += _addresses()
      super().run_failed(run, error, again)

  flag = '--xla_cpu_enable_fast_math=false'
  monkeypatch.setenv('XLA_FLAGS', flag)
  # More than half of this host, so one at a time, but not all of it.
  cpus = max((os.cpu_count() or 1) - 0.5, 1.0)
  options = _options(tmp_path)
  listener = Killer(count=_SHORT.protocol.epochs + 2, act=_kill_the_worker)
  with pytest.raises(launch.Interrupted):
    launch.launch(
      [_SHORT, _LONG], on_ray(options, None, cpus), options, listener
    )
  ((run_id, error, again),) = listener.of('failed')
  assert (run_id, again) == (_LONG.run_id, True)
  assert 'its worker has died' in error
  first, resumed = [
    epoch for name, epoch in listener.of('started') if name == _LONG.run_id
  ]
  assert first < resumed
  # No other host can reach it.
  assert len(listener.addresses) > 5
  assert set(listener.addresses) <= {'127.0.0.1', '::1', '::ffff:127.0.0.1'}
  _assert_saved(tmp_path)
  (short,) = [record for record in store.load(tmp_path) if record.result]
  cores = min(len(machine.cores()), int(cpus))
  assert short.environment['cores'] == str(cores)
  assert flag in short.environment['XLA_FLAGS']
  assert not list(tmp_path.glob('.launch*'))


def _assert_saved(folder: Path) -> int:
  """The last epoch of the long run, which a stop has saved."""
  assert not _workers()
  (record,) = [r for r in store.load(folder) if r.run_id == _LONG.run_id]
  assert record.result is None
  done = len(record.metrics)
  saved = os.listdir(folder / _LONG.run_id / 'checkpoints')
  assert f'{done}.msgpack' in saved
  return done


def test_a_stop_keeps_the_epochs_of_workers(tmp_path):
  options = _options(tmp_path, 0.0)  # no checkpoint is due before
  launcher = in_processes(options, places(1))
  with pytest.raises(launch.Interrupted, match='SIGTERM'):
    launch.launch([_LONG], launcher, options, Listener(2, terminate))
  done = _assert_saved(tmp_path)
  assert done >= 2
  # Another launch resumes there.
  listener = Listener(done + 1, terminate)
  with pytest.raises(launch.Interrupted):
    launch.launch([_LONG], launch.in_this_process(options), options, listener)
  assert listener.events[0] == ('started', _LONG.run_id, done + 1)
  assert listener.epochs() == [done + 1]


def test_each_worker_has_its_own_part_of_the_host(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 4, 5})
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert [place.cores for place in places(2)] == [(0, 1), (2, 4, 5)]
  each = [(0,), (1,), (2,), (4,), (5,)]
  assert [place.cores for place in places(None)] == each
  assert {place.cores for place in places(10)} == set(each)
  with pytest.raises(ValueError, match='workers must be positive, not 0'):
    places(0)
  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,GPU-8f')
  assert [place.environment for place in places(None)] == [
    {'JAX_PLATFORMS': '', 'CUDA_VISIBLE_DEVICES': '3'},
    {'JAX_PLATFORMS': '', 'CUDA_VISIBLE_DEVICES': 'GPU-8f'},
  ]
  name = 'XLA_PYTHON_CLIENT_PREALLOCATE'  # of those that share a device
  assert [place.environment[name] for place in places(3)] == 3 * ['false']
  monkeypatch.setenv(name, 'true')
  assert {place.environment[name] for place in places(3)} == {'true'}
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')  # hides all
  assert [place.cores for place in places(None)] == each
