"""NNX: layers, V and where it is kept, optimizers, copies, redraws, stacks."""

import copy
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from symjax_bp.nnx import Feedback, feedback_weights
from tests.cases import PAPER_RULES, assert_same_bits, normal
from tests.nnx_models import (
  CNN,
  IMAGES,
  MLP,
  Autoencoder,
  Stack,
  X,
  fast_jit,
  gradient,
  params,
  state,
)

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


def V_of(model, rule, x, dtype):
  """V for a kernel that was cast, from what the rule keeps."""
  W = model.kernel[...]
  R = rule.expand(W, *jax.tree.leaves(state(model, Feedback)) or [None])
  (row,) = asymmetric.layer_rules(model, x)
  R = None if R is None else R.astype(dtype)
  return rule.weights(W.astype(dtype), R, row.fan).astype(W.dtype)


@pytest.mark.parametrize('layer', LAYERS.values(), ids=LAYERS)
def test_layers_are_those_of_flax_but_for_dx(layer):
  """All rules in one program; dx is that of Flax's layer whose kernel is V."""
  ours, flax, args, kwargs, shape = layer
  plain = flax(*args, rngs=nnx.Rngs(0), **kwargs)
  models = {
    name: ours(*args, feedback=rule, rngs=nnx.Rngs(0), **kwargs)
    for name, rule in PAPER_RULES.items()
  }
  x = normal(0, shape)
  dtype = plain(x).dtype
  V = {name: V_of(m, PAPER_RULES[name], x, dtype) for name, m in models.items()}
  assert all(isinstance(model, flax) for model in models.values())

  def of(model, x, g):
    def loss(model, x):
      y = model(x)
      return (y * g.astype(y.dtype)).astype(jnp.float32).sum(), y

    gradients = nnx.grad(loss, argnums=(0, 1), has_aux=True)
    (dW, dx), y = gradients(model, x)
    return params(model), nnx.to_pure_dict(dW), dx, y

  g = normal(1, plain(x).shape)
  graph, weights = nnx.split(plain)
  graphs, states = {}, {}
  for name, model in models.items():
    graphs[name], states[name] = nnx.split(model)

  @fast_jit
  def run(states, weights, V):
    expected = of(nnx.merge(graph, weights), x, g)
    results = {}
    for name, each in states.items():
      at_V = nnx.merge(graph, weights, copy=True)
      at_V.kernel[...] = V[name]
      dx = of(at_V, x, g)[2]
      results[name] = of(nnx.merge(graphs[name], each), x, g), dx
    return expected, results

  (W, dW, dx, y), results = run(states, weights, V)
  for name, (actual, dx_at_V) in results.items():
    assert_same_bits(actual[:2], (W, dW))
    assert_same_bits(actual[3], y)
    assert_same_bits(actual[2], dx_at_V)
    assert (actual[2] == dx).all() == (name == 'symmetric()')


LABELS = jnp.array([0, 1, 2, 1])


def train(model, steps=4, tx=None, wrt=nnx.Param, key=None):
  """Losses of some steps; the model is changed."""
  optimizer = nnx.Optimizer(model, tx or optax.sgd(0.05, 0.9), wrt=wrt)

  def loss(model):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(model(IMAGES), LABELS).mean()

  @nnx.jit
  def step(model, optimizer, number):
    if key is not None:
      asymmetric.redraw(model, jax.random.fold_in(key, number))
    diff = nnx.DiffState(0, wrt)
    value, grads = nnx.value_and_grad(loss, argnums=diff)(model)
    optimizer.update(model, grads)
    return value

  return [step(model, optimizer, number) for number in range(steps)]


def cnn(rule, **kwargs):
  kwargs = {'rngs': nnx.Rngs(feedback=1), **kwargs}
  return asymmetric.with_feedback(CNN(nnx.Rngs(0)), rule, **kwargs)


def test_a_symmetric_cnn_learns_exactly_as_plain_flax():
  """Statistics, dropout masks and keys too; the original is not changed."""
  plain = CNN(nnx.Rngs(0))
  before = state(plain)
  copies = [asymmetric.with_feedback(plain, sbp.symmetric()), nnx.clone(plain)]
  copies.append(asymmetric.plain_twin(cnn(sbp.rndf())))
  actual, expected, twin = map(train, copies)
  assert_same_bits(actual, expected)
  assert_same_bits(twin, expected)
  assert_same_bits(state(copies[0]), state(copies[1]))
  assert_same_bits(state(plain), before)
  assert expected[-1] < expected[0]


def without_learning(rule):
  return rule.learning is None and not rule.redraws


