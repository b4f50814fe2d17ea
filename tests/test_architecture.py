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


def test_what_loads_and_waits_and_that_public_names_exist():
  """Flax waits for its use; the experiments and their packages never load."""
  program = """
import importlib, pkgutil, sys, symjax_bp
flax = {'flax.nnx', 'flax.linen'}
assert not flax & set(sys.modules)
missing = set(symjax_bp.__all__) - set(dir(symjax_bp))
assert not missing, missing
for name in symjax_bp.__all__:
  getattr(symjax_bp, name)
assert flax <= set(sys.modules)
for module in pkgutil.walk_packages(symjax_bp.__path__, 'symjax_bp.'):
  names = importlib.import_module(module.name).__all__
  missing = [n for n in names if not hasattr(sys.modules[module.name], n)]
  assert not missing, missing
  print(module.name)
unwanted = {'experiments', 'tensorflow', 'matplotlib', 'torch', 'chex',
            'equinox'}
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  modules = pkgutil.walk_packages(symjax_bp.__path__, 'symjax_bp.')
  assert done.stdout.split() == [module.name for module in modules]


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
