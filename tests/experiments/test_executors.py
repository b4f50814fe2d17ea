"""Worker processes and Ray: the same bits, whatever dies."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from experiments import cluster, executors, processes, runner
from experiments.cluster import Ray
from experiments.datasets import DatasetError
from experiments.runs import store
from experiments.runs.store import Store
from experiments.tasks import Settings
from experiments.training import machine
from tests.experiments import folders, tiny
from tests.experiments.listener import Listener

# Ray forks to start its servers, as a driver does before it has loaded JAX.
pytestmark = pytest.mark.filterwarnings('ignore:os.fork')

_CORES = set(machine.cores())
_RUNS = [tiny.run('brSF-50%', epochs=6, seed=seed) for seed in (0, 1)]
_LONG = tiny.run('brSF-50%', epochs=100_000)  # never done before a stop
_FAILS = tiny.run('brSF-50%', tiny.dataset(250), epochs=6)


@dataclasses.dataclass(frozen=True)
class _Load:
  """Writes down which process is at a run; fails at one."""

  folder: Path

  def __call__(self, run):
    (self.folder / 'process').write_text(str(os.getpid()))
    if run.digest == _FAILS.digest:
      raise RuntimeError('no memory\nfor this')
    return tiny.dataset()

  def process(self) -> int:
    return int((self.folder / 'process').read_text())


def _processes(settings):
  return processes.Processes(settings, processes.places(1))


_EXECUTORS = {
  'processes': _processes,
  'ray': lambda settings: Ray(settings, cpus=float(os.cpu_count() or 1)),
}


def _executor(name, load):
  return _EXECUTORS[name](Settings(load, None, 1.0))


@pytest.fixture(name='_compiled', scope='module', autouse=True)
def _compile_once(tmp_path_factory):
  """All worker processes share what the first one compiled."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp('compiled')
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(folder))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    yield


@pytest.fixture(name='undisturbed', scope='module')
def _undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  Store(folder).create()
  local = executors.Local(Settings(_Load(folder), None, 1.0))
  summary = runner.carry_out(_RUNS, Store(folder), local, Listener())
  assert summary.done == 2
  return folders.contents(folder)


class _Killer(Listener):
  """Kills a worker after the second epoch that it is told of."""

  def __init__(self, load):
    super().__init__()
    self._load = load
    self.killed = None
    self.listening = []

  def epoch_finished(self, run, line):
    super().epoch_finished(run, line)
    if line['epoch'] == 2 and self.killed is None:
      self.listening = _listening()
      self.killed = self._load.process()
      os.kill(self.killed, signal.SIGKILL)


def _listening() -> list[str]:
  """The addresses at which this process and its children listen."""
  processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
  return [
    connection.laddr.ip
    for process in processes
    for connection in process.net_connections('inet')
    if connection.status == psutil.CONN_LISTEN
  ]


@pytest.mark.parametrize('name', _EXECUTORS)
def test_a_killed_worker_is_retried_and_a_failing_run_recorded(
  tmp_path, undisturbed, name
):
  load = _Load(tmp_path)
  listener = _Killer(load)
  target = Store(tmp_path / 'results')
  target.create()
  summary = runner.carry_out(
    [_RUNS[0], _FAILS, _RUNS[1]], target, _executor(name, load), listener
  )
  assert (summary.done, summary.failed, summary.elsewhere) == (2, 1, 0)
  assert listener.killed not in (None, os.getpid(), load.process())

  # The killed one went on from what the driver had of it.
  failures = [event for event in listener.told if event[0] == 'failed']
  begun = [event[1:] for event in listener.told if event[0] == 'started']
  killed, *others = failures
  assert 'died' in killed[2]
  assert [event[1] for event in others] == [_FAILS.run_id] * 3
  assert [event[3] for event in others] == [True, True, False]
  starts = [epoch for run_id, epoch in begun if run_id == killed[1]]
  assert len(starts) == 2
  assert starts[0] == 1
  assert starts[1] in (3, 4)

  found = folders.contents(target.folder)
  recorded = {k: found.pop(k) for k in list(found) if _FAILS.run_id in k}
  assert found == undisturbed
  assert 'RuntimeError in line' in recorded[_FAILS.run_id, 'error.json']
  (failed,) = [r for r in store.load(target.folder) if r.error]
  assert failed.run_id == _FAILS.run_id
  assert failed.error.endswith(': no memory for this')
  # It is tried again by the next command.
  assert target.missing([*_RUNS, _FAILS]) == [_FAILS]
  assert not list((target.folder / '.leases').glob(f'{killed[1]}*'))
  if name == 'ray':  # no other host can reach it
    assert len(listener.listening) > 5
  assert all(ip in ('127.0.0.1', '::1', '::ffff:127.0.0.1')
             for ip in listener.listening)  # fmt: skip


@pytest.mark.parametrize('name', _EXECUTORS)
def test_a_stop_keeps_what_workers_have_done(tmp_path, name):
  folder = tmp_path / 'results'
  Store(folder).create()

  def stop():
    os.kill(os.getpid(), signal.SIGTERM)

  # No checkpoint is due before.
  settings = Settings(_Load(tmp_path), None, 0.0)
  with pytest.raises(runner.Interrupted, match='SIGTERM'):
    runner.carry_out(
      [_LONG], Store(folder), _EXECUTORS[name](settings), Listener(2, stop)
    )
  (record,) = store.load(folder)
  assert record.result is None
  done = len(record.metrics)
  assert done >= 2
  saved = {
    path.name for path in (folder / _LONG.run_id / 'checkpoints').iterdir()
  }
  assert saved == {f'{done}', f'{done}.sha256'}
  # Another command goes on from there.
  listener = Listener(done + 1, stop)
  with pytest.raises(runner.Interrupted):
    runner.carry_out(
      [_LONG], Store(folder), executors.Local(settings), listener
    )
  assert listener.told[0] == ('started', _LONG.run_id, done + 1)
  assert listener.epochs() == [done + 1]


