"""Unmodified models: parameters, outputs and learning; twins and wrappers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import symjax_bp as sbp
from symjax_bp import linen
from tests.cases import assert_same_bits, normal
from tests.linen_models import (
  CNN,
  KEY,
  MODELS,
  RNGS,
  Custom,
  every_model,
  gradient,
)


@every_model
def test_an_unmodified_model_keeps_its_parameters_and_outputs(model, shape):
  x = normal(0, shape)
  expected = model.init(KEY, x)
  for rule in (sbp.usf(), sbp.brsf(), sbp.frsf(0.5), sbp.rndf()):
    asymmetric = linen.with_feedback(model, rule)
    variables = asymmetric.init(KEY, x)
    assert_same_bits(variables['params'], expected['params'])
    y = asymmetric.apply(variables, x, rngs=RNGS)
    np.testing.assert_allclose(y, model.apply(expected, x), rtol=1e-6)
    actual = gradient(asymmetric, variables, x)
    plain = gradient(model, expected, x)
    differs = jax.tree.map(lambda a, b: not np.allclose(a, b), actual, plain)
    assert any(jax.tree.leaves(differs))


@every_model
def test_a_symmetric_model_learns_exactly_as_plain_flax(model, shape):
  """Step by step: an unmodified model and its twin stay bit-identical."""
  x, labels = normal(0, shape), jnp.array([0, 1, 2, 1])
  optimizer = optax.sgd(0.05, momentum=0.9)

  def train(model):
    params = model.init(KEY, x)['params']

    @jax.jit
    def step(params, state):
      def loss(params):
        logits = model.apply({'params': params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(
          logits, labels
        ).mean()

      value, grads = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    history = []
    for _ in range(5):
      params, state, value = step(params, state)
      history.append((value, params))
    return history

  symmetric = train(linen.with_feedback(model, sbp.symmetric()))
  plain = train(model)
  assert_same_bits(symmetric, plain)
  assert plain[-1][0] < plain[0][0]


def test_every_layer_of_attention_uses_V():
  model, shape = MODELS['attention']
  x = normal(0, shape)
  model = linen.with_feedback(model, sbp.rndf())
  variables = model.init(KEY, x)
  kernels = {
    path: leaf
    for path, leaf in jax.tree.leaves_with_path(variables['params'])
    if path[-1].key == 'kernel'
  }
  feedback = dict(jax.tree.leaves_with_path(variables['feedback']))
  assert feedback.keys() == kernels.keys() and len(kernels) == 6
  assert all(feedback[path].shape == kernels[path].shape for path in kernels)
  values = [np.asarray(leaf).ravel()[:8] for leaf in feedback.values()]
  assert len(np.unique(values, axis=0)) == len(values), 'draws differ by layer'


@every_model
def test_the_plain_twin_is_plain_backpropagation(model, shape):
  x = normal(0, shape)
  asymmetric = linen.with_feedback(model, sbp.rndf())
  variables = asymmetric.init(KEY, x)
  twin = linen.plain_twin(asymmetric)
  plain = {'params': variables['params']}
  assert_same_bits(
    gradient(twin, plain, x, None), gradient(model, plain, x, None)
  )


def test_the_plain_twin_of_layers_and_of_models_with_other_weights():
  class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
      return linen.Dense(2, feedback=sbp.rndf())(Custom()(x))

  x = normal(0, (2, 3))
  variables = Mixed().init(KEY, x)
  twin = linen.plain_twin(Mixed())
  assert set(linen.layer_rules(twin, x)) == {'Custom_0/W', 'Dense_0'}
  assert linen.layer_rules(twin, x)['Dense_0'][1] == sbp.symmetric()
  gradient(twin, {'params': variables['params']}, x, None)


def test_the_plain_twin_leaves_plain_layers_as_they_are():
  """An operation of their own, and the formulation of large convolutions."""

  class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.tanh(nn.Conv(50, (5, 5), padding='VALID', name='plain')(x))
      x = nn.Dense(4)(x.reshape(len(x), -1))
      return nn.Dense(3, dot_general=jax.lax.dot_general, name='head')(x)

  x = normal(0, (8, 12, 12, 20))
  model = linen.with_feedback(Own(), sbp.usf(), exclude=['plain', 'head'])
  variables = model.init(KEY, x)
  plain = gradient(Own(), variables, x)
  for twin in (linen.plain_twin(model), linen.plain_twin(Own())):
    assert_same_bits(gradient(twin, variables, x), plain)
  rules = linen.layer_rules(linen.plain_twin(model), x)
  assert [rule for _, rule in rules.values()] == [sbp.symmetric(), None, None]
  rows = linen.layer_alignment(model, variables, jnp.sum, x)
  assert list(rows) == ['Dense_0']
  # Whatever is around a twin still wins.
  around = linen.with_feedback(linen.plain_twin(model), sbp.rndf(),
                               exclude=['plain', 'head'])  # fmt: skip
  assert linen.layer_rules(around, x)['Dense_0'][1] == sbp.rndf()


def test_the_outermost_wrapper_wins():
  x = normal(0, (4, 6, 6, 2))
  inner = linen.with_feedback(CNN(), sbp.rndf())
  outer = linen.with_feedback(inner, {'Conv': sbp.usf(), '': sbp.nusf()})
  rules = [rule for _, rule in linen.layer_rules(outer, x).values()]
  assert rules == [sbp.usf(), sbp.nusf(), sbp.nusf()]


def test_a_wrapped_model_inside_another_module():
  class Outer(nn.Module):
    encoder: nn.Module

    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(self.encoder(x) + self.encoder(-x))

  x = normal(0, (4, 5))
  encoder = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(4)])
  wrapped = Outer(linen.with_feedback(encoder, {'^layers_': sbp.rndf()}))
  variables = wrapped.init(KEY, x)
  assert_same_bits(variables['params'], Outer(encoder).init(KEY, x)['params'])
  rules = {p: rule for p, (_, rule) in linen.layer_rules(wrapped, x).items()}
  assert rules == {
    'Dense_0': None,
    'encoder/layers_0': sbp.rndf(),
    'encoder/layers_2': sbp.rndf(),
  }


def test_a_step_that_is_already_jitted_uses_V():
  x = normal(0, (4, 6, 6, 2))
  variables = CNN().init(KEY, x)

  @jax.jit
  def forward(params, x):
    return CNN().apply(params, x)

  forward(variables, x)
  plain = gradient(CNN(), variables, x)
  actual = gradient(linen.with_feedback(CNN(), sbp.usf()), variables, x)
  again = gradient(CNN(), variables, x)
  assert_same_bits(plain, again)
  assert not np.allclose(actual['Conv_0']['kernel'], plain['Conv_0']['kernel'])


JitDense = nn.jit(nn.Dense)


class Jitted(nn.Module):
  @nn.compact
  def __call__(self, x):
    return JitDense(3)(jnp.tanh(JitDense(5)(x)))


def test_nn_jit_does_not_keep_the_trace_of_another_rule():
  x = normal(0, (4, 5))
  variables = Jitted().init(KEY, x)
  plain = gradient(Jitted(), variables, x)
  models = [
    linen.with_feedback(Jitted(), rule) for rule in (sbp.usf(), sbp.nusf())
  ]
  first, second = (gradient(model, variables, x) for model in models)
  below = lambda grads: grads['JitDense_1']['kernel']
  assert not np.allclose(below(first), below(plain))
  np.testing.assert_allclose(below(first), 5 * below(second), rtol=1e-5)
  assert_same_bits(gradient(linen.plain_twin(models[0]), variables, x), plain)
  for model, rule in zip(models, (sbp.usf(), sbp.nusf()), strict=True):
    rules = [rule for _, rule in linen.layer_rules(model, x).values()]
    assert rules == [rule, rule]
  assert [rule for _, rule in linen.layer_rules(Jitted(), x).values()] == [
    None, None,
  ]  # fmt: skip
