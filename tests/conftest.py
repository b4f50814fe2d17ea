"""A strict session: nothing is promoted, broadcast or warned about silently."""

import os
from pathlib import Path

# Eight host devices, so that pmap, shard_map and sharded jit really run.
os.environ['JAX_PLATFORMS'] = os.environ.get('JAX_PLATFORMS', 'cpu')
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'xla_force_host_platform_device_count' not in _FLAGS:
  os.environ['XLA_FLAGS'] = (
    f'{_FLAGS} --xla_force_host_platform_device_count=8'.strip()
  )

# XLA's compilation is most of the time: all tests, workers and sessions share
# what one of them has compiled.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(Path(__file__).parents[1] / '.pytest_cache' / 'jax'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True)
def _same_variables():
  """A command sets some; later tests would compile another way."""
  before = dict(os.environ)
  yield
  for name in os.environ.keys() - before.keys():
    del os.environ[name]
  os.environ.update(before)


@pytest.fixture
def float64():
  """Double precision, in which no rounding hides or explains a difference."""
  with jax.enable_x64(True):
    yield


def _choose_optimizations(item):
  """Without any, the library's tests compile in half the time."""
  of_library = item.path.parent == Path(__file__).parent
  skip = of_library and not item.get_closest_marker('optimized')
  if skip != jax.config.read('jax_disable_most_optimizations'):
    jax.config.update('jax_disable_most_optimizations', skip)
    jax.clear_caches()  # Each test runs what is compiled its own way.


def pytest_runtest_setup(item):
  _choose_optimizations(item)


def pytest_runtest_teardown(nextitem):
  """For tests that are not below this folder."""
  if nextitem:
    _choose_optimizations(nextitem)


# Files that take minutes start first, so that no worker waits for another.
_LONG = (
  'test_processes.py', 'test_killed.py', 'test_ray.py', 'test_bench.py',
  'test_launch.py', 'test_tutorials.py', 'test_environments.py', 'test_zoo.py',
  'test_transform.py',
)  # fmt: skip


def pytest_configure(config):
  """Keeps that order: by default xdist starts the files with most tests."""
  config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
  """Sorts the files that take longest to the front."""
  items.sort(key=lambda item: item.path.name not in _LONG)
