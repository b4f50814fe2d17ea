"""Runs as one program: each is what it would have been alone."""

import dataclasses
import json
import os
import signal
from typing import Any

import jax
import numpy as np
import pytest

from experiments import runner, worker
from experiments.datasets import SPECS
from experiments.executors import Local
from experiments.runs.store import Store
from experiments.tasks import Epoch, Failed, Finished, Settings, Task
from experiments.training import devices, models
from experiments.training import loop as train
from experiments.training import vmapped as together
from experiments.training.models import Conv, Full
from experiments.training.pooling import Pool
from tests.experiments import folders, tiny
from tests.experiments.listener import Listener


class _Counter(Listener):
  """Acts when it has been told of so many epochs, of all runs."""

  def __init__(self, count, act):
    super().__init__()
    self._count, self._then = count, act

  def epoch_finished(self, run, line):
    super().epoch_finished(run, line)
    if len(self.epochs()) == self._count:
      self._then()


class _Crash(Exception):
  """Stands for the end of the process."""


def _crash():
  raise _Crash


def _interrupt():
  os.kill(os.getpid(), signal.SIGINT)


def _cell(condition, rates=(10.0, 1.0, 0.1), seeds=(0, 1), data=None, **fields):
  return [
    tiny.run(condition, data, rate=rate, seed=seed, **fields)
    for seed in seeds
    for rate in rates
  ]


def _carry_out(
  folder, runs, size, listener=None, data=None, scan=None, share=0.03, **options
):
  store = Store(folder)
  store.create()
  data = data or tiny.dataset()
  local = Local(Settings(lambda run: data, scan, share), size)
  summary = runner.carry_out(
    runs, store, local, listener or Listener(), **options
  )
  found: dict[tuple[str, str], Any] = folders.contents(folder)
  return summary, found


def _started(listener):
  return dict(event[1:] for event in listener.told if event[0] == 'started')


def _check_close(found, wanted, runs, data=None):
  """The same of some runs, within rounding, which may turn one image over."""
  data = data or tiny.dataset()
  for run in runs:
    config, lines, result = (
      found[run.run_id, name]
      for name in ('config.json', 'metrics.jsonl', 'result.json')
    )
    assert config == wanted[run.run_id, 'config.json']
    expected = wanted[run.run_id, 'metrics.jsonl']
    for line, other in zip(lines, expected, strict=True):
      assert line.keys() == other.keys()
      for name, value in line.items():
        if name.endswith('_error'):
          images = {'test': len(data.y_test), 'train': 200, 'holdout': 24}
          one = 100 / images[name.removesuffix('_error')]
          assert value == pytest.approx(other[name], abs=1.01 * one)
        else:
          jax.tree.map(_check_value, value, other[name])
    assert json.loads(result) == train.result(
      lines, classes=len(data.classes), train_images=216
    )


def _check_value(a, b):
  assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


_DENSE = _cell('frSF-50%+BN', layer_metrics=True)


@pytest.fixture(name='alone', scope='module')
def _alone(tmp_path_factory):
  return _carry_out(tmp_path_factory.mktemp('alone'), _DENSE, 1)[1]


@pytest.fixture(name='as_one', scope='module')
def _as_one(tmp_path_factory):
  listener = Listener()
  folder = tmp_path_factory.mktemp('as_one')
  summary, found = _carry_out(folder, _DENSE, 6, listener)
  assert summary.done == 6
  # Epoch by epoch, not run by run.
  assert listener.epochs() == [1] * 6 + [2] * 6
  return found


def test_the_dense_network(as_one, alone):
  assert as_one.keys() == alone.keys()
  _check_close(as_one, alone, _DENSE)


def test_one_run_has_the_bits_of_a_run_alone(tmp_path, alone):
  run = _DENSE[4]
  _, found = _carry_out(tmp_path, [run], 6)
  assert found == {key: alone[key] for key in alone if key[0] == run.run_id}
  _, lines = tiny.train(run)
  assert found[run.run_id, 'metrics.jsonl'] == [
    line | {'seconds': None} for line in lines
  ]


def test_as_a_compiled_loop(tmp_path, alone):
  runs = [_DENSE[0], _DENSE[4]]
  _, found = _carry_out(tmp_path, runs, 2, scan=True)
  _check_close(found, alone, runs)


