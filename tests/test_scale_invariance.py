"""Batch Manhattan sees no scale: an exact check of rules, layers and updates.

Multiplying V by a power of two is exact in floating point and cannot change
the sign of a gradient, so 200 steps end with the same bits; by SGD they do not.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import symjax_bp
from tests.cases import assert_same_bits, chain, normal

SHAPES = ((6, 12), (12, 8), (8, 3))


def train(rule, optimizer, scales):
  """The weights after training by each scale."""
  x, labels = normal(0, (20, 6)), jnp.arange(20) % 3
  params = [normal(i, shape) / 3 for i, shape in enumerate(SHAPES)]

  def run(scale):
    f = symjax_bp.with_feedback(chain, rule(scale=scale))
    feedback = f.init(jax.random.key(0), params)

    def step(carry, _):
      def loss(params):
        logits = f(params, feedback, x)
        cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return cost.mean()

      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, length=200)[0][0]

  compiled = jax.jit(run)
  return [compiled(jnp.float32(scale)) for scale in scales]


@pytest.mark.parametrize('rule', [symjax_bp.usf, symjax_bp.brsf])
def test_a_power_of_two_on_V_changes_no_bit(rule):
  optimizer = symjax_bp.optim.batch_manhattan(1e-3, weight_decay=1e-3)
  one, small, large = train(rule, optimizer, (1, 2**-7, 2**5))
  assert_same_bits(small, one)
  assert_same_bits(large, one)


def test_sgd_does_see_the_scale():
  one, four = train(symjax_bp.usf, symjax_bp.optim.sgd(1e-3), (1, 4))
  assert (one[0] != four[0]).any() and (one[1] != four[1]).any()
