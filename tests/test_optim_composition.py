"""Optimizers work with schedules and wrappers of optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from symjax_bp import optim
from tests.optimization import (
  DECAY,
  MOMENTUM,
  RATE,
  SETTINGS,
  initial_weights,
  random_gradients,
  train,
)


def _drop(at, before, after, step):
  """A schedule (optax's own mix integers and floats, which is refused here)."""
  return jnp.where(step < at, jnp.float32(before), jnp.float32(after))


@pytest.mark.parametrize('setting', SETTINGS)
def test_learning_rate_schedule(setting):
  schedule = functools.partial(_drop, 5, 0.5, 0.125)
  gradients, weights = list(random_gradients(8)), initial_weights()
  transform = optim.scale_by_batch_manhattan(setting, MOMENTUM)
  optimizer = optim.batch_manhattan(schedule, MOMENTUM, setting=setting)
  tau_state, state = transform.init(weights), optimizer.init(weights)
  for step, g in enumerate(gradients):
    minus_tau, tau_state = transform.update(g, tau_state, weights)
    updates, state = optimizer.update(g, state, weights)
    rate = np.float32(0.5 if step < 5 else 0.125)
    chex.assert_trees_all_equal(
      updates, jax.tree.map(lambda u, rate=rate: -rate * u, minus_tau)
    )


def test_weight_decay_schedule():
  optimizer = optim.sgd(1.0, 0.0, functools.partial(_drop, 1, 0.0, 0.5))
  weights = jnp.array([2.0, -4.0])
  state = optimizer.init(weights)
  for expected in ([0.0, 0.0], [-1.0, 2.0]):
    updates, state = optimizer.update(jnp.zeros(2), state, weights)
    np.testing.assert_array_equal(updates, np.float32(expected))


@pytest.mark.parametrize('setting', SETTINGS)
def test_inject_hyperparams(setting):
  gradients, weights = list(random_gradients(6)), initial_weights()
  injected = optax.inject_hyperparams(
    optim.batch_manhattan, static_args='setting'
  )(RATE, MOMENTUM, DECAY, setting)
  plain = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)
  state, plain_state = injected.init(weights), plain.init(weights)
  update = jax.jit(injected.update)
  for step, g in enumerate(gradients):
    updates, state = update(g, state, weights)
    expected, plain_state = plain.update(g, plain_state, weights)
    factor = 1.0 if step < 3 else 0.125
    chex.assert_trees_all_close(
      updates,
      jax.tree.map(lambda u, f=factor: u * f, expected),
      rtol=0,
      atol=1e-6 * RATE,
    )
    if step == 2:
      state.hyperparams['learning_rate'] = jnp.float32(0.125 * RATE)


def test_inject_hyperparams_with_a_mask_function():
  optimizer = optax.inject_hyperparams(
    optim.sgd, static_args=('weight_decay_mask',)
  )(1.0, 0.0, 0.25, lambda w: jax.tree.map(lambda a: a.ndim > 1, w))
  weights = jax.tree.map(jnp.asarray, initial_weights())
  zeros = jax.tree.map(jnp.zeros_like, weights)
  updates, _ = optimizer.update(zeros, optimizer.init(weights), weights)
  np.testing.assert_array_equal(updates['kernel'], -0.25 * weights['kernel'])
  np.testing.assert_array_equal(updates['bias'], zeros['bias'])


def test_inject_hyperparams_asks_for_a_static_setting():
  optimizer = optax.inject_hyperparams(optim.batch_manhattan)(RATE)
  with pytest.raises(TypeError, match="static_args='setting'"):
    optimizer.init(initial_weights())


def test_momentum_schedule_by_inject_hyperparams():
  optimizer = optax.inject_hyperparams(optim.sgd)(
    1.0, momentum=functools.partial(_drop, 2, 0.0, 0.5)
  )
  weights = jnp.zeros(1)
  state = optimizer.init(weights)
  for expected in (-1.0, -1.0, -1.5):
    updates, state = optimizer.update(jnp.ones(1), state, weights)
    np.testing.assert_array_equal(updates, np.float32([expected]))


def test_masked():
  weights, g = initial_weights(), next(random_gradients(1))
  optimizer = optax.masked(
    optim.scale_by_batch_manhattan(), {'kernel': True, 'bias': False}
  )
  updates, _ = optimizer.update(g, optimizer.init(weights), weights)
  chex.assert_trees_all_equal(
    updates, {'kernel': np.sign(g['kernel']), 'bias': g['bias']}
  )


@pytest.mark.parametrize('setting', SETTINGS)
def test_multi_transform_freezes(setting):
  weights = initial_weights()
  optimizer = optax.multi_transform(
    {
      'train': optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting),
      'freeze': optax.set_to_zero(),
    },
    {'kernel': 'train', 'bias': 'freeze'},
  )
  after = train(optimizer, random_gradients(5), weights)
  alone = train(
    optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting),
    random_gradients(5),
    weights,
  )
  np.testing.assert_array_equal(after['bias'], weights['bias'])
  np.testing.assert_array_equal(after['kernel'], alone['kernel'])


@pytest.mark.parametrize('setting', SETTINGS)
def test_multi_steps_takes_the_sign_of_the_mean_gradient(setting):
  weights = jax.tree.map(jnp.asarray, initial_weights())
  micro = list(random_gradients(4))
  inner = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)
  optimizer = optax.MultiSteps(inner, every_k_schedule=4)
  state = optimizer.init(weights)
  for k, g in enumerate(micro):
    # MultiSteps divides a float by its integer count.
    with jax.numpy_dtype_promotion('standard'):
      updates, state = optimizer.update(g, state, weights)
    if k < 3:
      chex.assert_trees_all_equal(
        updates, jax.tree.map(jnp.zeros_like, weights)
      )
  mean = jax.tree.map(lambda *gs: sum(gs) / np.float32(4), *micro)
  expected, _ = inner.update(mean, inner.init(weights), weights)
  # MultiSteps keeps a running mean, which rounds differently; a sign of
  # anything that is not 0 does not.
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-9)
