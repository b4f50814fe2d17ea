"""The program in the environments of the real world."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from experiments import cli
from experiments.bench import __main__ as bench
from tests.experiments import tiny
from tests.experiments.command_line import ROOT, call

_NOBODY = (
  'setpriv', '--reuid', '54321', '--regid', '54321', '--clear-groups',
  '--inh-caps=-all', '--bounding-set=-all',
)  # fmt: skip


def _program(code, *arguments, cwd=ROOT, prefix=(), **environment):
  kept = {'PATH': os.environ['PATH'], 'PYTHONPATH': str(ROOT)}
  return subprocess.run(
    [*prefix, sys.executable, '-c', code, *map(str, arguments)],
    cwd=cwd,
    env=kept | environment,
    capture_output=True,
    check=False,
  )


_CALL = """
import sys
from experiments import cli


def call(*arguments):
  sys.argv = ['experiments', *arguments]
  try:
    cli.main()
  except SystemExit as end:
    assert not end.code
"""
_LIST_AND_HELP = f"""{_CALL}
call('list')
call('run', '--help')
heavy = {{'jax', 'flax', 'sklearn', 'scipy', 'matplotlib', 'pandas'}}
assert not heavy & set(sys.modules)
"""
_RUN_AND_REPORT = f"""{_CALL}
*run, folder = sys.argv[1:]
call(*run, folder)
call('report', folder)
"""


@pytest.mark.parametrize(
  'environment',
  [
    {'COLUMNS': '40'},  # and no HOME
    {'COLUMNS': '200', 'FORCE_COLOR': '1', 'HOME': '/nonexistent'},
    {'TERM': 'dumb', 'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii'},
  ],
)
def test_list_and_help_import_no_jax(tmp_path, environment):
  done = _program(_LIST_AND_HELP, cwd=tmp_path, **environment)
  assert done.returncode == 0
  assert done.stderr == b''
  assert b'uSF+BN+BM' in done.stdout
  assert b'--train-size' in done.stdout
  if 'COLUMNS' in environment:
    text = re.sub('\x1b.*?m', '', done.stdout.decode())
    boxes = [line for line in text.splitlines() if line[:1] in ('│', '╭')]
    assert max(map(len, boxes)) <= int(environment['COLUMNS'])


def test_a_run_and_its_report():
  """In an ASCII world, as a user without name, home or cache folder."""
  # Only root may become one; others have a name and no home.
  prefix = _NOBODY if not os.getuid() and shutil.which('setpriv') else ()
  with tempfile.TemporaryDirectory() as parent:
    folder = Path(parent) / 'r\u00e9sultats [x]'
    folder.mkdir()
    environment = {
      'PYTHONIOENCODING': 'ascii',
      'PYTHONDONTWRITEBYTECODE': '1',
      'JAX_PLATFORMS': 'cpu',
      'MPLCONFIGDIR': str(folder),
    }
    for path in (folder, folder.parent):
      os.chmod(path, 0o777)
    done = _program(
      _RUN_AND_REPORT,
      *tiny.COMMAND,
      '--results',
      folder,
      prefix=prefix,
      **environment,
    )
    assert done.returncode == 0, done.stderr
    assert rb'r\xe9sultats [x]' in done.stdout
    assert b'Traceback' not in done.stderr
    assert (folder / 'report' / 'report.html').stat().st_size > 1000


def _options() -> set[str]:
  """All options of all commands, of the benchmark too."""
  found = {'--help'}
  for program, commands in (
    (cli.main, ('demo', 'run', 'plan', 'list', 'data', 'report', 'fold')),
    (bench.main, ('steps', 'scaling', 'grid')),
  ):
    for command in commands:
      _, text, _ = call(program, command, '--help')
      found |= set(re.findall(r'--[a-z][a-z-]*', text))
  return found


def test_options_in_messages_and_guides_exist():
  named = {
    option
    for kind in ('py', 'md', 'toml')
    for path in (ROOT / 'experiments').rglob(f'*.{kind}')
    for option in re.findall(
      r'(?<![\w-])--([a-z]{3,}(?:-[a-z]+)*)(?![\w])', path.read_text()
    )
  }
  others = {
    'array', 'cpus-per-task', 'dry', 'inplace', 'requeue', 'signal', 'xla',
  }  # fmt: skip
  known = {option.removeprefix('--') for option in _options()}
  assert named - known - others == set()


_WORDS = st.one_of(
  st.sampled_from(
    [
      '--table', '2', '--condition', 'SGD', 'uSF+BN', '--dataset', 'digits',
      '--rate', '1', '--seed', '0', '--epochs', '--train-size', '200',
      '--plugin', '--holdout', '0.5', '--initial-std', '0.01', '--network',
      '--data-dir', '.', '--reduction', 'sum', '-1', 'nan', 'inf', '1e400',
      '/', '', '--test-share', '--architecture', 'cifar',
    ]
  ),
  st.text(max_size=8),
)  # fmt: skip


@hypothesis.settings(
  max_examples=75, deadline=None, derandomize=True, database=None
)
@hypothesis.given(
  command=st.sampled_from(['plan', 'data', 'report']),
  words=st.lists(_WORDS, max_size=8),
)
def test_any_command_line_ends_without_a_traceback(command, words):
  status, *_ = call(cli.main, command, *words)
  assert status in (0, 1, 2)