def test_a_worker_that_is_asked_alone_goes_on(tmp_path, undisturbed):
  load = _Load(tmp_path)
  target = Store(tmp_path / 'results')
  target.create()

  def ask():
    os.kill(load.process(), signal.SIGTERM)

  listener = Listener(1, ask)
  summary = runner.carry_out(
    _RUNS, target, _executor('processes', load), listener
  )
  assert (summary.done, summary.failed) == (2, 0)
  assert folders.contents(target.folder) == undisturbed
  begun = [event for event in listener.told if event[0] == 'started']
  assert len(begun) > 2


def test_missing_data_end_the_command(tmp_path):
  Store(tmp_path / 'results').create()
  with pytest.raises(DatasetError, match='TIMIT80: made by the tests has chan'):
    runner.carry_out(
      [tiny.run('brSF-50%', tiny.dataset(300))],
      Store(tmp_path / 'results'),
      _executor('processes', _Load(tmp_path)),
      Listener(),
    )


def test_more_than_this_host_has_is_refused(tmp_path):
  Store(tmp_path / 'results').create()
  executor = Ray(Settings(_Load(tmp_path), None, 1.0), gpus=500.0)
  with pytest.raises(ValueError, match='gpus_per_run is 500, but this host'):
    runner.carry_out(_RUNS, Store(tmp_path / 'results'), executor, Listener())


class _LoadTogether(_Load):
  """Waits until both runs have written down the cores that they have."""

  def __call__(self, run):
    own = ' '.join(map(str, sorted(os.sched_getaffinity(0))))
    (self.folder / f'cores{run.seed}').write_text(own)
    end = time.monotonic() + 60
    while len(list(self.folder.glob('cores*'))) < 2 and time.monotonic() < end:
      time.sleep(0.05)
    return tiny.dataset()


@pytest.mark.skipif(len(_CORES) < 2, reason='needs two cores')
def test_a_ray_task_keeps_to_its_cores_and_has_the_settings(
  tmp_path, monkeypatch
):
  flag = '--xla_cpu_enable_fast_math=false'
  monkeypatch.setenv('XLA_FLAGS', flag)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  target = Store(tmp_path / 'results')
  target.create()
  executor = Ray(Settings(_LoadTogether(tmp_path), None, 1.0))
  summary = runner.carry_out(_RUNS, target, executor, Listener())
  assert summary.done == 2
  own = {(tmp_path / f'cores{seed}').read_text() for seed in (0, 1)}
  assert len(own) == 2
  assert {int(core) for core in own} <= _CORES
  for record in store.load(target.folder):
    assert record.environment['cores'] == '1'
    assert flag in record.environment['XLA_FLAGS']


def test_parts_of_a_host_are_shared_only_when_all_are_taken(monkeypatch):
  had = []
  monkeypatch.setattr(cluster, '_cores', lambda: (91, 92, 94, 95, 97))
  monkeypatch.setattr(os, 'listdir', lambda _: ['7'])
  monkeypatch.setattr(os, 'sched_setaffinity', lambda _, own: had.append(own))
  with cluster._own_cores(2.0):
    with cluster._own_cores(2.0), cluster._own_cores(2.0):
      pass
    with cluster._own_cores(2.0):
      pass
  with cluster._own_cores(0.0):  # asks for none: has all
    pass
  assert had[:2] == [(91, 92), (94, 95)]
  assert had[2] in had[:2]
  assert had[3:] == [(94, 95)]
  with cluster._own_cores(0.5), cluster._own_cores(0.5):
    with cluster._own_cores(0.5):
      pass
  assert had[4:] == [(91,), (91,), (92,)]


@pytest.mark.parametrize('address', [None, 'host:6379'])
def test_ray_tasks_are_told_what_numbers_depend_on(monkeypatch, address):
  monkeypatch.setenv('XLA_FLAGS', '--xla_one=1')
  variables = cluster._runtime(address, 'cpu')['env_vars']
  assert variables['XLA_FLAGS'] == '--xla_one=1'
  assert variables['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] == '0'
  assert ('PYTHONPATH' in variables) == (address is None)


def test_each_worker_has_its_own_part_of_the_host(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 4, 5})
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert [place.cores for place in processes.places(2)] == [(0, 1), (2, 4, 5)]
  assert [place.cores for place in processes.places(None)] == [
    (0,), (1,), (2,), (4,), (5,),
  ]  # fmt: skip
  more = processes.places(10)
  assert {place.cores for place in more} == {(0,), (1,), (2,), (4,), (5,)}
  with pytest.raises(ValueError, match='workers must be positive, not 0'):
    processes.places(0)
  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,GPU-8f')
  devices = [place.environment for place in processes.places(None)]
  assert devices == [
    {'JAX_PLATFORMS': '', 'CUDA_VISIBLE_DEVICES': '3'},
    {'JAX_PLATFORMS': '', 'CUDA_VISIBLE_DEVICES': 'GPU-8f'},
  ]
