"""Asymmetric Linen layers and models: state, paths, tables, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import serialization

import symjax_bp as sbp
from symjax_bp import linen, metrics
from tests.cases import assert_same_bits, differ, normal
from tests.linen_models import (
  CNN,
  IMAGES,
  KEY,
  RNGS,
  Autoencoder,
  X,
  gradient,
  without_feedback,
)

BP = sbp.symmetric()
MASK = jnp.ones((3, 3, 2, 4)).at[0].set(0.0)
LAYERS = {
  'Dense': (sbp.rndf(), (5,), {'dtype': jnp.bfloat16}, (3, 4)),
  'DenseGeneral': (
    sbp.nusf(), ((3, 2),), {'axis': 2, 'batch_dims': (0,)}, (2, 4, 5)
  ),
  'Conv': (
    sbp.nusf(), (4, (3, 3)),
    {'feature_group_count': 2, 'strides': 2, 'padding': 'CIRCULAR'}
    | {'mask': MASK},
    (2, 6, 7, 4),
  ),
}  # fmt: skip


def pull_back(layer, variables, x):
  """dx, and what a layer has in common with Flax's: y and dparams."""
  apply = lambda params, x: layer.apply({**variables, 'params': params}, x)
  y, pullback = jax.vjp(apply, variables['params'], x)
  dparams, dx = pullback(normal(1, y.shape, y.dtype))
  return dx, (y, dparams)


@pytest.mark.parametrize('name', LAYERS)
def test_layers_are_those_of_flax_but_for_dx(name):
  rule, args, kwargs, shape = LAYERS[name]
  plain, x = getattr(nn, name)(*args, **kwargs), normal(0, shape)
  layer = getattr(linen, name)(*args, feedback=rule, **kwargs)
  params, variables = plain.init(KEY, x), layer.init(KEY, x)
  assert_same_bits(without_feedback(variables), params)
  V = linen.feedback_weights(layer, variables, x)
  assert V['kernel'].dtype == params['params']['kernel'].dtype
  at_V = {'params': {**params['params'], **V}}

  @jax.jit
  def run():
    each = (layer, variables), (plain, params), (plain, at_V)
    return [pull_back(model, given, x) for model, given in each]

  (dx, others), (true_dx, expected), (dx_at_V, _) = run()
  assert_same_bits(others, expected)
  assert_same_bits(dx, dx_at_V)
  assert differ(dx, true_dx)


@pytest.mark.parametrize(
  'rule',
  [
    sbp.usf(),
    sbp.rndf(),
    sbp.brsf(),
    sbp.product_feedback(width=8),
    sbp.low_rank(rank=2),
    sbp.local_loss(factors={'decay': 0.5, 'self': 0.5}),
  ],
  ids=str,
)
def test_variables_of_every_kind_survive_a_checkpoint(rule, tmp_path):
  variables = linen.with_feedback(Autoencoder(), rule).init(KEY, X)
  assert ('feedback' in variables) == rule.keeps_state
  empty = jax.tree.map(jnp.zeros_like, variables)
  data = serialization.to_bytes(variables)
  assert_same_bits(serialization.from_bytes(empty, data), variables)
  assert_same_bits(serialization.msgpack_restore(data), variables)
  if rule in (sbp.rndf(), sbp.product_feedback(width=8)):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / 'variables', variables)
      checkpointer.wait_until_finished()
      for target in ((), (empty,)):
        restored = checkpointer.restore(tmp_path / 'variables', *target)
        assert_same_bits(restored, variables)


def test_feedback_can_be_made_after_the_parameters():
  model, params = (
    linen.with_feedback(CNN(), sbp.rndf()),
    CNN().init(KEY, IMAGES),
  )
  make = lambda given, rngs: model.apply(
    given, IMAGES, rngs=rngs, mutable=['feedback']
  )
  y, made = make(params, RNGS)
  assert_same_bits(y, CNN().apply(params, IMAGES))
  for key in (0, 1):  # The draws do not depend on the key of the parameters.
    keys = {'params': jax.random.key(key), **RNGS}
    assert_same_bits(model.init(keys, IMAGES)['feedback'], made['feedback'])
  other = {'feedback': jax.random.key(8)}
  assert differ(make(params, other)[1], made)
  assert_same_bits(make({**params, **made}, other)[1], made)
  half = {'feedback': {'Conv_0': made['feedback']['Conv_0']}}
  assert_same_bits(make({**params, **half}, RNGS)[1], made)


