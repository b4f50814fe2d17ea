"""Bad records: named, left out, never fatal; no records: how to make some."""

import dataclasses
import re

import pytest

from experiments import report
from experiments.report.frame import EmptyReportError, read
from tests.report.records import cell, record


@pytest.mark.parametrize('function', [report.text_tables, report.claims_text])
def test_no_records_is_an_error_that_says_how_to_make_some(function, tmp_path):
  with pytest.raises(EmptyReportError, match='python -m experiments demo'):
    function([])
  with pytest.raises(EmptyReportError, match='no runs'):
    report.write_report([], tmp_path / 'report')
  assert not (tmp_path / 'report').exists()
  bad = dataclasses.replace(record(), problem='torn')
  with pytest.raises(EmptyReportError, match=bad.run_id):
    function([bad])


@pytest.mark.parametrize(
  'where, value, message',
  [
    ('config', 'torn', "config is 'torn', not an object"),
    ('config.dataset', KeyError, 'config.dataset is missing'),
    ('config.rule', 3, 'config.rule is 3, not a text'),
    ('config.seed', '0', "config.seed is '0', not an integer"),
    ('config.seed', True, 'config.seed is True, not an integer'),
    ('config.epochs', None, 'config.epochs is None, not an integer'),
    ('config.rate', 'ten', "config.rate is 'ten', not a finite"),
    ('config.rate', float('nan'), 'config.rate is nan, not a finite'),
    ('config.batch_plan', [], r'config.batch_plan is \[\], not a list of'),
    ('config.batch_plan', [['x', 1]], 'config.batch_plan is .* not a list of'),
    ('config.batch_plan', 'xy', "config.batch_plan is 'xy', not a list"),
    ('config.batch_plan', KeyError, 'config.batch_plan is missing'),
    ('result', [1], r'result is \[1\], not an object'),
    ('result.best_test_error', KeyError, 'result.best_test_error is missing'),
    ('result.best_test_error', '5', "best_test_error is '5', not a finite"),
    ('result.chance_error', None, 'result.chance_error is None'),
    ('result.chance_error', 100.0, 'result.chance_error is 100.0, not an'),
    ('result.train_images', 'all', "result.train_images is 'all'"),
    ('result.diverged', 'no', "result.diverged is 'no', not true or false"),
    ('result.held_out_epoch', 1.5, 'result.held_out_epoch is 1.5, not an int'),
    ('metrics', 'torn', "metrics is 'torn', not a list"),
    ('metrics', [], 'it has a result, but no epochs'),
    ('metrics.epoch', KeyError, r'metrics\[0\].epoch is missing'),
    ('metrics.test_error', 'x', r"metrics\[0\].test_error is 'x', not a"),
    ('metrics.layers', [], r'metrics\[0\].layers is \[\], not an object'),
    ('metrics.layers', {'a': 3}, r'\[0\].layers.a is 3, not an object'),
    ('metrics.layers', {'a': {'angle': 'x'}}, "layers.a.angle is 'x', not a"),
    ('environment', ['x'], r"environment is \['x'\], not an object"),
    ('problem', 'no\x1b JSON', 'no\N{REPLACEMENT CHARACTER} JSON'),
  ],
)
def test_a_bad_record_is_left_out_and_named(where, value, message):
  part, _, field = where.partition('.')
  bad = record('BM', 5.0)
  if not field:
    bad = dataclasses.replace(bad, **{part: value})
  else:
    holder = getattr(bad, part)
    holder = holder[0] if part == 'metrics' else holder
    holder.pop(field) if value is KeyError else holder.update({field: value})
  results = read([bad, *cell('SGD', 2.0)])
  (warning,) = results.warnings
  assert warning.startswith(f'run {bad.run_id} is left out: ')
  assert re.search(message, warning)
  assert len(results.runs) == 5


def test_many_warnings_are_counted():
  torn = [
    dataclasses.replace(record(seed=seed), problem='torn') for seed in range(25)
  ]
  *named, counted = read([*torn, *cell('SGD', 2.0)]).warnings
  assert len(named) == 20
  assert counted == '5 more of the runs are left out'
