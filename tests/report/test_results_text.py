"""RESULTS.md: what does not agree with the paper; protocols side by side."""

import re

from experiments import report
from tests.report.records import cell


def test_what_does_not_agree_is_said():
  records = [*cell('SGD', 2.0), *cell('uSF', 3.0), *cell('BM', 9.0)]
  text = report.results_markdown(records)
  assert (
    'Less training than in the paper: 4 epochs instead of 65, 10 % of the '
    'training images held out.' in text.replace('\\', '')
  )
  assert (
    '- **Protocol 1: 4 epochs, all training images**: MNIST; 15 runs. Of 2 '
    "statements these runs decide, 0 have the verdict that the paper's own"
  ) in text
  assert 'Of 2 cells with a baseline 2 stand otherwise to it' in text
  assert 'MNIST uSF (alike, in the paper worse)' in text
  assert 'uSF without BN and BM fails.' in text
  assert 'does not hold \\(MNIST\\)' in text or 'does not hold (MNIST)' in text


def test_without_a_baseline_no_cell_stands_to_it():
  alone = report.results_markdown([*cell('BN', 2.0), *cell('uSF', 90.0)])
  assert 'baseline none' not in alone
  assert 'stand otherwise' not in alone
  assert 'stand otherwise' not in report.results_markdown(cell('SGD', 60.0))


def test_a_condition_of_several_names_is_compared_once():
  # In Tables 2, 5 and 6.
  text = report.results_markdown([*cell('SGD', 2.67), *cell('BM', 3.99)])
  assert 'Of 1 cell with a baseline none stands otherwise to it' in text
  assert 'Our errors are 2.50 points' in text
  assert 'of 2 cells, farthest in' in text


def test_protocols_stand_side_by_side(tmp_path):
  records = [
    *cell('SGD', 2.0),
    *cell('BM', 3.0),
    *cell('SGD', 1.5, epochs=9, weight_decay=0.0),
    *cell('BM', 2.5, epochs=9, weight_decay=0.0)[:4],
    *cell('SGD', 9.0, dataset='CIFAR'),
  ]
  report.write_report(records, tmp_path)
  page = (tmp_path / 'report.html').read_text()
  assert 'weight decay 0.0</th><td>1.50</td>' in page
  text = (tmp_path / 'RESULTS.md').read_text()
  part = text.split('side by side')[1].split('## Protocol 1')[0]
  (table,) = re.findall(r'(?:^\|.*\n)+', part, re.MULTILINE)
  assert table.splitlines() == [
    '| MNIST | SGD |',
    '| --- | --- |',
    '| Protocol 1: 4 epochs, all training images | 2.00 |',
    '| Protocol 2: 9 epochs, all training images, weight decay 0.0 | 1.50 |',
    "| the paper's numbers | 0.67 |",
  ]
  assert 'side by side' not in report.results_markdown(cell('SGD', 2.0))


def test_what_is_more_stands_in_rows_of_protocols_and_conditions():
  names = ('SGD', 'BM', 'BN', 'uSF')
  records = [
    made
    for epochs in (4, 9)
    for error, name in enumerate(names, epochs)
    for made in cell(name, float(error), epochs=epochs)
  ]
  text = report.results_markdown(records)
  (table,) = re.findall(r'(?:^\|.*\n)+', text.split('## Protocol 1')[0], re.M)
  first, second = (
    f'Protocol {number}: {epochs} epochs, all training images'
    for number, epochs in ((1, 4), (2, 9))
  )
  assert table.splitlines() == [
    f"| MNIST | {first} | {second} | the paper's numbers |",
    '| --- | --- | --- | --- |',
    '| SGD | 4.00 | 9.00 | 0.67 |',
    '| BM | 5.00 | 10.00 | 0.99 |',
    '| BN | 6.00 | 11.00 | 0.52 |',
    '| uSF | 7.00 | 12.00 | 88.65 |',
  ]


def test_copies_of_a_dataset_stand_side_by_side_with_the_paper():
  records = [
    *cell('SGD', 2.0, digest='d1'),
    *cell('SGD', 3.0, digest='d2'),
    *cell('SGD', 1.5, digest='d1', epochs=9),
  ]
  text = report.results_markdown(records)
  (table,) = re.findall(r'(?:^\|.*\n)+', text.split('## Protocol 1')[0], re.M)
  assert table.splitlines()[2:] == [
    '| Protocol 1: 4 epochs, all training images \\[d1\\] | 2.00 |',
    '| Protocol 1: 4 epochs, all training images \\[d2\\] | 3.00 |',
    '| Protocol 2: 9 epochs, all training images | 1.50 |',
    "| the paper's numbers | 0.67 |",
  ]
