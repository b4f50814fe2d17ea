"""The commands in this process: their output, and what they refuse."""

import functools
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from experiments import cli, datasets, terminal
from experiments.paper.protocol import Protocol
from experiments.runs import launch
from experiments.runs.progress import Reporter
from experiments.runs.selection import Selection
from experiments.training import cost
from tests.experiments import tiny
from tests.experiments.command_line import call

main = functools.partial(call, cli.main)


def _output(*arguments) -> str:
  """The output of a command that succeeds."""
  status, output, _ = main(*arguments)
  assert status == 0
  return output


def _error(*arguments) -> str:
  """The one line of an expected error."""
  status, _, errors = main(*arguments)
  assert status == 2
  assert errors.startswith('error: ')
  assert errors.count('\n') == 1
  return errors


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--condition usf+bnn', "did you mean 'uSF+BN'"),
    ('--table 2 --dataset minst', "'mnist'"),
    ('', 'nothing is selected: say --table'),
    ('--condition SGD --rate', 'nothing is selected: --rate'),
    ('--condition SGD --seed', 'nothing is selected: --seed'),
    ('--condition SGD --dataset', 'nothing is selected: --dataset'),
    ('--condition SGD --initial-std', 'initial_std must be positive'),
    (
      '--condition SGD --initial-std 1 2 3 4 5',
      'initial_std is (1.0, 2.0, 3.0, 4.0, 5.0), one for each of 5 layers, but '
      'the network of digits has 4 layers',
    ),
    ('--condition SGD --train-size 5', 'train_size is 5'),
    ('--condition SGD --checkpoint-share 2', 'checkpoint_share must be in [0'),
    ('--condition SGD --workers 0', 'workers must be positive, not 0'),
    ('--condition SGD --retries -1', 'retries must be at least 0'),
    (
      '--condition SGD --workers 4',
      'workers is 4, but only --executor processes has it: add that, or leave',
    ),
    (
      '--condition SGD --cpus-per-run 2 --executor processes',
      'cpus_per_run is 2.0, but only --executor ray',
    ),
    ('--condition SGD --shard 0/4', 'I/N with I from 1 to N, such'),
    ('--condition SGD --shard 5/4', "not '5/4'"),
    ('--condition SGD --shard a', "not 'a'"),
    ('--condition SGD --together 0', 'together must be positive'),
    (
      '--condition SGD --together 2 --executor processes',
      'together is 2, but only --executor local',
    ),
    (
      '--condition SGD --devices 2 --executor ray',
      'devices is 2, but only --executor local',
    ),
    ('--condition SGD --dataset digits mnist', 'MNIST was not found'),
  ],
)
def test_run_refuses(tmp_path, arguments, message):
  results = tmp_path / 'results'
  assert message in _error('run', *arguments.split(), '--results', results)
  assert not results.exists()


def test_results_that_are_not_there_or_cannot_be_written(tmp_path):
  none = tmp_path / 'none'
  for command in (['report', none], ['claims', none], ['fold', none, 'study']):
    assert str(none) in _error(*command)
  (tmp_path / 'file').write_text('')
  error = _error('run', '--condition', 'SGD', '--results', tmp_path / 'file')
  assert 'file' in error
  assert '--results' in error


@pytest.mark.parametrize(
  'command',
  ['demo', 'run', 'plan', 'list', 'data', 'report', 'claims', 'fold'],
)
def test_help_shows_no_empty_defaults(command):
  out = _output(command, '--help')
  for noise in ('None', 'default: )', 'default: ,', '{['):
    assert noise not in out
  if command == 'run':
    for text in ('0.0005', '--train-size INT ', '--data-dir PATH '):
      assert text in out  # defaults and kinds


