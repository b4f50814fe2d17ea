"""Killed, or out of room: the same command then ends with the same bits."""

import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import time

import pytest

from experiments.runs import launch, store
from experiments.runs.files import StoreError
from experiments.runs.store import RunFolder, load
from experiments.runs.train import Options
from tests.experiments import folders, tiny
from tests.experiments.listener import Listener

# `.ci/run long` kills more often.
_KILLS = int(os.environ.get('SYMJAX_BP_KILLS', '8'))
_RUNS = [tiny.small('brSF-50%+BN+BM', epochs=6, seed=seed) for seed in (0, 1)]
_WAIT = 600  # seconds until something is wrong, on a busy machine too
# What a process does to the files of the store, as Python tells it.
_CHANGES = {
  'open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.utime',
  'os.truncate', 'shutil.rmtree',
}  # fmt: skip


class _Changes:
  """Counts changes of files in a folder; the last one is never made.

  The last is given by its number, or by its event and the name of the file.
  """

  def __init__(self, folder, last):
    self.count = 0
    self._folder, self._last = os.fspath(folder), last

  def __call__(self, event, arguments):
    if event in _CHANGES and str(arguments[0]).startswith(self._folder):
      self.count += 1
      name = os.path.basename(arguments[0])
      if self._last in (self.count, (event, name)):
        os.kill(os.getpid(), signal.SIGKILL)


def _do(folder, load, began, last, room, share) -> None:
  """The grid, in a process of its own; sends when it began, and changes."""
  if room is not None:  # Python ignores the signal, so writing fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
  changes = _Changes(folder, last)
  sys.addaudithook(changes)
  listener = Listener()
  listener.run_started = lambda *_: began.send(time.monotonic())
  options = Options(folder, load, checkpoint_share=share)
  try:
    store.create(folder)
    summary = launch.launch(
      _RUNS, launch.in_this_process(options), options, listener
    )
  except StoreError as error:
    began.send(str(error))
    return
  assert (summary.failed, summary.elsewhere) == (0, 0)
  began.send((time.monotonic(), changes.count))


def _missing(folder) -> list:
  return [
    run for run in _RUNS if RunFolder(folder, run.run_id).result() is None
  ]


@pytest.fixture(name='start', scope='module')
def _start():
  """Starts the grid in a folder: (process, pipe)."""
  context = multiprocessing.get_context('forkserver')
  # All imports are done once; what is forked has no threads yet.
  context.set_forkserver_preload(
    [__name__, 'experiments.training.vmapped', 'experiments.runs.checkpoints']
  )

  def start(folder, last=None, room=None, share=1.0):
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(
      target=_do, args=(folder, tiny.loader(), sending, last, room, share)
    )
    process.start()
    sending.close()
    return process, receiving

  return start


def _finish(start, folder, **limits) -> list:
  """Lets the grid come to its end; its messages."""
  process, receiving = start(folder, **limits)
  process.join(_WAIT)
  assert process.exitcode == 0
  messages = []
  with contextlib.suppress(EOFError):
    while receiving.poll():
      messages.append(receiving.recv())
  return messages


@pytest.fixture(name='undisturbed', scope='module')
def _undisturbed(start, tmp_path_factory):
  """What is left by a grid that nothing happens to."""
  folder = tmp_path_factory.mktemp('undisturbed')
  _finish(start, folder)
  contents = folders.contents(folder)
  assert len(contents) == 2 * 3
  return contents


def test_killed_at_many_moments(start, tmp_path, undisturbed):
  began, _, (ended, changes) = _finish(start, tmp_path / 'another')
  assert folders.contents(tmp_path / 'another') == undisturbed
  chance = random.Random(0)
  kills = 0
  for grid in itertools.count():
    folder = tmp_path / f'grid {grid}'
    while kills < _KILLS and _missing(folder):
      # At a change of a file, or while training and between all changes.
      by_file = kills % 2 == 0
      last = chance.randrange(1, changes) if by_file else None
      process, receiving = start(folder, last)
      if not by_file and receiving.poll(_WAIT):
        process.join(chance.uniform(0, ended - began))
        process.kill()
      process.join(_WAIT)
      assert process.exitcode in (0, -signal.SIGKILL)
      kills += process.exitcode != 0
    _finish(start, folder)
    assert folders.contents(folder) == undisturbed
    if kills == _KILLS:
      return


def test_killed_between_a_result_and_the_end(start, tmp_path, undisturbed):
  """At each of the three changes of files that follow a result."""
  for last, missing in (
    (('shutil.rmtree', 'checkpoints'), _RUNS[1:]),
    (('os.rmdir', 'checkpoints'), []),
    (('os.remove', '.lock'), []),
  ):
    process, _ = start(tmp_path, last)
    process.join(_WAIT)
    assert process.exitcode == -signal.SIGKILL
    assert _missing(tmp_path) == missing
  _finish(start, tmp_path)
  assert folders.contents(tmp_path) == undisturbed


def test_out_of_room(start, tmp_path, undisturbed):
  """Again and again, with a little more room each time.

  It is the room in bytes for any one file: as on a disk that fills, a write
  stops in its middle. No rights are needed for that.
  """
  for room, share, what, lines in (
    (400, 1.0, 'config.json', []),
    (1200, 0.0, 'metrics.jsonl', [2, 3, 4, 5]),  # of six, some have room
    (40_000, 1.0, 'checkpoints/1.msgpack', [1]),
  ):
    *_, error = _finish(start, tmp_path, room=room, share=share)
    assert isinstance(error, str)
    assert f'{what} could not be written' in error
    assert 'make room' in error
    assert 'Nothing finished is lost' in error
    for record in load(tmp_path):
      text = (tmp_path / record.run_id / 'metrics.jsonl').read_text()
      assert text.endswith('\n')
      assert text.count('\n') == len(record.metrics)
      assert len(record.metrics) in lines
    left = [file.name for file in tmp_path.rglob('*') if file.is_file()]
    assert not [name for name in left if 'writing' in name or 'tmp' in name]
  _finish(start, tmp_path)
  assert folders.contents(tmp_path) == undisturbed
