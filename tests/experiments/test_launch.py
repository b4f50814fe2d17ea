"""Launching runs in this process: interrupted anywhere, the same bits."""

import dataclasses
import json
import os
import signal
import time

import pytest

from experiments.datasets import DatasetError
from experiments.paper.results import result
from experiments.runs import launch as launching
from experiments.runs import store, train
from experiments.runs.launch import Interrupted, StopRequest, in_this_process
from experiments.runs.store import RunFolder
from experiments.runs.train import Options
from experiments.training import loop, vmapped
from tests.experiments import folders, tiny
from tests.experiments.listener import (
  Crash,
  Listener,
  crash,
  hang_up,
  interrupt,
  terminate,
)

_RUN = tiny.small('brSF-50%+BN+BM', epochs=4)
_GROUP = [
  tiny.small('frSF-50%+BN', rate=rate, seed=seed, layer_metrics=True)
  for seed in (0, 1)
  for rate in (10.0, 1.0)
]


def _launch(folder, runs, listener=None, size=1, share=0.03, **more):
  options = Options(folder, tiny.loader(), checkpoint_share=share)
  launcher = in_this_process(options, size)
  listener = listener or Listener()
  return launching.launch(runs, launcher, options, listener, **more)


def _launched(tmp_path_factory, runs, size=1):
  folder = tmp_path_factory.mktemp('undisturbed')
  assert _launch(folder, runs, size=size).done == len(runs)
  return folders.contents(folder)


@pytest.fixture(name='undisturbed', scope='module')
def _undisturbed(tmp_path_factory):
  return _launched(tmp_path_factory, [_RUN])


@pytest.fixture(name='alone', scope='module')
def _alone(tmp_path_factory):
  return _launched(tmp_path_factory, _GROUP)


@pytest.fixture(name='as_one', scope='module')
def _as_one(tmp_path_factory):
  return _launched(tmp_path_factory, _GROUP, len(_GROUP))


def test_an_undisturbed_run(tmp_path, undisturbed):
  assert {name for _, name in undisturbed} == {
    'config.json', 'metrics.jsonl', 'result.json',
  }  # fmt: skip
  lines = undisturbed[_RUN.run_id, 'metrics.jsonl']
  assert [line['epoch'] for line in lines] == [1, 2, 3, 4]
  listener = Listener()
  _launch(tmp_path, [_RUN], listener)
  assert [event[0] for event in listener.events] == [
    'started', *4 * ['epoch'], 'finished',
  ]  # fmt: skip
  (record,) = store.load(tmp_path)
  assert record.config == _RUN.config()
  assert record.environment['devices'] == '1'
  # It is not run again; another protocol is another run.
  listener = Listener()
  other = tiny.small('brSF-50%+BN+BM', epochs=4, base_rate=0.1)
  summary = _launch(tmp_path, [_RUN, other], listener)
  assert (summary.done, summary.skipped) == (1, 1)
  assert {event[1] for event in listener.events} == {other.run_id}


