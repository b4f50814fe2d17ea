"""The commands in this process: what they say, select and refuse."""

import sys

import numpy as np
import pytest

from experiments import cli, commands, options, planning, running, selection
from experiments.paper import protocol as grid
from experiments.paper.conditions import TABLES
from experiments.runs.store import Store
from experiments.training import backend


@pytest.fixture(name='main')
def _main(monkeypatch, capsys):
  """Calls the program with arguments: (exit status, output, errors)."""
  monkeypatch.setattr(backend, 'configure', lambda devices=None: [])

  def main(*arguments):
    monkeypatch.setattr(sys, 'argv', ['experiments', *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
      cli.main()
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err

  return main


def _error(result) -> str:
  """The one line of an expected error."""
  status, _, errors = result
  assert status == 2
  assert errors.startswith('error: ')
  assert errors.count('\n') == 1
  return errors


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--condition', 'usf+bnn'], "did you mean 'uSF+BN'"),
    (['--table', '7'], "unknown table '7'"),
    (['--table', '4-c3'], "'4-C2'"),
    (['--table', '2', '--dataset', 'minst'], "'mnist'"),
    ([], 'nothing is selected: say --table'),
    (['--condition', 'SGD', '--rate'], 'nothing is selected: --rate'),
    (['--condition', 'SGD', '--seed'], 'nothing is selected: --seed'),
    (['--condition', 'SGD', '--dataset'], 'nothing is selected: --dataset'),
    (['--condition', 'SGD', '--rate', '0'], 'rate must be positive, not 0.0'),
    (['--condition', 'SGD', '--initial-std'], 'initial_std must be positive'),
    (
      ['--condition', 'SGD', '--initial-std', *'12345'],
      'initial_std is (1.0, 2.0, 3.0, 4.0, 5.0), one for each of 5 layers, but '
      'the network of digits has 4 layers',
    ),
    (['--condition', 'SGD', '--seed', '-1'], 'seed must be from 0'),
    (['--condition', 'SGD', '--epochs', '0'], 'epochs must be positive, not 0'),
    (['--condition', 'SGD', '--holdout', '1'], 'holdout must be in [0, 1)'),
    (['--condition', 'SGD', '--reduction', 'max'], "'mean' or 'sum'"),
    (['--condition', 'SGD', '--train-size', '50'], 'change --holdout'),
    (['--condition', 'SGD', '--train-size', '5'], 'train_size is 5'),
    (['--condition', 'SGD', '--checkpoint-share', '2'], 'checkpoint_share'),
    (['--condition', 'SGD', '--workers', '0'], 'workers must be positive, no'),
    (['--condition', 'SGD', '--retries', '-1'], 'retries must be at least 0'),
    (['--condition', 'SGD', '--lease', '0'], 'lease must be from 1 to a mill'),
    (['--condition', 'SGD', '--lease', 'inf'], 'not inf'),
    (
      ['--condition', 'SGD', '--workers', '4'],
      'workers is 4, but only --executor processes has it: add that, or leave',
    ),
    (
      ['--condition', 'SGD', '--cpus-per-run', '2', '--executor', 'processes'],
      'cpus_per_run is 2.0, but only --executor ray',
    ),
    (['--condition', 'SGD', '--shard', '0/4'], 'I/N with I from 1 to N, such'),
    (['--condition', 'SGD', '--shard', '5/4'], "not '5/4'"),
    (['--condition', 'SGD', '--shard', 'a'], "not 'a'"),
    (['--condition', 'SGD', '--together', '0'], 'together must be positive'),
    (
      ['--condition', 'SGD', '--together', '2', '--executor', 'processes'],
      'together is 2, but only --executor local',
    ),
    (
      [
        '--condition',
        'SGD',
        '--together',
        '2',
        '--coordinator',
        'h:1',
        '--process-id',
        '0',
        '--process-count',
        '2',
      ],
      'together is 2, but must be 1 where several processes',
    ),
    (['--condition', 'SGD', '--dataset', 'mnist'], 'MNIST was not found'),
  ],
)
def test_what_run_refuses(main, tmp_path, arguments, said):
  results = tmp_path / 'results'
  error = _error(main('run', *arguments, '--results', results))
  assert said in error
  assert not results.exists()


def _truncated(path):
  np.savez(path, x_train=np.zeros((50, 28, 28, 1), np.uint8))
  path.write_bytes(path.read_bytes()[:1000])


