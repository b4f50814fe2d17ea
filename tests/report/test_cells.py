"""Two results of a cell, its completeness, and which cells a run belongs to."""

import dataclasses

import pytest

from experiments.paper import published as paper
from experiments.paper.conditions import CONDITIONS
from experiments.report import naming, rerun
from experiments.report.studies import gather
from tests.report.records import cell, like_the_paper, record


def only_study(records):
  (study,) = gather(records).studies
  return study


def test_best_validation_is_the_lowest_over_rates_and_the_mean_over_seeds():
  study = only_study([
    record('SGD', 9.0, rate=1.0, seed=0),
    record('SGD', 4.0, rate=10.0, seed=0),
    record('SGD', 8.0, rate=1.0, seed=1),
    record('SGD', 12.0, rate=10.0, seed=1),
  ])  # fmt: skip
  result = study.cells['MNIST', 'SGD'].best_validation
  assert result.values == {0: 4.0, 1: 8.0}
  assert result.mean == 6.0
  assert {seed: run.rate for seed, run in result.chosen.items()} == {
    0: 10.0,
    1: 1.0,
  }


def test_held_out_reports_the_test_error_of_the_run_the_held_out_part_chose():
  study = only_study([
    record('SGD', 4.0, rate=1.0, honest=4.5, holdout=7.0),
    record('SGD', 5.0, rate=10.0, honest=6.5, holdout=3.0),
  ])  # fmt: skip
  found = study.cells['MNIST', 'SGD']
  assert found.best_validation.mean == 4.0
  assert found.held_out.mean == 6.5


def test_without_a_held_out_part_there_is_no_held_out_result():
  made = record('SGD', 4.0)
  made.result.update(holdout_error=None, honest_error=None, honest_epoch=None)
  found = only_study([made]).cells['MNIST', 'SGD']
  assert found.held_out is None
  assert found.best_validation.mean == 4.0


def test_interval_needs_two_seeds_and_lies_between_the_values():
  one = only_study(cell('SGD', 5.0)).cells['MNIST', 'SGD']
  assert one.best_validation.interval is None
  records = [r for s in range(3) for r in cell('SGD', 5.0 + s, seed=s)]
  three = only_study(records).cells['MNIST', 'SGD'].best_validation
  low, high = three.interval
  assert 5.0 <= low < three.mean < high <= 7.0
  again = only_study(records).cells['MNIST', 'SGD'].best_validation
  assert again.interval == three.interval


def test_a_cell_lacking_a_rate_is_shown_and_marked():
  found = only_study(cell('SGD', 5.0)[:4]).cells['MNIST', 'SGD']
  assert (found.present, found.expected) == (4, 5)
  assert found.mark == '4/5 rates'
  assert not found.settled
  assert found.best_validation.mean == 5.0


def test_both_procedures_of_usf_bm_are_expected_and_the_better_one_counts():
  records = cell('uSF+BM', 5.0)
  records[7].result['paper_error'] = 2.0  # of the second procedure
  found = only_study(records).cells['MNIST', 'uSF+BM']
  assert (found.present, found.expected) == (10, 10)
  assert found.best_validation.mean == 2.0
  half = only_study(cell('uSF+BM', 5.0)[:5]).cells['MNIST', 'uSF+BM']
  assert half.mark == '5/10 runs'


def test_incomplete_seeds_do_not_count_beside_complete_ones():
  records = cell('SGD', 5.0) + cell('SGD', 1.0, seed=1)[:2]
  found = only_study(records).cells['MNIST', 'SGD']
  assert found.best_validation.values == {0: 5.0}
  assert found.mark == '7/10 runs'
  assert found.settled


def test_unfinished_runs_are_not_results():
  made = dataclasses.replace(record('SGD', 5.0), result=None)
  study = only_study([made, *cell('BM', 4.0)])
  assert study.cells['MNIST', 'SGD'].best_validation is None
  assert study.cells['MNIST', 'SGD'].mark == '0/5 rates'
  assert len(study.unfinished) == 1


def test_a_diverged_run_without_an_error_counts_as_chance():
  made = record('uSF', 50.0, dataset='digits', diverged=True, chance=88.0)
  made.result.update(
    paper_error=None, holdout_error=None, honest_error=None, paper_epoch=None
  )
  found = only_study([made]).cells['digits', 'uSF']
  assert found.best_validation.mean == 88.0
  assert found.held_out.mean == 88.0
  assert found.diverged == 1


def test_a_diverged_run_keeps_its_best_so_far():
  made = record('uSF', 50.0, diverged=True)
  found = only_study([made]).cells['MNIST', 'uSF']
  assert found.best_validation.mean == 50.0


