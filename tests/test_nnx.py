"""NNX: kernels, state and originals are left alone; V is where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from tests.cases import RULES, assert_same_bits, normal

LAYERS = {
  'Linear': (asymmetric.Linear, nnx.Linear, (4, 5), {}, (3, 4)),
  'Linear, bfloat16': (
    asymmetric.Linear, nnx.Linear, (4, 5), {'dtype': jnp.bfloat16}, (3, 4)
  ),
  'LinearGeneral': (
    asymmetric.LinearGeneral, nnx.LinearGeneral, ((4, 5), (3, 2)),
    {'axis': (1, 2)}, (2, 4, 5),
  ),
  'Conv': (
    asymmetric.Conv, nnx.Conv, (4, 6, (3, 3)),
    {'strides': 2, 'feature_group_count': 2}, (2, 6, 7, 4),
  ),
}  # fmt: skip
every_layer = pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)
every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)


def params(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@every_rule
@every_layer
def test_layers_are_those_of_flax_but_for_dx(layer, rule):
  ours, flax, args, kwargs, shape = layer
  model = ours(*args, feedback=rule, rngs=nnx.Rngs(0), **kwargs)
  plain = flax(*args, rngs=nnx.Rngs(0), **kwargs)
  assert_same_bits(params(model), params(plain))
  x = normal(0, shape)
  y, pullback = jax.vjp(model, x)
  assert_same_bits(y, plain(x))
  g = normal(1, y.shape, y.dtype)
  operation = asymmetric._operation_of(model)[1]
  at_V = nnx.clone(plain)
  V = operation.feedback_weights(plain.kernel[...].astype(y.dtype))
  at_V.kernel[...] = V.astype(jnp.float32)
  assert_same_bits(pullback(g)[0], jax.vjp(at_V, x)[1](g)[0])
  loss = lambda m: (m(x).astype(jnp.float32) * g.astype(jnp.float32)).sum()
  assert_same_bits(
    nnx.to_pure_dict(nnx.grad(loss)(model)),
    nnx.to_pure_dict(nnx.grad(loss)(plain)),
  )


class CNN(nnx.Module):
  """Plain Flax, as users have it."""

  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.layers = nnx.List([
      nnx.Linear(4 * 9, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs),
    ])  # fmt: skip

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
    return self.layers[1](nnx.relu(self.layers[0](x)))


SHAPE = (4, 6, 6, 2)
LABELS = jnp.array([0, 1, 2, 1])


def loss_of(model, x):
  losses = optax.softmax_cross_entropy_with_integer_labels(model(x), LABELS)
  return losses.mean()


def train(model, steps=5, key=None):
  optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
  x = normal(0, SHAPE)

  @nnx.jit
  def step(model, optimizer, number):
    if key is not None:
      asymmetric.redraw(model, jax.random.fold_in(key, number))
    value, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads)
    return value

  return [step(model, optimizer, number) for number in range(steps)]


def test_a_symmetric_copy_of_a_cnn_learns_exactly_as_plain_flax():
  plain = CNN(nnx.Rngs(0))
  symmetric = asymmetric.with_feedback(plain, sbp.symmetric())
  expected, actual = train(plain), train(symmetric)
  assert_same_bits(actual, expected)
  assert_same_bits(params(symmetric), params(plain))
  assert expected[-1] < expected[0]


@every_rule
def test_training_moves_the_parameters_and_leaves_feedback_alone(rule):
  plain = CNN(nnx.Rngs(0))
  before = nnx.to_pure_dict(nnx.state(plain))
  model = asymmetric.with_feedback(plain, rule, rngs=nnx.Rngs(1))
  assert_same_bits(params(model), params(plain))
  state = nnx.to_pure_dict(nnx.state(model, asymmetric.Feedback))
  drawn = {path: leaf for path, leaf in jax.tree.leaves_with_path(state)}
  assert len(drawn) == (3 if rule.draws else 0)
  losses = train(model)
  assert losses[-1] != losses[0]
  after = nnx.to_pure_dict(nnx.state(model, asymmetric.Feedback))
  if not rule.redraws:
    assert_same_bits(after, state)
  assert_same_bits(nnx.to_pure_dict(nnx.state(plain)), before)
  used = {p: r for p, (_, r) in asymmetric.layer_rules(model).items()}
  assert used == dict.fromkeys(('conv', 'layers/0', 'layers/1'), rule)
  other = asymmetric.with_feedback(plain, sbp.symmetric())
  trained = train(other)
  if rule != sbp.symmetric():
    assert losses[-1] != trained[-1]


def test_split_and_merge_keep_feedback():
  model = asymmetric.with_feedback(
    CNN(nnx.Rngs(0)), sbp.frsf(0.5), rngs=nnx.Rngs(1)
  )
  graph, state = nnx.split(model)
  again = nnx.merge(graph, state)
  x = normal(0, SHAPE)
  grads = [nnx.grad(loss_of)(m, x) for m in (model, again)]
  assert_same_bits(*map(nnx.to_pure_dict, grads))


@pytest.mark.parametrize('rule', [sbp.frsf(), sbp.rndf(), sbp.brsf()], ids=str)
@pytest.mark.parametrize(
  'streams',
  [{'default': 0}, {'params': 0}, {'params': 0, 'feedback': 1}],
  ids=str,
)
def test_feedback_does_not_shift_later_kernels(rule, streams):
  def build(layer, **kwargs):
    rngs = nnx.Rngs(**streams)
    return [layer(3, 3, rngs=rngs, **kwargs) for _ in range(3)]

  ours = build(asymmetric.Linear, feedback=rule)
  plain = build(nnx.Linear)
  assert_same_bits(list(map(params, ours)), list(map(params, plain)))
  V = [m.dot_general.feedback_weights(jnp.ones((3, 3))) for m in ours]
  assert not (V[0] == V[1]).any() and not (V[1] == V[2]).any()


def test_with_feedback_follows_its_key_and_does_not_advance_other_streams():
  model = CNN(nnx.Rngs(0))

  def draws(**streams):
    copy = asymmetric.with_feedback(model, sbp.frsf(), rngs=nnx.Rngs(**streams))
    return jax.tree.leaves(nnx.state(copy, asymmetric.Feedback))

  assert_same_bits(draws(feedback=1), draws(feedback=1))
  assert not any(
    (a == b).any()
    for a, b in zip(draws(feedback=1), draws(feedback=2), strict=True)
  )
  rngs = nnx.Rngs(0)
  asymmetric.with_feedback(model, sbp.frsf(), rngs=rngs)
  assert_same_bits(params(CNN(rngs)), params(CNN(nnx.Rngs(0))))


def test_redraw_changes_V_once_an_update_and_only_then():
  model = asymmetric.with_feedback(
    CNN(nnx.Rngs(0)), {'conv': sbp.brsf(), '': sbp.frsf()}, rngs=nnx.Rngs(1)
  )
  x = normal(0, SHAPE)
  first = asymmetric.feedback_weights(model)
  model(x)
  nnx.grad(loss_of)(model, x)
  assert_same_bits(asymmetric.feedback_weights(model), first)
  asymmetric.redraw(model, jax.random.key(5))
  second = asymmetric.feedback_weights(model)
  assert not (first['conv'] == second['conv']).any()
  assert_same_bits(first['layers/0'], second['layers/0'])
  asymmetric.redraw(model, jax.random.key(6))
  asymmetric.redraw(model, jax.random.key(5))
  assert_same_bits(asymmetric.feedback_weights(model), second)


def test_redraw_inside_a_jitted_step_is_the_same_as_outside():
  rngs = nnx.Rngs(1)
  build = lambda: asymmetric.with_feedback(
    CNN(nnx.Rngs(0)), sbp.brsf(0.25), rngs=nnx.Rngs(1)
  )
  del rngs
  key = jax.random.key(3)
  assert_same_bits(train(build(), key=key), train(build(), key=key))
  other = train(build(), key=jax.random.key(4))
  assert train(build(), key=key)[-1] != other[-1]


def test_attention_and_recurrent_cells_are_reached():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.attention = nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=rngs)
      self.cell = nnx.GRUCell(6, 4, rngs=rngs)

    def __call__(self, x):
      x = self.attention(x)
      carry, _ = self.cell(jnp.zeros((x.shape[0], 4)), x[:, 0])
      return carry

  model = Model(nnx.Rngs(0))
  copy = asymmetric.with_feedback(model, sbp.rndf(), rngs=nnx.Rngs(1))
  rules = asymmetric.layer_rules(copy)
  assert {path: rule for path, (_, rule) in rules.items()} == dict.fromkeys(
    [
      'attention/key', 'attention/out', 'attention/query', 'attention/value',
      'cell/dense_h', 'cell/dense_i',
    ],
    sbp.rndf(),
  )  # fmt: skip
  x = normal(0, (2, 5, 6))
  assert_same_bits(copy(x), model(x))
  ours, plain = (jax.grad(lambda x, m=m: m(x).sum())(x) for m in (copy, model))
  assert not np.allclose(ours, plain)


class Custom(nnx.Module):
  def __init__(self, rngs):
    self.W = nnx.Param(jax.random.normal(rngs.params(), (3, 4)))
    self.layer = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.layer(x @ self.W[...])


@pytest.mark.parametrize(
  'make, path',
  [
    (Custom, "'W'"),
    (lambda rngs: nnx.ConvTranspose(2, 3, (2,), rngs=rngs), "'kernel'"),
    (lambda rngs: nnx.Einsum('ab,bc->ac', (3, 4), rngs=rngs), "'kernel'"),
    (lambda rngs: nnx.Embed(3, 4, rngs=rngs), "'embedding'"),
  ],
)
def test_weights_that_can_not_be_asymmetric_are_refused_by_name(make, path):
  model = make(nnx.Rngs(0))
  with pytest.raises(ValueError, match=f'made asymmetric: {path}'):
    asymmetric.with_feedback(model, sbp.usf())
  allowed = asymmetric.with_feedback(
    model, sbp.usf(), exclude=f'^{path[1:-1]}$'
  )
  assert_same_bits(params(allowed), params(model))


def test_plain_twin_and_table():
  model = asymmetric.with_feedback(
    Custom(nnx.Rngs(0)), sbp.rndf(), rngs=nnx.Rngs(1), exclude='W'
  )
  assert asymmetric.feedback_table(model).splitlines() == [
    'layer  shape   feedback',
    'layer  (4, 2)  rndf()',
    'W      (3, 4)  plain backpropagation',
  ]
  twin = asymmetric.plain_twin(model)
  x = normal(0, (2, 3))
  loss = lambda m: (m(x) ** 2).sum()
  expected = nnx.grad(loss)(Custom(nnx.Rngs(0)))
  actual = nnx.grad(loss)(twin)
  assert_same_bits(nnx.to_pure_dict(actual), nnx.to_pure_dict(expected))


def test_rules_by_path_and_a_second_conversion():
  model = asymmetric.with_feedback(
    CNN(nnx.Rngs(0)), {'conv': sbp.usf(), 'layers': sbp.nusf()}
  )
  rules = [rule for _, rule in asymmetric.layer_rules(model).values()]
  assert rules == [sbp.usf(), sbp.nusf(), sbp.nusf()]
  again = asymmetric.with_feedback(model, sbp.symmetric())
  rules = [rule for _, rule in asymmetric.layer_rules(again).values()]
  assert rules == [sbp.symmetric()] * 3


def test_layer_alignment_measures_the_V_that_was_used():
  model = asymmetric.with_feedback(
    CNN(nnx.Rngs(0)),
    {'conv': sbp.usf(), 'layers/0': sbp.rndf(), '': sbp.symmetric()},
    rngs=nnx.Rngs(1),
  )
  x = normal(0, SHAPE)
  before = nnx.to_pure_dict(nnx.state(model))
  loss = lambda y: (y**2).sum()
  measure = nnx.jit(lambda m: asymmetric.layer_alignment(m, loss, x))
  rows = measure(model)
  assert_same_bits(nnx.to_pure_dict(nnx.state(model)), before)
  V = asymmetric.feedback_weights(model)
  for path, row in rows.items():
    module = dict(asymmetric._modules(model))[path]
    W, used = np.asarray(module.kernel[...]), np.asarray(V[path])
    ratio = np.linalg.norm(used) / np.linalg.norm(W)
    np.testing.assert_allclose(row.norm_ratio, ratio, rtol=1e-5)
    concordance = (np.sign(W) == np.sign(used)).mean()
    np.testing.assert_allclose(row.concordance, concordance, rtol=1e-6)
  assert rows['conv'].concordance == 1
  assert rows['layers/0'].gradient_angle == 0
  assert rows['conv'].gradient_angle > 1


@pytest.mark.parametrize(
  'call, error, message',
  [
    (lambda m: asymmetric.with_feedback(m, 'uSF'), TypeError, "not 'uSF'"),
    (lambda m: asymmetric.with_feedback(m, sbp.rndf()), ValueError,
     r'rndf\(\) draws random feedback: pass rngs'),
    (lambda m: asymmetric.with_feedback(m, {'conv': sbp.usf()}), ValueError,
     "layer 'layers/0' matches none"),
    (lambda m: asymmetric.with_feedback(m, {'x': sbp.usf(), '': sbp.usf()}),
     ValueError, r"'x' matches nothing in the model.*'conv', 'layers/0'"),
    (lambda m: asymmetric.with_feedback(jnp.sum, sbp.usf()), TypeError,
     'must be an nnx.Module'),
    (lambda m: asymmetric.Linear(2, 3, feedback=1, rngs=nnx.Rngs(0)),
     TypeError, 'not 1'),
    (lambda m: asymmetric.Linear(2, 3, feedback=sbp.usf(), rngs=nnx.Rngs(0),
                                 dot_general=lambda *a, **k: None),
     ValueError, 'operation of its own'),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
  with pytest.raises(error, match=message):
    call(CNN(nnx.Rngs(0)))
