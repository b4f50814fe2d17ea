"""Linen layers: Flax's parameters, values and outputs, and dx from V."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import symjax_bp as sbp
from symjax_bp import linen, primitives
from tests.cases import assert_same_bits, normal
from tests.linen_models import (
  CNN,
  KEY,
  RNGS,
  every_rule,
  weights_used,
)

LAYERS = {
  'Dense': (linen.Dense, nn.Dense, (5,), {}, (3, 4)),
  'Dense, bfloat16': (
    linen.Dense, nn.Dense, (5,), {'dtype': jnp.bfloat16}, (3, 4)
  ),
  'DenseGeneral': (
    linen.DenseGeneral, nn.DenseGeneral, ((3, 2),), {'axis': (1, 2)}, (2, 4, 5)
  ),
  'DenseGeneral, batch': (
    linen.DenseGeneral, nn.DenseGeneral, (3,), {'batch_dims': (0,)}, (2, 4, 5)
  ),
  'Conv': (linen.Conv, nn.Conv, (4, (3, 3)), {'strides': 2}, (2, 6, 7, 3)),
  'Conv, circular, 1d': (
    linen.Conv, nn.Conv, (4, (3,)), {'padding': 'CIRCULAR'}, (2, 6, 3)
  ),
  'Conv, groups': (
    linen.Conv, nn.Conv, (4, (3, 3)), {'feature_group_count': 2}, (2, 6, 7, 4)
  ),
}  # fmt: skip


every_layer = pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)


def build(layer, rule):
  asymmetric, plain, args, kwargs, shape = layer
  return (
    asymmetric(*args, feedback=rule, **kwargs),
    plain(*args, **kwargs),
    shape,
  )


@every_rule
@every_layer
def test_layers_are_those_of_flax_but_for_dx(layer, rule):
  model, plain, shape = build(layer, rule)
  x = normal(0, shape)
  variables = model.init(KEY, x)
  expected = plain.init(KEY, x)
  assert_same_bits(variables['params'], expected['params'])
  assert ('feedback' in variables) == (rule.draws and not rule.redraws)

  def output(params, x):
    return model.apply(
      {**variables, 'params': params}, x, rngs=RNGS, mutable='feedback_weights'
    )

  (y, sown) = output(variables['params'], x)
  assert_same_bits(y, plain.apply(expected, x))
  V = sown['feedback_weights']['kernel']
  g = normal(1, y.shape, y.dtype)
  _, pullback, _ = jax.vjp(output, variables['params'], x, has_aux=True)
  dparams, dx = pullback(g)
  _, plain_pullback = jax.vjp(plain.apply, expected, x)
  assert_same_bits(dparams, plain_pullback(g)[0]['params'])
  at_V = {'params': {**expected['params'], 'kernel': V.astype(jnp.float32)}}
  assert_same_bits(dx, jax.vjp(lambda x: plain.apply(at_V, x), x)[1](g)[0])
  if rule == sbp.symmetric():
    assert_same_bits(dx, plain_pullback(g)[1])
  else:
    assert not np.array_equal(dx, plain_pullback(g)[1])


def test_masked_weights_have_no_feedback():
  mask = jnp.ones((3, 3, 2, 4)).at[0].set(0.0)
  layer = linen.Conv(4, (3, 3), mask=mask, feedback=sbp.rndf())
  x = normal(0, (2, 5, 5, 2))
  V = weights_used(layer, layer.init(KEY, x), x, None)['kernel']
  assert_same_bits((V == 0).astype(jnp.float32), 1 - mask)


def test_feedback_is_stored_in_the_dtype_of_the_parameters():
  layer = linen.Dense(4, dtype=jnp.bfloat16, feedback=sbp.frsf())
  x = normal(0, (2, 3))
  variables = layer.init(KEY, x)
  assert variables['feedback']['kernel'].dtype == jnp.float32
  assert layer.apply(variables, x).dtype == jnp.bfloat16


def test_clone_and_copy_change_the_rule():
  layer = linen.Dense(4, feedback=sbp.usf())
  x = normal(0, (2, 3))
  variables = layer.init(KEY, x)
  changed = layer.clone(feedback=sbp.symmetric())
  V = weights_used(changed, variables, x, None)['kernel']
  assert_same_bits(V, variables['params']['kernel'])


def test_layer_alignment_measures_the_V_that_was_used():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(
    CNN(), {'Conv': sbp.brsf(0.25), 'Dense_0': sbp.rndf(), '': sbp.symmetric()}
  )
  variables = model.init(KEY, x)
  loss = lambda y: (y**2).sum()
  rows = jax.jit(lambda v: linen.layer_alignment(model, v, loss, x, rngs=RNGS))(
    variables
  )
  V = weights_used(model, variables, x, RNGS)
  assert set(rows) == {'Conv_0', 'Dense_0', 'Dense_1'}
  for name, row in rows.items():
    W = np.asarray(variables['params'][name]['kernel'], np.float64)
    used = np.asarray(V[name]['kernel'], np.float64)
    cosine = (W * used).sum() / np.linalg.norm(W) / np.linalg.norm(used)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    np.testing.assert_allclose(row.angle, angle, atol=1e-2)
    ratio = np.linalg.norm(used) / np.linalg.norm(W)
    np.testing.assert_allclose(row.norm_ratio, ratio, rtol=1e-5)
    concordance = (np.sign(W) == np.sign(used)).mean()
    np.testing.assert_allclose(row.concordance, concordance, rtol=1e-6)
  assert rows['Dense_1'].gradient_angle == 0  # nothing asymmetric above it
  assert rows['Dense_0'].gradient_angle == 0  # its own V does not matter
  assert rows['Conv_0'].gradient_angle > 1


@pytest.mark.parametrize(
  'make, error, message',
  [
    (lambda: linen.Dense(3, feedback='uSF'), TypeError, "not 'uSF'"),
    (lambda: linen.Conv(3, (1,), feedback=None), TypeError, 'not None'),
    (lambda: linen.DenseGeneral(3), TypeError, 'feedback'),
    (lambda: linen.with_feedback(CNN(), 'uSF'), TypeError, "not 'uSF'"),
    (lambda: linen.with_feedback(CNN(), {'a': 1}), TypeError, r"rule\['a'\]"),
    (lambda: linen.with_feedback(CNN(), {}), ValueError, 'empty'),
    (lambda: linen.with_feedback(CNN(), {'(': sbp.usf()}), ValueError,
     r"'\(' is not a regular expression"),
    (lambda: linen.with_feedback(lambda x: x, sbp.usf()), TypeError, 'nnx'),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_an_operation_may_be_used_by_hand_in_a_module():
  """The primitive is all that a custom layer needs."""

  class Mine(nn.Module):
    @nn.compact
    def __call__(self, x):
      W = self.param('W', nn.initializers.normal(), (3, 4))
      return primitives.dense(x, W, sbp.usf().weights(W))

  x = normal(0, (2, 3))
  variables = Mine().init(KEY, x)
  dx = jax.grad(lambda x: Mine().apply(variables, x).sum())(x)
  expected = jnp.ones((2, 4)) @ jnp.sign(variables['params']['W']).T
  assert_same_bits(dx, expected)
