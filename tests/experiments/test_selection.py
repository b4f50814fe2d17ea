"""Mini-batches that the images do not fill are refused, or said, beforehand."""

import dataclasses

import pytest
from experiments.options import ProtocolOptions, Selection
from experiments.tasks import Failed, Settings, Stopped, Task
from experiments.worker import Worker

from experiments import commands, options, selection
from experiments.cli import RunCommand
from experiments.paper.conditions import THEN_500
from tests.experiments import tiny


def _runs(*conditions, devices=1, **protocol):
  chosen = options.Selection(condition=conditions, rate=(1.0, 10.0))
  return selection.selected_runs(chosen, protocol.Protocol(**protocol), devices)


@pytest.mark.parametrize(
  ('condition', 'protocol', 'said'),
  [
    (
      'SGD-500', {'train_size': 200},
      r"condition is 'SGD-500', with mini-batches of 500, .* at most 180, the "
      r'images of digits to train on \(200, less 20 held out\)\. Put a smaller '
      r'number .* --train-size or --holdout',
    ),
    (
      'uSF+BN', {'train_size': 100, 'batch_norm_groups': 4},
      'mini-batches of 100, but they can have at most 90, ',
    ),
    ('uSF+BM', {'train_size': 50, 'holdout': 0.2}, 'of 100, .* at most 40, '),
    (
      'uSF+BM', {'train_size': 502, 'batch_norm_groups': 4, 'holdout': 0.2},
      r"batch_norm_groups is 4, .* 'uSF\+BM', and one has 402 images \(500 are "
      r'planned\), of 402, the images of digits .* Change --batch-norm-groups',
    ),
  ],
)  # fmt: skip
def test_batches_of_more_than_all_images_are_refused(condition, protocol, said):
  with pytest.raises(ValueError, match=said):
    _runs(condition, **protocol)


def test_devices_that_do_not_divide_what_is_left_are_refused():
  small = {'train_size': 500, 'holdout': 0.2}
  assert len(_runs('uSF+BM', devices=4, **small)) == 4
  with pytest.raises(ValueError, match='devices is 4, .* 402 .* --devices'):
    _runs('uSF+BM', devices=4, **{**small, 'train_size': 502})


def test_no_result_is_begun_for_what_is_refused(tmp_path, capsys):
  results = tmp_path / 'results'
  command = RunCommand(
    Selection(condition=('SGD', 'SGD-500')),
    ProtocolOptions(train_size=200),
    results=results,
  )
  assert commands.carry_out(command) == 2
  assert capsys.readouterr().err.startswith("error: condition is 'SGD-500'")
  assert not results.exists()


def test_larger_batches_later_on_take_all_and_it_is_said(capsys):
  runs = _runs('SGD', 'uSF+BM', train_size=500)
  assert {run.batch_plan for run in runs} == {((None, 100),), THEN_500}
  assert capsys.readouterr().out == (
    'uSF+BM: the mini-batches of 500 that follow those of 100 have only 450, '
    'all of the images of digits to train on (500, less 50 held out).\n'
  )
  _runs('uSF+BM', train_size=500, holdout=0.0)
  assert capsys.readouterr().out == ''


def test_batches_are_checked_of_every_run_that_shares_a_placed_set():
  data = tiny.dataset()
  at_work = Worker(Settings(lambda run: data, scan=None, checkpoint_share=0.0))
  first = tiny.run('uSF+BN')
  grouped = dataclasses.replace(
    tiny.run('uSF+BN', batch_norm_groups=5), batch_plan=THEN_500
  )
  ends = [
    list(at_work.carry_out(Task(run), lambda: True)) for run in (first, grouped)
  ]
  assert ends[0] == [Stopped()]
  ((failed,),) = ends[1:]
  assert isinstance(failed, Failed)
  assert 'batch_norm_groups is 5, but must divide a mini-batch of 216' in (
    failed.error
  )
