"""Two real processes on the loopback interface are one, or end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import experiments
from experiments.distributed import LOST
from experiments.options import Hosts
from experiments.runs import store
from experiments.training import loop as train
from tests.experiments import folders, halting

_ROOT = Path(experiments.__file__).parents[1]
_EPOCHS = 10
# A feedback that does not follow the signs of the weights, and a low rate:
# rounding to float32 then changes the losses by 1e-5 of them at most.
_OPTIONS = (
  '--condition', 'RndF+BN', '--rate', '0.1', '--train-size', '200',
  '--checkpoint-share', '1', '--calibration-batches', '2',
)  # fmt: skip
_PROGRAM = (sys.executable, '-m', 'experiments')
_WAIT = 600  # seconds until something is wrong, on a busy machine too
# Ours where computing fails, JAX's where it would hang.
_SAID = 'one of them was lost|another task died'
_NOTICED = 60  # seconds in which the loss of a process must be noticed


@pytest.fixture(name='start')
def _start_fixture():
  """Starts a process; none is left when the test ends."""
  started = []

  def start(*given, **named):
    started.append(_start(*given, **named))
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.communicate()


def _start(folder, *options, epochs=_EPOCHS, program=_PROGRAM):
  environment = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONUNBUFFERED='1')
  environment.pop('XLA_FLAGS', None)
  command = [*program, 'run', *_OPTIONS, '--epochs', str(epochs)]
  return subprocess.Popen(
    [*command, '--results', str(folder), *options],
    cwd=_ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _start_both(start, tmp_path, *options, each=((), ()), **numbers):
  """Both processes; only the first one's folder may be used."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    coordinator = f'127.0.0.1:{free.getsockname()[1]}'
  return [
    start(
      tmp_path / f'results {number}',
      *('--coordinator', coordinator, '--process-count', '2'),
      *('--process-id', str(number), *options, *each[number]),
      **numbers,
    )
    for number in (0, 1)
  ]


def _finish(processes, wait=_WAIT):
  """What became of each: (exit status, output, errors)."""
  outputs = [process.communicate(timeout=wait) for process in processes]
  return [
    (process.returncode, *output)
    for process, output in zip(processes, outputs, strict=True)
  ]


def _wait_for_epochs(tmp_path, count, processes):
  end = time.monotonic() + _WAIT
  while True:
    files = (tmp_path / 'results 0').glob('*/metrics.jsonl')
    if sum(path.read_text().count('\n') for path in files) >= count:
      return
    assert all(process.poll() is None for process in processes), _finish(
      processes
    )
    assert time.monotonic() < end
    time.sleep(0.01)


def _assert_equal_to_one_process(start, tmp_path):
  (status, _, errors), *_ = _finish([start(tmp_path / 'one')])
  assert status == 0, errors
  expected = folders.contents(tmp_path / 'one')
  actual = folders.contents(tmp_path / 'results 0')
  assert actual.keys() == expected.keys()
  for (run_id, name), wanted in expected.items():
    found = actual[run_id, name]
    if name == 'metrics.jsonl':
      assert len(found) == len(wanted) == _EPOCHS
      for line, wanted_line in zip(found, wanted, strict=True):
        _assert_close(line, wanted_line)
    elif name == 'result.json':  # near a tie, which epoch it is may differ
      lines = actual[run_id, 'metrics.jsonl']
      own = train.result(lines, classes=10, train_images=180)
      assert json.loads(found) == own
    else:
      assert found == wanted


def _assert_close(found, wanted):
  """Equal but for rounding, which can turn one image's class."""
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    if name.endswith('_loss'):
      assert found[name] == pytest.approx(value, rel=1e-4), name
    elif name.endswith('_error'):
      images = {'train_error': 100, 'holdout_error': 20}.get(name, 360)
      assert abs(found[name] - value) <= 100.1 / images, name
    else:
      assert found[name] == value, name


def test_two_processes_stop_together_go_on_and_are_one(start, tmp_path):
  processes = _start_both(start, tmp_path, program=halting.program(2))
  halting.wait(processes[0], _WAIT)
  processes[1].send_signal(signal.SIGTERM)  # the one that doesn't write
  halting.go_on(processes[0])
  (status, output, errors), other = _finish(processes)
  assert (status, other[0]) == (143, 143), (errors, other)
  assert 'stopped by SIGTERM; nothing recorded is lost. Go on' in output
  (record,) = store.load(tmp_path / 'results 0')
  done = len(record.metrics)
  assert 2 <= done < _EPOCHS

  (status, output, errors), other = _finish(
    _start_both(start, tmp_path, '--devices', '2')
  )
  assert (status, other[0]) == (0, 0), (errors, other)
  assert f'goes on with epoch {done + 1}' in output
  assert 'Table 4-C1' in output
  assert 'seed 0' not in other[1]  # process 0 alone reports
  assert not (tmp_path / 'results 1').exists()  # and writes
  _assert_equal_to_one_process(start, tmp_path)

  # Nothing to do is found by process 0 alone, too.
  (status, output, _), other = _finish(_start_both(start, tmp_path))
  assert (status, other[0]) == (0, 0)
  assert 'all 1 runs are finished' in output


@pytest.mark.parametrize('lost', [0, 1])
def test_a_lost_process_ends_the_other(start, tmp_path, lost):
  processes = _start_both(start, tmp_path, epochs=100_000)
  _wait_for_epochs(tmp_path, 2, processes)
  processes[lost].kill()
  began = time.monotonic()
  ((status, _, errors),) = _finish([processes[1 - lost]], _NOTICED)
  assert time.monotonic() - began < _NOTICED
  processes[lost].communicate()
  assert status != 0
  assert re.search(_SAID, errors), errors
  (record,) = store.load(tmp_path / 'results 0')
  assert record.result is None
  assert len(record.metrics) >= 2


def test_an_error_ends_both(start, tmp_path):
  differing = _start_both(start, tmp_path, each=((), ('--seed', '1')))
  (tmp_path / 'file').write_text('')
  unwritable = _start_both(
    start, tmp_path, each=(('--results', str(tmp_path / 'file' / 'in it')), ())
  )
  for status, _, errors in _finish(differing):
    assert status == 2, errors
    assert 'error: the processes were asked for different runs: give' in errors
    assert 'Traceback' not in errors
  (status, _, errors), (other, _, others) = _finish(unwritable)
  assert status == LOST, errors
  assert re.search('error: results folder .*in it can not be written', errors)
  assert 'Traceback' not in errors
  assert other != 0 and re.search(_SAID, others), others
  assert not (tmp_path / 'results 1').exists()


def test_where_the_other_processes_are():
  assert not Hosts().several()
  assert Hosts(distributed=True).several()
  at = dict(coordinator='127.0.0.1:99', process_id=1, process_count=2)
  assert Hosts(**at).several()
  for wrong, message in (
    ({'coordinator': None}, 'coordinator is None, but must be HOST:PORT'),
    ({'coordinator': 'host'}, "coordinator is 'host'"),
    ({'process_count': None}, 'process_count is None'),
    ({'process_count': 0}, 'process_count is 0'),
    ({'process_id': None}, 'process_id is None, but must be from 0 to 1'),
    ({'process_id': 2}, 'process_id is 2'),
    ({'process_id': -1}, 'process_id is -1'),
  ):
    with pytest.raises(ValueError, match=message):
      Hosts(**{**at, **wrong}).several()
