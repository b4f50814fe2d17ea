"""Torn records: named, left out, never fatal; an empty store says so."""

import dataclasses
import re

import pytest

from experiments import report
from experiments.report.frame import EmptyReportError, read
from tests.report.records import cell, record


@pytest.mark.parametrize('function', [report.text_tables, report.claims_text])
def test_no_records_says_how_to_fill_it(function):
  with pytest.raises(EmptyReportError, match='python -m experiments demo'):
    function([])


def test_no_records_writes_nothing(tmp_path):
  with pytest.raises(EmptyReportError, match='no runs'):
    report.write_report([], tmp_path / 'report')
  assert not (tmp_path / 'report').exists()


def broken(part, field, value):
  made = record('BM', 5.0)
  holder = {'config': made.config, 'result': made.result,
            'metrics': made.metrics[0]}[part]  # fmt: skip
  if value is KeyError:
    del holder[field]
  else:
    holder[field] = value
  return made


@pytest.mark.parametrize(
  'part, field, value, message',
  [
    ('config', 'dataset', KeyError, 'config.dataset is missing'),
    ('config', 'rule', 3, 'config.rule is 3, not a text'),
    ('config', 'seed', '0', "config.seed is '0', not an integer"),
    ('config', 'seed', True, 'config.seed is True, not an integer'),
    ('config', 'rate', 'ten', "config.rate is 'ten', not a finite"),
    ('config', 'rate', float('nan'), 'config.rate is nan, not a finite'),
    ('config', 'batch_plan', [], r'config.batch_plan is \[\], not a list'),
    ('config', 'batch_plan', 'xy', "config.batch_plan is 'xy', not a list"),
    ('config', 'batch_plan', KeyError, 'config.batch_plan is missing'),
    ('result', 'paper_error', KeyError, 'result.paper_error is missing'),
    ('result', 'paper_error', '5', "result.paper_error is '5', not a finite"),
    ('result', 'paper_error', None, 'result.paper_error is None, not a finite'),
    ('result', 'chance_error', None, 'result.chance_error is None'),
    ('result', 'chance_error', 100.0, 'result.chance_error is 100.0, not an'),
    ('result', 'train_images', 'all', "result.train_images is 'all'"),
    ('result', 'diverged', 'no', "result.diverged is 'no', not true or false"),
    ('result', 'honest_epoch', 1.5, 'result.honest_epoch is 1.5, not an int'),
    ('metrics', 'epoch', KeyError, r'metrics\[0\].epoch is missing'),
    ('metrics', 'test_error', 'x', r"metrics\[0\].test_error is 'x', not a"),
  ],
)
def test_a_torn_record_is_left_out_and_named(part, field, value, message):
  bad = broken(part, field, value)
  store = read([bad, *cell('SGD', 2.0)])
  (warning,) = store.warnings
  assert warning.startswith(f'run {bad.run_id} is left out: ')
  assert re.search(message, warning)
  assert len(store.runs) == 5
  shown = report.text_tables([bad, *cell('SGD', 2.0)])
  assert warning in shown


@pytest.mark.parametrize('part', ['config', 'metrics', 'result'])
def test_parts_of_a_wrong_type_are_named(part):
  bad = dataclasses.replace(record('BM', 5.0), **{part: 'torn'})
  (warning,) = read([bad, *cell('SGD', 2.0)]).warnings
  assert f"{part} is 'torn', not " in warning


def test_many_warnings_are_counted():
  torn = [
    dataclasses.replace(record(seed=seed), problem='torn') for seed in range(25)
  ]
  *named, counted = read([*torn, *cell('SGD', 2.0)]).warnings
  assert len(named) == 20
  assert all(warning.endswith('left out: torn') for warning in named)
  assert counted == '5 more of the runs are left out'


def test_warnings_are_in_every_file(tmp_path):
  bad = broken('result', 'paper_error', '<b>5</b>')
  report.write_report([bad, *cell('SGD', 2.0)], tmp_path)
  for name in ('report.html', 'RESULTS.md', 'tables.txt', 'claims.txt'):
    text = (tmp_path / name).read_text()
    assert bad.run_id in text, name
  assert '<b>5' not in (tmp_path / 'report.html').read_text()


def test_when_all_records_are_torn_the_error_names_them():
  bad = broken('result', 'paper_error', 'x')
  with pytest.raises(EmptyReportError, match=bad.run_id):
    report.text_tables([bad])


def test_missing_losses_and_extra_keys_are_no_trouble():
  made = record('SGD', 2.0)
  made.metrics[0].update(test_loss=None, layers={'conv': {'angle': 1.0}})
  made.result['extra'] = 'x'
  assert read([made]).warnings == []


def test_control_characters_never_reach_the_terminal():
  shown = report.text_tables(cell('SGD', 5.0, dataset='a\x1b[31mb\nc'))
  assert '\x1b' not in shown
  assert 'a�[31mb�c' in shown
