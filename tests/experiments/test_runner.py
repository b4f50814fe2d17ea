"""Carrying out runs: what is interrupted anywhere ends with the same bits."""

import os
import signal
import time

import jax
import numpy as np
import pytest

from experiments import executors, runner, worker
from experiments.datasets import DatasetError
from experiments.runs import store
from experiments.runs.store import Store
from experiments.tasks import Settings
from experiments.training import placement
from tests.experiments import folders, tiny
from tests.experiments.listener import Listener


class _Crash(Exception):
  """Stands for the end of the process."""


def _crash():
  raise _Crash


def _interrupt():
  os.kill(os.getpid(), signal.SIGINT)


def _terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def _load(run):
  del run
  return tiny.dataset()


def _carry_out(
  folder, runs, listener=None, load=_load, checkpoint_share=0.03, **options
):
  target = Store(folder)
  target.create()
  settings = Settings(load, None, checkpoint_share)
  return runner.carry_out(
    runs, target, executors.Local(settings), listener or Listener(), **options
  )


_RUN = tiny.run('brSF-50%+BN+BM', epochs=4)


@pytest.fixture(name='undisturbed', scope='module')
def _undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  assert _carry_out(folder, [_RUN]).done == 1
  return folders.contents(folder)


def test_an_undisturbed_run(undisturbed):
  assert {name for _, name in undisturbed} == {
    'config.json', 'metrics.jsonl', 'result.json',
  }  # fmt: skip
  lines = undisturbed[_RUN.run_id, 'metrics.jsonl']
  assert [line['epoch'] for line in lines] == [1, 2, 3, 4]


# With a share of 1 every epoch has a checkpoint, with 0 there is none.
@pytest.mark.parametrize(
  ('share', 'after', 'act', 'error', 'goes_on'),
  [
    (1.0, 1, _crash, _Crash, 1),  # before its checkpoint, so from the start
    (1.0, 3, _crash, _Crash, 3),
    (1.0, 4, _crash, _Crash, 4),  # all lines and no result
    (0.0, 3, _crash, _Crash, 1),
    (0.0, 2, _interrupt, runner.Interrupted, 3),  # a stop writes one
    (0.0, 3, _terminate, runner.Interrupted, 4),
    (1.0, 2, _terminate, runner.Interrupted, 3),
  ],
)
def test_goes_on_with_the_same_bits(
  tmp_path, undisturbed, share, after, act, error, goes_on
):
  with pytest.raises(error):
    _carry_out(tmp_path, [_RUN], Listener(after, act), checkpoint_share=share)
  assert not Store(tmp_path).finished(_RUN)
  listener = Listener()
  assert _carry_out(tmp_path, [_RUN], listener).done == 1
  assert listener.epochs() == [*range(goes_on, 5)]
  assert listener.told[0] == ('started', _RUN.run_id, goes_on)
  assert folders.contents(tmp_path) == undisturbed


def test_stopped_in_the_middle_of_an_epoch(tmp_path, undisturbed, monkeypatch):
  class Asked(runner.StopRequest):
    """Asks after the first of the two steps of epoch 2."""

    before = 1 + 2 + 2  # the run, two steps, two evaluations

    questions = 0

    def __init__(self):
      pass

    @property
    def asked(self):
      Asked.questions += 1
      return signal.SIGTERM if Asked.questions > Asked.before + 1 else None

  with monkeypatch.context() as patch:
    patch.setattr(runner, 'StopRequest', Asked)
    with pytest.raises(runner.Interrupted):
      _carry_out(tmp_path, [_RUN], checkpoint_share=0.0)
  listener = Listener()
  _carry_out(tmp_path, [_RUN], listener)
  assert listener.epochs() == [2, 3, 4]
  assert folders.contents(tmp_path) == undisturbed


