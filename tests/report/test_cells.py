"""Two results of a cell, its completeness, and which cells a run belongs to."""

import dataclasses

import pytest

from experiments.paper.conditions import COLUMNS
from experiments.report import commands
from experiments.report.frame import read
from tests.report.records import cell, record


def cells(records):
  """The cells of the records' only protocol by label and condition."""
  found = read(records).cells
  assert len({protocol for protocol, *_ in found}) == 1
  return {(label, name): cell for (_, label, name), cell in found.items()}


@pytest.mark.parametrize(
  'records, best, held_out, mark',
  [
    # Rates: the lowest error; the run that the held-out part chose.
    ([record(error=4.0, rate=1.0, held_out=4.5, holdout=7.0),
      record(error=5.0, rate=10.0, held_out=6.5, holdout=3.0)],
     {0: 4.0}, {0: 6.5}, '2/5 rates'),
    # Ties: the highest rate.
    ([record(error=4.0, rate=rate, held_out=rate, holdout=3.0)
      for rate in (0.1, 10.0, 1.0)],
     {0: 4.0}, {0: 10.0}, '3/5 rates'),
    # Seeds.
    ([record(error=9.0, seed=0), record(error=4.0, rate=10.0, seed=0),
      record(error=8.0, seed=1), record(error=12.0, rate=10.0, seed=1)],
     {0: 4.0, 1: 8.0}, {0: 4.0, 1: 12.0}, '4/10 runs'),
    # Incomplete seeds do not count beside complete ones.
    ([*cell('SGD', 5.0), *cell('SGD', 1.0, seed=1)[:2]],
     {0: 5.0}, {0: 5.0}, '7/10 runs'),
    # Rates other than the paper's do not complete a cell.
    ([*cell('SGD', 5.0)[:4], record(error=1.0, rate=3.0, holdout=99.0)],
     {0: 1.0}, {0: 5.0}, '4/5 rates'),
    # Unfinished runs are not results.
    ([dataclasses.replace(record(), result=None)], {}, {}, '0/5 rates'),
    # Both procedures of uSF+BM are expected, and the better one counts.
    (cell('uSF+BM', 5.0)[:5], {0: 5.0}, {0: 5.0}, '5/10 runs'),
    ([*cell('uSF+BM', 5.0)[:5], *(cell('uSF+BM', 2.0))[5:]],
     {0: 2.0}, {0: 5.0}, ''),
    # A diverged run keeps its best so far.
    ([record('uSF', 50.0, diverged=True)], {0: 50.0}, {0: 50.0}, '1/5 rates'),
  ],
)  # fmt: skip
def test_both_results_and_completeness(records, best, held_out, mark):
  for order in (records, records[::-1]):
    found = next(iter(cells(order).values()))
    assert (found.best.values if found.best else {}) == best
    assert (found.held_out.values if found.held_out else {}) == held_out
    assert found.mark == mark
    assert found.diverged == sum(made.result['diverged'] for made in records
                                 if made.result)  # fmt: skip


def test_without_a_held_out_part_there_is_no_held_out_result():
  made = record('SGD', 4.0)
  made.result.update(
    holdout_error=None, held_out_test_error=None, held_out_epoch=None
  )
  found = cells([made])['MNIST', 'SGD']
  assert found.held_out is None
  assert found.best.mean == 4.0


def test_interval_needs_two_seeds_and_lies_between_the_values():
  assert cells(cell('SGD', 5.0))['MNIST', 'SGD'].best.interval is None
  records = [r for s in range(3) for r in cell('SGD', 5.0 + s, seed=s)]
  three = cells(records)['MNIST', 'SGD'].best
  low, high = three.interval
  assert 5.0 <= low < three.mean < high <= 7.0


def test_runs_fill_every_column_with_their_content():
  """BM, BM1 and BM-100 are one condition; each run is found under all."""
  found = cells([run for error, name in enumerate(COLUMNS)
                 for run in cell(name, error, dataset=name)])  # fmt: skip
  assert {key: of.best.mean for key, of in found.items()} == {
    (name, other): error
    for error, (name, column) in enumerate(COLUMNS.items())
    for other in COLUMNS
    if {*column.conditions} & {*COLUMNS[other].conditions}
  }


