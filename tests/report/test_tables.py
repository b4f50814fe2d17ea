"""Tables: rows, flags, agreement with the paper, text and CSV."""

import csv
import io
import re

import pytest
from scipy import stats

from experiments import report
from experiments.paper import published as paper
from experiments.paper import statistics
from experiments.paper.conditions import TABLES
from experiments.report import frame, tables
from tests.report.records import cell, like_the_paper, record


def grids(records, names=None):
  return tables.grids(frame.read(records), names)


def line_of(records, table, label):
  (grid,) = grids(records, [table])
  return next(line for line in grid.lines if line.label == label)


@pytest.mark.parametrize(
  'error, baseline, expected',
  [
    (55.15, 52.15, 'worse'),
    (55.14, 52.15, ''),
    (49.15, 52.15, 'better'),
    (49.16, 52.15, ''),
    (64.02, 61.02, 'worse'),  # less than 3 in floating point
    (90.0, None, ''),
    (None, 3.0, ''),
  ],
)
def test_three_points_make_a_color(error, baseline, expected):
  assert tables.flag(error, baseline) == expected


@pytest.mark.parametrize(
  'table, dataset, worse',
  [
    ('4-C2', 'MNIST', '.wwwww.w'),
    ('4-C2', 'SVHN', '.wwwww.w'),
    ('5', 'CIFAR100', '.ww.....'),
  ],
)
def test_flags_of_the_paper_are_those_printed_in_it(table, dataset, worse):
  entries = line_of([record()], table, dataset).entries
  flags = ''.join((entry.flag_paper or '.')[0] for entry in entries)
  assert flags == worse


@pytest.mark.parametrize('table', TABLES)
def test_ours_come_first_then_the_papers_rows_in_its_order(table):
  column = TABLES[table].columns[-1]
  records = [
    r for name in ('zoo', 'CIFAR') for r in cell(column, 9, dataset=name)
  ]
  (grid,) = grids(records, [table])
  others = [name for name in paper.datasets(table) if name != 'CIFAR']
  assert [line.label for line in grid.lines] == [
    'CIFAR', "zoo (not the paper's)", *others,
  ]  # fmt: skip


def test_tables_appear_with_results_in_columns_of_their_own():
  found = grids(cell('SGD', 5.0) + cell('uSF+BN', 5.0))
  assert [grid.table.name for grid in found] == ['2']
  assert [grid.table.name for grid in grids(cell('RndF', 5.0))] == ['4-C1']
  # A protocol appears only in the tables for which it has such results.
  records = [*cell('SGD', 5.0), *cell('RndF', 5.0, epochs=9)]
  names = {grid.name: [line.title for line in grid.lines if line.ours]
           for grid in grids(records)}  # fmt: skip
  assert names == {
    'Table 2': ['MNIST, 4 epochs'],
    'Table 4-C1': ['MNIST, 9 epochs'],
  }


def test_conditions_of_ones_own_get_a_table():
  (grid,) = grids([record('uSF+BN', 5.0, rule='uSF-x')])
  assert grid.table.columns == ('uSF-x+BN',)
  assert grid.name == 'Other conditions'


def test_agreement_counts_shared_columns_and_equal_flags():
  # The paper's MNIST row: SGD .67, BM .99, uSF 88.65 (worse), NuSF .60.
  records = [
    *cell('SGD', 2.0), *cell('BM', 6.0), *cell('uSF', 80.0),
    *cell('NuSF', 1.0)[:3],
  ]  # fmt: skip
  assert line_of(records, '2', 'MNIST').agreement == [
    'rank correlation 1.00',
    'same marks 2 of 3',  # BM is worse only here
    '1 of 4 cells incomplete',
  ]
  assert line_of(cell('BM', 1.0), '2', 'MNIST').agreement == []


@pytest.mark.parametrize(
  'x, y', [([1, 2, 3, 4], [4, 1, 3, 2]), ([1, 1, 2, 5, 5], [3, 2, 2, 9, 1])]
)
def test_rank_correlation_is_scipys(x, y):
  expected = stats.spearmanr(x, y).statistic
  assert statistics.rank_correlation(x, y) == pytest.approx(expected)


def test_text_has_ours_beside_the_papers_and_marks():
  records = [r for s in (0, 1) for r in cell('SGD', 2.0 + s, seed=s)]
  records += cell('uSF', 80.0)[:3]
  shown = report.text_tables(records, ['2'])
  lines = {line[:12].strip(): ' '.join(line[12:].split())
           for line in reversed(shown.splitlines())}  # fmt: skip
  assert lines['MNIST'] == '2.50 | 0.67 80.00▲ | 88.65▲'
  assert lines['95 %'] == '[2.00, 3.00]'
  assert lines['incomplete'] == '3/5 rates'
  assert 'held-out' in lines