def test_damage_is_told_and_mended(tmp_path, undisturbed):
  with pytest.raises(_Crash):
    _carry_out(tmp_path, [_RUN], Listener(4, _crash), checkpoint_share=1.0)
  folder = tmp_path / _RUN.run_id
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"epoch": 5, "te')
  for path in (folder / 'checkpoints' / '3').rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  listener = Listener()
  _carry_out(tmp_path, [_RUN], listener)
  (message,) = listener.messages()
  assert str(folder / 'checkpoints' / '3') in message
  assert listener.epochs() == [3, 4]
  assert folders.contents(tmp_path) == undisturbed


def test_interrupted_twice(tmp_path, undisturbed):
  for after in (1, 3):
    with pytest.raises(runner.Interrupted):
      _carry_out(tmp_path, [_RUN], Listener(after, _interrupt))
  _carry_out(tmp_path, [_RUN])
  assert folders.contents(tmp_path) == undisturbed


def test_a_stop_says_which_signal_and_gives_the_handlers_back(tmp_path):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with pytest.raises(runner.Interrupted, match='SIGTERM') as stopped:
    _carry_out(tmp_path, [_RUN], Listener(1, _terminate))
  assert stopped.value.signal == signal.SIGTERM
  after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  assert before == after
  # A stop after the last epoch still ends the run; the next is not begun.
  other = tiny.run('brSF-50%+BN+BM', epochs=4, seed=1)
  with pytest.raises(runner.Interrupted):
    _carry_out(tmp_path, [_RUN, other], Listener(4, _interrupt))
  assert Store(tmp_path).finished(_RUN)
  assert not (tmp_path / other.run_id).exists()


def test_a_second_signal_ends_at_once():
  with runner.StopRequest() as stop, pytest.raises(KeyboardInterrupt):
    _interrupt()
    assert stop.asked == signal.SIGINT
    _terminate()


def test_finished_runs_are_not_run_again(tmp_path, undisturbed):
  _carry_out(tmp_path, [_RUN])
  listener = Listener()
  summary = _carry_out(tmp_path, [_RUN], listener)
  assert (summary.done, summary.skipped) == (0, 1)
  assert listener.told == []
  assert folders.contents(tmp_path) == undisturbed


def test_another_protocol_is_another_run(tmp_path):
  _carry_out(tmp_path, [_RUN])
  other = tiny.run('brSF-50%+BN+BM', epochs=4, weight_decay=0.1)
  assert Store(tmp_path).missing([_RUN, other]) == [other]


def test_runs_of_another_process_are_left_to_it(tmp_path):
  runs = [_RUN, tiny.run('brSF-50%+BN+BM', epochs=1)]
  Store(tmp_path).create()
  with Store(tmp_path).leases(60) as leases:
    assert leases.acquire(_RUN.run_id)
    summary = _carry_out(tmp_path, runs)
  assert (summary.done, summary.elsewhere) == (1, 1)
  assert not (tmp_path / _RUN.run_id).exists()


def test_what_another_process_gives_up_is_done_after_all(tmp_path):
  """While this one was at its last run."""
  runs = [_RUN, tiny.run('brSF-50%+BN+BM', epochs=1)]
  Store(tmp_path).create()
  with Store(tmp_path).leases(60) as leases:
    lease = leases.acquire(_RUN.run_id)
    assert lease
    listener = Listener(1, lambda: leases.give_up(lease))
    summary = _carry_out(tmp_path, runs, listener)
  assert (summary.done, summary.elsewhere) == (2, 0)
  assert Store(tmp_path).missing(runs) == []


def test_a_diverged_run_is_a_result_and_not_run_again(tmp_path):
  run = tiny.run('uSF', rate=1e30, epochs=3)
  listener = Listener(1, _crash)
  with pytest.raises(_Crash):  # after its last line, before its result
    _carry_out(tmp_path, [run], listener)
  _carry_out(tmp_path, [run])
  (record,) = store.load(tmp_path)
  assert record.result is not None
  assert record.result['diverged'] is True
  assert len(record.metrics) == 1
  assert _carry_out(tmp_path, [run]).skipped == 1


