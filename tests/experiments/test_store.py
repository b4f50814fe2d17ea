"""The results folder: nothing is lost to damaged or planted files."""

import errno
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.runs import checkpoints, files, store
from experiments.runs.store import RunFolder, StoreError
from tests.experiments import folders, tiny


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


def test_leftovers_of_a_crash_are_removed(tmp_path):
  folder = folders.interrupted(tmp_path)
  cut_off = folder.path / f'{files.UNFINISHED}abc'
  cut_off.write_text('{"half')
  folder.begin(tiny.run().config())
  assert not cut_off.exists()
  # Between the result and the end.
  result = json.dumps(folders.RESULT)
  files.write_atomically(folder.path / 'result.json', result)
  cut_off.write_text('{"half')
  unfinished = folders.interrupted(tmp_path, run=tiny.run('uSF'))
  assert folder.result() == folders.RESULT
  assert cut_off.exists()  # reading removes nothing
  store.tidy(tmp_path)
  assert sorted(os.listdir(folder.path)) == [
    'config.json', 'metrics.jsonl', 'result.json',
  ]  # fmt: skip
  assert folders.check(unfinished, 3) == []


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('{"version": 1}', 'not of version 2'),
    ('[1]', 'not of version 2'),
    ('{"version": 2, "dataset"', 'broken'),
    ('[' * 100_000, 'broken'),
    ('{"version": 2, "dataset": "other"}', 'another run'),
  ],
)
def test_a_config_of_something_else(tmp_path, text, reason):
  folder = RunFolder(tmp_path, tiny.run().run_id)
  folder.path.mkdir()
  (folder.path / 'config.json').write_text(text)
  with pytest.raises(StoreError, match=reason) as error:
    folder.begin(tiny.run().config())
  assert folder.path.name in str(error.value)
  if reason != 'another run':
    folders.interrupted(tmp_path, run=tiny.run('uSF'))
    bad, good = sorted(store.load(tmp_path), key=lambda r: r.problem is None)
    assert reason in (bad.problem or '')
    assert (bad.run_id, good.metrics[0]) == (folder.path.name, folders.line(1))
  assert (folder.path / 'config.json').read_text() == text


def test_words_in_a_config_may_differ(tmp_path):
  folder = folders.interrupted(tmp_path)
  config = json.loads((folder.path / 'config.json').read_text())
  config |= {'source': 'elsewhere', 'note': 'lossy'}
  (folder.path / 'config.json').write_text(json.dumps(config))
  folder.begin(tiny.run().config())
  assert folders.check(folder, 3) == []


@pytest.mark.parametrize(
  'text',
  ['null', '[]', '{', '{"best_test_error": NaN}', '{"best_test_error": "1"}'],
)
def test_a_file_that_is_no_result(tmp_path, text):
  folder = folders.interrupted(tmp_path)
  (folder.path / 'result.json').write_text(text)
  if text == 'null':
    assert folder.result() is None
    return
  with pytest.raises(StoreError, match='result.json.* run again') as error:
    folder.result()
  assert folder.path.name in str(error.value)
  (record,) = store.load(tmp_path)
  assert record.problem == str(error.value)


def test_a_result_of_other_epochs(tmp_path):
  """Files of another folder, such as that of a second machine, replaced it."""
  folder = folders.interrupted(tmp_path)
  folder.finish({**folders.RESULT, 'best_test_error': 2.0}, {})
  (record,) = store.load(tmp_path)
  assert 'result.json does not follow from metrics' in (record.problem or '')


