"""Ray tasks: their share of a host, their settings, refused launches."""

import os
from types import SimpleNamespace

import pytest

from experiments.runs import ray_tasks
from experiments.runs.files import StoreError
from experiments.runs.train import Options
from tests.experiments import tiny


def test_more_than_this_host_has_is_refused():
  ray = SimpleNamespace(cluster_resources=lambda: {'CPU': 5.0})
  assert ray_tasks._room(ray, None, 2.0, 0.0) == 2
  with pytest.raises(ValueError, match='gpus_per_run is 1, but this host'):
    ray_tasks._room(ray, None, 2.0, 1.0)
  assert ray_tasks._room(ray, 'host:6379', 2.0, 1.0) == 1  # it may grow


def test_results_that_a_node_cannot_see_are_refused(tmp_path):
  options = Options(tmp_path, tiny.loader())
  unseen = ray_tasks._task(tiny.run(), options, tmp_path / 'no lock')
  ray = SimpleNamespace(get=lambda _: unseen)
  with pytest.raises(StoreError, match='a Ray node cannot see the results fol'):
    ray_tasks._outcome(ray, None, False)


def test_a_launch_removes_what_a_dead_one_left(tmp_path):
  left = tmp_path / '.launch-0123abc'
  left.touch()
  first = ray_tasks._begin(tmp_path)
  assert not left.exists()
  second = ray_tasks._begin(tmp_path)
  assert os.path.exists(first.lock_file)  # its driver is alive
  assert os.path.exists(second.lock_file)
  first.release()
  second.release()


def test_parts_of_a_host_are_shared_only_when_all_are_taken(monkeypatch):
  had = []
  monkeypatch.setattr(ray_tasks, '_cores', lambda: (91, 92, 94, 95, 97))
  monkeypatch.setattr(os, 'listdir', lambda _: ['7'])
  monkeypatch.setattr(os, 'sched_setaffinity', lambda _, own: had.append(own))
  own_cores = ray_tasks._own_cores
  with own_cores(2.0):
    with own_cores(2.0), own_cores(2.0):
      pass
    with own_cores(2.0):
      pass
  with own_cores(0.0):  # asks for none: has all
    pass
  assert had[:2] == [(91, 92), (94, 95)]
  assert had[2] in had[:2]
  assert had[3:] == [(94, 95)]
  with own_cores(0.5), own_cores(0.5):
    with own_cores(0.5):
      pass
  assert had[4:] == [(91,), (91,), (92,)]


@pytest.mark.parametrize('address', [None, 'host:6379'])
def test_tasks_have_the_settings_that_numbers_depend_on(monkeypatch, address):
  monkeypatch.setenv('XLA_FLAGS', '--xla_one=1')
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  variables = ray_tasks._runtime(address, 'cpu')['env_vars']
  assert variables['XLA_FLAGS'] == '--xla_one=1'
  assert variables['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] == '0'
  assert ('PYTHONPATH' in variables) == (address is None)
