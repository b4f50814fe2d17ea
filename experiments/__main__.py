"""``python -m experiments``: see ``--help``."""

import sys
from pathlib import Path

try:
  from experiments.cli import main
except ModuleNotFoundError as missing:
  # Usually a forgotten environment.
  root = Path(__file__).parents[1]
  hint = f"install it with {sys.executable} -m pip install -e '.[experiments]'"
  python = root / '.venv/bin/python'
  if python.exists() and python != Path(sys.executable):
    hint = f'run {python} -m experiments'
  sys.exit(f'error: {sys.executable} has no package {missing.name}; {hint}')

if __name__ == '__main__':
  main()