def test_a_convolutional_network(tmp_path, monkeypatch):
  layers = (
    Conv(5, 3, stride=2),
    Pool('max', 2, 2),
    Conv(3, 4, padding=1),
    Pool('average', 3, 2, padding=1),
    Full(lambda classes: 16),
    Full(lambda classes: classes),
  )
  monkeypatch.setitem(models.ARCHITECTURES, 'mnist', layers)
  data = tiny.dataset()
  x_train, x_test = (
    np.clip(25 * x[:, :784] + 128, 0, 255).astype(np.uint8)
    for x in (data.x_train, data.x_test)
  )
  data = dataclasses.replace(
    data,
    x_train=x_train.reshape(-1, 28, 28, 1),
    x_test=x_test.reshape(-1, 28, 28, 1),
    spec=SPECS['MNIST'],
  )
  # A standard deviation that no other test compiles a network with.
  runs = _cell('brSF-50%', data=data, initial_std=0.0501, input_scale=0.01)
  _, alone = _carry_out(tmp_path / 'alone', runs, 1, data=data)
  _, as_one = _carry_out(tmp_path / 'as_one', runs, 6, data=data)
  _check_close(as_one, alone, runs, data)
  losses = [alone[run.run_id, 'metrics.jsonl'][-1]['test_loss'] for run in runs]
  assert len(set(losses)) == 6


@pytest.mark.parametrize('size', [1, 10])
def test_five_rates_and_two_seeds_compile_the_step_once(tmp_path, size):
  runs = _cell(
    'uSF', (10.0, 1.0, 0.1, 0.01, 0.001), epochs=1, momentum=0.5 + size / 100
  )
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **about: (
      compiled.append(about['fun_name'])
      if event == '/jax/core/compile/backend_compile_duration'
      else None
    )
  )
  try:
    summary, _ = _carry_out(tmp_path, runs, size)
  finally:
    jax.monitoring.clear_event_listeners()
  assert summary.done == 10
  assert [name for name in compiled if 'step' in name] == ['jit(step)']


def test_a_stop_ends_the_group_which_goes_on_with_the_same_bits(
  tmp_path, as_one
):
  listener = _Counter(2, _interrupt)
  with pytest.raises(runner.Interrupted):
    _carry_out(tmp_path, _DENSE, 6, listener, share=0.0)
  assert listener.epochs() == [1] * 6  # all that is known is recorded
  listener = Listener()
  _, found = _carry_out(tmp_path, _DENSE, 6, listener)
  assert _started(listener) == {run.run_id: 2 for run in _DENSE}
  assert found == as_one


def test_a_group_whose_runs_stand_at_different_epochs_goes_on(tmp_path, alone):
  with pytest.raises(_Crash):  # after three checkpoints
    _carry_out(tmp_path, _DENSE, 6, _Counter(4, _crash), share=1.0)
  # One of which is of other arrays.
  folder = Store(tmp_path).open(_DENSE[1])
  folder.save(1, {'params': np.zeros(3, np.float32)})
  listener = Listener()
  _, found = _carry_out(tmp_path, _DENSE, 6, listener)
  epochs = {run.run_id: 2 if run in _DENSE[:3] else 1 for run in _DENSE}
  (message,) = listener.messages()
  assert 'not float32 of shape' in message
  assert _started(listener) == epochs | {_DENSE[1].run_id: 1}
  assert listener.epochs() == [2, 2] + [1] * 4 + [2] * 4
  _check_close(found, alone, _DENSE)


def test_runs_that_are_done_or_being_done(tmp_path, alone):
  finished, locked, *others = _DENSE
  _carry_out(tmp_path, [finished], 1)
  listener = Listener()
  with Store(tmp_path).leases(60) as leases:
    assert leases.acquire(locked.run_id)
    summary, found = _carry_out(tmp_path, _DENSE, 6, listener)
  assert (summary.done, summary.skipped, summary.elsewhere) == (4, 1, 1)
  assert not (tmp_path / locked.run_id).exists()
  _check_close(found, alone, [finished, *others])


def test_one_that_diverges_ends_alone(tmp_path, alone):
  diverging, other = dataclasses.replace(_DENSE[0], rate=1e30), _DENSE[4]
  listener = Listener()
  _, found = _carry_out(tmp_path, [diverging, other], 2, listener)
  (line,) = found[diverging.run_id, 'metrics.jsonl']
  assert line['finite'] is False
  # It has its result before the other goes on.
  assert [event[:2] for event in listener.told[2:5]] == [
    ('epoch', diverging.run_id),
    ('finished', diverging.run_id),
    ('epoch', other.run_id),
  ]
  _check_close(found, alone, [other])


