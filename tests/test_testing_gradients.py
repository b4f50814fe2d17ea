"""Assertions on gradients tell backpropagation from everything else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import symjax_bp as sbp
from symjax_bp import linen, primitives, testing
from symjax_bp import nnx as asymmetric
from tests.cases import RULES
from tests.small_models import KEY, MLP, RNGS, X, fails, linen_model, nnx_model

asymmetric_rules = [r for r in RULES.values() if r != sbp.symmetric()]


def loss(y):
  return (y**2).sum()


@pytest.mark.parametrize('rule', asymmetric_rules, ids=str)
def test_every_rule_but_the_symmetric_one_is_not_backpropagation(rule):
  model, variables = linen_model(rule)
  testing.assert_asymmetric_gradients(model, variables, loss, X, rngs=RNGS)
  testing.assert_asymmetric_gradients(nnx_model(rule), None, loss, X)


def test_the_symmetric_rule_is_backpropagation():
  model, variables = linen_model(sbp.symmetric())
  testing.assert_symmetric_gradients(model, variables, loss, X)
  testing.assert_symmetric_gradients(nnx_model(sbp.symmetric()), None, loss, X)


def test_the_symmetric_model_fails_with_a_table_of_its_layers():
  model, variables = linen_model(sbp.symmetric())
  table = (
    '  layer    shape   feedback     gradient angle\n'
    '  {}  (5, 6)  symmetric()  0\n'
    '  {}  (6, 3)  symmetric()  0'
  )
  with fails('really not backpropagation?', 'min_angle = 0.01 degrees',
             table.format('Dense_0', 'Dense_1')):  # fmt: skip
    testing.assert_asymmetric_gradients(model, variables, loss, X)
  model = nnx_model(sbp.symmetric())
  table = table.replace('layer  ', 'layer   ')
  with fails(table.format('layers/0', 'layers/2')):
    testing.assert_asymmetric_gradients(model, None, loss, X)


def test_an_asymmetric_model_fails_as_the_control_with_rule_and_angle():
  model, variables = linen_model(sbp.frsf(0.25))
  with fails(
    'must be those of plain backpropagation:',
    'Dense_0/bias: 6 of 6 values differ, by up to ',
    'Dense_0/kernel: 30 of 30 values differ, by up to ',
    'gradient angle',
    'Dense_0  (5, 6)  frsf(p_flip=0.25)  ',
    'Dense_1  (6, 3)  frsf(p_flip=0.25)  0',
  ) as caught:
    testing.assert_symmetric_gradients(model, variables, loss, X)
  assert 'Dense_1/kernel' not in str(caught.value)
  with fails('layers/0/kernel: 30 of 30 values', 'usf()'):
    testing.assert_symmetric_gradients(nnx_model(sbp.usf()), None, loss, X)


def test_asymmetry_in_the_first_layer_alone_reaches_no_gradient():
  rules = {'Dense_0': sbp.rndf(), '': sbp.symmetric()}
  model, variables = linen_model(rules)
  testing.assert_symmetric_gradients(model, variables, loss, X)
  with fails('really not', 'rndf()       0', 'symmetric()  0'):
    testing.assert_asymmetric_gradients(model, variables, loss, X)


def test_a_layer_below_an_asymmetric_one_counts_whatever_its_own_rule():
  model, variables = linen_model(sbp.usf(), exclude='Dense_0')
  testing.assert_asymmetric_gradients(model, variables, loss, X)
  testing.assert_asymmetric_gradients(
    nnx_model(sbp.usf(), exclude='layers/0'), None, loss, X
  )


def test_a_model_without_rules_is_plain_backpropagation():
  variables = MLP().init(KEY, X)
  testing.assert_symmetric_gradients(MLP(), variables, loss, X)
  with fails('Dense_1', '(6, 3)', 'plain backpropagation', '0'):
    testing.assert_asymmetric_gradients(MLP(), variables, loss, X)


def test_min_angle_is_the_bound():
  model, variables = linen_model(sbp.nusf())
  arguments = (model, variables, loss, X)
  angle = linen.layer_alignment(*arguments)['Dense_0'].gradient_angle
  testing.assert_asymmetric_gradients(*arguments, min_angle=angle * 0.99)
  with fails('min_angle = ', 'Dense_0', 'nusf()', f'{angle:.4g}'):
    testing.assert_asymmetric_gradients(*arguments, min_angle=angle * 1.01)


def test_calls_with_state_keys_and_options():
  model = linen.with_feedback(MLP(), sbp.brsf())
  rngs = {'dropout': jax.random.key(3), **RNGS}
  init = jax.jit(lambda keys: model.init(keys, X, train=True))
  variables = init({'params': KEY, **rngs})
  testing.assert_asymmetric_gradients(
    model, variables, loss, X, rngs=rngs, mutable=['batch_stats'], train=True
  )
  symmetric = linen.with_feedback(MLP(), sbp.symmetric())
  testing.assert_symmetric_gradients(
    symmetric, variables, loss, X,
    rngs=rngs, mutable=['batch_stats'], train=True,
  )  # fmt: skip


class NNXNet(nnx.Module):
  """With state that a call changes."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(5, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(self.norm(nnx.tanh(self.hidden(x)))))


