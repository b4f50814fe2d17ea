"""A run over several devices is that of one, whatever its condition."""

import chex
import jax
import numpy as np
import pytest

from experiments.training import data as device
from experiments.training import devices, step
from experiments.training import loop as train
from experiments.training.step import Setup
from tests.experiments import tiny


def _run(condition, size=72, **protocol):
  """With three mini-batches of 216 images; 2, 4 and 8 divide them."""
  return tiny.run(f'{condition}-{size}', **protocol)


def _placed(run, count):
  mesh = devices.mesh_for([run], count)
  return tiny.placed(run, mesh=mesh)


def _trained(run, count, state=None, first=1, scan=None):
  """States and lines; the state must be the same bits on every device."""
  placed = _placed(run, count)
  before = state or train.start(run, placed)
  states, lines = [], []
  for state, line in train.epochs(run, placed, before, first, scan):
    for leaf in jax.tree.leaves(state):
      shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
      assert len(shards) == count
      for shard in shards:
        np.testing.assert_array_equal(shard, shards[0])
    states.append(jax.tree.map(np.array, state))
    lines.append(line)
  return states, lines


@pytest.mark.parametrize(
  ('condition', 'count', 'scan'),
  [
    ('frSF-50%+BN', 8, True),
    ('brSF-50%+BN+BM', 4, False),
  ],
)
def test_several_devices_are_one(condition, count, scan):
  """Even in a run that goes on with another number of them."""
  # Rounding decides the sign of a gradient that is nearly 0, and the updates
  # after it follow. So one update an epoch, and each from the same state.
  size = 216 if '+BM' in condition else 72
  run = _run(condition, size, layer_metrics=scan)
  expected, expected_lines = _trained(run, 1)
  first, lines = _trained(run, count, scan=scan)
  second, more = _trained(run, count, expected[0], first=2, scan=scan)
  tiny.assert_close([lines[0], *more], expected_lines)
  for state, wanted in zip((first[0], *second), expected, strict=True):
    tree = zip(
      jax.tree.leaves(state['params']),
      jax.tree.leaves(wanted['params']),
      strict=True,
    )
    for a, b in tree:
      close = np.isclose(a, b, rtol=1e-3, atol=1e-5)
      assert close.mean() > 0.999 if '+BM' in condition else close.all()
    assert tiny.equal(state['feedback'], wanted['feedback'])


def test_groups_have_their_own_statistics_on_any_number_of_devices():
  run = _run('uSF+BN', batch_norm_groups=4, epochs=1)
  _, lines = _trained(run, 4)
  _, same = _trained(run, 1)
  tiny.assert_close(lines, same)
  _, whole = _trained(_run('uSF+BN', epochs=1), 1)
  assert abs(lines[0]['train_loss'] - whole[0]['train_loss']) > 0.01
  # Where nothing is normalized there is nothing to group.
  run = _run('SGD', batch_norm_groups=4)
  assert step._in_groups(Setup.of(run, _placed(run, 1)), print) is print


@pytest.mark.parametrize('name', ['BN', 'DFA+BN', 'Mirror+BN'])
def test_a_step_in_groups_is_the_mean_of_the_gradients_of_the_groups(name):
  """Momentum and decay are 0 and the rate is 1: the step is the gradient."""
  options = dict(momentum=0.0, weight_decay=0.0)
  grouped = _run(name, batch_norm_groups=4, **options)
  index = device.mini_batches(grouped, 1, _placed(grouped, 1).trained)[0]
  parts = [
    tiny.first_step(_run(name, **options), rows, 1.0)
    for rows in index.reshape(4, -1)
  ]
  mean = jax.tree.map(lambda *each: np.mean(each, 0), *parts)
  whole = tiny.first_step(grouped, index, 1.0)
  chex.assert_trees_all_close(whole, mean, rtol=1e-4, atol=1e-6)


def test_the_default_is_what_divides_every_mini_batch(monkeypatch):
  hundred = tiny.run('SGD')
  assert devices.mesh_for([hundred], None) is None  # on a CPU
  assert devices.mesh_for([hundred], 1) is None
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  for runs, count in (
    ([hundred], 5),
    ([_run('SGD')], 8),
    ([hundred, _run('SGD')], 4),
    ([tiny.run('BM-50')], 5),
  ):
    mesh = devices.mesh_for(runs, None)
    assert mesh is not None
    assert mesh.devices.tolist() == jax.devices()[:count]
  assert devices.mesh_for([tiny.run('BM-17')], None) is None


def test_devices_that_are_not_there_are_refused():
  run = tiny.run('SGD')
  with pytest.raises(ValueError, match='devices is 9, .* from 1 to 8'):
    devices.mesh_for([run], 9)
  with pytest.raises(ValueError, match='devices is 0'):
    devices.mesh_for([run], 0)


def test_a_mini_batch_that_does_not_divide_is_on_every_device():
  mesh = devices.mesh_for([tiny.run('uSF+BM')], 5)
  for images, divided in ((100, True), (216, False)):
    rows = devices.split(mesh, np.zeros((2, images), np.int32))
    assert rows.is_fully_replicated != divided