@pytest.mark.parametrize(
  'wrt',
  [nnx.Param, nnx.PathContains('kernel')]
  + [nnx.PathContains('kernel', exact=False)],
  ids=str,
)
def test_optimizers_leave_V_alone(wrt):
  rules = {'conv': sbp.rndf(), 'layers/0': sbp.frsf(), '': sbp.brsf()}
  model = cnn(rules)
  before, W = state(model, Feedback), params(model)
  V = feedback_weights(model)
  # Decay would shrink what has no gradient.
  train(model, 2, sbp.optim.batch_manhattan(0.1, weight_decay=0.1), wrt)
  assert_same_bits(state(model, Feedback), before)
  assert (params(model)['conv']['kernel'] != W['conv']['kernel']).all()
  after = feedback_weights(model)
  assert_same_bits(after['conv/kernel'], V['conv/kernel'])
  assert (after['layers/1/kernel'] != V['layers/1/kernel']).all()


def test_kolen_pollack_is_learned_with_the_parameters():
  """One optimizer for W and V: their difference decays by 1 - rate * decay."""
  wrt = nnx.Any(nnx.Param, Feedback)
  model = cnn(sbp.kolen_pollack())
  V, W = feedback_weights(model), asymmetric._parameters(model)
  tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
  train(model, 4, tx, wrt)
  V_after, W_after = feedback_weights(model), asymmetric._parameters(model)
  assert len(V) == 3
  for path in V:
    assert not np.allclose(W_after[path], W[path] * 0.95**4, rtol=1e-3)
    difference = (V[path] - W[path]) * 0.95**4
    # Four steps of float32 on numbers of at most 1.
    np.testing.assert_allclose(
      V_after[path] - W_after[path], difference, rtol=1e-4, atol=1e-6
    )


def through_pure_dict(model):
  fresh = cnn(sbp.frsf(0.5), rngs=nnx.Rngs(feedback=7))
  new = nnx.state(fresh)
  nnx.replace_by_pure_dict(new, nnx.to_pure_dict(nnx.state(model)))
  nnx.update(fresh, new)
  return fresh


COPIES = {
  'merge': lambda model: nnx.merge(*nnx.split(model)),
  'update': through_pure_dict,
  'clone': nnx.clone,
  'copy': copy.copy,
  'deepcopy': copy.deepcopy,
  'pickle': lambda model: pickle.loads(pickle.dumps(model)),
  'pickled state': lambda model: nnx.merge(
    *pickle.loads(pickle.dumps(nnx.split(model)))
  ),
  'cloudpickle': lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
  'view': lambda model: nnx.view(model, deterministic=False),
}


@pytest.fixture(scope='module')
def frsf_cnn():
  return cnn(sbp.frsf(0.5)), nnx.jit(gradient)


@pytest.mark.parametrize('make', COPIES.values(), ids=COPIES)
def test_copies_are_asymmetric_models(make, frsf_cnn):
  model, jitted = frsf_cnn
  other = make(model)
  assert isinstance(other, CNN) and type(other) is type(model)
  assert_same_bits(state(other, Feedback), state(model, Feedback))
  dropped = [nnx.clone(each) for each in (model, other)]  # Keys advance.
  actual, expected = (jitted(each, IMAGES) for each in dropped)
  assert_same_bits(actual, expected)


def test_copies_of_a_local_class_and_of_a_layer():
  class Local(MLP):
    pass

  layer = asymmetric.Linear(3, 2, feedback=sbp.rndf(), rngs=nnx.Rngs(0))
  local = asymmetric.with_feedback(Local(nnx.Rngs(0)), sbp.usf())
  for model, module in ((layer, pickle), (local, cloudpickle)):
    other = module.loads(module.dumps(model))
    assert type(other).__name__ == type(model).__name__
    assert_same_bits(gradient(other, X), gradient(model, X))