@pytest.mark.parametrize(
  ('executable', 'on_path', 'typed'),
  [
    ('/opt/env/bin/python', '/opt/env/bin/python', 'python'),
    ('/usr/bin/python3', '/usr/bin/python3', 'python3'),
    ('{here}/.venv/bin/python', '/usr/bin/python', '.venv/bin/python'),
    ('/opt/an env/bin/python', None, "'/opt/an env/bin/python'"),
  ],
)
def test_commands_work_as_typed(
  monkeypatch, tmp_path, executable, on_path, typed
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'executable', executable.format(here=tmp_path))
  monkeypatch.setattr(
    terminal.shutil, 'which',
    lambda name: on_path if on_path and Path(on_path).name == name else None,
  )  # fmt: skip
  text = "run `python -m experiments demo`, or pip install -e '.[ray]'"
  pip = 'pip' if typed == 'python' else f'{typed} -m pip'
  assert terminal.as_typed(text) == (
    f"run `{typed} -m experiments demo`, or {pip} install -e '.[ray]'"
  )


@pytest.mark.parametrize('width', [40, 80])
@pytest.mark.parametrize('command', ['list', 'plan'])
def test_lines_fit_the_terminal(monkeypatch, tmp_path, command, width):
  monkeypatch.setenv('COLUMNS', str(width))
  monkeypatch.setattr(sys, 'executable', '/env/bin/python')
  more = ['--condition', 'SGD', '--results', tmp_path]
  out = _output(command, *(more if command == 'plan' else []))
  names = out.split()
  assert ('brSF-100%+BN+BM' if command == 'list' else 'digits') in names
  longest = max(out.splitlines(), key=len)
  assert len(longest) <= max(width, max(map(len, names)) + 6)


def test_a_failed_run_is_in_the_exit_status_and_the_report(tmp_path):
  plugin, results = tmp_path / 'plugin.py', tmp_path / 'results'
  plugin.write_text(
    "def small(*_): raise RuntimeError('no <memory>\\nfor this')\n"
    "NETWORKS = {'small': small}"
  )
  options = ('--plugin', plugin, '--retries', '1', '--results', results)
  status, out, _ = main(*tiny.COMMAND, *options)
  assert status == 1
  assert out.count('; it will be tried again') == 1
  assert 'FAILED: RuntimeError in line 1 of <plugin>: no <memory> for' in out
  assert '1 runs failed and are recorded with their errors' in out
  _output('report', results)
  page = (results / 'report' / 'report.html').read_text()
  assert 'no &lt;memory&gt; for this' in page


def test_finished_runs_are_reported_folded_and_not_run_again(tmp_path):
  results, study = tmp_path / 'results', tmp_path / 'study.jsonl'
  out = _output(*tiny.COMMAND, '--results', results)
  assert '[1/1] digits SGD, network small, rate x1, seed 0: best' in out
  assert 'SGD' in out.split('Table 2')[1]
  (run,) = [path for path in results.iterdir() if path.is_dir()]
  (run / 'checkpoints').mkdir()  # left by a process that was killed
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(launch, 'launch', lambda *_: pytest.fail('runs again'))
    out = _output(*tiny.COMMAND, '--results', results)
    assert 'all 1 runs are finished' in out
    out = _output(*tiny.COMMAND, '--results', results, '--shard', '3/4')
    assert 'shard 3/4 has no runs: nothing to do.' in out
  assert not (run / 'checkpoints').exists()

  _output('fold', results, study)
  out = tmp_path / 'out'
  shown = _output('report', study, '--markdown-only', '--out', out)
  assert 'Table 2' in shown
  assert (out / 'RESULTS.md').exists()
  status, shown, error = main('report', results, '--out', study)
  assert (status, 'Table 2' in shown) == (2, True)
  assert 'choose another folder with --out' in error


def test_the_demo_ends_with_the_answer_and_commands_that_work(
  tmp_path, monkeypatch
):
  demo = Selection(
    condition=('SGD',), rate=(1.0,), plugin=tiny.PLUGIN, network='small'
  )
  monkeypatch.setenv('COLUMNS', '160')  # No sentence is broken.
  monkeypatch.setattr(cli, '_DEMO', demo)
  protocol = Protocol(epochs=1, train_size=200)
  monkeypatch.setattr(cli, '_DEMO_PROTOCOL', protocol)
  monkeypatch.setattr(sys, 'executable', str(tmp_path / '.venv/bin/python'))
  monkeypatch.chdir(tmp_path)
  out = _output('demo', '--results', 'demo')
  assert 'digits SGD: compiling, then training' in out
  page = re.search('Open the page: (.*)', out)[1]
  answer = re.search(r'digits \(1 epoch, .*\): backpropagation .*', out)[0]
  assert f'<li>{answer}</li>' in Path(page).read_text()
  start = '  .venv/bin/python -m experiments '
  commands = [line for line in out.splitlines() if line.startswith(start)]
  assert len(commands) > 3
  for command in commands:
    words = command.removeprefix(start).split()
    if words[0] == 'run' and '--help' not in words:
      words[0] = 'plan'  # has these options too, and trains nothing
    assert main(*words)[0] == 0, command


