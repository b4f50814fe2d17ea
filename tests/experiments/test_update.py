"""One update: what it changes, at which rate, with which feedback."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import symjax_bp
from experiments import datasets
from experiments.paper import conditions, protocol
from experiments.training import loop as train
from experiments.training.models import NETWORKS, Network
from experiments.training.step import Setup, program
from tests.experiments import tiny


def test_what_is_frozen_does_not_move():
  last = {'output'}
  for part in ('Bottom', 'Top'):
    run = tiny.run(f'BN {part}', weight_decay=0.1)
    before = train.start(run, tiny.placed(run))['params']
    after = tiny.first_step(run)
    moved = {
      layer for layer in before if not tiny.equal(before[layer], after[layer])
    }
    assert moved == (last if part == 'Top' else set(before) - last)


def test_weight_decay_spares_batch_norm_alone():
  decayed, plain = (
    tiny.first_step(tiny.run('BN', weight_decay=decay)) for decay in (0.5, 0.0)
  )
  run = tiny.run('BN')
  before = train.start(run, tiny.placed(run))['params']

  def check(path, w, decayed, plain):
    decay = 0.0 if path[0].key.startswith('BatchNorm') else 0.5
    wanted = -np.float32(0.01 * decay) * w
    np.testing.assert_allclose(decayed - plain, wanted, atol=2e-6 * decay)

  jax.tree.map_with_path(check, before, decayed, plain)
  assert before.keys() == {
    'Dense_0', 'Dense_1', 'output', 'BatchNorm_0', 'BatchNorm_1',
  }  # fmt: skip


def test_a_summed_gradient_is_the_mean_times_the_batch():
  summed = tiny.run(reduction='sum', weight_decay=0.0)
  chex.assert_trees_all_close(
    tiny.first_step(summed, rate=0.0001),
    tiny.first_step(tiny.run(weight_decay=0.0)),
    rtol=1e-4,
    atol=1e-6,
  )


def test_the_rate_follows_the_schedule():
  # Batch Manhattan without momentum moves each weight by the rate or not at
  # all; one update an epoch, at 1, 0.1 and 0.01 of the rate.
  run = tiny.run(
    'BM', rate=10.0, epochs=3, momentum=0.0, weight_decay=0.0, holdout=0.5
  )
  placed = tiny.placed(run)
  states = [jax.tree.map(np.array, train.start(run, placed))]
  states += tiny.train(run, placed)[0]
  for before, after, rate in zip(
    states[:-1], states[1:], (0.1, 0.01, 0.001), strict=True
  ):
    w, w_next = (s['params']['output']['bias'] for s in (before, after))
    np.testing.assert_allclose(np.abs(w_next - w), rate, rtol=1e-3)


def test_feedback_is_redrawn_once_an_update():
  def buffers(condition, updates, seed=0):
    run = tiny.run(condition)
    placed = tiny.placed(run)
    state = train.start(run, placed) | {'updates': jnp.int32(updates)}
    other = train.start(tiny.run(condition, seed=seed), placed)
    kept = jax.tree.map(np.array, other['feedback'])
    # At rate 0 nothing but the gradient is remembered.
    state, _ = program(Setup.of(run, placed)).step(
      state | {'feedback': other['feedback']},
      placed.arrays,
      placed.trained[:100],
      np.float32(0),
    )
    assert state['updates'] == updates + 1
    assert tiny.equal(state['feedback'], kept)
    trace = jax.tree.leaves(state['optimizer'])
    return [np.array(leaf) for leaf in trace if leaf.ndim == 2]

  redrawn = 'brSF-50%+BN+BM'
  assert tiny.equal(buffers(redrawn, 5), buffers(redrawn, 5))
  assert not tiny.equal(buffers(redrawn, 5), buffers(redrawn, 6))
  assert not tiny.equal(buffers(redrawn, 5), buffers(redrawn, 5, seed=1))
  assert tiny.equal(buffers('frSF-50%+BN', 5), buffers('frSF-50%+BN', 6))


def test_the_start_is_that_of_the_model():
  run = tiny.run('frSF-50%+BN', seed=3)
  state = train.start(run, tiny.placed(run))
  model = symjax_bp.with_feedback(
    Network(
      NETWORKS['timit'], tiny.CLASSES, batch_norm='plain', initial_stds=(0.05,)
    ),
    symjax_bp.from_name(run.condition.rule),
  )
  initialize = jax.jit(model.init, static_argnums=2)
  variables = initialize(jax.random.key(3), jnp.zeros((1, 1845)), True)
  for part in ('params', 'feedback'):
    # Another program may round the product with 0.05 differently.
    chex.assert_trees_all_close(state[part], variables[part], rtol=1e-6)


class _Plain(nn.Module):
  """The MNIST network as anyone would write it."""

  @nn.compact
  def __call__(self, x):
    for features in (20, 50):
      x = nn.relu(nn.Conv(features, (5, 5), padding='VALID')(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
    return nn.Dense(10, name='output')(x)


def test_a_symmetric_run_is_plain_flax_and_optax_step_by_step():
  data = datasets.load('digits', train_size=200)
  (run,) = protocol.runs_of(
    conditions.find('SGD'),
    (1.0,),
    dataset=protocol.Data('digits', data.digest),
    protocol=protocol.Protocol(base_rate=1e-4, initial_std=0.05, momentum=0.8),
  )
  placed = tiny.placed(run, data)
  functions = program(Setup.of(run, placed))
  state = train.start(run, placed)
  plain = _Plain()
  params = jax.tree.map(jnp.array, state['params'])
  optimizer = optax.chain(
    optax.add_decayed_weights(5e-4), optax.trace(0.8), optax.scale(-1e-4)
  )
  memory = optimizer.init(params)

  @jax.jit
  def update(params, memory, x, y):
    def loss(params):
      logits = plain.apply({'params': params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    changes, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, changes), memory, value

  mean = data.x_train[placed.trained].mean(0, dtype=np.float64)
  for step in range(4):
    index = placed.trained[30 * step : 30 * step + 30]
    x = (data.x_train[index] - mean).astype(np.float32)
    params, memory, value = update(params, memory, x, data.y_train[index])
    state, scores = functions.step(
      state, placed.arrays, index, np.float32(1e-4)
    )
    assert float(scores[0]) / 30 == pytest.approx(float(value), rel=1e-4)
    chex.assert_trees_all_close(state['params'], params, rtol=1e-3, atol=1e-5)
