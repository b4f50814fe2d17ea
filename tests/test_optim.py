"""Batch Manhattan is the paper's equations, in every company optax allows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from symjax_bp import optim

SETTINGS = (0, 1, 2, 3)
BATCH_MANHATTAN = (1, 2, 3)
MOMENTUM = 0.9
DECAY = 5e-4
RATE = 1e-3


def _weights(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'kernel': rng.standard_normal((3, 4)).astype(np.float32),
    'bias': rng.standard_normal(4).astype(np.float32),
  }


def _gradients(steps, seed=1):
  """Random gradients with a tenth of exact zeros, the last bias always 0."""
  rng = np.random.default_rng(seed)
  like = _weights()
  for _ in range(steps):
    gradients = {
      name: rng.standard_normal(w.shape).astype(np.float32)
      * (rng.random(w.shape) > 0.1).astype(np.float32)
      for name, w in like.items()
    }
    gradients['bias'][-1] = 0.0
    yield gradients


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


def _drop(at, before, after, step):
  """A schedule (optax's own mix integers and floats, which is refused here)."""
  return jnp.where(step < at, jnp.float32(before), jnp.float32(after))


def _train(optimizer, gradients, weights):
  state = optimizer.init(weights)
  for g in gradients:
    updates, state = optimizer.update(g, state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights


@pytest.mark.parametrize('setting', SETTINGS)
def test_300_steps_are_the_equations_to_the_bit(setting):
  weights = _weights()
  memory = {name: np.zeros_like(w) for name, w in weights.items()}
  # Not jitted: XLA would contract a * b + c to one rounding.
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)
  actual = jax.tree.map(jnp.asarray, weights)
  state = optimizer.init(actual)
  for g in _gradients(300):
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
  gradients = list(_gradients(30))
  after = [
    _train(
      optim.batch_manhattan(RATE, MOMENTUM, DECAY, k), gradients, _weights()
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
    _train(
      optimizer,
      [
        jax.tree.map(lambda g, s=s: g * np.float32(s), g)
        for g in _gradients(30)
      ],
      _weights(),
    )
    for s in (1.0, scale)
  )
  chex.assert_trees_all_equal(plain, scaled)


@pytest.mark.parametrize('setting', BATCH_MANHATTAN)
def test_zero_gradient_moves_nothing(setting):
  # sign(0) = 0: without decay a weight nobody asked to move stays.
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, setting=setting)
  weights = _weights()
  after = _train(optimizer, _gradients(10), weights)
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
  gradients = list(_gradients(20))
  ours = optim.sgd(RATE, MOMENTUM, DECAY)
  theirs = optax.chain(
    optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)
  )
  setting_0 = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting=0)
  after = _train(ours, gradients, _weights())
  chex.assert_trees_all_equal(after, _train(theirs, gradients, _weights()))
  chex.assert_trees_all_equal(after, _train(setting_0, gradients, _weights()))


@pytest.mark.parametrize('setting', SETTINGS)
def test_learning_rate_schedule(setting):
  schedule = functools.partial(_drop, 5, 0.5, 0.125)
  gradients, weights = list(_gradients(8)), _weights()
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
  gradients, weights = list(_gradients(6)), _weights()
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
  weights = jax.tree.map(jnp.asarray, _weights())
  zeros = jax.tree.map(jnp.zeros_like, weights)
  updates, _ = optimizer.update(zeros, optimizer.init(weights), weights)
  np.testing.assert_array_equal(updates['kernel'], -0.25 * weights['kernel'])
  np.testing.assert_array_equal(updates['bias'], zeros['bias'])


def test_inject_hyperparams_asks_for_a_static_setting():
  optimizer = optax.inject_hyperparams(optim.batch_manhattan)(RATE)
  with pytest.raises(TypeError, match="static_args='setting'"):
    optimizer.init(_weights())


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
  weights, g = _weights(), next(_gradients(1))
  optimizer = optax.masked(
    optim.scale_by_batch_manhattan(), {'kernel': True, 'bias': False}
  )
  updates, _ = optimizer.update(g, optimizer.init(weights), weights)
  chex.assert_trees_all_equal(
    updates, {'kernel': np.sign(g['kernel']), 'bias': g['bias']}
  )


@pytest.mark.parametrize('setting', SETTINGS)
def test_multi_transform_freezes(setting):
  weights = _weights()
  optimizer = optax.multi_transform(
    {
      'train': optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting),
      'freeze': optax.set_to_zero(),
    },
    {'kernel': 'train', 'bias': 'freeze'},
  )
  after = _train(optimizer, _gradients(5), weights)
  alone = _train(
    optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting),
    _gradients(5),
    weights,
  )
  np.testing.assert_array_equal(after['bias'], weights['bias'])
  np.testing.assert_array_equal(after['kernel'], alone['kernel'])


@pytest.mark.parametrize('setting', SETTINGS)
def test_multi_steps_takes_the_sign_of_the_mean_gradient(setting):
  weights = jax.tree.map(jnp.asarray, _weights())
  micro = list(_gradients(4))
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


@pytest.mark.parametrize('setting', SETTINGS)
def test_jit_compiles_once_and_agrees(setting):
  optimizer = optim.batch_manhattan(RATE, MOMENTUM, DECAY, setting)

  traces = []

  @jax.jit
  def step(weights, state, g):
    traces.append(setting)
    updates, state = optimizer.update(g, state, weights)
    return optax.apply_updates(weights, updates), state

  weights = jax.tree.map(jnp.asarray, _weights())
  state = optimizer.init(weights)
  for g in _gradients(20):
    weights, state = step(weights, state, g)
  assert len(traces) == 1
  # Weights near 1 rounded 20 times; one sign that differs would be RATE.
  chex.assert_trees_all_close(
    weights, _train(optimizer, _gradients(20), _weights()), rtol=0, atol=5e-6
  )


def _loss(weights, x, y):
  return jnp.sum(jnp.square(x @ weights - y))


def _device_step(optimizer, sign_first, weights, state, x, y):
  g = jax.grad(_loss)(weights, x, y)
  g = jax.lax.psum(jnp.sign(g) if sign_first else g, 'batch')
  updates, state = optimizer.update(g, state, weights)
  return optax.apply_updates(weights, updates), state


@pytest.mark.parametrize('setting', BATCH_MANHATTAN)
@pytest.mark.parametrize('devices', [2, 4])
def test_sum_across_devices_before_the_sign(setting, devices):
  rng = np.random.default_rng(3)
  # Small integers: sums are exact, whatever their order.
  x = rng.integers(-3, 4, (8, 5)).astype(np.float32)
  y = rng.integers(-3, 4, 8).astype(np.float32)
  weights = jnp.zeros(5)
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
        w, state, x.reshape(devices, -1, 5), y.reshape(devices, -1)
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


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(setting, dtype):
  weights = jax.tree.map(lambda w: jnp.asarray(w, dtype), _weights())
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
  weights = jax.tree.map(jnp.asarray, _weights())
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
  ids=str,
)
def test_errors(arguments, error, message):
  with pytest.raises(error, match=message):
    optim.scale_by_batch_manhattan(**arguments)
  with pytest.raises(error, match=message):
    optim.batch_manhattan(RATE, **arguments)


def test_update_asks_for_the_parameters():
  optimizer = optim.batch_manhattan(RATE)
  with pytest.raises(ValueError, match='params'):
    optimizer.update(_weights(), optimizer.init(_weights()))