def test_a_condition_that_is_no_column_gets_a_name_of_its_own():
  made = record('SGD', 5.0)
  made.config.update(batch_plan=[[3, 20], [None, 50]], frozen='last layer')
  assert list(cells([made])) == [('MNIST', 'SGD-20x3,50 Bottom')]


def test_protocols_are_never_mixed_and_the_longer_comes_first():
  results = read(
    [record('SGD', 1.0, epochs=9)] + cell('SGD', 5.0) + cell('BM', 4.0)
  )
  assert list(results.protocols) == ['9 epochs', '4 epochs']
  assert results.cells['9 epochs', 'MNIST', 'SGD'].best.mean == 1.0
  assert results.cells['4 epochs', 'MNIST', 'SGD'].best.mean == 5.0


@pytest.mark.parametrize(
  'changes, name, options',
  [
    ({'epochs': 65}, '65 epochs', '--rate 1'),
    ({'epochs': 1, 'train_size': 5000}, '1 epoch, 5000 images',
     '--epochs 1 --train-size 5000'),
    ({'weight_decay': 0.0}, '4 epochs, weight decay 0',
     '--epochs 4 --weight-decay 0'),
    ({'initial_std': [0.001, 0.05]}, '4 epochs, initial std 0.001 0.05',
     '--epochs 4 --initial-std 0.001 0.05'),
    ({'layer_metrics': True}, '4 epochs, layer metrics',
     '--epochs 4 --layer-metrics'),
    ({'reduction': 'sum'}, '4 epochs, reduction sum',
     '--epochs 4 --reduction sum'),
    ({'network': 'general'}, '4 epochs, network general',
     '--epochs 4 --architecture general'),
    ({'network': 'x\ny', 'plugin': 'a = 1'},
     '4 epochs, network x\\ny, plugin b5bc1ffd',
     "--epochs 4 --plugin FILE --network 'x\ny'"),
  ],
)  # fmt: skip
def test_a_protocol_is_named_and_repeated_by_what_is_not_as_by_default(
  changes, name, options
):
  made = record('SGD', 1.0, **changes)
  results = read([made])
  assert list(results.protocols) == [name]
  (command,) = commands.of_protocol(results, name)
  assert command.endswith(f' {options}')
  (run,) = results.runs.itertuples()
  assert commands.of_run(run) == command
  # The name stays when other protocols are added.
  others = [record('SGD', 1.0, epochs=n) for n in (2, 3, 70)]
  assert name in read([*others, made]).protocols


def test_commands_make_the_runs_that_are_there_and_no_others():
  results = read([
    *(run for name in ('SGD', 'BM', 'BN') for run in cell(name, 5.0)),
    *(run for name in ('SGD', 'BM-100') for run in cell(name, 5.0, seed=1)),
    record('BN', 5.0, rate=10.0, seed=1),
    record('BN', 5.0, rate=1.0, seed=1),
  ])  # fmt: skip
  assert [
    command.split('--dataset MNIST --condition ')[1].split(' --epochs')[0]
    for command in sorted(commands.of_protocol(results, '4 epochs'))
  ] == ['BN', 'BN --rate 10 1 --seed 1', 'SGD BM --seed 0 1']


def test_commands_ask_for_as_many_cores_as_the_runs_had():
  about = {'cores': '2', 'cores of the host': '8'}
  made = [dataclasses.replace(run, environment=about)
          for run in cell('SGD', 2.0)]  # fmt: skip
  (command,) = commands.of_protocol(read(made), '4 epochs')
  assert command.endswith('--executor processes --workers 4')


def test_rows_are_in_the_papers_order_others_last():
  names = ('zoo', 'TIMIT80', 'digits', 'CIFAR', 'MNIST')
  rows = read([record(dataset=name) for name in names]).rows
  assert [label for _, label in rows] == [
    'MNIST', 'CIFAR', 'TIMIT80', 'digits', 'zoo',
  ]  # fmt: skip