def test_a_dataset_is_loaded_once_and_then_let_go(tmp_path, monkeypatch):
  small, large = tiny.dataset(260), tiny.dataset(300)
  by_digest = {data.digest: data for data in (small, large)}
  runs = [
    tiny.run('uSF', data, epochs=1, seed=seed)
    for data in (small, large)
    for seed in (0, 1)
  ]
  loaded = []

  def load(run):
    # The images of the dataset before are gone.
    assert not any(x.shape == (260, 1845) for x in jax.live_arrays())
    loaded.append(run.digest)
    return by_digest[run.digest]

  uploads = []
  upload = placement.upload
  monkeypatch.setattr(
    placement,
    'upload',
    lambda *given: uploads.append(given) or upload(*given),
  )
  summary = _carry_out(tmp_path, runs, load=load)
  assert summary.done == 4
  assert loaded == [small.digest, large.digest]
  assert len(uploads) == 2


def test_a_dataset_that_changed_meanwhile(tmp_path):
  run = tiny.run('uSF', tiny.dataset(300))
  with pytest.raises(DatasetError, match='TIMIT80: made by the tests has chan'):
    _carry_out(tmp_path, [run])
  assert not Store(tmp_path).finished(run)


def test_checkpoints_take_their_share_of_the_time(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

  saved = []
  pace = worker.Pace(0.03)
  for epoch in range(1, 1001):
    now[0] += 1.0
    if pace.due():
      saved.append(epoch)
      now[0] += 2.0
      pace.took(2.0)
  assert 12 <= len(saved) <= 1000 * 0.03 / 2 + 1
  assert saved[0] == 17  # the first, guessed at half a second
  assert 2.0 * len(saved) <= 0.032 * now[0]


def test_the_order_of_what_a_listener_is_told(tmp_path):
  run = tiny.run('uSF', epochs=2)
  listener = Listener()
  _carry_out(tmp_path, [run], listener)
  assert [event[0] for event in listener.told] == [
    'started', 'epoch', 'epoch', 'finished',
  ]  # fmt: skip
  (record,) = store.load(tmp_path)
  assert record.config == run.config()


def test_a_run_that_was_taken_over_meanwhile_is_left(tmp_path, undisturbed):
  other = tiny.run('brSF-50%+BN+BM', epochs=1, seed=1)
  taken = []

  def take_over():
    """As another process does while this one is away for too long."""
    (claim,) = (tmp_path / '.leases').glob(f'{_RUN.run_id}.*')
    os.utime(claim, (1, 1))
    leases = Store(tmp_path).leases(60)
    taken.append(leases.acquire(_RUN.run_id))

  listener = Listener(2, take_over)
  summary = _carry_out(tmp_path, [_RUN, other], listener, checkpoint_share=1.0)
  assert (summary.done, summary.elsewhere) == (1, 1)
  assert 'taken over by another process' in listener.messages()[0]
  # Nothing was written to it after that, and the other's lease is untouched.
  lines = [r.metrics for r in store.load(tmp_path) if r.run_id == _RUN.run_id]
  assert [line['epoch'] for line in lines[0]] == [1, 2]
  (lease,) = taken
  assert lease is not None
  assert lease.held()
  lease.give_up()
  assert _carry_out(tmp_path, [_RUN]).done == 1
  found = folders.contents(tmp_path)
  assert {k: v for k, v in found.items() if k[0] == _RUN.run_id} == undisturbed


def test_a_checkpoint_of_other_arrays_gives_way_to_the_one_before(
  tmp_path, undisturbed
):
  with pytest.raises(_Crash):
    _carry_out(tmp_path, [_RUN], Listener(4, _crash), checkpoint_share=1.0)
  folder = Store(tmp_path).open(_RUN)
  folder.save(3, {'params': np.zeros(3, np.float32)})
  listener = Listener()
  assert _carry_out(tmp_path, [_RUN], listener).done == 1
  (message,) = listener.messages()
  assert 'not used' in message
  assert 'of shape (), not ' in message
  assert listener.epochs() == [3, 4]
  assert folders.contents(tmp_path) == undisturbed
