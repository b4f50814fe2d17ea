"""The machine: how JAX is started on it, and what a result depends on.

Two things would cost a training step on a CPU a third of its time:

* jaxlib 0.10 hands convolutions to a library that uses one core. The flag below
  returns them to code that uses all cores, and hands that library the sums,
  which it takes in one pass.
* The C library returns large arrays to the system after every step, and the
  next step fills them with zeros again. Kept memory is reused.

On an NVIDIA GPU a flag makes the same seed give the same bits. XLA then no
longer times cuDNN's algorithms for every program, which took a minute.

Flags that the user set are kept. Settings that would change the
random numbers or the precision of a run are set here, because a run's identity
does not contain them.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path

from experiments.datasets.cache import default_dir

_CPU_FLAGS = {
  '--xla_cpu_experimental_ynn_fusion_type': (
    'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE'
  ),
}
_GPU_FLAGS = {'--xla_gpu_deterministic_ops': 'true'}
_CPU_DEVICES = '--xla_force_host_platform_device_count'
# XLA ends the process on an unknown flag.
_VERSION_WITH_FLAGS = '0.10.'
# The run's identity does not contain these.
_NUMERICS = {
  'JAX_DEFAULT_PRNG_IMPL': 'threefry2x32',
  'JAX_THREEFRY_PARTITIONABLE': 'true',
  'JAX_ENABLE_X64': 'false',
  'JAX_DEFAULT_MATMUL_PRECISION': 'float32',
}
# Of malloc.h: all threads use one arena, which grows by 64 MiB, holds arrays of
# all sizes and never shrinks.
_MALLOC = {
  'M_ARENA_MAX': (-8, 1),
  'M_TOP_PAD': (-2, 2**26),
  'M_MMAP_MAX': (-4, 0),
  'M_TRIM_THRESHOLD': (-1, 2**31 - 1),
}
_PACKAGES = ('symjax-bp', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
_VARIABLES = ('XLA_FLAGS', 'GLIBC_TUNABLES', 'LD_PRELOAD', 'OMP_NUM_THREADS')


def configure(devices: int | None = None) -> list[str]:
  """Sets what JAX reads when it is imported; returns what was set, in words.

  Args:
    devices: how many a CPU is to have; None leaves it at one.
  """
  messages, wanted = [], {}
  if importlib.metadata.version('jaxlib').startswith(_VERSION_WITH_FLAGS):
    wanted |= _CPU_FLAGS
  if accelerators():
    wanted |= _GPU_FLAGS
  if devices is not None and devices > 1:
    wanted[_CPU_DEVICES] = devices
  flags = os.environ.get('XLA_FLAGS', '')
  for flag, value in wanted.items():
    if flag not in flags:
      flags = f'{flags} {flag}={value}'.strip()
      messages.append(f'XLA_FLAGS {flag}={value}')
  if flags:
    os.environ['XLA_FLAGS'] = flags
  for name, value in _NUMERICS.items():
    if os.environ.get(name, value) != value:
      messages.append(f'{name} {value} (was {os.environ[name]})')
    os.environ[name] = value
  if keep_memory():
    messages.append('malloc: memory is kept between steps')
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(default_dir() / 'compiled'),
    # JAX's own limit of a second excludes most of these programs.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  for name, value in cache.items():
    if name not in os.environ:
      os.environ[name] = value
      messages.append(f'{name} {value}')
  # A process that was killed may have written half of an entry, and another one
  # may be writing it: JAX compiles then.
  warnings.filterwarnings(
    'ignore', 'Error reading persistent compilation cache entry'
  )
  return messages


def start_jax() -> None:
  """``configure`` with its messages on standard output."""
  for line in configure():
    print(f'set {line}', flush=True)


def keep_memory() -> bool:
  """Makes glibc's malloc keep memory, unless the user configured malloc.

  It holds for this process, not for its children.
  """
  chosen = any(
    name == 'GLIBC_TUNABLES' or name.startswith('MALLOC_')
    for name in os.environ
  )
  if platform.libc_ver()[0] != 'glibc' or chosen:
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all([mallopt(*setting) == 1 for setting in _MALLOC.values()])


def cores() -> list[int]:
  """The numbers of the cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return [*range(os.cpu_count() or 1)]


def accelerators() -> list[str]:
  """CUDA's names of the devices that this process may use."""
  if os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
    return []
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return [
      name for name in visible.split(',') if name.strip() not in ('', '-1')
    ]
  found = Path('/dev').glob('nvidia[0-9]*')
  return [str(number) for number in range(len(list(found)))]


def environment(further: Iterable[str] = ()) -> dict[str, str]:
  """Processor, cores, system and versions: what bits may depend on.

  Args:
    further: packages whose versions are wanted too.
  """
  return {
    'processor': _processor(),
    'cores': str(len(cores())),
    'cores of the host': str(os.cpu_count() or 1),
    'system': platform.platform(),
    'python': platform.python_version(),
    **_versions((*_PACKAGES, *further)),
    **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
  }


def warn_if_busy() -> None:
  """Prints a warning if other programs use the processor."""
  load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else 0.0
  if load > len(cores()) / 2:
    print(
      f'warning: other programs use the processor (load {load:.1f} on '
      f'{len(cores())} cores) and distort what is measured now.'
    )


def _processor() -> str:
  with contextlib.suppress(OSError):
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _versions(packages: Iterable[str]) -> dict[str, str]:
  found = {}
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found
