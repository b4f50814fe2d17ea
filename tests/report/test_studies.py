"""Study files: folding a results folder, reading it back, broken files."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest

from experiments import studies
from experiments.runs import store
from experiments.runs.files import StoreError
from tests.report.records import record, write_live

LAYERS = {'conv': {'angle': 1.25, 'norm_ratio': None}}
MACHINE = {'cores': '2', 'processor': 'a <processor>'}


def some_records():
  """Two datasets, two protocols, a diverged run, layer metrics, a machine."""
  made = [
    record('SGD', 2.0),
    record('uSF+BM', 3.0, seed=2**32 - 1, plan=1, note='lossy \u2028 copy'),
    record('BN', 30.0, dataset='Cal101', diverged=True, holdout=5.0),
    record('frSF-25%+BN+BM', 4.0, initial_std=[0.001, 0.05], rate=0.01),
  ]
  for line in made[3].metrics:
    line['layers'] = LAYERS
  for line in made[0].metrics:
    del line['holdout_error']
  for key in ('holdout_error', 'honest_error', 'honest_epoch'):
    made[0].result[key] = None
  return [dataclasses.replace(run, environment=MACHINE) for run in made]


def by_name(records):
  return sorted(records, key=lambda record: record.run_id)


@pytest.fixture
def live(tmp_path):
  return write_live(tmp_path / 'live', some_records())


def test_a_folded_folder_reads_as_the_folder(live, tmp_path):
  file = tmp_path / 'study.jsonl'
  assert studies.fold(live, file) == 4
  assert by_name(studies.load(file)) == by_name(some_records())
  assert by_name(studies.load(live)) == by_name(some_records())
  shutil.rmtree(live)
  assert by_name(studies.load(tmp_path)) == by_name(some_records())


def test_the_bytes_depend_on_the_runs_alone(live, tmp_path):
  whole = tmp_path / 'study.jsonl'
  studies.fold(live, whole)
  expected = whole.read_bytes()
  studies.fold(live, whole)
  assert whole.read_bytes() == expected
  for at, order in enumerate(itertools.permutations(some_records(), 2)):
    folder = tmp_path / str(at)
    parts = write_live(folder / 'first', list(order))
    names = {made.run_id for made in order}
    others = [r for r in some_records() if r.run_id not in names]
    rest = write_live(folder / 'second', others)
    for part in (parts, rest):
      studies.fold(part, folder / 'study.jsonl')
    assert (folder / 'study.jsonl').read_bytes() == expected


def test_what_runs_share_is_stored_once_and_what_follows_is_not(live, tmp_path):
  file = tmp_path / 'study.jsonl'
  studies.fold(live, file)
  head, *lines = map(json.loads, file.read_text().splitlines())
  assert [len(head[f'{of}s']) for of in ('dataset', 'protocol')] == [3, 2]
  assert head['environments'] == [MACHINE]
  text = '\n'.join(file.read_text().splitlines()[1:])
  assert len(lines) == 4
  for name in ('run_id', 'paper_error', '"epoch"', 'momentum', 'processor'):
    assert name not in text


def folded(tmp_path, records):
  folder = write_live(tmp_path / 'earlier', records)
  studies.fold(folder, tmp_path / 'study.jsonl')
  return tmp_path / 'study.jsonl'


def test_runs_that_are_there_stay_and_seconds_are_no_conflict(tmp_path):
  first = some_records()
  file = folded(tmp_path, first[:2])
  again = dataclasses.replace(first[0], metrics=[
    {**line, 'seconds': 9.0} for line in first[0].metrics
  ])  # fmt: skip
  live = write_live(tmp_path / 'live', [again, first[2]])
  assert studies.fold(live, file) == 3
  assert by_name(studies.load(file)) == by_name(first[:3])


@pytest.mark.parametrize('key', ['test_error', 'train_loss'])
def test_other_numbers_of_the_same_run_are_refused(tmp_path, key):
  file = folded(tmp_path, some_records())
  before, (other, *_) = file.read_bytes(), some_records()
  other.metrics[0][key] = 77.0
  live = write_live(tmp_path / 'live', [other])
  with pytest.raises(StoreError, match=f'{other.run_id} has other numbers'):
    studies.fold(live, file)
  assert file.read_bytes() == before


@pytest.mark.parametrize(
  'part, change, message',
  [
    ('result.json', None, 'is not finished'),
    ('result.json', '{"paper_error": 1.0}', 'does not follow'),
    ('result.json', '[', 'is broken'),
    ('config.json', '[1]', 'config.json is not of version'),
  ],
)
def test_a_folder_that_is_not_whole_is_refused(live, tmp_path, part, change,
                                               message):  # fmt: skip
  path = next(live.iterdir()) / part
  path.unlink() if change is None else path.write_text(change)
  with pytest.raises(StoreError, match=message):
    studies.fold(live, tmp_path / 'study.jsonl')
  assert not (tmp_path / 'study.jsonl').exists()


def test_a_wrong_name_and_an_empty_folder_are_refused(live, tmp_path):
  next(live.iterdir()).rename(live / ('0' * 20))
  with pytest.raises(StoreError, match='does not follow'):
    studies.fold(live, tmp_path / 'study.jsonl')
  (tmp_path / 'none').mkdir()
  with pytest.raises(StoreError, match='has no runs'):
    studies.fold(tmp_path / 'none', tmp_path / 'study.jsonl')
  with pytest.raises(StoreError, match='no results folder'):
    studies.load(tmp_path / 'nowhere')


def set_line(**changes):
  return lambda line: {**line, **changes}


def set_epochs(**changes):
  return lambda line: {**line, 'epochs': {**line['epochs'], **changes}}


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda line: 'torn', 'Expecting value'),
    (lambda line: {k: v for k, v in line.items() if k != 'rule'},
     "'rule' is missing"),
    (set_line(dataset=9), 'dataset is 9, not an index'),
    (set_line(protocol=-1), 'protocol is -1, not an index'),
    (set_line(environment='0'), "environment is '0', not an index"),
    (set_line(epochs={}), 'no epochs'),
    (set_line(epochs=[]), 'no epochs'),
    (set_line(epochs={'test_error': 7}), 'not iterable'),
    (set_epochs(test_error=['x'] * 4), "test_error is 'x', not a finite"),
    (set_epochs(test_error=[None] * 4), 'test_error is None, not a finite'),
    (set_epochs(test_error=[1.0]), 'shorter|longer'),
    (set_line(seed=float('nan')), 'NaN is no number'),
    (set_line(diverged=None), 'diverged is None, not true or false'),
  ],
)  # fmt: skip
def test_a_broken_line_is_named_and_hides_no_other(live, tmp_path, change,
                                                   message):  # fmt: skip
  file = tmp_path / 'study.jsonl'
  studies.fold(live, file)
  lines = file.read_text().splitlines()
  changed = change(json.loads(lines[2]))
  lines[2] = changed if isinstance(changed, str) else json.dumps(changed)
  file.write_text('\n'.join(lines) + '\n')
  found = studies.load(file)
  bad = [made for made in found if made.problem is not None]
  assert (len(found), len(bad)) == (4, 1)
  assert bad[0].run_id == 'study.jsonl, line 3'
  assert re.search(message, bad[0].problem)
  before = file.read_bytes()
  with pytest.raises(StoreError, match='study.jsonl, line 3'):
    studies.fold(live, file)
  assert file.read_bytes() == before


@pytest.mark.parametrize(
  'head', ['', '{', '[]', '{"format": 2}', '{"format": 1, "datasets": 3}',
           '[' * 10_000],
)  # fmt: skip
def test_a_broken_head_is_named_and_hides_no_other_file(live, tmp_path, head):
  folder = tmp_path / 'folder'
  folder.mkdir()
  studies.fold(live, folder / 'good.jsonl')
  good = (folder / 'good.jsonl').read_text().split('\n', 1)[1]
  (folder / 'bad.jsonl').write_text(f'{head}\n{good}')
  bad, *others = sorted(studies.load(folder), key=lambda r: r.problem is None)
  assert bad.run_id == 'bad.jsonl'
  assert len(others) == 4
  with pytest.raises(StoreError, match='not a study file'):
    studies.load(folder / 'bad.jsonl')


def test_links_are_not_followed(live, tmp_path):
  studies.fold(live, tmp_path / 'study.jsonl')
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'link.jsonl').symlink_to(tmp_path / 'study.jsonl')
  (only,) = studies.load(folder)
  assert 'link' in only.problem


def test_a_run_of_several_files_is_there_once_or_named(live, tmp_path):
  for name in ('a', 'b'):
    studies.fold(live, tmp_path / f'{name}.jsonl')
  assert by_name(studies.load(tmp_path)) == by_name(some_records())
  file = tmp_path / 'b.jsonl'
  file.write_text(
    file.read_text().replace('"train_loss":[0.5', '"train_loss":[1')
  )
  found = studies.load(tmp_path)
  problems = [made for made in found if made.problem is not None]
  assert len(problems) == 4
  assert all('b.jsonl' in made.run_id for made in problems)
  good = [made for made in found if made.problem is None]
  assert by_name(good) == by_name(some_records())


def test_a_live_folder_may_hold_study_files(live, tmp_path):
  other = write_live(tmp_path / 'other', [record('BM', 9.0)])
  studies.fold(other, live / 'other.jsonl')
  assert len(studies.load(live)) == 5
  assert len(store.load(live)) == 4
