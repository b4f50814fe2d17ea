"""The results folder: whatever is torn, damaged or planted, nothing is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runs import files, store
from experiments.runs.store import Store, StoreError
from tests.experiments import folders, tiny


def test_what_a_finished_run_leaves(tmp_path):
  run = tiny.run()
  folder = folders.interrupted(tmp_path)
  assert not Store(tmp_path).finished(run)
  folder.finish(folders.RESULT, folders.ENVIRONMENT)
  assert Store(tmp_path).finished(run)
  assert sorted(os.listdir(tmp_path / run.run_id)) == [
    'config.json', 'environment.json', 'metrics.jsonl', 'result.json',
  ]  # fmt: skip
  (record,) = store.load(tmp_path)
  assert record == store.Record(
    run.run_id,
    run.config(),
    [folders.line(1), folders.line(2), folders.line(3)],
    folders.RESULT,
    folders.ENVIRONMENT,
  )


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
  folder = folders.interrupted(tmp_path)
  torn = folder.path / f'{files.UNFINISHED}abc'
  torn.write_text('{"half')
  assert Store(tmp_path).missing([run]) == [run]
  Store(tmp_path).open(run)
  assert not torn.exists()
  # Between the result and the end.
  result = json.dumps(folders.RESULT)
  files.write_atomically(folder.path / 'result.json', result)
  torn.write_text('{"half')
  unfinished = folders.interrupted(tmp_path, run=tiny.run('uSF'))
  Store(tmp_path).create()
  leases = Store(tmp_path).leases(60)
  assert leases.acquire(run.run_id)
  assert leases.acquire(unfinished.path.name)
  assert Store(tmp_path).missing([run]) == []
  assert torn.exists()  # to ask removes nothing
  Store(tmp_path).tidy()
  assert sorted(os.listdir(folder.path)) == [
    'config.json', 'metrics.jsonl', 'result.json',
  ]  # fmt: skip
  assert os.listdir(tmp_path / '.leases') == [f'{unfinished.path.name}.1']
  assert folders.check(unfinished, 3) == []


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('{"version": 1}', 'not of version 2'),
    ('{}', 'not of version 2'),
    ('[1]', 'not of version 2'),
    ('{"version": 2, "dataset"', 'broken'),
    ('[' * 100_000, 'broken'),
    ('{"version": 2, "dataset": "other"}', 'another run'),
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
    folders.interrupted(tmp_path, run=tiny.run('uSF'))
    bad, good = sorted(store.load(tmp_path), key=lambda r: r.problem is None)
    assert said in (bad.problem or '')
    assert (bad.run_id, good.metrics[0]) == (run.run_id, folders.line(1))
  assert (path / 'config.json').read_text() == text


def test_words_in_a_config_may_differ(tmp_path):
  folder = folders.interrupted(tmp_path)
  config = json.loads((folder.path / 'config.json').read_text())
  config |= {'source': 'elsewhere', 'note': 'lossy'}
  (folder.path / 'config.json').write_text(json.dumps(config))
  assert folders.check(Store(tmp_path).open(tiny.run()), 3) == []


@pytest.mark.parametrize(
  'text', ['null', '[]', '{', '{"paper_error": NaN}', '{"paper_error": "1"}']
)
def test_a_result_that_is_none(tmp_path, text):
  run = tiny.run()
  folder = folders.interrupted(tmp_path)
  (folder.path / 'result.json').write_text(text)
  if text == 'null':
    assert not Store(tmp_path).finished(run)
    return
  with pytest.raises(StoreError, match='result.json') as error:
    Store(tmp_path).missing([run])
  assert run.run_id in str(error.value)
  assert 'do that run again' in str(error.value)
  (record,) = store.load(tmp_path)
  assert record.problem == str(error.value)


def test_links_are_not_followed(tmp_path):
  run = tiny.run()
  outside = folders.interrupted(tmp_path / 'outside').path
  inside = tmp_path / 'inside'
  (inside / run.run_id).mkdir(parents=True)
  (inside / run.run_id / 'config.json').symlink_to(outside / 'config.json')
  (record,) = store.load(inside)
  assert 'config.json is a link' in (record.problem or '')
  (inside / run.run_id / 'config.json').unlink()
  folder = Store(inside).open(run)
  (folder.path / 'checkpoints').symlink_to(outside / 'checkpoints')
  with pytest.raises(StoreError, match='checkpoints is a link'):
    folder.restore()
  shutil.rmtree(folder.path)
  folder.path.symlink_to(outside)
  with pytest.raises(StoreError, match=f'{run.run_id} is a link'):
    Store(inside).open(run)
  assert store.load(inside) == []
  files.write_atomically(outside / 'result.json', json.dumps(folders.RESULT))
  with pytest.raises(StoreError, match=f'{run.run_id} is a link'):
    Store(inside).missing([run])
  Store(inside).tidy()
  assert {'2', '3'} < set(os.listdir(outside / 'checkpoints'))
  (inside / '.leases').symlink_to(tmp_path / 'outside')
  for ask in (Store(inside).create, Store(inside).tidy):
    with pytest.raises(StoreError, match='.leases is a link'):
      ask()


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl'])
def test_pipes_are_not_waited_for(tmp_path, name):
  path = folders.interrupted(tmp_path).path / name
  path.unlink()
  os.mkfifo(path)
  (record,) = store.load(tmp_path)
  assert f'{name} is not an ordinary file' in (record.problem or '')


def test_other_folders_are_ignored(tmp_path):
  folders.interrupted(tmp_path)
  for name in ('report', '0' * 19, 'G' * 20, '.leases', '0' * 20):
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
  folder = folders.interrupted(tmp_path)

  def denied(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied')

  with monkeypatch.context() as patch:
    patch.setattr(Path, 'read_text', denied)
    (record,) = store.load(tmp_path)
    assert 'config.json can not be read: Perm' in (record.problem or '')
  with monkeypatch.context() as patch:
    patch.setattr(Path, 'iterdir', denied)
    with pytest.raises(StoreError, match=f'{tmp_path} can not be read: Perm'):
      store.load(tmp_path)
  assert folders.check(folder, 3) == []


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
  folder = folders.interrupted(tiny_disk, 2)
  fill = tiny_disk / 'fill'
  size = shutil.disk_usage(tiny_disk).free
  fill.write_bytes(b'0' * size)
  with pytest.raises(StoreError, match='checkpoints/3 could not.*make room'):
    folder.save(3, folders.arrays(3))
  with pytest.raises(StoreError, match='metrics.jsonl could not.*No space'):
    for epoch in range(3, 100_000):
      folder.append(folders.line(epoch))
  with pytest.raises(StoreError, match='environment.json could not.*No space'):
    folder.finish(folders.RESULT, folders.ENVIRONMENT)
  with pytest.raises(StoreError, match='can not be written: No space'):
    Store(tiny_disk).create()
  assert not (folder.path / 'result.json').exists()
  fill.unlink()
  assert folders.check(folder, 2) == []
  folder.finish(folders.RESULT, folders.ENVIRONMENT)
  assert store.load(tiny_disk)[0].result == folders.RESULT


def test_no_pickle_is_read():
  # An audit hook stays until the process ends.
  code = """
import sys, tempfile
from pathlib import Path
from experiments import store
from tests.experiments import folders
loaded = []
def hook(event, arguments):
  if event == 'pickle.find_class':
    loaded.append(arguments)
path = Path(tempfile.mkdtemp())
folder = folders.interrupted(path, 2)
sys.addaudithook(hook)
folders.check(folder, 2)
store.load(path)
assert not loaded, loaded
import pickle
pickle.loads(pickle.dumps(Path))
assert loaded  # the hook works
"""
  subprocess.run([sys.executable, '-c', code], check=True, env=_environment())


def _environment() -> dict[str, str]:
  return {**os.environ, 'PYTHONPATH': os.getcwd(), 'JAX_PLATFORMS': 'cpu'}


def test_why_a_run_failed_is_kept_until_it_is_tried_again(tmp_path):
  folder = folders.interrupted(tmp_path)
  folder.fail('RuntimeError: <out of memory>')
  (record,) = store.load(tmp_path)
  assert record.error == 'RuntimeError: <out of memory>'
  assert record.result is None
  assert Store(tmp_path).missing([tiny.run()]) == [tiny.run()]
  Store(tmp_path).open(tiny.run())
  assert store.load(tmp_path)[0].error is None
