"""How JAX is started for the experiments; imported before JAX.

On a CPU jaxlib 0.10 hands convolutions to a library that uses one core; the
flag below gives them back to the code that uses all cores. What the user sets
in the environment is never overridden.
"""

import importlib.metadata
import os

from experiments.datasets.cache import default_dir

_CPU_FLAGS = {
  '--xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT',
}
# XLA ends the process on a flag that it doesn't know.
_KNOWS_THEM = '0.10.'


def configure() -> list[str]:
  """Sets XLA's flags and the compilation cache; says what was set."""
  said = []
  flags = os.environ.get('XLA_FLAGS', '')
  version = importlib.metadata.version('jaxlib')
  for flag, value in _CPU_FLAGS.items():
    if flag not in flags and version.startswith(_KNOWS_THEM):
      flags = f'{flags} {flag}={value}'.strip()
      said.append(f'XLA_FLAGS {flag}={value}')
  if flags:
    os.environ['XLA_FLAGS'] = flags
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = str(default_dir() / 'compiled')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    said.append(f'JAX_COMPILATION_CACHE_DIR {folder}')
  return said


def leave_accelerators_to_others() -> None:
  """Keeps this process, which only writes results, to the CPU."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
