"""Linen: Flax's parameters, values and outputs; V where and only where told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import symjax_bp as sbp
from symjax_bp import linen, primitives
from tests.cases import RULES, assert_same_bits, normal

KEY = jax.random.key(0)
RNGS = {'feedback': jax.random.key(7)}
every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)

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


class CNN(nn.Module):
  """Plain Flax, as users have it."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(8)(x))
    return nn.Dense(3)(x)


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
    x = x + y
    return nn.Dense(3)(nn.relu(nn.Dense(8)(nn.LayerNorm()(x))).mean(1))


class Remat(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.remat(nn.Dense)(8)(x)
    return nn.remat(CNN)(name='cnn')(x)


class Shared(nn.Module):
  def setup(self):
    self.layer = nn.Dense(6)
    self.head = nn.Dense(3)

  def __call__(self, x):
    return self.head(jnp.tanh(self.layer(jnp.tanh(self.layer(x)))))

  def encode(self, x):
    return self.layer(x)


class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    recur = nn.RNN(
      nn.GRUCell(5),
      variable_broadcast=['params', 'feedback'],
      split_rngs={'params': False, 'feedback': False},
    )
    return nn.Dense(3)(recur(x)[:, -1])


class Nested(nn.Module):
  model: nn.Module  # the name of the wrapper's own property, on purpose

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.relu(self.model(x)))


MODELS = {
  'CNN': (CNN(), (4, 6, 6, 2)),
  'attention': (Attention(), (4, 5, 6)),
  'remat': (Remat(), (4, 6, 6, 2)),
  'shared': (Shared(), (4, 6)),
  'recurrent': (Recurrent(), (4, 5, 3)),
  'nested': (Nested(nn.Sequential([nn.Dense(4), jnp.tanh])), (4, 5)),
}
every_model = pytest.mark.parametrize(
  'model, shape', MODELS.values(), ids=MODELS
)


def gradient(model, variables, x, rngs=RNGS):
  def loss(params):
    y = model.apply({**variables, 'params': params}, x, rngs=rngs)
    return (y**2).sum()

  return jax.jit(jax.grad(loss))(variables['params'])


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


def weights_used(model, variables, x, rngs):
  _, sown = model.apply(variables, x, rngs=rngs, mutable='feedback_weights')
  return sown['feedback_weights']


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


def test_rules_by_path():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(
    CNN(), {'Conv': sbp.rndf(), '^Dense_0$': sbp.usf(), '.*': sbp.symmetric()}
  )
  rules = {
    path: rule for path, (_, rule) in linen.layer_rules(model, x).items()
  }
  assert rules == {
    'Conv_0': sbp.rndf(), 'Dense_0': sbp.usf(), 'Dense_1': sbp.symmetric(),
  }  # fmt: skip
  variables = model.init(KEY, x)
  assert list(variables['feedback']) == ['Conv_0']
  V = weights_used(model, variables, x, RNGS)
  assert_same_bits(
    V['Dense_1'], {'kernel': variables['params']['Dense_1']['kernel']}
  )


def test_rules_by_path_change_just_the_layers_below():
  """A layer's V is seen by what comes before it, never by its own dW."""
  x = normal(0, (4, 6, 6, 2))
  variables = CNN().init(KEY, x)
  plain = gradient(CNN(), variables, x)
  last = linen.with_feedback(CNN(), {'Dense_1': sbp.usf(), '': sbp.symmetric()})
  actual = gradient(last, variables, x)
  assert_same_bits(actual['Dense_1'], plain['Dense_1'])
  for name in ('Dense_0', 'Conv_0'):
    assert not np.allclose(actual[name]['kernel'], plain[name]['kernel'])
  first = linen.with_feedback(CNN(), {'Conv': sbp.usf(), '': sbp.symmetric()})
  assert_same_bits(gradient(first, variables, x), plain)


