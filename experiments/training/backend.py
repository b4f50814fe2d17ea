"""How JAX is started for the experiments; imported before JAX.

On a CPU two things cost a training step a third of its time that need not:

* jaxlib 0.10 hands convolutions to a library that uses one core. The flag below
  gives them back to code that uses all cores, and hands that library the sums,
  which it does in one pass.
* The C library returns large arrays to the system after every step, which then
  fills them with zeros for the next one. Kept memory is used again.

What the user sets in the environment is never overridden.
"""

import ctypes
import importlib.metadata
import os
import platform

from experiments.datasets.cache import default_dir

_CPU_FLAGS = {
  '--xla_cpu_experimental_ynn_fusion_type': (
    'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE'
  ),
}
_CPU_DEVICES = '--xla_force_host_platform_device_count'
# XLA ends the process on a flag that it doesn't know.
_KNOWS_THEM = '0.10.'

# Of malloc.h: all threads use one arena, which grows by 64 MiB, holds arrays of
# all sizes and is never made smaller.
_MALLOC = {
  'M_ARENA_MAX': (-8, 1),
  'M_TOP_PAD': (-2, 2**26),
  'M_MMAP_MAX': (-4, 0),
  'M_TRIM_THRESHOLD': (-1, 2**31 - 1),
}


def configure(devices: int | None = None) -> list[str]:
  """Sets XLA's flags, memory and the compilation cache; says what was set.

  Args:
    devices: how many a CPU is to have; None leaves it at one.
  """
  said = []
  flags = os.environ.get('XLA_FLAGS', '')
  version = importlib.metadata.version('jaxlib')
  for flag, value in _CPU_FLAGS.items():
    if flag not in flags and version.startswith(_KNOWS_THEM):
      flags = f'{flags} {flag}={value}'.strip()
      said.append(f'XLA_FLAGS {flag}={value}')
  if devices is not None and devices > 1 and _CPU_DEVICES not in flags:
    flags = f'{flags} {_CPU_DEVICES}={devices}'.strip()
    said.append(f'XLA_FLAGS {_CPU_DEVICES}={devices}')
  if flags:
    os.environ['XLA_FLAGS'] = flags
  if keep_memory():
    said.append('malloc: memory is kept between steps')
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(default_dir() / 'compiled'),
    # JAX's own limit of a second leaves most of these programs out.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  for name, value in cache.items():
    if name not in os.environ:
      os.environ[name] = value
      said.append(f'{name} {value}')
  return said


def keep_memory() -> bool:
  """Tells glibc's malloc, unless the user told it something, to keep memory.

  It holds for this process alone, not for those that it starts.
  """
  chosen = any(
    name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_')
    for name in os.environ
  )
  if platform.libc_ver()[0] != 'glibc' or chosen:
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all([mallopt(*setting) == 1 for setting in _MALLOC.values()])


def leave_accelerators_to_others() -> None:
  """Keeps this process, which only writes results, to the CPU."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