@pytest.mark.parametrize(
  ('rate', 'then'),
  [(1e31, [Epoch, Finished]), (1.0, [Epoch] * 5 + [Finished])],
)
def test_a_group_ends_with_its_last_run(rate, then):
  runs = _cell('uSF', (1e30, rate), (0,), epochs=5)
  tasks = map(Task, runs)
  local = Local(Settings(lambda run: tiny.dataset(), None, 0.0), 2)
  events = [
    (run, type(event))
    for run, event in local.carry_out(lambda: next(tasks, None), lambda: False)
  ]
  # And of one that has ended nothing is heard.
  assert events == [
    *((runs[0], event) for event in (Epoch, Finished)),
    *((runs[1], event) for event in then),
  ]


def test_what_fails_is_tried_again_alone(tmp_path, alone, monkeypatch):
  epochs = together.epochs

  def no_memory_for_several(runs, *arguments):
    if len(runs) > 1:
      raise RuntimeError('no memory')
    return epochs(runs, *arguments)

  monkeypatch.setattr(together, 'epochs', no_memory_for_several)
  listener = Listener()
  summary, found = _carry_out(tmp_path, _DENSE, 6, listener, retries=0)
  assert (summary.done, summary.failed) == (6, 0)
  failures = [event for event in listener.told if event[0] == 'failed']
  assert {event[1] for event in failures} == {run.run_id for run in _DENSE}
  assert len(failures) == 6
  assert found == alone


def test_one_that_can_not_begin_leaves_the_others(tmp_path, alone, monkeypatch):
  failing, *others = _DENSE[2:5]
  start = train.start

  def start_some(run, placed):
    if run == failing:
      raise RuntimeError('no start')
    return start(run, placed)

  monkeypatch.setattr(train, 'start', start_some)
  listener = Listener()
  summary, found = _carry_out(tmp_path, _DENSE[2:5], 3, listener, retries=0)
  assert (summary.done, summary.failed) == (2, 1)
  assert listener.epochs() == [1, 1, 2, 2]
  assert 'no start' in found[failing.run_id, 'error.json']
  _check_close(found, alone, others)


def test_a_stop_gives_back_what_was_not_begun(tmp_path):
  group = _cell('uSF', (1.0, 0.1), (0,))
  (other,) = _cell('SGD', (1.0,), (0,))
  listener = _Counter(4, _interrupt)
  with pytest.raises(runner.Interrupted):
    _carry_out(tmp_path, [*group, other], 6, listener)
  assert listener.epochs() == [1, 1, 2, 2]
  assert Store(tmp_path).missing([*group, other]) == [other]
  with Store(tmp_path).leases(60) as leases:
    assert leases.acquire(other.run_id)


class _Grouped:
  """In place of a worker: notes groups; a first time some runs fail."""

  def __init__(self, failing):
    self.groups = []
    self._failing = list(failing)

  def carry_out_group(self, tasks, stopping):
    del stopping
    self.groups.append([task.run for task in tasks])
    for task in tasks:
      if task.run in self._failing:
        self._failing.remove(task.run)
        yield task.run, Failed('')
      else:
        yield task.run, Finished({})


@pytest.fixture(name='groups')
def _groups(monkeypatch):
  """Of tasks, in which groups their runs are trained."""

  def groups(tasks, size, failing=()):
    tasks, grouped = list(tasks), _Grouped(failing)
    monkeypatch.setattr(worker, 'worker', lambda settings: grouped)
    local = Local(Settings(lambda run: tiny.dataset(), None, 1.0), size)
    for run, event in local.carry_out(
      lambda: tasks.pop(0) if tasks else None, lambda: False
    ):
      if isinstance(event, Failed):
        tasks.insert(0, Task(run))
    return grouped.groups

  return groups


def test_groups(groups):
  a, b = _cell('uSF'), _cell('uSF', epochs=3)
  tasks = [Task(run) for run in [*a, *b]]
  assert groups(tasks, 10) == [a, b]
  assert groups(tasks, 4) == [a[:4], a[4:], b[:4], b[4:]]
  assert groups(tasks, 1) == [[run] for run in [*a, *b]]
  # Those that stand at the same epoch.
  begun = [Task(run, lines=({'epoch': 1},)) for run in a[:2]]
  assert groups([*begun, *tasks[2:]], 10) == [a[:2], a[2:], b]
  # A failure is tried again alone.
  assert groups(tasks[:6], 10, failing=a[1:3]) == [a, [a[2]], [a[1]]]


def test_how_many_are_trained_together(monkeypatch):
  mesh = devices.mesh_for([tiny.run()], 2)
  assert together.group_size(None, None) == 1  # on a CPU
  assert together.group_size(5, None) == 5
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert together.group_size(None, None) == 32
  assert together.group_size(None, mesh) == together.group_size(1, mesh) == 1
  with pytest.raises(ValueError, match='together is 5, .* over 2 devices'):
    together.group_size(5, mesh)
