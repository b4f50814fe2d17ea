"""Batch Manhattan is the paper's equations, to the bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from symjax_bp import optim
from tests.optimization import (
  BATCH_MANHATTAN,
  DECAY,
  MOMENTUM,
  RATE,
  SETTINGS,
  initial_weights,
  random_gradients,
  train,
)


def _numpy_tau(setting, gradient, memory, weights):
  """The paper's tau(t) and what the momentum keeps, operation by operation.

  float32 throughout and in the order in which optax carries them out (a
  change of all signs does not change rounding), so that bits can be compared.
  """
  momentum, decay = np.float32(MOMENTUM), np.float32(DECAY)
  drive = gradient if setting == 0 else np.sign(gradient)
  tau = (-drive - decay * weights) + momentum * memory
  if setting == 2:
    tau = np.sign(tau)
  return (np.sign(tau) if setting == 3 else tau), tau


@pytest.mark.parametrize('setting', SETTINGS)
def test_300_steps_are_the_equations_to_the_bit(setting):
  weights = initial_weights()
  memory = {name: np.zeros_like(w) for name, w in weights.items()}
  # Not jitted: XLA would contract a * b + c to one rounding.
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)
  actual = jax.tree.map(jnp.asarray, weights)
  state = optimizer.init(actual)
  for g in random_gradients(300):
    updates, state = optimizer.update(
      jax.tree.map(jnp.asarray, g), state, actual
    )
    actual = optax.apply_updates(actual, updates)
    for name, w in weights.items():
      tau, memory[name] = _numpy_tau(setting, g[name], memory[name], w)
      weights[name] = w + np.float32(RATE) * tau
  chex.assert_trees_all_equal(actual, weights)
  assert np.isfinite(weights['kernel']).all()


def test_settings_differ():
  gradients = list(random_gradients(30))
  after = [
    train(
      optim.batch_manhattan(RATE, MOMENTUM, DECAY, k),
      gradients,
      initial_weights(),
    )['kernel']
    for k in SETTINGS
  ]
  for a in SETTINGS:
    for b in range(a):
      assert not np.allclose(after[a], after[b], rtol=0, atol=RATE / 2)


@pytest.mark.parametrize('setting', BATCH_MANHATTAN)
@pytest.mark.parametrize('scale', [2.0**-60, 2.0**40])
def test_scale_of_the_gradient_does_not_change_a_bit(setting, scale):
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)
  plain, scaled = (
    train(
      optimizer,
      [
        jax.tree.map(lambda g, s=s: g * np.float32(s), g)
        for g in random_gradients(30)
      ],
      initial_weights(),
    )
    for s in (1.0, scale)
  )
  chex.assert_trees_all_equal(plain, scaled)


@pytest.mark.parametrize('setting', BATCH_MANHATTAN)
def test_zero_gradient_moves_nothing(setting):
  # sign(0) = 0: without decay a weight nobody asked to move stays.
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, setting=setting)
  weights = initial_weights()
  after = train(optimizer, random_gradients(10), weights)
  np.testing.assert_array_equal(after['bias'][-1], weights['bias'][-1])
  assert (after['bias'][:-1] != weights['bias'][:-1]).all()


def test_signed_trace_keeps_the_sign():
  transform = optim.signed_trace(decay=0.75)
  state = transform.init(jnp.zeros(2))
  # An unsigned trace would still be positive after the third step.
  for gradients, expected in [
    ([1.0, 0.0], [1.0, 0.0]),
    ([1.0, 0.5], [1.0, 1.0]),
    ([-1.0, -0.5], [-1.0, 1.0]),
  ]:
    updates, state = transform.update(jnp.array(gradients), state)
    np.testing.assert_array_equal(updates, np.float32(expected))
    assert isinstance(state, optax.TraceState)
    np.testing.assert_array_equal(state.trace, updates)


def test_sgd_is_optax_sgd_after_weight_decay():
  gradients = list(random_gradients(20))
  ours = optim.sgd(RATE, MOMENTUM, DECAY)
  theirs = optax.chain(
    optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)
  )
  setting_0 = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting=0)
  after = train(ours, gradients, initial_weights())
  chex.assert_trees_all_equal(
    after, train(theirs, gradients, initial_weights())
  )
  chex.assert_trees_all_equal(
    after, train(setting_0, gradients, initial_weights())
  )


@pytest.mark.parametrize('setting', SETTINGS)
def test_jit_compiles_once_and_agrees(setting):
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)

  traces = []

  @jax.jit
  def step(weights, state, g):
    traces.append(setting)
    updates, state = optimizer.update(g, state, weights)
    return optax.apply_updates(weights, updates), state

  weights = jax.tree.map(jnp.asarray, initial_weights())
  state = optimizer.init(weights)
  for g in random_gradients(20):
    weights, state = step(weights, state, g)
  assert len(traces) == 1
  # Weights near 1 rounded 20 times; one sign that differs would be RATE.
  chex.assert_trees_all_close(
    weights,
    train(optimizer, random_gradients(20), initial_weights()),
    rtol=0,
    atol=5e-6,
  )


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(setting, dtype):
  weights = jax.tree.map(lambda w: jnp.asarray(w, dtype), initial_weights())
  optimizer = optim.batch_manhattan(0.125, MOMENTUM, DECAY, setting)
  state = optimizer.init(weights)
  chex.assert_trees_all_equal_dtypes(optax.tree.get(state, 'trace'), weights)
  updates, state = optimizer.update(weights, state, weights)
  chex.assert_trees_all_equal_dtypes(updates, weights)
  chex.assert_trees_all_equal_dtypes(optax.tree.get(state, 'trace'), weights)


@pytest.mark.parametrize(
  'mask',
  [
    {'kernel': True, 'bias': False},
    lambda w: jax.tree.map(lambda a: a.ndim > 1, w),
  ],
  ids=['tree', 'function'],
)
@pytest.mark.parametrize(
  'make', [optim.sgd, optim.batch_manhattan], ids=['sgd', 'batch_manhattan']
)
def test_weight_decay_mask(make, mask):
  weights = jax.tree.map(jnp.asarray, initial_weights())
  zeros = jax.tree.map(jnp.zeros_like, weights)
  optimizer = make(1.0, MOMENTUM, 0.25, weight_decay_mask=mask)
  updates, _ = optimizer.update(zeros, optimizer.init(weights), weights)
  np.testing.assert_array_equal(updates['kernel'], -0.25 * weights['kernel'])
  np.testing.assert_array_equal(updates['bias'], zeros['bias'])


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'setting': 4}, ValueError, 'setting is 4, but must be one of .* 0 '),
    ({'setting': -1}, ValueError, 'setting is -1'),
    ({'setting': True}, ValueError, 'setting is True'),
    ({'setting': 1.0}, ValueError, r'setting is 1\.0'),
    ({'setting': '1'}, ValueError, "setting is '1'"),
    ({'momentum': 1.0}, ValueError, r'momentum is 1\.0, .* \[0, 1\.0\)'),
    ({'momentum': -0.1}, ValueError, r'momentum is -0\.1'),
    ({'momentum': float('nan')}, ValueError, 'momentum is nan'),
    ({'momentum': None}, TypeError, 'momentum is None, but must be a number'),
    ({'momentum': lambda step: 0.9}, TypeError, 'inject_hyperparams'),
    ({'weight_decay': -1e-4}, ValueError, 'weight_decay is -0.0001'),
    ({'weight_decay': float('inf')}, ValueError, 'weight_decay is inf'),
  ],
)
def test_errors(arguments, error, message):
  with pytest.raises(error, match=message):
    optim.scale_by_batch_manhattan(**arguments)
  with pytest.raises(error, match=message):
    optim.batch_manhattan(RATE, **arguments)


def test_update_asks_for_the_parameters():
  optimizer = optim.batch_manhattan(RATE)
  with pytest.raises(ValueError, match='params'):
    optimizer.update(initial_weights(), optimizer.init(initial_weights()))
