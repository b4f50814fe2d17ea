"""The page: answers first, every cell's runs, alignment, folded extras."""

import re

import pytest

from experiments.paper.conditions import COLUMNS, FAMILY
from experiments.report import frame, plain
from experiments.terminal import as_typed
from tests.report.records import cell

NBSP = '\N{NO-BREAK SPACE}'


def answers(*records):
  found = plain.answers(frame.read(records))
  return [answer.replace(NBSP, ' ') for answer in found]


@pytest.mark.parametrize(
  'errors, sentence',
  [
    ({'SGD': 5.56, 'uSF': 90.0, 'uSF+BN': 5.84, 'uSF+BN+BM': 0.833},
     'uSF alone stays at chance; with batch norm 5.8 %; with batch norm and '
     'Batch Manhattan 0.83 %; backpropagation 5.6 %'),
    ({'uSF+BM': 12.34, 'RndF': 87.1, 'RndF+BN': 86.9},
     'uSF with Batch Manhattan 12.3 %; random feedback alone stays at chance; '
     'with batch norm 86.9 %'),
    ({'RndF+BN': 7.0}, 'random feedback with batch norm 7.0 %'),
    ({'SGD': 1.0}, 'backpropagation 1.0 %'),
    ({'BM': 2.0}, 'BM 2.0 %'),
    ({'BM': 2.0, 'BN': 1.0},
     'of 2 conditions BN has the lowest error: 1.0 %'),
  ],
)  # fmt: skip
def test_a_dataset_has_its_answer_in_a_sentence(errors, sentence):
  records = [r for name, error in errors.items() for r in cell(name, error)]
  assert answers(*records) == [f'MNIST (4 epochs): {sentence}.']


def test_an_answer_is_of_the_fullest_row_and_says_what_is_missing():
  assert answers(
    *cell('SGD', 5.0, epochs=9),
    *cell('SGD', 7.0)[:3], *cell('uSF', 89.0),
    *cell('uSF', 80.0, dataset='CIFAR'), *cell('uSF', 70.0, epochs=3),
    *cell('uSF', 1.0, weight_decay=0.0), *cell('SGD', 1.0, weight_decay=0.0),
    *cell('BM', 2.0, dataset='zoo', weight_decay=0.0),
  ) == [
    'MNIST (4 epochs): uSF stays at chance; backpropagation 7.0 % (3/5 rates).',
    'CIFAR (4 epochs): uSF 80.0 %.',
    'zoo (4 epochs, weight decay 0): BM 2.0 %.',
  ]  # fmt: skip


def test_an_answer_prefers_training_to_a_quarter_of_the_conditions():
  names = ('SGD', 'uSF', 'uSF+BN', 'uSF+BM')
  fuller = [r for name in names for r in cell(name, 7.0)]
  for longer, epochs in ((names[:3], 9), (names[:2], 4)):
    records = [r for name in longer for r in cell(name, 5.0, epochs=9)]
    assert answers(*fuller, *records)[0].startswith(f'MNIST ({epochs} epochs)')


def test_every_condition_is_told_apart_in_a_line():
  others = [*FAMILY, 'LowRank16', 'Adam']
  lines = plain.glossary([*COLUMNS, *others])
  contents = {column.conditions for column in COLUMNS.values()}
  assert len(set(lines.values())) == len(contents) + len(others)
  assert '50%' in lines['brSF-50%+BN+BM']
  assert 'redrawn' in lines['brSF-50%+BN+BM']
  assert plain.glossary(['uSF-x']) == {
    'uSF-x': "not one of the paper's conditions"
  }


def between(text, start, end):
  return text.split(start, 1)[1].split(end, 1)[0]


def test_answers_come_first_and_the_rest_in_order(page):
  body = page.split('<body>')[1]
  marks = (
    'uSF alone stays at chance', '<dt>uSF+BN</dt>', 'href="#cell-',
    "The paper's own table, 15 rows", 'Learning curves</h2>',
    'id="alignment"', 'id="claims"', 'need more runs', 'id="runs"', 'id="made"',
  )  # fmt: skip
  places = [body.index(mark) for mark in marks]
  assert places == sorted(places)


def test_only_ones_own_rows_and_conditions_are_open(page):
  table = between(page, '<h3>Table 2.', '</table>')
  heads = re.findall('<th>([^<]*)</th>', between(table, '<thead>', '</thead>'))
  assert heads == [
    'dataset', 'SGD', 'BN', 'uSF', 'uSF+BN', 'uSF+BN+BM', 'brSF+BN+BM',
    'beside the paper',
  ]  # fmt: skip
  rows = between(table, '<tbody>', '</tbody>')
  names = re.findall('<tr><th><span class="name">(.*?)<', rows)
  assert (names[:3], len(names)) == (['MNIST', 'CIFAR', 'CIFAR'], 6)
  folded = between(page, "<details><summary>The paper's own", '</details>')
  assert '<span class="name">CIFAR100</span>' in folded
  assert '40.60' in folded  # NuSF on CIFAR, of which there is no run


def test_claims_that_are_decided_are_open_and_others_folded(page):
  claims = between(page, 'id="claims"', '<h2>')
  decided, folded = claims.split('<details><summary>4 epochs: ')
  assert 'Normalization is necessary: uSF without BN and BM fails.' in decided
  assert 'verdict open' not in decided
  assert 'Batch Manhattan degrades with small batches.' in folded
  assert 'Needs all rates of BM-5, BM-100.' in folded
  assert 'verdict' not in folded


def test_a_cell_leads_to_its_runs_and_the_commands_that_repeat_them(page):
  link = re.search('href="#(cell-[0-9]+)" title="uSF\\+BN: ([^"]*)"', page)
  seeds = 'seed 0: rate 1, epoch 4; seed 1: rate 1, epoch 4'
  assert link[2] == f'10/10 runs; {seeds}'
  cell_ = between(page, f'id="{link[1]}"', '<details class="cell"')
  command = 'python -m experiments run --dataset MNIST --condition uSF+BN'
  command = as_typed(command)
  assert f'<pre>{command} --seed 0 1 --epochs 4</pre>' in cell_
  assert cell_.count('<tr><td>0</td>') == 5
  for seed in ('', ' --seed 1'):
    assert f'<pre>{command} --rate 100{seed} --epochs 4</pre>' in cell_
