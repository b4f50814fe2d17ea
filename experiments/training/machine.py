"""On what something was computed, so that it can be made again."""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = ('symjax-bp', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
_RIVALS = ('torch', 'biotorch')
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


def cores() -> list[int]:
  """The numbers of the cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return [*range(os.cpu_count() or 1)]


def _versions(packages: Iterable[str]) -> dict[str, str]:
  found = {}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def environment() -> dict[str, str]:
  """Processor, its cores, system and versions: what bits may depend on."""
  return {
    'processor': _processor(),
    'cores': str(len(cores())),
    'cores of the host': str(os.cpu_count() or 1),
    'system': platform.platform(),
    'python': platform.python_version(),
    **_versions(_PACKAGES),
    **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
  }


def described() -> dict[str, str]:
  """The command that is being carried out, and its environment."""
  command = shlex.join(['python', '-m', 'experiments', *sys.argv[1:]])
  return {'command': command, **environment(), **_versions(_RIVALS)}


def warn_if_busy() -> None:
  """Says so if other programs are using the processor."""
  load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.0
  if load > len(cores()) / 2:
    print(
      f'warning: other programs use the processor (load {load:.1f} on '
      f'{len(cores())} cores): what is measured now is theirs as much as ours.'
    )