def test_an_nnx_model_is_left_as_it_was():
  model = asymmetric.with_feedback(NNXNet(nnx.Rngs(0)), sbp.usf())
  before = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
  testing.assert_asymmetric_gradients(model, None, loss, X)
  after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
  assert all((a == b).all() for a, b in zip(after, before, strict=True))


class Leaky(nn.Module):
  """Feedback that is trained: the mistake of a layer written by hand."""

  @nn.compact
  def __call__(self, x):
    W = self.param('kernel', nn.initializers.lecun_normal(), (5, 3))
    V = self.variable('feedback', 'kernel', jnp.ones_like, W).value
    return x @ W + (x @ V - lax.stop_gradient(x @ V))


def test_feedback_with_a_gradient_fails():
  variables = Leaky().init(KEY, X)
  with fails('feedback must have no gradient:', 'kernel: gradient of up to '):
    testing.assert_asymmetric_gradients(Leaky(), variables, loss, X)


def test_feedback_in_the_forward_pass_fails(monkeypatch):
  use_V = lambda x, W, V, *args, **kwargs: lax.dot_general(
    x, V, *args, **kwargs
  )
  monkeypatch.setattr(primitives, 'dot_general', use_V)
  for check in (
    testing.assert_asymmetric_gradients,
    testing.assert_symmetric_gradients,
  ):
    with fails('output must be that of the plain twin:', '12 of 12 values'):
      check(nnx_model(sbp.usf()), None, loss, X)


@pytest.mark.parametrize(
  'check',
  [testing.assert_asymmetric_gradients, testing.assert_symmetric_gradients],
)
def test_state_that_does_not_match_fails_before_the_model_is_called(check):
  model, variables = linen_model(sbp.rndf())
  variables['params']['feedback'] = variables['feedback']
  with fails('feedback/Dense_0/kernel: feedback is among the parameters'):
    check(model, variables, loss, X)


def test_gradients_that_show_nothing_do_not_pass():
  model, variables = linen_model(sbp.symmetric())
  constant = lambda y: (0 * y).sum()
  with fails('all gradients are 0', 'nan'):
    testing.assert_symmetric_gradients(model, variables, constant, X)
  infinite = lambda y: (y / jnp.zeros_like(y)).sum()
  with fails('Dense_1/kernel', 'differ, by up to nan'):
    testing.assert_symmetric_gradients(model, variables, infinite, X)
  model, variables = linen_model(sbp.usf())
  for useless in (constant, infinite):
    with fails('really not', 'usf()', 'nan'):
      testing.assert_asymmetric_gradients(model, variables, useless, X)


@pytest.mark.parametrize(
  'make, error, message',
  [
    (lambda: (jnp.tanh, None), TypeError, 'flax.linen.Module or an nnx.Module'),
    (lambda: (MLP(), None), ValueError, 'variables must be .* not None'),
    (lambda: (MLP(), {'w': X}), ValueError, r"'params'.*not \['w'\]"),
    (lambda: (nnx_model(sbp.usf()), {}), ValueError, 'so pass None'),
  ],
)  # fmt: skip
@pytest.mark.parametrize(
  'check',
  [testing.assert_asymmetric_gradients, testing.assert_symmetric_gradients],
)
def test_models_and_variables_must_go_together(check, make, error, message):
  with pytest.raises(error, match=message):
    check(*make(), loss, X)


@pytest.mark.parametrize('min_angle', [-1.0, 180.0, float('nan')])
def test_min_angle_must_be_an_angle(min_angle):
  with pytest.raises(ValueError, match=f'min_angle must be.*not {min_angle}'):
    testing.assert_asymmetric_gradients(MLP(), {}, loss, X, min_angle=min_angle)