def test_a_terminal_shows_the_conditions_that_were_run_and_explains_no_more():
  shown = report.text_tables(cell('SGD', 5.0, dataset='digits'))
  assert "digits (not the paper's)" in shown
  for absent in ('NuSF', 'CIFAR', '▲', '[', ' | '):
    assert absent not in shown
  shown = report.text_tables([*cell('SGD', 5.0), *cell('uSF', 80.0)])
  assert 'NuSF' not in shown
  assert '▲: 3 points or more worse' in shown
  assert "ours | the paper's" in shown


@pytest.mark.parametrize('width', [60, 160])
def test_text_lines_are_no_wider_than_the_terminal(width):
  records = [
    *like_the_paper(('MNIST',), seeds=2),
    *cell('SGD', 4.0, epochs=9),
    *cell('BM', 4.0, dataset='CIFAR'),
  ]
  lines = report.text_tables(records, ['2', '3'], width).splitlines()
  assert len(lines) > 50
  assert max(map(len, lines)) <= width
  assert '9 epochs' in lines
  words = {word for line in lines for word in line.split()}
  assert {'brSF-50%+BN+BM', 'uSF+BN+BM', 'MNIST'} <= words


def test_a_table_too_wide_becomes_a_list_of_what_each_row_has():
  records = [*like_the_paper(('MNIST',)), *cell('BM', 4.0, dataset='CIFAR')]
  text = report.text_tables(records, ['2'], 80)
  (rest,) = re.findall(r'\nCIFAR\n(.*?)\n\S', text, re.DOTALL)
  assert [line.split() for line in rest.splitlines()] == [
    ['best', 'held-out'],
    ['BM', '4.00', '|', '23.98', '4.00'],
  ]


def test_a_part_of_a_datasets_classes_is_not_the_papers_dataset():
  """Ten classes are easier to tell apart than 102."""
  records = [
    *cell('SGD', 30.0, dataset='Cal256-101', digest='d1', chance=90.0),
    *cell('SGD', 70.0, dataset='Cal256-101', digest='d2'),
  ]
  label = "Cal256-101 (10 classes) (not the paper's)"
  part = line_of(records, '2', label).entries[0]
  assert (part.best.mean, part.paper) == (30.0, None)
  whole = line_of(records, '2', 'Cal256-101').entries[0]
  assert whole.best.mean == 70.0
  assert whole.paper == paper.by_condition()['Cal256-101', 'SGD']


def test_csv_has_a_line_per_cell_of_ours_and_of_the_papers():
  records = [r for s in (0, 1) for r in cell('SGD', 2.0 + s, seed=s)]
  text = tables.as_frame(frame.read(records)).to_csv(index=False)
  rows = list(csv.DictReader(io.StringIO(text)))
  published = paper.errors()
  assert len(rows) == len(published)
  for row in rows:
    key = row['table'], row['dataset'], row['condition']
    assert float(row['paper']) == published[key]
  first = next(row for row in rows if row['best_test_error'])
  names = ('table', 'dataset', 'protocol', 'condition')
  assert [first[name] for name in names] == ['2', 'MNIST', '4 epochs', 'SGD']
  assert float(first['best_test_error']) == 2.5
  assert (float(first['low']), float(first['high'])) == (2.0, 3.0)
  names = ('seeds', 'runs', 'expected_runs', 'best_rate', 'best_epoch')
  assert [first[name] for name in names] == ['2', '10', '10', '1', '4']


def test_other_settings_stand_beside_the_usual_ones_over_shared_seeds():
  records = [
    *cell('SGD', 2.0),
    *cell('SGD', 8.0, seed=1),
    *cell('BM', 3.0),
    *cell('SGD', 1.5, weight_decay=0.0),
    *cell('BM', 2.5, weight_decay=0.0)[:4],
    *cell('SGD', 9.0, epochs=9),
    *cell('SGD', 9.0, dataset='CIFAR'),
    *cell('SGD', 2.0, layer_metrics=True),  # the same runs, recorded
  ]
  ((dataset, table),) = tables.settings(frame.read(records)).items()
  assert dataset == 'MNIST'
  assert table.to_dict('index') == {
    '4 epochs': {'SGD': 2.0},
    '4 epochs, weight decay 0': {'SGD': 1.5},
    "the paper's numbers": {'SGD': 0.67},
  }
  assert not tables.settings(frame.read(cell('SGD', 2.0)))
