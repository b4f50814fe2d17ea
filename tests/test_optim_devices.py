"""Batch Manhattan takes the sign of the sum over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from symjax_bp import optim
from tests.optimization import BATCH_MANHATTAN


def _loss(weights, x, y):
  return jnp.sum(jnp.square(x @ weights - y))


def _device_step(optimizer, sign_first, weights, state, x, y):
  g = jax.grad(_loss)(weights, x, y)
  g = jax.lax.psum(jnp.sign(g) if sign_first else g, 'batch')
  updates, state = optimizer.update(g, state, weights)
  return optax.apply_updates(weights, updates), state


@pytest.mark.parametrize('setting', BATCH_MANHATTAN)
@pytest.mark.parametrize('devices', [2, 4, 8])
def test_sum_across_devices_before_the_sign(setting, devices):
  rng = np.random.default_rng(3)
  # Small integers: sums are exact, whatever their order.
  x = rng.integers(-3, 4, (16, 20)).astype(np.float32)
  y = rng.integers(-3, 4, 16).astype(np.float32)
  weights = jnp.zeros(20)
  optimizer = optim.batch_manhattan(0.25, 0.5, 0.25, setting)

  def train(sign_first):
    step = jax.pmap(
      functools.partial(_device_step, optimizer, sign_first),
      axis_name='batch',
      in_axes=(None, None, 0, 0),
      out_axes=None,
      devices=jax.devices()[:devices],
    )
    w, state = weights, optimizer.init(weights)
    for _ in range(2):
      w, state = step(
        w, state, x.reshape(devices, -1, 20), y.reshape(devices, -1)
      )
    return w

  expected, state = weights, optimizer.init(weights)
  for _ in range(2):
    g = jax.grad(_loss)(expected, x, y)
    updates, state = optimizer.update(g, state, expected)
    expected = optax.apply_updates(expected, updates)
  np.testing.assert_array_equal(train(sign_first=False), expected)
  assert (np.asarray(train(sign_first=True)) != expected).any()


def test_shard_map_equals_one_device():
  rng = np.random.default_rng(3)
  x = rng.integers(-3, 4, (8, 5)).astype(np.float32)
  y = rng.integers(-3, 4, 8).astype(np.float32)
  weights = jnp.zeros(5)
  optimizer = optim.batch_manhattan(0.25, 0.5, 0.25)
  replicated, split = PartitionSpec(), PartitionSpec('batch')

  @functools.partial(
    jax.shard_map,
    mesh=Mesh(jax.devices()[:4], ('batch',)),
    in_specs=(replicated, split, split),
    out_specs=replicated,
  )
  def updates(weights, x, y):
    # The gradient with respect to replicated weights is already summed.
    g = jax.grad(_loss)(weights, x, y)
    return optimizer.update(g, optimizer.init(weights), weights)[0]

  g = jax.grad(_loss)(weights, x, y)
  expected, _ = optimizer.update(g, optimizer.init(weights), weights)
  np.testing.assert_array_equal(updates(weights, x, y), expected)
