"""How JAX is started: flags, memory, the compilation cache."""

import os
import platform
import subprocess
import sys

import pytest

from experiments.training import machine
from tests.experiments.command_line import python


def test_flags_of_the_user_are_kept(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=x')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'mine')
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '3')
  monkeypatch.setenv('MALLOC_ARENA_MAX', '4')
  messages = machine.configure()
  assert os.environ['XLA_FLAGS'].startswith('--xla_dump_to=x ')
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == 'mine'
  assert len(messages) == 1
  assert machine.configure() == []
  monkeypatch.setattr(machine.importlib.metadata, 'version', lambda _: '0.11.0')
  monkeypatch.setenv('XLA_FLAGS', '')
  assert machine.configure() == []  # XLA ends on flags that it doesn't know


def test_an_accelerator_gives_the_same_bits_unless_the_user_says_no(
  monkeypatch,
):
  monkeypatch.setattr(machine, 'accelerators', lambda: ['0'])
  monkeypatch.setenv('XLA_FLAGS', '')
  machine.configure()
  assert '--xla_gpu_deterministic_ops=true' in os.environ['XLA_FLAGS'].split()
  theirs = '--xla_gpu_deterministic_ops=false'
  monkeypatch.setenv('XLA_FLAGS', theirs)
  machine.configure()
  assert os.environ['XLA_FLAGS'].count('deterministic') == 1
  assert theirs in os.environ['XLA_FLAGS'].split()


@pytest.mark.parametrize(
  'begin',
  [
    "assert any('memory' in line for line in machine.configure())",
    # Of a worker process, whose pipe is closed.
    """
with contextlib.suppress(EOFError):
  processes._work(closed, processes.Place((), {}), None)
""",
  ],
)
def test_memory_is_kept_between_steps(begin):
  if platform.libc_ver()[0] != 'glibc':
    return  # nothing is set elsewhere
  script = f"""
import contextlib, multiprocessing, os, resource
import numpy as np
from experiments.runs import processes
from experiments.training import machine

closed, other = multiprocessing.Pipe()
other.close()
os.sched_setaffinity = lambda *_: None
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
  faults = int(python(script, env={'PATH': os.environ['PATH']}))
  pages = 4 * 2**23 * 8 // os.sysconf('SC_PAGE_SIZE')
  assert faults < pages / 100


def test_what_changes_numbers_is_set_whatever_the_user_has():
  """A run's identity does not contain these."""
  script = """
from experiments.training import machine
print(machine.configure())
import jax
print(jax.config.jax_default_prng_impl, jax.config.jax_enable_x64,
      jax.config.jax_threefry_partitionable,
      jax.config.jax_default_matmul_precision)
"""
  theirs = {
    'JAX_DEFAULT_PRNG_IMPL': 'rbg',
    'JAX_ENABLE_X64': '1',
    'JAX_THREEFRY_PARTITIONABLE': '0',
    'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16',
  }
  environment = {'PATH': os.environ['PATH'], **theirs}
  messages, settings = python(script, env=environment).splitlines()
  assert settings == 'threefry2x32 False True float32'
  for name, value in theirs.items():
    assert f'{name} ' in messages
    assert f'(was {value})' in messages


def test_half_a_cache_entry_is_no_warning(tmp_path):
  """Of a process that was killed, or that is writing it."""
  program = """
import os, pathlib, sys
from experiments.training import machine
machine.configure()
import jax
add = jax.jit(lambda x: x + 1)
print(add(1.0))
for path in pathlib.Path(sys.argv[1]).iterdir():
  os.truncate(path, 20)
  print('cut')
jax.clear_caches()
print(add(1.0))
"""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', program, tmp_path],
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  first, *cut, last = done.stdout.splitlines()
  assert (first, {*cut}, last, done.stderr) == ('2.0', {'cut'}, '2.0', '')
