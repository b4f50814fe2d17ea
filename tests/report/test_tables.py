"""Tables: rows, flags, agreement with the paper, text, Markdown and CSV."""

import csv
import io

import pytest
from scipy import stats

from experiments import report
from experiments.paper import published as paper
from experiments.paper.conditions import TABLES
from experiments.report import markdown, statistics, text, tidy
from experiments.report.studies import gather
from experiments.report.tables import fill, flag, grids
from tests.report.records import cell, like_the_paper, record


def line_of(records, table, label):
  (study,) = gather(records).studies
  grid = fill(study, TABLES[table])
  return next(line for line in grid.lines if line.label == label)


@pytest.mark.parametrize(
  'error, expected',
  [(55.15, 'worse'), (55.14, ''), (52.15, ''), (49.15, 'better'), (49.16, '')],
)
def test_three_points_make_a_colour(error, expected):
  assert flag(error, 52.15) == expected


def test_a_difference_of_three_is_three_in_floating_point_too():
  assert 64.02 - 61.02 < 3
  assert flag(64.02, 61.02) == 'worse'


def test_no_baseline_no_colour():
  assert flag(90.0, None) == ''
  assert flag(None, 3.0) == ''


def test_flags_of_the_paper_are_those_printed_in_it():
  """Bold in the paper's tables (MNIST and SVHN of 4-C2, CIFAR100 of 5)."""
  line = line_of([record()], '4-C2', 'MNIST')
  assert [entry.flag_paper for entry in line.entries] == [
    '', 'worse', 'worse', 'worse', 'worse', 'worse', '', 'worse',
  ]  # fmt: skip
  line = line_of([record()], '4-C2', 'SVHN')
  assert [entry.flag_paper for entry in line.entries] == [
    '', 'worse', 'worse', 'worse', 'worse', 'worse', '', 'worse',
  ]  # fmt: skip
  line = line_of([record()], '5', 'CIFAR100')
  assert [entry.flag_paper for entry in line.entries] == [
    '', 'worse', 'worse', '', '', '', '', '',
  ]  # fmt: skip


def test_the_baseline_of_table_6_is_sgd_at_batch_100():
  records = cell('SGD', 10.0) + cell('SGD-5', 14.0) + cell('BM-5', 6.0)
  line = line_of(records, '6', 'MNIST')
  flags = {entry.condition: entry.flag for entry in line.entries}
  assert flags['SGD-5'] == 'worse'
  assert flags['BM-5'] == 'better'
  assert flags['SGD-100'] == ''


@pytest.mark.parametrize('table', TABLES)
def test_rows_are_the_papers_in_its_order_then_others(table):
  (study,) = gather(cell(TABLES[table].columns[-1], 9, dataset='zoo')).studies
  labels = [line.label for line in fill(study, TABLES[table]).lines]
  own = table not in ('3', '4-C1')  # their last columns are table 2's
  assert labels == [*paper.datasets(table), *(['zoo'] if own else [])]


def test_tables_appear_with_results_in_columns_of_their_own():
  (study,) = gather(cell('SGD', 5.0) + cell('uSF+BN', 5.0)).studies
  assert [grid.table.name for grid in grids(study)] == ['2']
  (study,) = gather(cell('RndF', 5.0)).studies
  assert [grid.table.name for grid in grids(study)] == ['4-C1']


def test_conditions_of_ones_own_get_a_table():
  (study,) = gather([record('uSF+BN', 5.0, rule='uSF-x')]).studies
  (grid,) = grids(study)
  assert grid.table.columns == ('uSF-x+BN',)
  assert grid.heading == "Other conditions. Not the paper's"


def test_columns_without_anything_to_show_are_left_out_of_the_terminal():
  shown = report.text_tables(cell('SGD', 5.0, dataset='digits'))
  assert 'SGD' in shown
  assert 'NuSF' not in shown
  assert 'NuSF' in report.text_tables(cell('SGD', 5.0))


def test_agreement_counts_shared_columns_and_equal_flags():
  # The paper's MNIST row: SGD .67, BM .99, uSF 88.65 (worse), NuSF .60.
  records = [
    *cell('SGD', 2.0), *cell('BM', 6.0), *cell('uSF', 80.0), *cell('NuSF', 1.0),
  ]  # fmt: skip
  found = line_of(records, '2', 'MNIST').agreement
  assert found.columns == 4
  assert found.rank == pytest.approx(1.0)
  assert (found.same_flags, found.flags) == (2, 3)  # BM is worse only here
  assert found.incomplete == 0