@pytest.mark.parametrize('name', CONDITIONS)
def test_runs_fill_every_column_with_their_content(name):
  """BM, BM1 and BM-100 are one condition; each run is found under all."""
  study = only_study(cell(name, 5.0))
  content = dataclasses.replace(CONDITIONS[name], name='')
  names = {
    other
    for other, row in CONDITIONS.items()
    if set(row.batch_plans) & set(content.batch_plans)
    and dataclasses.replace(row, name='', batch_plans=content.batch_plans)
    == content
  }
  assert name in names
  assert {condition for _, condition in study.cells} == names


@pytest.mark.parametrize(
  'changes, name',
  [
    ({'rule': 'frSF-10%', 'batch_norm': 'plain'}, 'frSF-10%+BN'),
    ({'rule': 'uSF', 'batch_norm': 'affine'}, 'uSF+BN(affine)'),
    ({'batch_norm': 'plain'}, 'SGD+BN'),
    ({'batch_norm': 'affine', 'batch_manhattan': 2}, 'BN+BM2'),
    ({'batch_plan': [[None, 50]]}, 'SGD-50'),
    (
      {'batch_plan': [[3, 20], [None, 50]], 'frozen': 'last layer'},
      'SGD-20x3,50 Bottom',
    ),
  ],
)
def test_a_condition_that_is_no_column_gets_a_name_of_its_own(changes, name):
  made = record('SGD', 5.0)
  made.config.update(changes)
  assert name not in CONDITIONS
  assert list(only_study([made]).cells) == [('MNIST', name)]


def test_protocols_are_never_mixed_and_the_larger_comes_first():
  store = gather(
    [record('SGD', 1.0, epochs=9)] + cell('SGD', 5.0) + cell('BM', 4.0)
  )
  assert [len(study.runs) for study in store.studies] == [10, 1]
  assert [study.fields['epochs'] for study in store.studies] == [4, 9]
  assert store.studies[0].title == 'Protocol 1: 4 epochs, all training images'
  assert store.studies[0].cells['MNIST', 'SGD'].best_validation.mean == 5.0


def test_a_heading_names_the_fields_in_which_protocols_differ():
  store = gather([record('SGD', 1.0), record('SGD', 1.0, momentum=0.5)])
  assert store.studies[0].title.endswith(('momentum 0.9', 'momentum 0.5'))


def test_initial_weights_by_layer_are_named_and_asked_for():
  study = only_study([record('SGD', 1.0, initial_std=[0.001, 0.05])])
  assert study.title.endswith(', initial std 0.001 0.05')
  [command] = rerun.study_commands(study)
  assert ' --initial-std 0.001 0.05' in command


def test_commands_make_the_runs_that_are_there_and_no_others():
  study = only_study([
    *(run for name in ('SGD', 'BM', 'BN') for run in cell(name, 5.0)),
    *(run for name in ('SGD', 'BM-100') for run in cell(name, 5.0, seed=1)),
    record('BN', 5.0, rate=10.0, seed=1),
    record('BN', 5.0, rate=1.0, seed=1),
  ])  # fmt: skip
  assert [
    command.split('--dataset MNIST --condition ')[1].split(' --epochs')[0]
    for command in sorted(rerun.study_commands(study))
  ] == ['BN', 'BN --rate 10 1 --seed 1', 'SGD BM --seed 0 1']


def test_two_copies_of_a_dataset_are_two_rows():
  study = only_study(
    [record(digest='aaaa'), record(digest='bbbb', note='lossy copy')]
  )
  assert list(study.rows) == ['MNIST [aaaa]', 'MNIST [bbbb]']
  assert study.rows['MNIST [bbbb]'].notes == ('lossy copy',)


def test_rows_are_in_the_papers_order_others_last():
  study = only_study(
    [record(dataset=d) for d in ('zoo', 'TIMIT80', 'digits', 'CIFAR', 'MNIST')]
  )
  assert list(study.rows) == ['MNIST', 'CIFAR', 'TIMIT80', 'digits', 'zoo']
  assert [row.in_paper for row in study.rows.values()] == [True] * 3 + [
    False
  ] * 2


def test_the_papers_own_numbers_come_back_from_runs_that_have_them():
  study = only_study(like_the_paper(('STL10',), noise=0.0))
  for (dataset, name), error in paper.by_condition().items():
    # The paper ran SGD again for its last table, and got another number.
    if dataset == 'STL10' and naming.first_name(name) == name:
      found = study.cells[dataset, name].best_validation.mean
      assert found == pytest.approx(error, abs=1e-9)
