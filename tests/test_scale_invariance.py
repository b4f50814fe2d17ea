"""Batch Manhattan sees no scale: an exact check of rules, layers and updates.

Multiplying V by a power of two is exact in floating point and can not change
the sign of a gradient, so 300 steps end with the same bits; by SGD they don't.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import symjax_bp as sbp
from tests.cases import assert_same_bits, normal

STEPS = 300


def train(rule, optimizer):
  """The weights after many steps on a small classification problem."""
  mlp = nn.Sequential(
    [nn.Dense(12), jnp.tanh, nn.Dense(8), nn.relu, nn.Dense(3)]
  )
  model = sbp.linen.with_feedback(mlp, rule)
  x, labels = normal(0, (20, 6)), jnp.arange(20) % 3
  variables = model.init(jax.random.key(0), x)
  params = variables.pop('params')

  @jax.jit
  def run(params):
    def step(carry, number):
      params, state = carry
      rngs = {'feedback': jax.random.fold_in(jax.random.key(1), number)}

      def loss(params):
        logits = model.apply({**variables, 'params': params}, x, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(
          logits, labels
        ).mean()

      gradient = jax.grad(loss)(params)
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    return jax.lax.scan(step, start, jnp.arange(STEPS))[0][0]

  return run(params)


@pytest.mark.parametrize('setting', [1, 2, 3])
@pytest.mark.parametrize('make', [sbp.usf, sbp.brsf, sbp.frsf, sbp.rndf])
def test_a_power_of_two_on_V_changes_no_bit(make, setting):
  optimizer = sbp.optim.batch_manhattan(
    1e-3, weight_decay=1e-3, setting=setting
  )
  expected = train(make(), optimizer)
  for scale in (2.0**-7, 2.0**5):
    assert_same_bits(train(make(scale=scale), optimizer), expected)


def test_sgd_does_see_the_scale():
  optimizer = sbp.optim.sgd(1e-3)
  first, second = (train(sbp.usf(scale=s), optimizer) for s in (1.0, 4.0))
  differs = jax.tree.map(lambda a, b: bool((a != b).any()), first, second)
  assert differs['layers_0']['kernel'] and differs['layers_2']['kernel']
