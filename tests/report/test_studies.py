"""Study files: folding a results folder, reading it back, broken files."""

import dataclasses
import itertools
import json
import re

import pytest

from experiments import studies
from experiments.runs.files import StoreError
from tests.report.records import record, with_layers, write_live

MACHINE = {'cores': '2', 'processor': 'a <processor>'}


def some_records():
  """Two datasets, two protocols, a diverged run, layer metrics, a machine."""
  made = [
    record('SGD', 2.0),
    record('uSF+BM', 3.0, seed=2**32 - 1, plan=1, note='lossy \u2028 copy'),
    record('BN', 30.0, dataset='Cal101', diverged=True, holdout=5.0),
    record('frSF-25%+BN+Adam', 4.0, initial_std=[0.001, 0.05], rate=0.01),
  ]
  for line in made[0].metrics:
    del line['holdout_error']
  with_layers(made[3:], {'conv': {'angle': 1.25, 'norm_ratio': None}})
  for key in ('holdout_error', 'held_out_test_error', 'held_out_epoch'):
    made[0].result[key] = None
  return [dataclasses.replace(run, environment=MACHINE) for run in made]


def by_name(records):
  return sorted(records, key=lambda record: record.run_id)


@pytest.fixture
def live(tmp_path):
  return write_live(tmp_path / 'live', some_records())


@pytest.fixture
def file(live, tmp_path):
  studies.fold(live, tmp_path / 'study.jsonl')
  return tmp_path / 'study.jsonl'


def test_a_file_a_folder_of_files_and_a_live_folder_read_alike(live, file):
  for path in (file, file.parent, live):
    assert by_name(studies.load(path)) == by_name(some_records())
  other = write_live(file.parent / 'other', [record('BM', 9.0)])
  studies.fold(other, live / 'other.jsonl')
  assert len(studies.load(live)) == 5


def test_a_run_that_a_file_holds_twice_is_loaded_once(live, file):
  text = file.read_text()
  line = text.splitlines()[1]
  file.write_text(f'{text}{line}\n')
  assert by_name(studies.load(file)) == by_name(some_records())
  assert studies.fold(live, file) == 4
  assert file.read_text() == text
  other = json.loads(line)
  other['epochs']['test_error'][0] += 1
  file.write_text(f'{text}{json.dumps(other)}\n')
  *_, problem = studies.load(file)
  assert problem.problem == 'it is there already, with other numbers'
  with pytest.raises(StoreError, match='already, with other numbers'):
    studies.fold(live, file)


def test_the_bytes_depend_on_the_runs_alone(live, file, tmp_path):
  expected = file.read_bytes()
  assert studies.fold(live, file) == 4
  assert file.read_bytes() == expected
  for at, (one, other) in enumerate(itertools.combinations(range(4), 2)):
    first = [some_records()[one], some_records()[other]]
    rest = [r for r in some_records() if r not in first]
    for name, part in (('first', first), ('rest', rest)):
      folder = write_live(tmp_path / f'{at} {name}', part)
      studies.fold(folder, tmp_path / f'{at}.jsonl')
    again = (tmp_path / f'{at}.jsonl').read_text()
    assert again.replace(f'"study":"{at}"', '"study":"study"') == (
      expected.decode()
    )


def test_what_runs_share_is_stored_once_and_what_follows_is_not(file):
  first, *lines = file.read_text().splitlines()
  head = json.loads(first)
  assert [len(head[f'{of}s']) for of in ('dataset', 'protocol')] == [3, 2]
  assert head['environments'] == [MACHINE]
  assert len(lines) == 4
  for name in ('run_id', 'best_test_error', '"epoch"', 'momentum', 'processor'):
    assert name not in ''.join(lines)


@pytest.mark.parametrize('key', ['seconds', 'train_loss'])
def test_runs_that_are_there_stay_and_other_numbers_are_refused(
  file, tmp_path, key
):
  before, (other, *_) = file.read_bytes(), some_records()
  other.metrics[0][key] = 77.0
  folder = write_live(tmp_path / 'again', [other])
  if key == 'seconds':
    assert studies.fold(folder, file) == 4
  else:
    with pytest.raises(StoreError, match=f'{other.run_id} has other numbers'):
      studies.fold(folder, file)
  assert file.read_bytes() == before