def test_links_are_not_followed(tmp_path):
  run = tiny.run()
  outside = folders.interrupted(tmp_path / 'outside').path
  inside = RunFolder(tmp_path / 'inside', run.run_id)
  inside.path.mkdir(parents=True)
  (inside.path / 'config.json').symlink_to(outside / 'config.json')
  (record,) = store.load(inside.path.parent)
  assert 'config.json is a link' in (record.problem or '')
  (inside.path / 'config.json').unlink()
  (inside.path / 'checkpoints').symlink_to(outside / 'checkpoints')
  with pytest.raises(StoreError, match='checkpoints is a link'):
    folders.check(inside, 0)
  shutil.rmtree(inside.path)
  inside.path.symlink_to(outside)
  files.write_atomically(outside / 'result.json', json.dumps(folders.RESULT))
  for ask in (inside.result, inside.claimed().__enter__):
    with pytest.raises(StoreError, match=f'{run.run_id} is a link'):
      ask()
  (record,) = store.load(inside.path.parent)
  assert f'{run.run_id} is a link' in (record.problem or '')
  store.tidy(inside.path.parent)
  assert len(os.listdir(outside / 'checkpoints')) == 2


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl'])
def test_pipes_do_not_block(tmp_path, name):
  path = folders.interrupted(tmp_path).path / name
  path.unlink()
  os.mkfifo(path)
  (record,) = store.load(tmp_path)
  assert f'{name} is not an ordinary file' in (record.problem or '')


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(StoreError, match='file cannot be written.*--results'):
    store.create(file)
  for path in (file, tmp_path / 'none'):
    with pytest.raises(StoreError, match='no results folder.*experiments run'):
      store.load(path)
  with pytest.raises(StoreError, match='--results'):
    RunFolder(file, tiny.run().run_id).claimed().__enter__()
  assert RunFolder(tmp_path / 'none', tiny.run().run_id).result() is None
  assert not (tmp_path / 'none').exists()

  def denied(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied')

  folder = folders.interrupted(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(Path, 'read_bytes', denied)
    (record,) = store.load(tmp_path)
    assert 'config.json cannot be read: Perm' in (record.problem or '')
  with monkeypatch.context() as patch:
    patch.setattr(Path, 'iterdir', denied)
    with pytest.raises(StoreError, match=f'{tmp_path} cannot be read: Perm'):
      store.load(tmp_path)
  assert folders.check(folder, 3) == []


def test_names_that_other_libraries_take_for_patterns(tmp_path):
  """Or cut off. Folders of other names in the results are no runs."""
  for name in ('a[b]', '*?', '{x}', 'é ü', '#%:', '-r', '~', '\'"'):
    folder = folders.interrupted(tmp_path / name)
    assert folders.check(folder, 3) == []
    for other in ('report', '0' * 19, 'G' * 20, '0' * 20):
      (tmp_path / name / other).mkdir()
    (tmp_path / name / ('1' * 20)).write_text('a file')
    assert len(store.load(tmp_path / name)) == 1


def test_no_pickle_is_read(tmp_path):
  loaded = []

  def hook(event, arguments):  # it stays until the process ends
    if event == 'pickle.find_class':
      loaded.append(arguments)

  folder = folders.interrupted(tmp_path, 2)
  sys.addaudithook(hook)
  folders.check(folder, 2)
  store.load(tmp_path)
  assert not loaded
  pickle.loads(pickle.dumps(Path))
  assert loaded  # the hook works


def test_the_error_of_a_failed_run_is_kept_until_it_is_tried_again(tmp_path):
  folder = folders.interrupted(tmp_path)
  folder.fail('RuntimeError: <out of memory>')
  (record,) = store.load(tmp_path)
  assert record.error == 'RuntimeError: <out of memory>'
  assert record.result is folder.result() is None
  folder.begin(tiny.run().config())
  assert store.load(tmp_path)[0].error is None


def test_the_last_two_checkpoints_are_kept(tmp_path):
  folder = folders.interrupted(tmp_path)
  path = folder.path / 'checkpoints'
  assert sorted(os.listdir(path)) == ['2.msgpack', '3.msgpack']
  assert folders.check(folder, 3) == []
  folder.append(folders.line(4))  # an epoch after the last checkpoint
  assert folders.check(folder, 3) == []
  (folder.path / 'metrics.jsonl').unlink()
  assert len(folders.check(folder, 0)) == 2
  # Nothing is removed before another way was found; then the later ones go.
  assert sorted(os.listdir(path)) == ['2.msgpack', '3.msgpack']
  folder.append(folders.line(1))
  checkpoints.save(folder.checkpoints, 1, folders.state(1))
  assert os.listdir(path) == ['1.msgpack']


@pytest.mark.parametrize(
  ('line', 'epochs'),
  [
    ('{"epoch": 4, "test_er', 3),
    ('\x00\x00', 3),
    ('{}', 3),
    ('[' * 100_000, 2),
    ('{"epoch": 3, "test_error": "50", "finite": true}', 2),
    ('{"epoch": 3, "test_error": NaN, "finite": true}', 2),
    ('{"epoch": 3, "test_error": 101, "finite": true}', 2),
    ('{"epoch": 3, "test_error": 50, "finite": 1}', 2),
    ('{"epoch": 3, "test_error": 1, "finite": true, "holdout_error": null}', 2),
    ('{"epoch": 5, "test_error": 50, "finite": true}', 2),
    ('17', 2),
  ],
)
def test_lines_that_are_no_metrics_end_the_metrics(tmp_path, line, epochs):
  folder = folders.interrupted(tmp_path)
  lines = [json.dumps(folders.line(epoch)) for epoch in range(1, epochs + 1)]
  (folder.path / 'metrics.jsonl').write_text('\n'.join([*lines, line]))
  assert len(store.load(tmp_path)[0].metrics) == epochs
  problems = folders.check(folder, epochs)
  if epochs == 2:
    assert '3.msgpack is not used: there are metrics of 2 epochs' in problems[0]
  folder.append(folders.line(epochs + 1))
  assert len(folder.metrics()) == epochs + 1


def _truncate(path: Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def _flip_a_byte(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(data)


def _another(path: Path) -> None:
  shutil.copyfile(path.with_name('2.msgpack'), path)


def _other_arrays(change):
  def damage(path: Path) -> None:
    arrays = checkpoints.by_name(folders.state(3))
    kernel = arrays.pop('params.kernel')
    checkpoints.save(path.parent, 3, arrays | change(kernel))

  return damage


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    *((each, 'damaged') for each in (_truncate, _flip_a_byte, _another)),
    *(
      (_other_arrays(change), 'params.kernel is ')
      for change in (
        lambda kernel: {},
        lambda kernel: {'params.kernel': kernel[:8]},
        lambda kernel: {'params.kernel': kernel.astype(np.float64)},
      )
    ),
  ],
)
def test_a_checkpoint_of_no_use_gives_way_to_the_one_before(
  tmp_path, damage, reason
):
  folder = folders.interrupted(tmp_path)
  damage(folder.path / 'checkpoints' / '3.msgpack')
  (problem,) = folders.check(folder, 2)
  assert f'{folder.path}/checkpoints/3.msgpack is not used: ' in problem
  assert reason in problem
  assert (folder.path / 'checkpoints' / '3.msgpack').exists()
