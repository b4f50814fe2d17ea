"""Draws: where they are kept, which key they follow, what is missing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import symjax_bp as sbp
from symjax_bp import linen
from tests.cases import assert_same_bits, normal
from tests.linen_models import (
  CNN,
  KEY,
  MODELS,
  RNGS,
  Shared,
  every_rule,
  gradient,
  weights_used,
)


@pytest.mark.parametrize('name', ['CNN', 'remat', 'shared', 'recurrent'])
def test_a_redrawing_rule_follows_its_key_and_nothing_else(name):
  model, shape = MODELS[name]
  x = normal(0, shape)
  model = linen.with_feedback(model, sbp.brsf())
  variables = model.init(KEY, x)
  same = gradient(model, variables, x)
  assert_same_bits(same, gradient(model, variables, x))
  other = gradient(model, variables, x, {'feedback': jax.random.key(8)})
  changed = jax.tree.map(lambda a, b: (a != b).any(), same, other)
  assert any(jax.tree.leaves(changed))


def test_a_shared_layer_has_one_V_however_often_it_is_called():
  """V of two uses of a layer is the one that a single use would draw."""
  x = normal(0, (4, 6))
  model = linen.with_feedback(Shared(), sbp.brsf())
  variables = model.init(KEY, x)

  class Spy(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = linen.Dense(6, feedback=sbp.brsf(), name='layer', use_bias=False)
      return layer(layer(x))

  spy = Spy()
  spied = spy.init(KEY, x)
  dx = jax.grad(lambda x: spy.apply(spied, x, rngs=RNGS).sum())(x)
  V = weights_used(spy, spied, x, RNGS)['layer']['kernel']
  np.testing.assert_allclose(dx, jnp.ones((4, 6)) @ V.T @ V.T, rtol=1e-5)
  both = weights_used(model, variables, x, RNGS)['layer']['kernel']
  once, sown = model.apply(
    variables, x, rngs=RNGS, mutable='feedback_weights', method='encode'
  )
  assert once.shape == (4, 6)
  assert_same_bits(both, sown['feedback_weights']['layer']['kernel'])


def test_feedback_draws_do_not_depend_on_the_parameter_key_when_given_one():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), sbp.frsf())
  init = lambda params, feedback: model.init(
    {'params': jax.random.key(params), 'feedback': jax.random.key(feedback)}, x
  )
  assert_same_bits(init(0, 1)['feedback'], init(2, 1)['feedback'])
  assert_same_bits(init(0, 1)['params'], init(0, 2)['params'])
  first, second = init(0, 1)['feedback'], init(0, 2)['feedback']
  same = jax.tree.map(lambda a, b: bool((a == b).any()), first, second)
  assert not any(jax.tree.leaves(same))


def test_feedback_can_be_made_for_parameters_that_came_without():
  x = normal(0, (4, 6, 6, 2))
  params = CNN().init(KEY, x)
  model = linen.with_feedback(CNN(), sbp.rndf())
  _, made = model.apply(params, x, rngs=RNGS, mutable=['feedback'])
  expected = model.init({'params': KEY, **RNGS}, x)
  assert_same_bits(made['feedback'], expected['feedback'])


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(nn.Dense(6)(x)), None


def stack(variable_axes, split_rngs, lift=nn.scan):
  if lift is nn.vmap:
    layers = nn.vmap(
      nn.Dense, variable_axes=variable_axes, split_rngs=split_rngs
    )

    class Stack(nn.Module):
      @nn.compact
      def __call__(self, x):
        return layers(6)(x)
  else:
    layers = nn.scan(
      Block, variable_axes=variable_axes, split_rngs=split_rngs, length=3
    )

    class Stack(nn.Module):
      @nn.compact
      def __call__(self, x):
        return layers()(x, None)[0]

  return Stack()


@pytest.mark.parametrize('lift', [nn.scan, nn.vmap])
@every_rule
def test_lifted_layers_work_where_the_lift_carries_the_state(rule, lift):
  model = stack(
    {'params': 0, 'feedback': 0, 'feedback_weights': 0},
    {'params': True, 'feedback': True},
    lift,
  )
  x = normal(0, (3, 6))
  asymmetric = linen.with_feedback(model, rule)
  variables = asymmetric.init(KEY, x)
  assert_same_bits(variables['params'], model.init(KEY, x)['params'])
  (V,) = jax.tree.leaves(weights_used(asymmetric, variables, x, RNGS))
  W = max(jax.tree.leaves(variables['params']), key=lambda leaf: leaf.ndim)
  assert V.shape == W.shape == (3, 6, 6)
  if rule.draws:
    assert not (V[0] == V[1]).any(), 'each layer has a draw of its own'
  gradient(asymmetric, variables, x)


def test_a_lift_that_does_not_carry_the_state_is_explained():
  x = normal(0, (3, 6))
  bare = stack({'params': 0}, {'params': True})
  with pytest.raises(ValueError, match="variable_axes={'feedback': 0}"):
    linen.with_feedback(bare, sbp.frsf()).init(KEY, x)
  model = linen.with_feedback(bare, sbp.brsf())
  variables = model.init(KEY, x)
  with pytest.raises(ValueError, match="split_rngs={'feedback': True}"):
    model.apply(variables, x, rngs=RNGS)
  model = linen.with_feedback(bare, sbp.usf())
  gradient(model, model.init(KEY, x), x)


def test_missing_key_stream_and_collection_are_explained():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), sbp.brsf())
  variables = model.init(KEY, x)
  with pytest.raises(ValueError, match=r"'Conv_0'.*'feedback', which is miss"):
    model.apply(variables, x)
  model = linen.with_feedback(CNN(), sbp.frsf())
  variables = model.init(KEY, x)
  with pytest.raises(ValueError, match=r"'Conv_0'.*collection 'feedback'"):
    model.apply({'params': variables['params']}, x)
  wrong = jax.tree.map(lambda a: a[..., :1], variables['feedback'])
  with pytest.raises(ValueError, match=r"'Conv_0'.*\(3, 3, 2, 4\), not"):
    model.apply({**variables, 'feedback': wrong}, x)
