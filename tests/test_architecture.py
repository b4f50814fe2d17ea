"""What importing the library brings along, and what it does not."""

import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import symjax_bp

ROOT = pathlib.Path(symjax_bp.__file__).parents[1]
_PRIVATE = r'\b(?:jax|flax)\._\w+|_call_wrapped_method\(self'


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


def test_flax_waits_for_its_use_and_public_names_exist():
  program = """
import sys, symjax_bp
assert not {'flax.nnx', 'flax.linen'} & set(sys.modules)
missing = set(symjax_bp.__all__) - set(dir(symjax_bp))
assert not missing, missing
for name in symjax_bp.__all__:
  getattr(symjax_bp, name)
assert {'flax.nnx', 'flax.linen'} <= set(sys.modules)
"""
  run_alone(program)


def test_the_library_loads_without_the_experiments_and_their_packages():
  program = """
import importlib, pkgutil, sys, symjax_bp
for module in pkgutil.walk_packages(symjax_bp.__path__, 'symjax_bp.'):
  names = importlib.import_module(module.name).__all__
  missing = [n for n in names if not hasattr(sys.modules[module.name], n)]
  assert not missing, missing
  print(module.name)
unwanted = {'experiments', 'tensorflow', 'matplotlib', 'torch', 'chex',
            'equinox'}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
  modules = pkgutil.walk_packages(symjax_bp.__path__, 'symjax_bp.')
  assert run_alone(program).split() == [module.name for module in modules]


def test_private_names_of_jax_and_flax_are_in_one_place_each():
  """Each with its reason: a comment that says 'Private' right above."""
  found = []
  for path in sorted((ROOT / 'symjax_bp').glob('*.py')):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
      private = re.search(_PRIVATE, line)
      if private:
        above = '\n'.join(lines[max(0, number - 3) : number + 4])
        assert 'Private' in above, f'{path.name}:{number + 1}: {line}'
        found.append(private[0])
  assert found == ['jax._src', '_call_wrapped_method(self']