def test_models_in_plain_jax():
  """Split by hand, and as a pytree, under jit, vmap and remat."""
  model = asymmetric.with_feedback(MLP(nnx.Rngs(0)), sbp.usf())
  expected = nnx.jit(gradient)(model, X)
  graph, weights, rest = nnx.split(model, nnx.Param, ...)

  @jax.jit
  def by_hand(weights):
    return jax.grad(
      lambda weights: (nnx.merge(graph, weights, rest)(X) ** 2).sum()
    )(weights)

  actual = by_hand(weights)
  assert_same_bits(nnx.to_pure_dict(actual), expected)
  tree = jax.jit(jax.grad(lambda model: (model(X) ** 2).sum()))(model)
  assert_same_bits(params(tree), expected)
  vmapped = nnx.grad(lambda m: (jax.vmap(m)(X) ** 2).sum())(model)
  remat = nnx.grad(lambda m: (nnx.remat(MLP.__call__)(m, X) ** 2).sum())(model)
  for other in (vmapped, remat):
    for a, b in zip(*map(jax.tree.leaves, (other, expected)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


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
  V = [abs(feedback_weights(layer)['kernel']) for layer in ours]
  assert not (V[0] == V[1]).any() and not (V[1] == V[2]).any()


def test_with_feedback_follows_its_key_and_advances_no_other_stream():
  def draws(**streams):
    return jax.tree.leaves(
      state(cnn(sbp.frsf(), rngs=nnx.Rngs(**streams)), Feedback)
    )

  assert_same_bits(draws(feedback=1), draws(feedback=1))
  pairs = zip(draws(feedback=1), draws(feedback=2), strict=True)
  assert not any((a == b).any() for a, b in pairs)
  rngs = nnx.Rngs(0)
  first = cnn(sbp.frsf(), rngs=rngs)
  assert_same_bits(params(CNN(rngs)), params(CNN(nnx.Rngs(0))))
  assert_same_bits(
    state(cnn(sbp.frsf(), rngs=nnx.Rngs(0)), Feedback), state(first, Feedback)
  )
  rngs = nnx.Rngs(1, feedback=0)  # A stream of that name does advance.
  a, b = (feedback_weights(cnn(sbp.rndf(), rngs=rngs)) for _ in range(2))
  assert not (a['conv/kernel'] == b['conv/kernel']).any()


def test_redrawn_V_changes_when_W_does_and_only_then():
  model = cnn({'conv': sbp.brsf(), '': sbp.frsf()})
  first = feedback_weights(model)
  for _ in range(2):  # Two micro-batches.
    nnx.jit(gradient)(model, IMAGES)
  assert_same_bits(feedback_weights(model), first)
  model.conv.kernel[0, 0, 0, 0] += 1
  second = feedback_weights(model)
  assert not (abs(second['conv/kernel']) == abs(first['conv/kernel'])).any()
  assert_same_bits(second['layers/0/kernel'], first['layers/0/kernel'])


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_redraw_by_a_key(impl):
  """The same inside and outside of jit; each weight has a V of its own."""
  key = jax.random.key(3, impl=impl)
  tied = asymmetric.with_feedback(
    nnx.List([Autoencoder(nnx.Rngs(0)), nnx.Linear(3, 5, rngs=nnx.Rngs(0))]),
    sbp.brsf(0.25),
    rngs=nnx.Rngs(feedback=1),
  )
  jitted, eager = (nnx.clone(tied) for _ in range(2))
  nnx.jit(asymmetric.redraw)(jitted, key)
  asymmetric.redraw(eager, jax.random.key(4))
  asymmetric.redraw(eager, key)
  V = feedback_weights(eager)
  assert_same_bits(feedback_weights(jitted), V)
  a, b = (abs(V[path]) for path in ('0/dec/kernel', '1/kernel'))
  assert not (a == b).any()
  assert not (abs(feedback_weights(tied)['1/kernel']) == b).any()


def test_training_follows_the_key_of_redraw():
  a, b, c = (
    train(cnn(sbp.brsf()), 3, key=jax.random.key(seed)) for seed in (3, 3, 4)
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


def check_stack(model, plain, x):
  """All is linear: dx is that of plain layers whose kernels are V as reported."""
  V = feedback_weights(model, x)['layers/kernel']
  at_V = nnx.clone(plain)
  at_V.layers.kernel[...] = V
  g = normal(1, x.shape)

  @nnx.jit
  def dx(model):
    return nnx.grad(lambda m, x: (m(x) * g).sum(), argnums=1)(model, x)

  # Three products of float32.
  np.testing.assert_allclose(dx(model), dx(at_V), rtol=1e-4, atol=1e-6)
  return V


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
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
def test_every_layer_of_a_stack_has_a_V_of_its_own(layer, rule, impl):
  make, shape = STACKS[layer]
  with jax.default_prng_impl(impl):
    plain = Stack(make)
    model = asymmetric.with_feedback(plain, rule, rngs=nnx.Rngs(1))
    V = check_stack(model, plain, normal(0, shape))
  if rule.keeps_state:
    assert not ((abs(V[0]) == abs(V[1])) & (V[0] != 0)).any()


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_a_stack_of_our_own_layers_is_redrawn_and_measured(impl):
  make, shape = STACKS['Linear']
  ours = lambda rngs: asymmetric.Linear(6, 6, feedback=sbp.brsf(), rngs=rngs)
  x = normal(0, shape)
  with jax.default_prng_impl(impl):
    model, plain = Stack(ours), Stack(make)
    first = check_stack(model, plain, x)
    asymmetric.redraw(model, jax.random.key(5))
    V = check_stack(model, plain, x)
  assert not (first == V).any() and not (abs(V[0]) == abs(V[1])).any()
  row = asymmetric.layer_alignment(model, jnp.sum, x)['layers/kernel']
  ratio = np.linalg.norm(V) / np.linalg.norm(plain.layers.kernel[...])
  np.testing.assert_allclose(row.norm_ratio, ratio, rtol=1e-5)
  assert row.update_angle > 1


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
    V = feedback_weights(layer)['kernel']
    assert (V.dtype, used.dtype) == dtypes
    np.testing.assert_array_equal(V.astype(used.dtype), used)
