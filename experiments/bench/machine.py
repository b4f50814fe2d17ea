"""On what a measurement was made, so that it can be made again."""

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'biotorch')
_VARIABLES = ('XLA_FLAGS', 'GLIBC_TUNABLES', 'LD_PRELOAD', 'OMP_NUM_THREADS')


def _processor() -> str:
  """The name of the processor, as far as the system tells."""
  try:
    lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    lines = []
  names = [line for line in lines if line.startswith('model name')]
  if names:
    return names[0].partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _threads() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def described() -> dict[str, str]:
  """Command, processor, cores, versions and what the environment sets."""
  found = {
    'command': shlex.join(['python', '-m', 'experiments', *sys.argv[1:]]),
    'processor': _processor(),
    'cores': str(_threads()),
    'system': platform.platform(),
    'python': platform.python_version(),
  }
  found |= {name: _version(name) for name in _PACKAGES}
  found |= {name: os.environ.get(name) for name in _VARIABLES}
  return {name: value for name, value in found.items() if value}


def warn_if_busy() -> None:
  """Says so if other programs are using the processor."""
  load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.0
  if load > _threads() / 2:
    print(
      f'warning: other programs use the processor (load {load:.1f} on '
      f'{_threads()} cores): what is measured now is theirs as much as ours.'
    )