@pytest.mark.parametrize(
  'part, change, message',
  [
    ('result.json', None, 'is not finished'),
    ('result.json', {'best_epoch': 9}, 'name or result does not follow'),
    ('config.json', {'version': 1}, 'config.json is not of version'),
    ('', {}, 'name or result does not follow'),
  ],
)
def test_a_folder_that_is_not_whole_is_refused(
  live, tmp_path, part, change, message
):
  path = next(live.iterdir())
  if not part:
    path.rename(live / ('0' * 20))
  elif change is None:
    (path / part).unlink()
  else:
    whole = json.loads((path / part).read_text())
    (path / part).write_text(json.dumps(whole | change))
  with pytest.raises(StoreError, match=message):
    studies.fold(live, tmp_path / 'study.jsonl')
  assert not (tmp_path / 'study.jsonl').exists()


def test_a_study_that_cannot_be_written(live, tmp_path):
  with pytest.raises(StoreError, match='is .*, a folder, but must be the file'):
    studies.fold(live, live)
  with pytest.raises(StoreError, match='could not be written.* is unchanged'):
    studies.fold(live, tmp_path / 'nowhere' / 'study.jsonl')


def test_nothing_to_fold_or_to_load_is_an_error(tmp_path):
  with pytest.raises(StoreError, match='has no runs'):
    studies.fold(tmp_path, tmp_path / 'study.jsonl')
  with pytest.raises(StoreError, match='no results folder'):
    studies.load(tmp_path / 'nowhere')


@pytest.mark.parametrize(
  'change, message',
  [
    ('torn', 'Expecting value'),
    ({'rule': KeyError}, "'rule' is missing"),
    ({'dataset': 9}, 'dataset is 9, not an index'),
    ({'protocol': -1}, 'protocol is -1, not an index'),
    ({'environment': '0'}, "environment is '0', not an index"),
    ({'epochs': {}}, 'no epochs'),
    ({'epochs': []}, 'no epochs'),
    ({'epochs': {'test_error': 7}}, 'not iterable'),
    ({'epochs': {'test_error': ['x']}}, "test_error is 'x', not a number"),
    ({'epochs': {'test_error': [None]}}, 'test_error is None, not a number'),
    ({'epochs': {'test_error': [-5]}}, 'test_error is -5, not a number from 0'),
    ({'epochs': {'test_error': [1, 2], 'seconds': [1]}}, 'shorter'),
    ({'seed': float('nan')}, 'NaN is no number'),
    ({'diverged': None}, 'diverged is None, not true or false'),
  ],
)
def test_a_broken_line_is_named_and_hides_no_other(live, file, change, message):
  lines = file.read_text().splitlines()
  if change != 'torn':
    line = json.loads(lines[2]) | change
    line = {key: value for key, value in line.items() if value is not KeyError}
    change = json.dumps(line)
  lines[2] = change
  file.write_text('\n'.join(lines) + '\n')
  before, found = file.read_bytes(), studies.load(file)
  (bad,) = (made for made in found if made.problem is not None)
  assert len(found) == 4
  assert bad.run_id == 'study.jsonl, line 3'
  assert re.search(message, bad.problem)
  with pytest.raises(StoreError, match='study.jsonl, line 3'):
    studies.fold(live, file)
  assert file.read_bytes() == before


@pytest.mark.parametrize(
  'head', ['', '{', '[]', '{"format": 2}', '{"format": 1, "datasets": 3}',
           '[' * 10_000],
)  # fmt: skip
def test_a_broken_head_is_named_and_hides_no_other_file(file, head):
  other = file.with_name('bad.jsonl')
  other.write_text(head + '\n' + file.read_text().split('\n', 1)[1])
  bad, *others = sorted(
    studies.load(file.parent), key=lambda made: made.problem is None
  )
  assert bad.run_id == 'bad.jsonl'
  assert by_name(others) == by_name(some_records())
  with pytest.raises(StoreError, match='not a study file'):
    studies.load(other)


def test_links_are_not_followed(file, tmp_path):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder' / 'link.jsonl').symlink_to(file)
  (only,) = studies.load(tmp_path / 'folder')
  assert 'link' in only.problem


def test_a_run_of_several_files_is_there_once_or_named(file):
  text, other = file.read_text(), file.with_name('z.jsonl')
  other.write_text(text)
  assert by_name(studies.load(file.parent)) == by_name(some_records())
  other.write_text(text.replace('"train_loss":[0.5', '"train_loss":[1'))
  found = studies.load(file.parent)
  bad = [made.run_id for made in found if made.problem is not None]
  assert len(bad) == 4
  assert all(name.startswith('z.jsonl, run ') for name in bad)
  good = [made for made in found if made.problem is None]
  assert by_name(good) == by_name(some_records())