def test_broken_data_is_named_and_nothing_lost(main, tmp_path):
  path = tmp_path / 'mnist.npz'
  _truncated(path)
  error = _error(
    main(
      'run', '--condition', 'SGD', '--dataset', 'digits', 'mnist',
      '--data-dir', tmp_path, '--results', tmp_path / 'results',
    )
  )  # fmt: skip
  assert str(path) in error
  assert 'broken or truncated' in error
  for command in ('plan', 'run'):
    _error(
      main(command, '--table', '2', '--dataset', 'mnist', '--data-dir', 'none')
    )


@pytest.mark.parametrize('command', ['report', 'claims'])
def test_results_that_are_not_there(main, tmp_path, command):
  error = _error(main(command, tmp_path / 'none'))
  assert f'no results folder {tmp_path / "none"}' in error


def test_results_that_can_not_be_written(main, tmp_path):
  (tmp_path / 'file').write_text('')
  error = _error(
    main('run', '--condition', 'SGD', '--results', tmp_path / 'file')
  )
  assert 'file' in error
  assert '--results' in error


def test_unknown_options_are_refused(main):
  status, _, errors = main('run', '--tabel', '2')
  assert status == 2
  assert '--table' in errors


def test_every_option_is_in_the_help(main):
  status, out, _ = main('run', '--help')
  assert status == 0
  for option in (
    'table', 'condition', 'dataset', 'rate', 'seed', 'data-dir', 'results',
    'epochs', 'train-size', 'holdout', 'base-rate', 'momentum', 'weight-decay',
    'initial-std', 'input-scale', 'reduction', 'batch-norm-epsilon',
    'batch-norm-groups', 'devices', 'coordinator', 'process-id',
    'process-count', 'distributed',
    'calibration-batches', 'layer-metrics', 'scan', 'checkpoint-share',
    'executor', 'workers', 'ray-address', 'cpus-per-run', 'gpus-per-run',
    'shard', 'retries', 'lease', 'together',
  ):  # fmt: skip
    assert f'--{option} ' in out or f'--{option},' in out
  assert '0.0005' in out  # defaults are there


def _runs(**chosen):
  return selection.selected_runs(options.Selection(**chosen), grid.Protocol())


def test_a_selection_is_tables_and_conditions_times_datasets_and_rates():
  runs = _runs(table=('2',), rate=(1.0, 10.0), seed=(0, 1))
  # 11 columns, one of them with two procedures, at two rates and seeds.
  assert len(runs) == 12 * 2 * 2
  assert {run.dataset for run in runs} == {'digits'}
  assert _runs(table=('2',), condition=('SGD', 'sgd')) == _runs(table=('2',))
  assert len(_runs(condition=('BM', 'BM1', 'BM-100'))) == 5


def test_table_4_is_both_halves_with_their_baseline():
  both = {run.run_id for run in _runs(table=('4',))}
  halves = {run.run_id for run in _runs(table=('4-C1', '4-C2'))}
  assert both == halves
  assert len(both) == (8 + 8) * 5
  c2 = _runs(table=('4-C2',))
  assert len(c2) == (8 + 1) * 5  # cells are coloured against SGD
  assert 'SGD' not in TABLES['4-C2'].columns


def test_a_shard_may_have_no_runs(main, tmp_path):
  results = tmp_path / 'results'
  arguments = ('--condition', 'SGD', '--rate', '1', '--results', results)
  status, out, _ = main('run', *arguments, '--shard', '3/4')
  assert status == 0
  assert 'shard 3/4 has no runs: nothing to do.' in out
  assert not results.exists()


@pytest.mark.parametrize('parts', [1, 2, 7, 100])
def test_shards_are_all_runs_once(parts):
  runs = _runs(table=('2',))
  shards = [
    options.Execution(shard=f'{part}/{parts}').part_of(runs)
    for part in range(1, parts + 1)
  ]
  assert sorted(r.run_id for shard in shards for r in shard) == sorted(
    run.run_id for run in runs
  )
  sizes = {len(shard) for shard in shards}
  assert max(sizes) - min(sizes) <= 1


def test_a_failed_run_is_in_the_exit_status_and_the_report(
  main, tmp_path, monkeypatch
):
  def fails(self, run):
    raise RuntimeError('no <memory>')

  monkeypatch.setattr(selection.Loader, '__call__', fails)
  arguments = (
    'run', '--condition', 'SGD', '--rate', '1', '--retries', '1',
    '--results', tmp_path,
  )  # fmt: skip
  status, out, _ = main(*arguments)
  assert status == 1
  assert out.count('; it is tried again') == 1
  assert 'FAILED: RuntimeError in line' in out
  assert '1 runs failed and are recorded with their errors' in out
  status, _, _ = main('report', tmp_path)
  assert status == 0
  page = (tmp_path / 'report' / 'report.html').read_text()
  assert 'no &lt;memory&gt;' in page


