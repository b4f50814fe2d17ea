"""The program as processes: killed, interrupted, two at once, on a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

import experiments
from experiments import processes
from experiments.runs import store
from tests.experiments import folders, halting

_ROOT = Path(experiments.__file__).parents[1]
_EPOCHS = 10
_OPTIONS = (
  '--condition', 'SGD', 'uSF+BN', '--rate', '1', '--train-size', '200',
  '--epochs', str(_EPOCHS), '--checkpoint-share', '1',
)  # fmt: skip
_WAIT = 600  # seconds until something is wrong, on a busy machine too
_PREEMPTION = 10  # seconds between SIGTERM and SIGKILL on many clusters


def _environment() -> dict[str, str]:
  """As a user has it: no flags of the tests' own."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONUNBUFFERED='1')
  environment.pop('XLA_FLAGS', None)
  return environment


_PROGRAM = (sys.executable, '-m', 'experiments')


def _command(folder: Path, program: Sequence[str] = _PROGRAM) -> list[str]:
  return [*program, 'run', *_OPTIONS, '--results', str(folder)]


def _start(
  folder: Path, *options: str, program: Sequence[str] = _PROGRAM
) -> subprocess.Popen:
  return subprocess.Popen(
    [*_command(folder, program), *options],
    cwd=_ROOT,
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
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
  """What a run that nothing happens to leaves: (contents, output)."""
  home = tmp_path_factory.getbasetemp() / 'cache_home'
  folder = tmp_path_factory.mktemp('undisturbed')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(home))
    output = _finish(_start(folder))
  return folders.contents(folder), output


def test_an_undisturbed_run(undisturbed):
  contents, output = undisturbed
  assert len(contents) == 2 * 3
  assert '2 of 2 runs to do' in output
  assert '[1/2] digits SGD, rate x1, seed 0: best validation error' in output
  assert '[2/2] digits uSF+BN, rate x1, seed 0: best valid' in output
  assert '\x1b' not in output  # plain lines where there is no terminal
  assert 'set XLA_FLAGS' in output


def test_killed_in_the_middle_and_resumed(tmp_path, undisturbed):
  process = _halted(tmp_path, _EPOCHS + 4)
  process.kill()
  process.communicate()
  records = store.load(tmp_path)
  assert [r.result is None for r in records].count(True) == 1
  # As if the kill had torn the line of an epoch.
  (torn,) = (r.run_id for r in records if r.result is None)
  with (tmp_path / torn / 'metrics.jsonl').open('a') as file:
    file.write('{"epoch": ')
  output = _finish(_start(tmp_path))
  assert '1 of 2 runs to do' in output
  assert 'digits uSF+BN, rate x1, seed 0: goes on with epoch' in output
  assert folders.contents(tmp_path) == undisturbed[0]


def test_signals_then_a_terminal(tmp_path, undisturbed):
  process = _halted(tmp_path, 2)
  process.send_signal(signal.SIGINT)
  halting.go_on(process)
  output = _finish(process, 130)
  assert 'stopped by SIGINT' in output
  again = output.split('Go on with: ')[1].strip()
  assert again.startswith('python -m experiments run --condition SGD uSF+BN')
  assert str(tmp_path) in again
  (record,) = store.load(tmp_path)
  done = len(record.metrics)
  assert os.listdir(tmp_path / record.run_id / 'checkpoints')

  process = _halted(tmp_path, _EPOCHS + 2 - done)
  process.send_signal(signal.SIGTERM)
  halting.go_on(process)
  output = _finish(process, 143, within=_PREEMPTION)
  assert f'goes on with epoch {done + 1}' in output
  assert 'stopped by SIGTERM' in output

  status, output = _on_a_terminal(_command(tmp_path))
  assert status == 0
  assert '━' in output  # the bar
  assert re.search(r'digits uSF\+BN, rate x1, seed 0: best', output)
  assert re.search(rf'{_EPOCHS}/{_EPOCHS}', output)
  assert folders.contents(tmp_path) == undisturbed[0]


def _on_a_terminal(command: list[str]) -> tuple[int, str]:
  """Runs a command on a terminal of 200 columns: (status, output)."""
  main, terminal = pty.openpty()
  environment = _environment() | {'COLUMNS': '200', 'TERM': 'xterm-256color'}
  process = subprocess.Popen(
    command, cwd=_ROOT, env=environment, stdout=terminal, stderr=terminal
  )
  os.close(terminal)
  output = b''
  end = time.monotonic() + _WAIT
  while time.monotonic() < end:
    if not select.select([main], [], [], 1.0)[0]:
      continue
    try:
      chunk = os.read(main, 65536)
    except OSError:  # how Linux says that the other side is closed
      break
    if not chunk:
      break
    output += chunk
  os.close(main)
  return process.wait(timeout=_WAIT), output.decode(errors='replace')


def test_two_processes_share_a_folder(tmp_path, undisturbed):
  processes = [_start(tmp_path) for _ in range(2)]
  outputs = [_finish(process) for process in processes]
  assert folders.contents(tmp_path) == undisturbed[0]
  done = ''.join(outputs)
  for condition in ('SGD', 'uSF+BN'):  # each once
    assert len(re.findall(rf'\] digits {re.escape(condition)}, ', done)) == 1


def test_a_driver_that_dies_takes_its_workers_along(tmp_path, undisturbed):
  process = _halted(tmp_path, 3, '--executor', 'processes', '--workers', '1')
  workers = psutil.Process(process.pid).children(recursive=True)
  cores = {
    tuple(w.cpu_affinity()) for w in workers if 'spawn_main' in str(w.cmdline())
  }
  process.kill()
  process.communicate()
  _, alive = psutil.wait_procs(workers, timeout=_WAIT)
  assert not alive
  shares = {place.cores for place in processes.places(1)}
  assert shares <= cores  # as many as without workers, for the same bits
  # Its runs are not waited for, and shards know of each other's.
  outputs = [
    _finish(_start(tmp_path, '--shard', shard)) for shard in ('1/2', '2/2')
  ]
  assert 'another process' not in ''.join(outputs)
  assert all('[1/1] digits' in output for output in outputs)
  assert folders.contents(tmp_path) == undisturbed[0]


def test_a_reader_that_goes_away_is_no_traceback():
  with subprocess.Popen(
    [sys.executable, '-m', 'experiments', 'list'],
    cwd=_ROOT,
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  ) as process:
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait(timeout=_WAIT) == 1


def test_help_imports_no_jax():
  code = """
import sys
from experiments import cli
sys.argv = ['experiments', *sys.argv[1:]]
try:
  cli.main()
finally:
  heavy = {'jax', 'flax', 'sklearn', 'scipy', 'matplotlib', 'orbax'}
  print(sorted(heavy & set(sys.modules)))
"""
  for arguments in (['--help'], ['run', '--help'], ['list']):
    result = subprocess.run(
      [sys.executable, '-c', code, *arguments],
      cwd=_ROOT,
      env=_environment(),
      capture_output=True,
      text=True,
      check=True,
    )
    assert result.stdout.endswith('[]\n'), result.stdout[-300:]