def test_agreement_without_baseline_has_no_flags():
  found = line_of(cell('BM', 1.0), '2', 'MNIST').agreement
  assert (found.columns, found.rank, found.flags) == (1, None, 0)


@pytest.mark.parametrize(
  'x, y', [([1, 2, 3, 4], [4, 1, 3, 2]), ([1, 1, 2, 5, 5], [3, 2, 2, 9, 1])]
)
def test_rank_correlation_is_scipys(x, y):
  expected = stats.spearmanr(x, y).statistic
  assert statistics.rank_correlation(x, y) == pytest.approx(expected)


def test_text_has_ours_beside_the_papers_and_marks():
  shown = report.text_tables([*cell('SGD', 2.0), *cell('uSF', 80.0)[:3]], ['2'])
  row = next(line for line in shown.splitlines() if line.startswith('MNIST'))
  expected = 'MNIST 2.00 | 0.67 | 0.99 | 0.52 | 0.73 80.00▲ | 88.65▲'
  assert ' '.join(row.split()).startswith(expected)
  assert '3/5 rates' in shown
  assert 'held-out' in shown
  assert 'No results yet: CIFAR, ' in shown
  assert 'rank correlation not defined over 2 columns' in shown


def test_text_lines_are_no_wider_than_asked():
  store = gather(like_the_paper(('MNIST',)))
  shown = text.tables(store, ['2', '3'], all_rows=True, width=90)
  lines = shown.splitlines()
  assert len(lines) > 60
  assert max(map(len, lines)) <= 90
  assert 'TIMIT80' in shown


def test_a_dataset_that_is_not_the_papers_is_labelled():
  records = cell('SGD', 5.0, dataset='digits')
  assert "digits (not the paper's)" in report.text_tables(records)
  assert "digits (not the paper's)" in markdown.tables(gather(records))


def test_a_part_of_a_datasets_classes_is_not_the_papers_dataset():
  """Ten classes are easier to tell apart than 102."""
  records = [
    *cell('SGD', 30.0, dataset='Cal256-101', digest='d1', chance=90.0),
    *cell('SGD', 70.0, dataset='Cal256-101', digest='d2'),
  ]
  part = line_of(records, '2', 'Cal256-101 (10 classes)').entries[0]
  assert (part.best_validation.mean, part.paper) == (30.0, None)
  whole = line_of(records, '2', 'Cal256-101').entries[0]
  assert whole.best_validation.mean == 70.0
  assert whole.paper == paper.by_condition()['Cal256-101', 'SGD']
  shown = report.text_tables(records)
  assert "Cal256-101 (10 classes) (not the paper's)" in shown


def test_an_unknown_table_is_refused_by_name():
  with pytest.raises(ValueError, match="unknown table '7'"):
    report.text_tables(cell('SGD', 5.0), ['7'])


def test_csv_has_a_line_per_cell_of_ours_and_of_the_papers():
  records = [r for s in (0, 1) for r in cell('SGD', 2.0 + s, seed=s)]
  rows = list(csv.DictReader(io.StringIO(tidy.text(gather(records)))))
  published = {key: error for key, error in paper.errors().items()}
  assert len(rows) == len(published)
  for row in rows:
    key = row['table'], row['dataset'], row['condition']
    assert float(row['paper']) == published[key]
  sgd = next(r for r in rows if r['ours_best_validation'])
  assert (sgd['table'], sgd['dataset'], sgd['condition']) == (
    '2', 'MNIST', 'SGD',
  )  # fmt: skip
  assert float(sgd['ours_best_validation']) == 2.5
  assert 2.0 <= float(sgd['interval_low']) < float(sgd['interval_high']) <= 3
  assert (sgd['seeds'], sgd['runs'], sgd['expected_runs']) == ('2', '10', '10')
  assert (sgd['best_rate'], sgd['best_epoch']) == ('1', '4')


def test_markdown_shows_names_as_they_are():
  name = 'a|b <i>*c*</i> [d](e)'
  shown = markdown.tables(gather(cell('SGD', 5.0, dataset=name)))
  assert r'a\|b &lt;i&gt;\*c\*&lt;/i&gt; \[d\](e)' in shown
  assert '<i>' not in shown