def test_a_call_is_traced_once():
  """Also where feedback is made on the way, or V or a mirror is asked for."""
  calls = []

  class Counted(nn.Module):
    @nn.compact
    def __call__(self, x):
      calls.append(x)
      return nn.Dense(2)(x)

  model = linen.with_feedback(Counted(), sbp.rndf())
  mutable, params = ['feedback', 'feedback_weights'], Counted().init(KEY, X)
  calls.clear()
  _, made = model.apply(params, X, rngs=RNGS, mutable=mutable)
  assert len(calls) == 1 and set(made) == set(mutable)
  f = sbp.with_feedback(Counted().apply, sbp.weight_mirror())
  stored = f.init(KEY, params)
  calls.clear()
  f.mirror(KEY, params, stored, X)
  assert len(calls) == 1


def test_a_redrawing_rule_follows_its_seed_and_the_weights():
  model = linen.with_feedback(Autoencoder(), sbp.brsf())
  params = Autoencoder().init(KEY, X)
  by_key = gradient(model, params, X, rngs=RNGS)
  _, seeds = model.apply(params, X, rngs=RNGS, mutable=['feedback'])
  other = {'feedback': jax.random.key(8)}
  stored, again = {**params, **seeds}, {**params, **sbp.redraw(seeds, KEY)}
  for rngs in ({}, other):  # A stored seed counts, not the key.
    assert_same_bits(gradient(model, stored, X, rngs=rngs), by_key)
  assert differ(gradient(model, params, X, rngs=other), by_key)
  changed = jax.tree.map(lambda leaf: leaf * 2, params)
  V = [
    linen.feedback_weights(model, given, X, rngs=rngs)['enc/kernel']
    for given, rngs in (
      (stored, {}), (again, {}), (params, other), ({**changed, **seeds}, {})
    )
  ]  # fmt: skip
  for i, U in enumerate(V):
    assert_same_bits(jnp.sign(U), jnp.sign(params['params']['enc']['kernel']))
    assert all((U != other).all() for other in V[:i])


def test_feedback_that_does_not_fit_is_refused():
  model = linen.with_feedback(Autoencoder(), sbp.rndf())
  variables = model.init(KEY, X)
  params, made = variables['params'], variables['feedback']

  def apply(rule, feedback):
    model = linen.with_feedback(Autoencoder(), rule)
    return model.apply({'params': params, 'feedback': feedback}, X)

  for rule in (sbp.rndf(scale=2.0), sbp.usf()):  # Of this state, or of none.
    assert_same_bits(apply(rule, made), model.apply(variables, X))
  factored = sbp.product_feedback(width=8)
  factors = linen.with_feedback(Autoencoder(), factored).init(KEY, X)[
    'feedback'
  ]
  narrow, thin = jax.tree.map(lambda state: state[..., :1], (made, factors))
  for rule, feedback, message in (
    (sbp.frsf(), made, r"'dec/kernel' was made by rndf\(\), .* frsf\(\)"),
    (sbp.rndf(0.1), made, r"'dec/kernel' was made by rndf\(\)"),
    (sbp.rndf(), narrow, r"'dec/.*\(5, 1\), but the weight has \(5, 5\)"),
    (factored, thin, r"'dec/.*\(5, 1\) and \(8, 1\), but .* \(5, 5\)"),
    (sbp.rndf(), {}, "'enc/kernel', 'dec/kernel' is missing"),
    (sbp.rndf(), {'enc': made['enc']}, "of 'dec/kernel' is missing"),
  ):
    with pytest.raises(sbp.FeedbackError, match=message):
      apply(rule, feedback)


