"""The results folder: whatever is torn, damaged or planted, nothing is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import files, store
from experiments.store import Store, StoreError
from tests.experiments import tiny

_RESULT = {'paper_error': 12.5, 'diverged': False}


def _line(epoch: int, error: float = 50.0) -> dict:
  return {'epoch': epoch, 'test_error': error, 'finite': True, 'seconds': 0.1}


def _state(epoch: int) -> dict:
  return {
    'params': {'kernel': jnp.full((64, 8), epoch, jnp.float32)},
    'feedback': {},
    'updates': jnp.int32(epoch),
  }


def _interrupted(folder: Path, epochs: int = 3) -> store.RunFolder:
  """A run with metrics and checkpoints of some epochs."""
  folder = Store(folder).open(tiny.run())
  for epoch in range(1, epochs + 1):
    folder.append(_line(epoch))
    folder.save(epoch, _state(epoch))
  return folder


def _check(folder: store.RunFolder, epoch: int) -> list[str]:
  """Restores; the state and the metrics must be those of the epoch."""
  found, state, problems = folder.restore(_state(0))
  assert found == epoch
  jax.tree.map(np.testing.assert_array_equal, state, _state(epoch))
  assert [line['epoch'] for line in folder.metrics()] == [*range(1, epoch + 1)]
  return problems


def test_what_a_finished_run_leaves(tmp_path):
  run = tiny.run()
  folder = _interrupted(tmp_path)
  assert not Store(tmp_path).finished(run)
  folder.finish(_RESULT)
  assert Store(tmp_path).finished(run)
  assert sorted(os.listdir(tmp_path / run.run_id)) == [
    'config.json', 'metrics.jsonl', 'result.json',
  ]  # fmt: skip
  (record,) = store.load(tmp_path)
  assert record == store.Record(
    run.run_id, run.config(), [_line(1), _line(2), _line(3)], _RESULT
  )


def test_goes_on_from_the_last_checkpoint(tmp_path):
  folder = _interrupted(tmp_path)
  assert sorted(os.listdir(folder.path / 'checkpoints')) == [
    '2', '2.sha256', '3', '3.sha256',
  ]  # fmt: skip
  assert _check(folder, 3) == []


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
  folder = _interrupted(tmp_path)
  folder.append(_line(4))
  assert _check(folder, 3) == []


@pytest.mark.parametrize('torn', ['{"epoch": 4, "test_er', '\x00\x00', '{}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  folder = _interrupted(tmp_path)
  path = folder.path / 'metrics.jsonl'
  with path.open('a') as file:
    file.write(torn)
  assert len(store.load(tmp_path)[0].metrics) == 3
  assert _check(folder, 3) == []
  folder.append(_line(4))
  assert [line['epoch'] for line in folder.metrics()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
  'line',
  [
    '[' * 100_000,
    '{"epoch": 3, "test_error": "50", "finite": true}',
    '{"epoch": 3, "test_error": NaN, "finite": true}',
    '{"epoch": 3, "test_error": 50, "finite": 1}',
    '{"epoch": 3, "test_error": 1, "finite": true, "holdout_error": null}',
    '{"epoch": 5, "test_error": 50, "finite": true}',
    '17',
  ],
)
def test_lines_that_are_no_metrics_end_the_metrics(tmp_path, line):
  folder = _interrupted(tmp_path)
  lines = [json.dumps(_line(1)), json.dumps(_line(2)), line]
  (folder.path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  (problem,) = _check(folder, 2)
  assert '3 is not used: there are metrics of 2 epochs only' in problem


def test_lost_metrics_begin_anew(tmp_path):
  folder = _interrupted(tmp_path)
  (folder.path / 'metrics.jsonl').unlink()
  assert len(_check(folder, 0)) == 2
  # Checkpoints of the future would push out those of the present.
  assert os.listdir(folder.path / 'checkpoints') == []


def _arrays(folder: store.RunFolder, epoch: int) -> Path:
  """The largest file of a checkpoint."""
  files_ = (folder.path / 'checkpoints' / str(epoch)).rglob('*')
  return max(filter(Path.is_file, files_), key=lambda path: path.stat().st_size)


def _truncate(path: Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def _flip_a_byte(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(data)


def _garbage(path: Path) -> None:
  path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.parametrize(
  'damage', [_truncate, _flip_a_byte, _garbage, os.unlink]
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
  folder = _interrupted(tmp_path)
  damage(_arrays(folder, 3))
  (problem,) = _check(folder, 2)
  assert str(folder.path / 'checkpoints' / '3') in problem
  assert 'not used' in problem
  assert not (folder.path / 'checkpoints' / '3').exists()


def test_a_checkpoint_that_is_whole_but_another_is_noticed(tmp_path):
  folder = _interrupted(tmp_path)
  path = folder.path / 'checkpoints'
  shutil.rmtree(path / '3')
  shutil.copytree(path / '2', path / '3')
  (problem,) = _check(folder, 2)
  assert 'its files are damaged' in problem


def test_two_damaged_checkpoints_begin_anew(tmp_path):
  folder = _interrupted(tmp_path)
  for epoch in (2, 3):
    path = folder.path / 'checkpoints' / str(epoch)
    shutil.rmtree(path)
    path.mkdir()
  assert len(_check(folder, 0)) == 2


def test_a_checkpoint_of_other_arrays_is_not_used(tmp_path):
  folder = _interrupted(tmp_path)
  like = _state(0) | {'params': {'kernel': jnp.zeros((8, 8), jnp.float32)}}
  epoch, state, problems = folder.restore(like)
  assert (epoch, state, len(problems)) == (0, like, 2)


def test_a_checkpoint_without_digests_was_never_finished(tmp_path):
  folder = _interrupted(tmp_path)
  (folder.path / 'checkpoints' / '3.sha256').unlink()
  assert _check(folder, 2) == []
  assert not (folder.path / 'checkpoints' / '3').exists()


def test_a_checkpoint_that_can_not_be_written(tmp_path, monkeypatch):
  import orbax.checkpoint as ocp

  folder = _interrupted(tmp_path, 2)

  def fails(self, path, *_, **__):
    (path.parent / '3.orbax-checkpoint-tmp').mkdir()
    raise ValueError('RESOURCE_EXHAUSTED: quota\nand much more')

  monkeypatch.setattr(ocp.StandardCheckpointer, 'save', fails)
  with pytest.raises(StoreError, match='checkpoints/3 .*: RES.*: quota. Noth'):
    folder.save(3, _state(3))
  monkeypatch.undo()
  assert not (folder.path / 'checkpoints' / '3.orbax-checkpoint-tmp').exists()
  assert _check(folder, 2) == []


def test_an_unfinished_checkpoint_is_removed(tmp_path):
  folder = _interrupted(tmp_path)
  unfinished = folder.path / 'checkpoints' / '4.orbax-checkpoint-tmp'
  unfinished.mkdir()
  assert _check(folder, 3) == []
  assert not unfinished.exists()


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'result.json'
  files.write_atomically(path, 'old')

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  for name in ('fsync', 'replace'):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, full)
      with pytest.raises(StoreError, match='result.json.*No space left'):
        files.write_atomically(path, 'new')
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['result.json']
  files.write_atomically(path, 'new')
  assert path.read_text() == 'new'


def test_what_a_crash_leaves_is_removed(tmp_path):
  run = tiny.run()
  folder = _interrupted(tmp_path)
  torn = folder.path / f'{files.UNFINISHED}abc'
  torn.write_text('{"half')
  assert Store(tmp_path).missing([run]) == [run]
  Store(tmp_path).open(run)
  assert not torn.exists()
  # Between the result and the end.
  files.write_atomically(folder.path / 'result.json', json.dumps(_RESULT))
  torn.write_text('{"half')
  assert Store(tmp_path).missing([run]) == []
  assert sorted(os.listdir(folder.path)) == [
    'config.json', 'metrics.jsonl', 'result.json',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('{"version": 2}', 'not of version 1'),
    ('{}', 'not of version 1'),
    ('[1]', 'not of version 1'),
    ('{"version": 1, "dataset"', 'broken'),
    ('[' * 100_000, 'broken'),
    ('{"version": 1, "dataset": "other"}', 'another run'),
  ],
)
def test_a_config_of_something_else(tmp_path, text, said):
  run = tiny.run()
  path = tmp_path / run.run_id
  path.mkdir()
  (path / 'config.json').write_text(text)
  with pytest.raises(StoreError, match=said) as error:
    Store(tmp_path).open(run)
  assert run.run_id in str(error.value)
  if said != 'another run':
    with pytest.raises(StoreError, match=said):
      store.load(tmp_path)
  assert (path / 'config.json').read_text() == text


def test_words_in_a_config_may_differ(tmp_path):
  folder = _interrupted(tmp_path)
  config = json.loads((folder.path / 'config.json').read_text())
  config |= {'source': 'elsewhere', 'note': 'lossy'}
  (folder.path / 'config.json').write_text(json.dumps(config))
  assert _check(Store(tmp_path).open(tiny.run()), 3) == []


@pytest.mark.parametrize(
  'text', ['null', '[]', '{', '{"paper_error": NaN}', '{"paper_error": "1"}']
)
def test_a_result_that_is_none(tmp_path, text):
  run = tiny.run()
  folder = _interrupted(tmp_path)
  (folder.path / 'result.json').write_text(text)
  if text == 'null':
    assert not Store(tmp_path).finished(run)
    return
  for read in (
    lambda: Store(tmp_path).missing([run]),
    lambda: store.load(tmp_path),
  ):
    with pytest.raises(StoreError, match='result.json') as error:
      read()
    assert run.run_id in str(error.value)
    assert 'do that run again' in str(error.value)


def test_links_are_not_followed(tmp_path):
  run = tiny.run()
  outside = _interrupted(tmp_path / 'outside').path
  inside = tmp_path / 'inside'
  (inside / run.run_id).mkdir(parents=True)
  (inside / run.run_id / 'config.json').symlink_to(outside / 'config.json')
  with pytest.raises(StoreError, match='config.json is a link'):
    store.load(inside)
  (inside / run.run_id / 'config.json').unlink()
  folder = Store(inside).open(run)
  (folder.path / 'checkpoints').symlink_to(outside / 'checkpoints')
  with pytest.raises(StoreError, match='checkpoints is a link'):
    folder.restore(_state(0))
  shutil.rmtree(folder.path)
  folder.path.symlink_to(outside)
  with pytest.raises(StoreError, match=f'{run.run_id} is a link'):
    Store(inside).open(run)
  assert store.load(inside) == []
  assert {'2', '3'} < set(os.listdir(outside / 'checkpoints'))


def test_other_folders_are_ignored(tmp_path):
  _interrupted(tmp_path)
  for name in ('report', '0' * 19, 'G' * 20, '.locks', '0' * 20):
    (tmp_path / name).mkdir(exist_ok=True)
  (tmp_path / 'notes.txt').write_text('mine')
  (tmp_path / ('1' * 20)).write_text('a file')
  assert len(store.load(tmp_path)) == 1


def test_folders_that_can_not_be_used(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(StoreError, match='file can not be written.*--results'):
    Store(file).create()
  for path in (file, tmp_path / 'none'):
    with pytest.raises(StoreError, match='no results folder.*experiments run'):
      store.load(path)
  with pytest.raises(StoreError, match='--results'):
    Store(file).open(tiny.run())
  assert not Store(tmp_path / 'none').finished(tiny.run())
  assert not (tmp_path / 'none').exists()


def test_a_folder_that_can_not_be_read(tmp_path, monkeypatch):
  folder = _interrupted(tmp_path)

  def denied(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied')

  with monkeypatch.context() as patch:
    patch.setattr(Path, 'read_text', denied)
    with pytest.raises(StoreError, match='config.json can not be read: Perm'):
      store.load(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(Path, 'iterdir', denied)
    with pytest.raises(StoreError, match=f'{tmp_path} can not be read: Perm'):
      store.load(tmp_path)
  assert _check(folder, 3) == []


@pytest.fixture(name='tiny_disk')
def _tiny_disk(tmp_path):
  """A file system of 8 MiB."""
  path = tmp_path / 'disk'
  path.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'none', str(path)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('mounting a tmpfs needs the rights of an administrator')
  yield path
  subprocess.run(['umount', str(path)], check=True)


def test_a_full_disk_tears_nothing(tiny_disk):
  folder = _interrupted(tiny_disk, 2)
  fill = tiny_disk / 'fill'
  size = shutil.disk_usage(tiny_disk).free
  fill.write_bytes(b'0' * size)
  with pytest.raises(StoreError, match='checkpoints/3 could not.*make room'):
    folder.save(3, _state(3))
  with pytest.raises(StoreError, match='metrics.jsonl could not.*No space'):
    for epoch in range(3, 100_000):
      folder.append(_line(epoch))
  with pytest.raises(StoreError, match='result.json could not.*No space'):
    folder.finish(_RESULT)
  with pytest.raises(StoreError, match='can not be written: No space'):
    Store(tiny_disk).create()
  assert not (folder.path / 'result.json').exists()
  fill.unlink()
  assert _check(folder, 2) == []
  folder.finish(_RESULT)
  assert store.load(tiny_disk)[0].result == _RESULT


def test_no_pickle_is_read():
  # An audit hook stays until the process ends.
  code = """
import sys, tempfile
from pathlib import Path
from tests.experiments.test_store import _check, _interrupted, store
loaded = []
def hook(event, arguments):
  if event == 'pickle.find_class':
    loaded.append(arguments)
path = Path(tempfile.mkdtemp())
folder = _interrupted(path, 2)
sys.addaudithook(hook)
_check(folder, 2)
store.load(path)
assert not loaded, loaded
import pickle
pickle.loads(pickle.dumps(Path))
assert loaded  # the hook works
"""
  subprocess.run([sys.executable, '-c', code], check=True, env=_environment())


def _environment() -> dict[str, str]:
  return {**os.environ, 'PYTHONPATH': os.getcwd(), 'JAX_PLATFORMS': 'cpu'}


def test_one_lock_a_run(tmp_path):
  import filelock

  folder = Store(tmp_path)
  folder.create()
  with folder.lock(tiny.run()):
    with pytest.raises(filelock.Timeout), folder.lock(tiny.run()):
      pass
    with folder.lock(tiny.run('uSF')):
      pass
  with folder.lock(tiny.run()):
    pass