@pytest.mark.parametrize('command', ['report', 'claims'])
def test_an_unreadable_run_is_left_out_and_named(main, tmp_path, command):
  arguments = (
    'run', '--condition', 'SGD', '--rate', '1', '--epochs', '1',
    '--train-size', '200', '--results', tmp_path,
  )  # fmt: skip
  assert main(*arguments)[0] == 0
  (tmp_path / ('0' * 20)).mkdir()
  (tmp_path / ('0' * 20) / 'config.json').write_text('{"version": 1, <b>')
  status, out, _ = main(command, tmp_path)
  assert status == 0
  assert f'run {"0" * 20} is left out: ' in out
  assert 'config.json is broken' in out
  assert '1 epoch, 200 images' in out


def test_list(main):
  status, out, _ = main('list')
  assert status == 0
  for text in (
    'digits', 'Scene67', '4-C2', 'uSF+BN+BM3',
    'batch 100 or 100 for 3 epochs, then 500', 'last layer frozen',
  ):  # fmt: skip
    assert text in out
  lines = [' '.join(line.split()) for line in out.splitlines()]
  assert (
    'RndF+BN+BM Top RndF BM setting 1 BN batch 100, before last layer frozen'
  ) in lines
  assert 'BN+BM BP BM setting 1 BN, learnable batch 100' in lines


def test_plan_runs_and_writes_nothing(main, tmp_path):
  results = tmp_path / 'results'
  arguments = (
    'plan', '--condition', 'SGD', 'uSF', '--rate', '1', '10', '--epochs', '2',
    '--results', results,
  )  # fmt: skip
  loads, load = [], selection.Loader.__call__
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      selection.Loader,
      '__call__',
      lambda self, run: loads.append(run) or load(self, run),
    )
    status, out, _ = main(*arguments)
  assert status == 0
  assert len(loads) == 1
  assert '0 of 4 runs are finished' in out
  assert '4 runs missing' in out
  assert '--calibrate' in out
  assert not results.exists()


def test_plan_calibrated(main, tmp_path):
  status, out, _ = main(
    'plan', '--condition', 'SGD', '--rate', '1', '--train-size', '200',
    '--results', tmp_path, '--calibrate',
  )  # fmt: skip
  assert status == 0
  (line,) = [line for line in out.splitlines() if 'GFLOP/s' in line]
  assert line.split()[:2] == ['digits', 'SGD']
  assert 'h on this machine' in out


def test_the_cost_of_a_run_by_hand():
  (run,) = selection.selected_runs(
    options.Selection(condition=('uSF+BN',), rate=(1.0,)),
    grid.Protocol(epochs=2),
  )
  data = commands.datasets.load('digits')
  forward = 2 * (288_000 + 1_600_000 + 400_000 + 5_000)
  step = 2 * (2 * 288_000 + 3 * (1_600_000 + 400_000 + 5_000))
  # 1437 images: 144 held out, 360 tested, 20 mini-batches for the statistics.
  wanted = 2 * (1293 * step + (144 + 360 + 2000) * forward)
  assert planning.run_flops(run, data) == wanted


def test_data(main):
  status, out, _ = main('data', 'digits')
  assert status == 0
  assert out.startswith('digits: ')
  status, out, _ = main('data', 'digits', '--show-split')
  assert status == 0
  assert out.count('\n') > 20
  assert 'row 0' in out
  assert 'MNIST was not found' not in out
  assert "did you mean 'digits'" in _error(main('data', 'digit'))
  assert 'say `data NAME`' in _error(main('data', 'mend', 'digits'))


def test_finished_runs_are_seen_without_jax_or_a_new_folder(main, tmp_path):
  run, *_ = _runs(condition=('SGD',), rate=(1.0,))
  (tmp_path / run.run_id).mkdir()
  (tmp_path / run.run_id / 'result.json').write_text('{"paper_error": 1.0}')
  left = tmp_path / run.run_id / 'checkpoints'  # by a process that was killed
  left.mkdir()
  assert Store(tmp_path).missing([run]) == []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(running, 'start_jax', lambda _: pytest.fail('JAX started'))
    _, out, _ = main(
      'run', '--condition', 'SGD', '--rate', '1', '--results', tmp_path
    )
  assert 'all 1 runs are finished' in out
  assert 'nothing to do' in out
  assert not left.exists()


def test_a_second_interrupt_is_no_traceback(main, monkeypatch):
  def interrupted(_):
    raise KeyboardInterrupt

  monkeypatch.setitem(commands._COMMANDS, cli.List, interrupted)
  status, _, errors = main('list')
  assert status == 130
  assert errors.count('\n') == 1
