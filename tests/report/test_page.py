"""The page: answers first, every cell's runs, alignment, folded extras."""

import re

import pytest

from experiments import report
from experiments.paper.conditions import COLUMNS, FAMILY
from experiments.report import frame, plain, plots
from experiments.terminal import as_typed
from tests.report.records import cell, like_the_paper, record

NBSP = '\N{NO-BREAK SPACE}'
LAYERS = {
  'conv': {'concordance': 0.75, 'angle': 40.0, 'update_angle': None},
  'output': {'concordance': 1.0, 'angle': 30.0, 'error_angle': 0.0},
}


def with_layers(records, layers=None):
  for made in records:
    for line in made.metrics:
      line['layers'] = layers or LAYERS
  return records


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


@pytest.fixture(name='page', scope='module')
def _page(tmp_path_factory):
  records = [
    *like_the_paper(('MNIST',), only=('SGD', 'uSF', 'uSF+BN+BM')),
    *with_layers(cell('uSF+BN', 2.0)),
    *cell('BM', 1.5)[:2],
    record('SGD', 3.0, seed=1),
  ]
  folder = tmp_path_factory.mktemp('page')
  report.write_report(records, folder)
  return (folder / 'report.html').read_text()


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
    'dataset', 'SGD', 'BM', 'uSF', 'uSF+BN', 'uSF+BN+BM', 'beside the paper',
  ]  # fmt: skip
  rows = between(table, '<tbody>', '</tbody>')
  assert re.findall('<tr><th><span class="name">(.*?)<', rows) == ['MNIST']
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
  link = re.search(
    'href="#(cell-[0-9]+)" title="uSF\\+BN: ([^"]*)"', page
  )  # fmt: skip
  assert link[2] == '5/5 runs; seed 0: rate 1, epoch 4'
  cell_ = between(page, f'id="{link[1]}"', '<details class="cell"')
  command = 'python -m experiments run --dataset MNIST --condition uSF+BN'
  command = as_typed(command)
  assert f'<pre>{command} --epochs 4</pre>' in cell_
  assert cell_.count('<tr><td>0</td>') == 5
  assert f'<pre>{command} --rate 100 --epochs 4</pre>' in cell_


def test_alignment_is_drawn_by_layer_and_epoch(monkeypatch):
  found = {}
  monkeypatch.setattr(
    plots, 'picture', lambda figure, name, _: found.update({name: figure})
  )
  same = {'conv': {'concordance': 1.0, 'angle': 0.0, 'norm_ratio': 1.0}}
  other = {'conv': {'concordance': 0.25, 'angle': 60.0, 'norm_ratio': 20.0}}
  results = frame.read([
    *with_layers(cell('SGD', 1.0), same),
    *with_layers(cell('RndF', 5.0)),
    *with_layers(cell('RndF', 6.0, seed=1), other),
    *cell('BM', 2.0),
  ])  # fmt: skip
  (row,) = results.main_rows
  plots.alignment(results, row)
  (figure,) = found.values()
  assert [axes.get_ylabel() for axes in figure.axes] == ['RndF', *[''] * 4]
  norms, signs, angles, updates, _ = figure.axes
  assert list(norms.lines[0].get_ydata()) == [20.0] * 4
  assert norms.get_yscale() == 'log'
  lines = [list(line.get_ydata()) for line in signs.lines]
  assert lines == [[0.5] * 4, [1.0] * 4, [0.5, 0.5]]  # the last: unrelated
  assert list(angles.lines[0].get_ydata()) == [50.0] * 4
  assert list(signs.lines[0].get_xdata()) == [1, 2, 3, 4]
  assert all(value != value for value in updates.lines[0].get_ydata())
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names[:2] == ['conv', 'output']
  assert plots.alignment(frame.read(cell('RndF', 5.0)), row) is None


@pytest.mark.parametrize(
  'layers, message',
  [
    ([], r'metrics\[0\].layers is \[\], not an object'),
    ({'a': 3}, r'metrics\[0\].layers.a is 3, not an object'),
    ({'a': {'angle': 'x'}}, r"metrics\[0\].layers.a.angle is 'x', not a fin"),
  ],
)
def test_bad_layers_are_named(layers, message):
  bad = record('BM', 5.0)
  bad.metrics[0]['layers'] = layers
  (warning,) = frame.read([bad, *cell('SGD', 2.0)]).warnings
  assert re.search(message, warning)
