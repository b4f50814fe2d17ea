"""The rules of the house that no single module can keep on its own."""

import ast
import importlib
import inspect
import io
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tokenize
import tomllib

import pytest

import symjax_bp

ROOT = pathlib.Path(symjax_bp.__file__).parents[1]
MAX_CODE_LINES = 300


def sources(*folders):
  paths = [path for each in folders for path in (ROOT / each).rglob('*.py')]
  assert paths, f'no sources in {folders} of {ROOT}'
  return sorted(paths)


def name_of(path):
  return path.relative_to(ROOT).as_posix()


LIBRARY = sources('symjax_bp')
PROGRAM = sources('experiments')
EVERYTHING = sources('symjax_bp', 'experiments', 'tests')
every_file_of_the_library = pytest.mark.parametrize(
  'path', LIBRARY, ids=name_of
)
every_file_but_tests = pytest.mark.parametrize(
  'path', LIBRARY + PROGRAM, ids=name_of
)
every_file = pytest.mark.parametrize('path', EVERYTHING, ids=name_of)


# --- what imports what


def imported(tree):
  """Absolute names of all modules that a file imports, wherever it does so."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'line {node.lineno}: import by absolute name'
      yield node.module


@every_file_of_the_library
def test_the_library_imports_its_declared_dependencies_alone(path):
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  declared = {re.match(r'\w+', each)[0] for each in project['dependencies']}
  assert {'jax', 'flax'} <= declared
  roots = {name.split('.')[0] for name in imported(ast.parse(path.read_text()))}
  assert roots - sys.stdlib_module_names <= declared | {'symjax_bp'}


def run_alone(program):
  """What a program prints, in a process of its own."""
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_nnx_which_takes_long_to_import_waits_for_its_use():
  program = """
import sys, symjax_bp
assert 'flax.nnx' not in sys.modules
missing = set(symjax_bp.__all__) - set(dir(symjax_bp))
assert not missing, missing
for name in symjax_bp.__all__:
  getattr(symjax_bp, name)
assert 'flax.nnx' in sys.modules
try:
  symjax_bp.nxx
except AttributeError as error:
  print(error)
"""
  assert "'symjax_bp' has no attribute 'nxx'" in run_alone(program)


def test_the_library_loads_without_the_experiments_and_their_packages():
  program = """
import importlib, pkgutil, sys, symjax_bp
for module in pkgutil.walk_packages(symjax_bp.__path__, 'symjax_bp.'):
  importlib.import_module(module.name)
  print(module.name)
unwanted = {'experiments', 'tensorflow', 'matplotlib', 'torch'}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
  output = run_alone(program)
  assert set(output.split()) == {module.__name__ for module in MODULES[1:]}


# --- what is public is documented


MODULES = [
  symjax_bp,
  *(
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(symjax_bp.__path__, 'symjax_bp.')
  ),
]


def public_objects(module):
  """Functions and classes that a module offers, and the classes' methods."""
  offered = getattr(module, '__all__', None)
  for name, value in vars(module).items():
    defined_here = getattr(value, '__module__', None) == module.__name__
    public = defined_here and not name.startswith('_')
    if not (public if offered is None else public or name in offered):
      continue
    if not (inspect.isclass(value) or inspect.isroutine(value)):
      continue
    yield name, value
    if inspect.isclass(value) and defined_here:
      for attribute, member in vars(value).items():
        if isinstance(member, property | classmethod | staticmethod) or (
          inspect.isfunction(member)
          and member.__qualname__.startswith(value.__qualname__)
        ):
          if not attribute.startswith('_'):
            yield f'{name}.{attribute}', member


@pytest.mark.parametrize('module', MODULES, ids=lambda m: m.__name__)
def test_public_names_have_a_docstring_that_starts_with_a_sentence(module):
  if hasattr(module, '__all__'):
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing, f'{module.__name__}.__all__ has {missing}'
  poor = []
  for name, value in [('', module), *public_objects(module)]:
    # The object's own, not its base class's.
    first = (value.__doc__ or '').strip().partition('\n')[0]
    if not first.endswith(('.', ':', '?')):
      poor.append(f'{module.__name__}.{name}: {first!r}')
  assert not poor, 'no docstring whose first line is a sentence: ' + str(poor)


# --- one file, one job


def code_lines(source):
  """Lines with code: no docstrings, comments or blank lines."""
  lines = set()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type not in (
      tokenize.COMMENT,
      tokenize.NL,
      tokenize.NEWLINE,
      tokenize.INDENT,
      tokenize.DEDENT,
      tokenize.ENDMARKER,
    ):
      lines.update(range(token.start[0], token.end[0] + 1))
  documented = ast.Module | ast.ClassDef | ast.FunctionDef
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, documented) and ast.get_docstring(node) is not None:
      docstring = node.body[0]
      lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
  return len(lines)


def test_code_lines_are_counted_as_said():
  source = '''"""Docstring
of two lines."""

import os  # counts, and so does the next line

def f(x):
  """Docstring."""
  # comment

  return (
    x,
    """a value
    of two lines""",
  )  # and so do all five of this value
'''
  assert code_lines(source) == 7


@every_file
def test_no_file_has_two_jobs(path):
  count = code_lines(path.read_text())
  assert count <= MAX_CODE_LINES, (
    f'{name_of(path)} has {count} lines of code (without docstrings, comments '
    f'and blank lines), more than {MAX_CODE_LINES}: it has two jobs, split it.'
  )


# --- what data may not do, and what is left undone


def dangers(tree):
  """What would run code that comes with data."""
  forbidden = {'pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}
  for name in imported(tree):
    if name.split('.')[0] in forbidden:
      yield f'import {name}'
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name) and node.func.id in ('eval', 'exec'):
        yield f'line {node.lineno}: {node.func.id}('
      for keyword in node.keywords:
        if keyword.arg == 'allow_pickle' and not (
          isinstance(keyword.value, ast.Constant)
          and keyword.value.value is False
        ):
          yield f'line {node.lineno}: allow_pickle'


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'def f():\n  from pickle import loads',
    'np.load(f, allow_pickle=True)',
    'np.load(f, allow_pickle=flag)',
    'eval(text)',
    'exec(text)',
  ],
)
def test_dangers_are_seen(source):
  assert list(dangers(ast.parse(source)))


def test_safe_calls_are_no_dangers():
  source = 'np.load(f, allow_pickle=False)\njax.eval_shape(f)\nmodel.eval()'
  assert not list(dangers(ast.parse(source)))


@every_file_but_tests
def test_data_can_not_run_code(path):
  assert not list(dangers(ast.parse(path.read_text())))


@every_file
def test_nothing_is_left_for_later(path):
  words = '|'.join(('TO' + 'DO', 'FIX' + 'ME', 'XX' + 'X'))
  left = [
    f'line {number}: {line.strip()}'
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(rf'\b({words})\b', line)
  ]
  assert not left