def test_the_bar_of_all_runs_counts_parts_of_runs():
  first, second = Selection(condition=('SGD',), rate=(1.0, 10.0)).runs(
    Protocol(epochs=4)
  )
  output = io.StringIO()
  bars = Progress(console=Console(file=output))
  reporter = Reporter(Console(file=output), bars, 2)
  result = {
    'best_test_error': 40.0, 'held_out_test_error': 41.0, 'diverged': False,
  }  # fmt: skip
  done = []
  for run in (first, second):
    reporter.run_started(run, 1)
    reporter.epoch_finished(run, {'epoch': 1, 'test_error': 50.0})
    done.append(bars.tasks[0].completed)
    reporter.run_finished(run, result)
    done.append(bars.tasks[0].completed)
  assert done == [0.25, 1, 1.25, 2]
  assert output.getvalue().count('compiling') == 1
  text = 'best test error 40.00 %, held-out test error 41.00 %'
  assert output.getvalue().count(text) == 2


def test_list(monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  out = _output('list')
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


def test_plan_writes_nothing(tmp_path):
  results = tmp_path / 'results'
  out = _output(
    'plan', '--condition', 'SGD', 'uSF', '--rate', '1', '10', '--epochs', '2',
    '--results', results,
  )  # fmt: skip
  assert '0 of 4 runs are finished' in out
  missing = re.search(r'4 runs missing: \S+ FLOP, about ([0-9]+) s on one', out)
  assert missing and 0 < int(missing[1]) < 60
  assert '--calibrate' in out
  out = _output('plan', *tiny.COMMAND[1:], '--calibrate', '--results', results)
  head, line = out.splitlines()[1:3]
  assert head.split() == [
    'dataset', 'condition', 'runs', 'FLOP', 'GFLOP/s', 'time',
  ]  # fmt: skip
  assert line.split()[:3] == ['digits', 'SGD', '1']
  assert 'on this machine' in ' '.join(out.split())
  assert not results.exists()


def test_the_cost_of_a_run_by_hand():
  selection = Selection(condition=('uSF+BN',), rate=(1.0,))
  (run,) = selection.runs(Protocol(epochs=2))
  forward = 2 * (288_000 + 1_600_000 + 400_000 + 5_000)
  step = 2 * (2 * 288_000 + 3 * (1_600_000 + 400_000 + 5_000))
  # 1437 images: 144 held out, 360 tested, 20 mini-batches for the statistics.
  wanted = 2 * (1293 * step + (144 + 360 + 2000) * forward)
  assert cost.run_flops(run, datasets.load('digits')) == wanted


def test_data():
  out = _output('data', 'digits')
  assert out.startswith('digits: ')
  out = _output('data', 'digits', '--show-split')
  assert out.count('\n') > 20
  assert 'row 0' in out
  assert 'MNIST was not found' not in out
  assert "did you mean 'digits'" in _error('data', 'digit')
  assert 'say `data NAME`' in _error('data', 'mend', 'digits')


def test_an_interrupt_is_no_traceback(monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(datasets, 'status', interrupted)
  status, _, errors = main('list')
  assert status == 130
  assert errors.count('\n') == 1


def test_a_forgotten_environment_is_said_in_a_line(tmp_path):
  (tmp_path / 'experiments').symlink_to(Path(cli.__file__).parent)
  (tmp_path / 'tyro.py').write_text('raise ModuleNotFoundError(name="tyro")')

  def run():
    done = subprocess.run(
      [sys.executable, '-m', 'experiments', 'list'],
      cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ''
    return done.stderr.strip()

  hint = "-m pip install -e '.[experiments]'"
  assert run() == (
    f'error: {sys.executable} has no package tyro; install it with '
    f'{sys.executable} {hint}'
  )
