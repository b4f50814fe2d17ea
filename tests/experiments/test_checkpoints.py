"""Going on from what is whole, whatever happened to the rest."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.runs import checkpoints, store
from experiments.runs.store import StoreError
from tests.experiments import folders


def test_goes_on_from_the_last_checkpoint(tmp_path):
  folder = folders.interrupted(tmp_path)
  assert sorted(os.listdir(folder.path / 'checkpoints')) == [
    '2', '2.sha256', '3', '3.sha256',
  ]  # fmt: skip
  assert folders.check(folder, 3) == []


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
  folder = folders.interrupted(tmp_path)
  folder.append(folders.line(4))
  assert folders.check(folder, 3) == []


@pytest.mark.parametrize('torn', ['{"epoch": 4, "test_er', '\x00\x00', '{}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  folder = folders.interrupted(tmp_path)
  path = folder.path / 'metrics.jsonl'
  with path.open('a') as file:
    file.write(torn)
  assert len(store.load(tmp_path)[0].metrics) == 3
  assert folders.check(folder, 3) == []
  folder.append(folders.line(4))
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
  folder = folders.interrupted(tmp_path)
  lines = [json.dumps(folders.line(1)), json.dumps(folders.line(2)), line]
  (folder.path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  (problem,) = folders.check(folder, 2)
  assert '3 is not used: there are metrics of 2 epochs only' in problem


def test_lost_metrics_begin_anew(tmp_path):
  folder = folders.interrupted(tmp_path)
  (folder.path / 'metrics.jsonl').unlink()
  assert len(folders.check(folder, 0)) == 2
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
  folder = folders.interrupted(tmp_path)
  damage(_arrays(folder, 3))
  (problem,) = folders.check(folder, 2)
  assert str(folder.path / 'checkpoints' / '3') in problem
  assert 'not used' in problem
  assert not (folder.path / 'checkpoints' / '3').exists()


def test_a_checkpoint_that_is_whole_but_another_is_noticed(tmp_path):
  folder = folders.interrupted(tmp_path)
  path = folder.path / 'checkpoints'
  shutil.rmtree(path / '3')
  shutil.copytree(path / '2', path / '3')
  (problem,) = folders.check(folder, 2)
  assert 'its files are damaged' in problem


def test_two_damaged_checkpoints_begin_anew(tmp_path):
  folder = folders.interrupted(tmp_path)
  for epoch in (2, 3):
    path = folder.path / 'checkpoints' / str(epoch)
    shutil.rmtree(path)
    path.mkdir()
  assert len(folders.check(folder, 0)) == 2


def test_other_arrays_do_not_fit():
  arrays = folders.arrays(1)
  like = folders.state(0)
  jax.tree.map(
    np.testing.assert_array_equal,
    checkpoints.fit(arrays, like),
    folders.state(1),
  )
  kernel = arrays.pop('params.kernel')
  for other in (None, kernel[:8], kernel.astype(np.float64)):
    changed = arrays if other is None else arrays | {'params.kernel': other}
    with pytest.raises(ValueError, match=r'params.kernel is .* not float32 of'):
      checkpoints.fit(changed, like)


def test_a_checkpoint_without_digests_was_never_finished(tmp_path):
  folder = folders.interrupted(tmp_path)
  (folder.path / 'checkpoints' / '3.sha256').unlink()
  assert folders.check(folder, 2) == []
  assert not (folder.path / 'checkpoints' / '3').exists()


def test_a_checkpoint_that_can_not_be_written(tmp_path, monkeypatch):
  import orbax.checkpoint as ocp

  folder = folders.interrupted(tmp_path, 2)

  def fails(self, path, *_, **__):
    (path.parent / '3.orbax-checkpoint-tmp').mkdir()
    raise ValueError('RESOURCE_EXHAUSTED: quota\nand much more')

  monkeypatch.setattr(ocp.StandardCheckpointer, 'save', fails)
  with pytest.raises(StoreError, match='checkpoints/3 .*: RES.*: quota. Noth'):
    folder.save(3, folders.arrays(3))
  monkeypatch.undo()
  assert not (folder.path / 'checkpoints' / '3.orbax-checkpoint-tmp').exists()
  assert folders.check(folder, 2) == []


def test_an_unfinished_checkpoint_is_removed(tmp_path):
  folder = folders.interrupted(tmp_path)
  unfinished = folder.path / 'checkpoints' / '4.orbax-checkpoint-tmp'
  unfinished.mkdir()
  assert folders.check(folder, 3) == []
  assert not unfinished.exists()


def _hostile(folder, change) -> str:
  """What is said of a checkpoint whose digests are those of its maker."""
  path = folders.interrupted(folder, 1).path / 'checkpoints'
  change(path / '1')
  lines = [
    f'{hashlib.sha256(file.read_bytes()).hexdigest()}  '
    f'{file.relative_to(path).as_posix()}\n'
    for file in sorted((path / '1').rglob('*'))
    if file.is_file()
  ]
  (path / '1.sha256').write_text(''.join(lines))
  epoch, arrays, problems = checkpoints.restore(path, last=1)
  assert (epoch, arrays) == (0, None)
  (problem,) = problems
  return problem


@pytest.mark.parametrize('name', ['{outside}', '../../outside', 'a/b', ''])
def test_an_array_outside_is_not_read(tmp_path, name):
  name = name.format(outside=tmp_path / 'outside')

  def change(path):
    text = (path / '_METADATA').read_text()
    assert '"params.kernel"' in text
    text = text.replace('"params.kernel"', json.dumps(name))
    (path / '_METADATA').write_text(
      text.replace('"use_ocdbt": true', '"use_ocdbt": false')
    )

  assert 'which is no array' in _hostile(tmp_path / 'results', change)


def test_something_else_than_arrays_is_not_read(tmp_path):
  def change(path):
    text = (path / '_METADATA').read_text()
    (path / '_METADATA').write_text(text.replace('np.ndarray', 'string'))

  assert 'which is no array' in _hostile(tmp_path, change)


def test_a_small_file_can_not_ask_for_all_memory(tmp_path):
  import tensorstore

  def change(path):
    store_ = {'driver': 'ocdbt', 'base': f'file://{path}/'}
    tensorstore.open(
      {'driver': 'zarr', 'kvstore': store_ | {'path': 'params.kernel/'}},
      create=True,
      delete_existing=True,
      shape=[2**40],
      dtype='float32',
    ).result()

  assert 'its arrays would take 4398' in _hostile(tmp_path, change)