@pytest.mark.parametrize(
  'rule, exclude, message',
  [
    ({'Conv_9': sbp.usf(), '': sbp.usf()}, (), r"'Conv_9' matches nothing.*"
     r"'Conv_0', 'Dense_0', 'Dense_1'"),
    ({'Conv_0': sbp.usf()}, (), "layer 'Dense_0' matches none of"),
    (sbp.usf(), 'Conv_7', "'Conv_7' matches nothing"),
  ],
)  # fmt: skip
def test_patterns_that_miss_are_errors(rule, exclude, message):
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), rule, exclude)
  with pytest.raises(ValueError, match=message):
    model.init(KEY, x)
  with pytest.raises(ValueError, match=message):
    model.apply(CNN().init(KEY, x), x)


class Custom(nn.Module):
  @nn.compact
  def __call__(self, x):
    W = self.param('W', nn.initializers.normal(), (x.shape[-1], 4))
    return x @ W


class Tied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(5, 4)
    return embed.attend(nn.Dense(4)(embed(tokens)))


class LookUp(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(4)(nn.Embed(5, 4)(tokens))


TOKENS = jnp.array([[0, 1, 4]])
UNSUPPORTED = {
  'ConvLocal': (nn.ConvLocal(3, (2,)), normal(0, (2, 5, 3)), 'kernel'),
  'ConvTranspose': (nn.ConvTranspose(3, (2,)), normal(0, (2, 5, 3)), 'kernel'),
  'Einsum': (nn.Einsum((3, 4), 'bi,io->bo'), normal(0, (2, 3)), 'kernel'),
  'custom': (
    nn.Sequential([Custom(), nn.Dense(2)]), normal(0, (2, 3)), 'layers_0/W'
  ),
  'LSTM': (
    nn.RNN(nn.OptimizedLSTMCell(3)), normal(0, (2, 5, 3)), 'cell/(if|hf|ii)'
  ),
  'tied embedding': (Tied(), TOKENS, 'Embed_0/embedding'),
}  # fmt: skip


@pytest.mark.parametrize(
  'model, x, path', UNSUPPORTED.values(), ids=UNSUPPORTED
)
def test_weights_that_can_not_be_asymmetric_are_refused_by_name(model, x, path):
  asymmetric = linen.with_feedback(model, sbp.usf())
  with pytest.raises(ValueError, match=f"asymmetric: '.*{path}"):
    asymmetric.init(KEY, x)
  allowed = linen.with_feedback(model, sbp.usf(), exclude='.*')
  assert_same_bits(allowed.init(KEY, x), model.init(KEY, x))


def test_an_embedding_that_is_only_looked_up_needs_no_feedback():
  model = linen.with_feedback(LookUp(), sbp.usf())
  gradient(model, model.init(KEY, TOKENS), TOKENS)


def test_excluded_layers_are_left_alone():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), sbp.usf(), exclude=['Dense_1$'])
  variables = model.init(KEY, x)
  assert set(weights_used(model, variables, x, None)) == {'Conv_0', 'Dense_0'}
  assert linen.layer_rules(model, x)['Dense_1'][1] is None


def test_an_operation_of_the_users_own_is_not_replaced_silently():
  layer = nn.Dense(3, dot_general=jax.lax.dot_general)
  with pytest.raises(ValueError, match='operation of its own'):
    linen.with_feedback(layer, sbp.usf()).init(KEY, normal(0, (2, 4)))


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


def test_the_table_says_what_is_plain():
  x = normal(0, (2, 3))
  model = nn.Sequential([Custom(), nn.Dense(2)])
  wrapped = linen.with_feedback(model, sbp.brsf(0.25), exclude='layers_0/W')
  assert linen.feedback_table(wrapped, x).splitlines() == [
    'layer       shape   feedback',
    'layers_0/W  (3, 4)  plain backpropagation',
    'layers_1    (4, 2)  brsf(p_flip=0.25)',
  ]
  assert 'brsf' not in linen.feedback_table(model, x)


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