def test_rules_by_path_and_the_table():
  rules = {'Conv': sbp.rndf(), '^Dense_1/': sbp.usf()}
  model = linen.with_feedback(CNN(), rules, exclude='Dense_0')
  for x in (IMAGES, jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)):
    assert linen.feedback_table(model, x).splitlines() == [
      'weight          shape         feedback               use',
      'Conv_0/kernel   (3, 3, 2, 4)  rndf()                 product',
      'Dense_1/kernel  (36, 8)       usf()                  product',
      'Dense_0/kernel  (8, 3)        plain backpropagation  excluded',
      '2 of 3 weights with feedback: 360 of 384 parameters',
    ]
  variables = model.init(KEY, IMAGES)
  V = linen.feedback_weights(model, variables, IMAGES)
  W = variables['params']['Dense_1']['kernel']
  R = variables['feedback'].pop('Conv_0')['kernel:rndf()']
  assert_same_bits(V, {'Conv_0/kernel': R, 'Dense_1/kernel': jnp.sign(W)})
  assert not variables['feedback']
  model, tokens = nn.Sequential([nn.Embed(5, 4), nn.Dense(2)]), jnp.array([1])
  model = linen.with_feedback(model, sbp.rndf())
  assert list(model.init(KEY, tokens)['feedback']) == ['layers_1']
  assert linen.layer_rules(model, tokens)[0][2:4] == (None, 'looked up')


@pytest.mark.parametrize(
  'mutable', [(), 'batch_stats', ['batch_stats'], True, nn.DenyList('params')]
)
def test_alignment_measures_the_V_that_was_used(mutable):
  """``mutable`` is as in apply."""
  norm = nn.BatchNorm(use_running_average=not mutable)
  model = nn.Sequential([nn.Dense(4), norm, nn.Dense(3)])
  rules = {'layers_0': sbp.brsf(0.25), '': sbp.rndf()}
  model = linen.with_feedback(model, rules)
  variables, paths = model.init(KEY, X), {'layers_0/kernel', 'layers_2/kernel'}
  V = linen.feedback_weights(model, variables, X, mutable=mutable)
  loss = lambda y: (y**2).sum()
  rows = linen.layer_alignment(model, variables, loss, X, mutable=mutable)
  assert V.keys() == rows.keys() == paths
  for path, row in rows.items():
    W = variables['params'][path.partition('/')[0]]['kernel']
    angle = metrics.alignment_angle(W, V[path])
    np.testing.assert_allclose(row.angle, angle, rtol=1e-5)


wrap = linen.with_feedback
ERRORS = {
  'must be a flax.linen.Module': lambda: wrap(jnp.tanh, BP),
  "rules must .*not 'uSF'": lambda: wrap(CNN(), 'uSF'),
  "not 'BP'": lambda: linen.Dense(3, feedback='BP'),
  "argument: 'feedback'": lambda: linen.DenseGeneral(3),
  "'Conv_9' matches no parameter.*'Conv_0/kernel', 'Dense_0/bias'": (
    lambda: wrap(CNN(), {'Conv_9': BP, '': BP}).init(KEY, IMAGES)
  ),
  "'Dense_1/kernel' .* matches none of the rules.*'Dense_0/kernel'": (
    lambda: wrap(CNN(), {'Conv_0': BP}).init(KEY, IMAGES)
  ),
  'Autoencoder is called without variables: call model.apply': (
    lambda: wrap(Autoencoder(), BP)(X)
  ),
  'Dense is called without variables': lambda: linen.Dense(3, feedback=BP)(X),
  "Autoencoder has no field or method 'enc'.*use them in a method": (
    lambda: wrap(Autoencoder(), BP).bind({}).enc(X)
  ),
}


@pytest.mark.parametrize('message', ERRORS)
def test_errors_name_what_is_wrong(message):
  kinds = AttributeError, TypeError, ValueError
  with pytest.raises(kinds, match=f'(?s){message}'):
    ERRORS[message]()
