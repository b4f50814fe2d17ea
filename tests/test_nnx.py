"""NNX: kernels, state and originals are left alone; V is where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from symjax_bp import nnx_layers
from tests.cases import RULES, assert_same_bits, normal
from tests.nnx_models import CNN, SHAPE, Stack, input_gradient, params

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
    asymmetric.Conv, nnx.Conv, (4, 6, (3, 3), 2), {'feature_group_count': 2},
    (2, 6, 7, 4),
  ),
}  # fmt: skip
every_layer = pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)
every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)


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
  operation = nnx_layers.operation_of(model)[1]
  at_V = nnx.clone(plain)
  V = operation.feedback_weights(plain.kernel[...].astype(y.dtype))
  at_V.kernel[...] = V.astype(jnp.float32)
  assert_same_bits(pullback(g)[0], jax.vjp(at_V, x)[1](g)[0])
  loss = lambda m: (m(x).astype(jnp.float32) * g.astype(jnp.float32)).sum()
  assert_same_bits(
    nnx.to_pure_dict(nnx.grad(loss)(model)),
    nnx.to_pure_dict(nnx.grad(loss)(plain)),
  )


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


@pytest.mark.parametrize('streams, alike', [({'feedback': 0}, 0), ({}, 1)])
def test_two_calls_draw_alike_unless_there_is_a_stream(streams, alike):
  rngs = nnx.Rngs(1, **streams)
  a, b = (
    asymmetric.with_feedback(CNN(nnx.Rngs(0)), sbp.rndf(), rngs=rngs)
    for _ in range(2)
  )
  V = [asymmetric.feedback_weights(model)['conv'] for model in (a, b)]
  assert (V[0] == V[1]).mean() == alike


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


def twins(rule):
  """Two layers of one shape."""
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(*(nnx.Linear(3, 3, rngs=rngs) for _ in range(2)))
  return asymmetric.with_feedback(model, rule, rngs=nnx.Rngs(1))


def test_redraw_gives_every_layer_a_V_of_its_own():
  model = twins(sbp.brsf())
  asymmetric.redraw(model, jax.random.key(3))
  a, b = asymmetric.feedback_weights(model).values()
  assert not (abs(a) == abs(b)).any()


@pytest.mark.parametrize('key', [jax.random.key(3), jax.random.PRNGKey(3)])
def test_redraw_in_a_jitted_step_is_that_outside(key):
  jitted, eager = twins(sbp.brsf(0.25)), twins(sbp.brsf(0.25))
  nnx.jit(asymmetric.redraw)(jitted, key)
  asymmetric.redraw(eager, jax.random.key(3))
  V = [asymmetric.feedback_weights(model) for model in (jitted, eager)]
  assert_same_bits(*V)
  before = asymmetric.feedback_weights(twins(sbp.brsf(0.25)))
  assert not (before['layers/0'] == V[0]['layers/0']).any()


def test_training_follows_the_key_of_redraw():
  a, b, c = (
    train(
      asymmetric.with_feedback(CNN(nnx.Rngs(0)), sbp.brsf(), rngs=nnx.Rngs(1)),
      key=jax.random.key(seed),
    )
    for seed in (3, 3, 4)
  )
  assert_same_bits(a, b)
  assert a[-1] != c[-1]


STACKS = {
  'Linear': (lambda rngs: nnx.Linear(6, 6, rngs=rngs), (4, 6)),
  'LinearGeneral': (
    lambda rngs: nnx.LinearGeneral(
      (2, 3), (2, 3), axis=(1, 2), batch_axis={0: 4}, rngs=rngs
    ), (4, 2, 3),
  ),
  'Conv': (
    lambda rngs: nnx.Conv(
      2, 2, (3,), mask=jnp.ones((3, 2, 2)).at[0, 0].set(0), rngs=rngs
    ), (4, 5, 2),
  ),
}  # fmt: skip


def assert_uses_reported_feedback(model, plain, x):
  """All is linear: dx is that of plain layers whose kernels are V."""
  at_V = nnx.clone(plain)
  V = asymmetric.feedback_weights(model)['layers']
  at_V.layers.kernel[...] = V
  g = normal(1, x.shape)
  actual, expected = (input_gradient(m, x, g) for m in (model, at_V))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)
  return V


@pytest.mark.parametrize(
  'layer, rule',
  [
    ('Linear', sbp.nusf()),
    ('Linear', sbp.brsf()),
    ('LinearGeneral', sbp.brsf()),
    ('Conv', sbp.nusf()),
    ('Conv', sbp.rndf()),
  ],
)
def test_every_layer_of_a_stack_has_a_V_of_its_own(layer, rule):
  make, shape = STACKS[layer]
  plain = Stack(make)
  model = asymmetric.with_feedback(plain, rule, rngs=nnx.Rngs(1))
  V = assert_uses_reported_feedback(model, plain, normal(0, shape))
  if rule.draws:
    assert not ((abs(V[0]) == abs(V[1])) & (V[0] != 0)).any()


def test_a_stack_of_our_own_layers_is_redrawn_and_measured():
  model = Stack(
    lambda rngs: asymmetric.Linear(6, 6, feedback=sbp.brsf(), rngs=rngs)
  )
  plain, x = Stack(STACKS['Linear'][0]), normal(0, (4, 6))
  asymmetric.redraw(model, jax.random.key(5))
  V = assert_uses_reported_feedback(model, plain, x)
  assert not (abs(V[0]) == abs(V[1])).any()
  row = asymmetric.layer_alignment(model, jnp.sum, x)['layers']
  ratio = np.linalg.norm(V) / np.linalg.norm(plain.layers.kernel[...])
  np.testing.assert_allclose(row.norm_ratio, ratio, rtol=1e-5)
  assert row.gradient_angle > 1


@pytest.mark.parametrize('rule', [sbp.brsf(0.25), sbp.frsf(0.25)], ids=str)
@pytest.mark.parametrize(
  'dtypes',
  [('float64', 'float32'), ('float32', 'float64'), ('float32', 'bfloat16')],
)
def test_V_is_drawn_in_the_dtype_of_the_parameters(dtypes, rule):
  with jax.enable_x64(True):
    layer = asymmetric.Linear(
      3, 4, feedback=rule, use_bias=False, param_dtype=dtypes[0],
      dtype=dtypes[1], rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jnp.ones(3, dtypes[1])
    used = jax.jacrev(layer)(x).T
    V = asymmetric.feedback_weights(layer)['']
    assert (V.dtype, used.dtype) == dtypes
    np.testing.assert_array_equal(V.astype(used.dtype), used)
