"""How JAX is started: flags, memory, the compilation cache."""

import os
import platform
import subprocess
import sys

import pytest

from experiments.training import backend


def test_flags_of_the_user_are_kept(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=x')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'mine')
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '3')
  monkeypatch.setenv('MALLOC_ARENA_MAX', '4')
  said = backend.configure()
  assert backend.os.environ['XLA_FLAGS'].startswith('--xla_dump_to=x ')
  assert backend.os.environ['JAX_COMPILATION_CACHE_DIR'] == 'mine'
  assert len(said) == 1
  assert backend.configure() == []
  monkeypatch.setattr(backend.importlib.metadata, 'version', lambda _: '0.11.0')
  monkeypatch.setenv('XLA_FLAGS', '')
  assert backend.configure() == []  # XLA ends on flags that it doesn't know


@pytest.mark.parametrize(
  'begin',
  [
    "assert any('memory' in line for line in backend.configure())",
    'processes._begin(processes.Place())',  # of a worker
  ],
)
def test_memory_is_kept_between_steps(begin):
  if platform.libc_ver()[0] != 'glibc':
    return  # nothing is set elsewhere
  script = f"""
import resource
import numpy as np
from experiments import backend, processes

processes._end_with_the_driver = lambda: None
{begin}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
large = lambda: np.ones(2**23)
large()
before = faults()
for _ in range(4):
  large()
print(faults() - before)
"""
  faults = subprocess.run(
    [sys.executable, '-c', script],
    check=True,
    capture_output=True,
    text=True,
    env={'PATH': os.environ['PATH']},
  ).stdout
  pages = 4 * 2**23 * 8 // os.sysconf('SC_PAGE_SIZE')
  assert int(faults) < pages / 100