@pytest.fixture(name='terminal')
def _terminal():
  """As where the tests do not run under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


# With a share of 1 every epoch has a checkpoint, with 0 there is none.
@pytest.mark.parametrize(
  ('share', 'after', 'act', 'error', 'resumes'),
  [
    (1.0, 1, crash, Crash, 1),  # before its checkpoint, so from the start
    (1.0, 4, crash, Crash, 4),  # all lines and no result
    (0.0, 2, interrupt, Interrupted, 3),  # a stop writes one
    (1.0, 2, terminate, Interrupted, 3),
    (0.0, 2, hang_up, Interrupted, 3),
  ],
)
@pytest.mark.usefixtures('terminal')
def test_resumes_with_the_same_bits(
  tmp_path, undisturbed, share, after, act, error, resumes
):
  with pytest.raises(error):
    _launch(tmp_path, [_RUN], Listener(after, act), share=share)
  assert RunFolder(tmp_path, _RUN.run_id).result() is None
  listener = Listener()
  assert _launch(tmp_path, [_RUN], listener).done == 1
  assert listener.epochs() == [*range(resumes, 5)]
  assert listener.events[0] == ('started', _RUN.run_id, resumes)
  assert folders.contents(tmp_path) == undisturbed


def test_a_resumed_run_compiles_nothing_again(tmp_path, undisturbed):
  with pytest.raises(Interrupted):
    _launch(tmp_path, [_RUN], Listener(1, interrupt))
  with tiny.compiled() as names:
    _launch(tmp_path, [_RUN])
  assert not names


def test_stopped_in_the_middle_of_an_epoch(tmp_path, undisturbed):
  """After the first of the two steps of epoch 2."""
  options = Options(tmp_path, tiny.loader(), checkpoint_share=0.0)
  answers = iter([False] * (2 + 2 + 1))  # two steps, two evaluations, a step
  ((run, outcome),) = train.train_runs(
    [_RUN], options, Listener(), lambda: next(answers, True)
  )
  assert (run, outcome.status) == (_RUN, 'stopped')
  listener = Listener()
  _launch(tmp_path, [_RUN], listener)
  assert listener.epochs() == [2, 3, 4]
  assert folders.contents(tmp_path) == undisturbed


def test_damage_is_reported_and_repaired(tmp_path, undisturbed):
  with pytest.raises(Crash):
    _launch(tmp_path, [_RUN], Listener(4, crash), share=1.0)
  folder = tmp_path / _RUN.run_id
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"epoch": 5, "te')
  path = folder / 'checkpoints' / '3.msgpack'
  os.truncate(path, path.stat().st_size // 2)
  listener = Listener()
  _launch(tmp_path, [_RUN], listener)
  ((message,),) = listener.of('message')
  assert f'{path} is not used: the file is damaged' in message
  assert listener.epochs() == [3, 4]
  assert folders.contents(tmp_path) == undisturbed


def test_a_stop_names_the_signal_and_restores_the_handlers(tmp_path):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with pytest.raises(Interrupted, match='SIGTERM') as stopped:
    _launch(tmp_path, [_RUN], Listener(1, terminate))
  assert stopped.value.signal == signal.SIGTERM
  after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  assert before == after
  # A stop after the last epoch still ends the run; the next is not begun.
  other = tiny.small('brSF-50%+BN+BM', epochs=4, seed=1)
  with pytest.raises(Interrupted):
    _launch(tmp_path, [_RUN, other], Listener(4, interrupt))
  assert RunFolder(tmp_path, _RUN.run_id).result() is not None
  assert not (tmp_path / other.run_id).exists()


def test_a_second_signal_ends_at_once():
  with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
    interrupt()
    assert stop.signal == signal.SIGINT
    terminate()


def test_a_lost_terminal_stops_nothing_under_nohup():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with StopRequest() as stop:
    hang_up()
  assert not stop()
  assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_runs_of_another_process_are_left_to_it(tmp_path):
  other = tiny.small('brSF-50%+BN+BM', epochs=1)
  with RunFolder(tmp_path, _RUN.run_id).claimed():
    summary = _launch(tmp_path, [_RUN, other])
  assert (summary.done, summary.elsewhere) == (1, 1)
  assert os.listdir(tmp_path / _RUN.run_id) == ['.lock']


def test_runs_that_another_process_gives_up_are_trained_after_all(tmp_path):
  """While this one trains its last run."""
  other = tiny.small('brSF-50%+BN+BM', epochs=1)
  claim = RunFolder(tmp_path, _RUN.run_id).claimed()
  claim.__enter__()
  listener = Listener(1, lambda: claim.__exit__(None, None, None))
  summary = _launch(tmp_path, [_RUN, other], listener)
  assert (summary.done, summary.elsewhere) == (2, 0)


def test_a_diverged_run_is_a_result_and_not_run_again(tmp_path):
  run = tiny.small(rate=1e30, epochs=3, layer_metrics=True)
  with pytest.raises(Crash):  # after its last line, before its result
    _launch(tmp_path, [run], Listener(1, crash))
  _launch(tmp_path, [run])
  (record,) = store.load(tmp_path)
  (line,) = record.metrics
  assert (line['finite'], line['train_loss'], line['test_loss']) == (
    False, None, None,
  )  # fmt: skip
  assert line['layers']['output']['angle'] is None
  assert record.result is not None
  assert record.result['diverged'] is True
  by_chance = pytest.approx(100 * 52 / 60)  # 8 of 60 are of the first class
  assert record.result['best_test_error'] == by_chance
  assert record.result['held_out_test_error'] == by_chance
  assert record.result['epochs_run'] == 1
  assert _launch(tmp_path, [run]).skipped == 1


def test_checkpoints_take_their_share_of_the_time(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
  saved = []
  pace = train._Pace(0.03)
  for epoch in range(1, 1001):
    now[0] += 1.0
    if pace.due():
      saved.append(epoch)
      now[0] += 2.0
      pace.took(2.0)
  assert 12 <= len(saved) <= 1000 * 0.03 / 2 + 1
  assert saved[0] == 17  # the first, guessed at half a second
  assert 2.0 * len(saved) <= 0.032 * now[0]


def _check_close(found, wanted, runs):
  for run in runs:
    key = run.run_id, 'config.json'
    assert found[key] == wanted[key]
    lines, others = (c[run.run_id, 'metrics.jsonl'] for c in (found, wanted))
    tiny.assert_close(lines, others, 1e-4)
    found_result = json.loads(found[run.run_id, 'result.json'])
    assert found_result == result(lines, classes=8, train_images=216)


def test_a_group_is_its_runs(tmp_path, as_one, alone):
  assert as_one.keys() == alone.keys()
  _check_close(as_one, alone, _GROUP)
  losses = [as_one[r.run_id, 'metrics.jsonl'][-1]['test_loss'] for r in _GROUP]
  assert len(set(losses)) == len(_GROUP)
  # A group of one has the bits of a run alone.
  run = _GROUP[3]
  _launch(tmp_path, [run], size=4)
  found = folders.contents(tmp_path)
  assert found == {key: alone[key] for key in alone if key[0] == run.run_id}


def test_a_stop_ends_the_group_which_resumes_with_the_same_bits(
  tmp_path, as_one
):
  listener = Listener(count=2, act=interrupt)
  with pytest.raises(Interrupted):
    _launch(tmp_path, _GROUP, listener, 4, share=0.0)
  assert listener.epochs() == [1] * 4  # all that is known is recorded
  listener = Listener()
  _launch(tmp_path, _GROUP, listener, 4)
  assert dict(listener.of('started')) == {run.run_id: 2 for run in _GROUP}
  assert listener.epochs() == [2] * 4
  assert folders.contents(tmp_path) == as_one


def test_runs_that_stand_at_different_epochs(tmp_path, alone):
  done, begun, *others = _GROUP
  _launch(tmp_path, [done])
  with pytest.raises(Interrupted):
    _launch(tmp_path, [begun], Listener(1, interrupt))
  listener = Listener()
  summary = _launch(tmp_path, _GROUP, listener, 4)
  assert (summary.done, summary.skipped) == (3, 1)
  epochs = {run.run_id: 2 if run == begun else 1 for run in [begun, *others]}
  assert dict(listener.of('started')) == epochs
  assert listener.epochs() == [1, 1, 2, 2, 2]
  _check_close(folders.contents(tmp_path), alone, _GROUP)


def test_one_that_diverges_ends_alone(tmp_path, alone):
  diverging, other = dataclasses.replace(_GROUP[0], rate=1e30), _GROUP[1]
  listener = Listener()
  _launch(tmp_path, [diverging, other], listener, 2)
  found = folders.contents(tmp_path)
  (line,) = found[diverging.run_id, 'metrics.jsonl']
  assert line['finite'] is False
  # It has its result before the other goes on.
  assert [event[:2] for event in listener.events[2:5]] == [
    ('epoch', diverging.run_id),
    ('finished', diverging.run_id),
    ('epoch', other.run_id),
  ]
  _check_close(found, alone, [other])


def test_a_group_that_fails_is_tried_again_run_by_run(
  tmp_path, alone, monkeypatch
):
  epochs = vmapped.epochs

  def no_memory_for_several(runs, *arguments):
    if len(runs) > 1:
      raise RuntimeError('no memory')
    yield from epochs(runs, *arguments)

  monkeypatch.setattr(vmapped, 'epochs', no_memory_for_several)
  listener = Listener()
  summary = _launch(tmp_path, _GROUP, listener, 4, retries=0)
  assert (summary.done, summary.failed) == (4, 0)
  assert len(listener.of('failed')) == 4
  assert folders.contents(tmp_path) == alone


def test_one_that_cannot_begin_leaves_the_others(tmp_path, alone, monkeypatch):
  failing, *others = _GROUP[:3]
  start = loop.start

  def start_some(run, data):
    if run == failing:
      raise RuntimeError('no start')
    return start(run, data)

  monkeypatch.setattr(loop, 'start', start_some)
  listener = Listener()
  summary = _launch(tmp_path, _GROUP[:3], listener, 3, retries=0)
  assert (summary.done, summary.failed) == (2, 1)
  assert listener.epochs() == [1, 1, 2, 2]
  assert 'no start' in listener.of('failed')[0][1]
  _check_close(folders.contents(tmp_path), alone, others)


def test_groups_differ_in_rate_and_seed_only(tmp_path, monkeypatch):
  groups = []

  def trained(runs, *_):
    groups.append(list(runs))
    return [(run, train.Outcome('done')) for run in runs]

  monkeypatch.setattr(launching, 'train_runs', trained)
  a = _GROUP
  b = [dataclasses.replace(run, protocol=_RUN.protocol) for run in a]
  for size, wanted in (
    (10, [a, b]),
    (3, [a[:3], a[3:], b[:3], b[3:]]),
    (1, [[run] for run in [*a, *b]]),
  ):
    groups.clear()
    options = Options(tmp_path)
    list(in_this_process(options, size)([*a, *b], Listener(), StopRequest()))
    assert groups == wanted


def test_missing_data_end_the_command(tmp_path):
  # Last, because another dataset removes all programs from memory.
  with pytest.raises(DatasetError, match='TIMIT80: .* has changed since this'):
    _launch(tmp_path, [tiny.small(data=tiny.dataset(300))])
