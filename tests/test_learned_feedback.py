"""Feedback that learns: its gradients in closed form, and that it aligns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import lax

import symjax_bp
from symjax_bp import feedback, linen, metrics
from tests.cases import assert_same_bits, normal

NHWC = ('NHWC', 'HWIO', 'NHWC')


class ConvNet(nn.Module):
  """Nothing in it knows of feedback."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(6, (3, 3), strides=2, use_bias=False)(x))
    x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x))
    return nn.Dense(3)(nn.relu(nn.Dense(10)(x.reshape(len(x), -1))))


def test_kolen_pollack_aligns_an_unmodified_network():
  """With the optimizer and weight decay of W for R, V - W decays by e^-6."""
  labels = jnp.arange(30) % 3
  x = normal(0, (30, 6, 6, 2)) / 2 + 2 * normal(1, (3, 6, 6, 2))[labels]
  model = symjax_bp.with_feedback(ConvNet(), feedback.kolen_pollack(0.1))
  optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2))

  def loss(variables):
    logits = model.apply(variables, x)
    cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return cost.mean()

  def step(carry, _):
    variables, state = carry
    gradient = jax.grad(loss)(variables)
    updates, state = optimizer.update(gradient, state, variables)
    return (optax.apply_updates(variables, updates), state), None

  def angles(variables):
    V = linen.feedback_weights(model, variables, x)
    W = flatten_dict(variables['params'], sep='/')
    return {path: metrics.alignment_angle(W[path], V[path]) for path in V}

  @jax.jit
  def train(key):
    start = model.init(key, x)
    carry = start, optimizer.init(start)
    (trained, _), _ = lax.scan(step, carry, length=300)
    return angles(start), angles(trained)

  before, after = train(jax.random.key(0))
  assert len(before) == 4 and all(angle > 60 for angle in before.values())
  assert all(angle < 5 for angle in after.values()), after


# --- Gradients in closed form -----------------------------------------------


def scanned(W, x):
  return lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0]


def masked(W, x):
  W = jnp.where(jnp.arange(16).reshape(4, 4) % 3 > 0, W, 0.0)
  return jnp.tanh(x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16))


def convolution(W, x):
  return lax.conv_general_dilated(
    x.reshape(-1, 4, 4, 2),
    W,
    (2, 1),
    'SAME',
    dimension_numbers=NHWC,
    feature_group_count=2,
  )


# Functions of W and x (24, 4), and the shape of W.
MODELS = {
  'dense': (lambda W, x: jnp.tanh(x @ W), (4, 5)),
  'scanned': (scanned, (3, 4, 4)),
  'masked, bfloat16': (masked, (4, 4)),
  'tied': (lambda W, x: jnp.tanh(x @ W) @ W.T, (4, 5)),
  'grouped': (convolution, (2, 3, 1, 6)),
}


def gradients(function, rule, W, x):
  """dW, dR and R of a quadratic loss."""
  f = symjax_bp.with_feedback(function, rule)
  stored = f.init(jax.random.key(1), W)
  learned, fixed = symjax_bp.partition(stored)

  def loss(W, learned):
    stored = symjax_bp.combine(learned, fixed)
    return (f(W, stored, x).astype(W.dtype) ** 2).sum()

  dW, dR = jax.jit(jax.grad(loss, (0, 1)))(W, learned)
  return dW, dR[rule.state_name]['learned'], stored[rule.state_name]


@pytest.mark.parametrize('function, shape', MODELS.values(), ids=MODELS)
def test_kolen_pollack_gives_R_the_bits_of_dW(function, shape):
  W, x = normal(0, shape), normal(1, (24, 4))
  dW, dR, _ = gradients(function, feedback.kolen_pollack(), W, x)
  assert np.any(dW)
  assert_same_bits(dR, dW)


def shifted(W, R):
  return W + jnp.sin(R)


def initial(key, W):
  return jax.random.normal(key, W.shape, W.dtype)


LEARNED = {
  feedback.product_feedback(width=7): lambda dW, R: R['fixed'].T @ dW,
  feedback.low_rank(rank=2): lambda dW, R: {
    'P': R['learned']['Q'].T @ dW, 'Q': dW @ R['learned']['P'].T,
  },
  feedback.rule(shifted, initial, learns=True): lambda dW, R: (
    dW.reshape(R['learned'].shape) * np.cos(R['learned'])
  ),
}  # fmt: skip


@pytest.mark.parametrize('rule', LEARNED, ids=repr)
def test_gradients_reach_the_state_by_the_chain_rule(rule):
  with jax.enable_x64(True):
    W, x = (
      normal(i, s, jnp.float64) for i, s in enumerate([(2, 3, 1, 6), (24, 4)])
    )
    dW, found, R = gradients(convolution, rule, W, x)
  R = jax.tree.map(np.asarray, R)
  expected = LEARNED[rule](np.asarray(dW).reshape(6, 6), R)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
    found,
    expected,
  )


def test_dW_does_not_know_that_V_learns():
  W, x = normal(0, (4, 5)), normal(1, (24, 4))

  def dW_of(learns):
    rule = feedback.rule(shifted, initial, learns=learns)
    f = symjax_bp.with_feedback(MODELS['tied'][0], rule)
    stored = f.init(jax.random.key(1), W)
    return jax.jit(jax.grad(lambda W: (f(W, stored, x) ** 2).sum()))(W)

  assert_same_bits(dW_of(True), dW_of(False))


# --- What an optimizer may see ----------------------------------------------

FIXED = [
  feedback.frsf(0.3),
  feedback.rndf(),
  feedback.frozen_sign(),
  feedback.frozen_noise(),
  feedback.tied_norm(),
  feedback.product_feedback(),
  feedback.weight_mirror(),
  feedback.rule(shifted, initial),
]
DECAY, RATE, STEPS = 0.3, 0.5, 10


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


TRANSFORMED = {
  'alone': lambda f: f,
  'jit': jax.jit,
  'checkpoint': jax.checkpoint,
  'vmap': lambda f: jax.vmap(f, (None, None, 0)),
  'scan': lambda f: (
    lambda *args: lax.scan(lambda x, _: (x, f(*args)), 0, length=2)[1]
  ),
}


@pytest.mark.parametrize(
  'rule, transform',
  [(rule, 'alone') for rule in FIXED] + [(FIXED[0], t) for t in TRANSFORMED],
  ids=str,
)
def test_what_does_not_learn_is_not_differentiated(rule, transform):
  """Weight decay would shrink it, and no gradient would bring it back."""
  params = {'a': normal(0, (4, 5)), 'b': normal(1, (5, 3))}
  f = symjax_bp.with_feedback(mlp, {'a': feedback.kolen_pollack(), 'b': rule})
  stored, x = f.init(jax.random.key(0), params), normal(2, (2, 3, 4))
  call = TRANSFORMED[transform](f)

  def loss(params, stored):
    return (call(params, stored, x) ** 2).sum()

  jax.grad(loss)(params, stored)
  message = r"the feedback of 'b', which .* is differentiated.*partition"
  with pytest.raises(symjax_bp.FeedbackError, match=message):
    jax.grad(loss, 1)(params, stored)


class Pair(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='b')(jnp.tanh(nn.Dense(5, name='a')(x)))


class NNXPair(nnx.Module):
  def __init__(self, rngs):
    self.a = nnx.Linear(4, 5, rngs=rngs)
    self.b = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    return self.b(jnp.tanh(self.a(x)))


OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE))


def trained(function, params, stored):
  """Parameters and feedback after some steps with weight decay."""
  learned, fixed = symjax_bp.partition(stored)
  both = params, learned
  state = OPTIMIZER.init(both)

  @jax.jit
  def step(both, state):
    def loss(both):
      return (function(both[0], symjax_bp.combine(both[1], fixed)) ** 2).mean()

    updates, state = OPTIMIZER.update(jax.grad(loss)(both), state, both)
    return optax.apply_updates(both, updates), state

  for _ in range(STEPS):
    both, state = step(both, state)
  return both[0], symjax_bp.combine(both[1], fixed)


def trained_function(rules, x):
  params = {'a': normal(0, (4, 5)), 'b': normal(1, (5, 3))}
  f = symjax_bp.with_feedback(mlp, rules)
  start = params, f.init(jax.random.key(0), params)
  return start, trained(lambda *both: f(*both, x), *start)


def trained_linen(rules, x):
  model = symjax_bp.with_feedback(Pair(), rules)
  variables = model.init(jax.random.key(0), x)
  start = variables['params'], variables['feedback']
  apply = lambda *both: model.apply(
    dict(zip(('params', 'feedback'), both, strict=True)), x
  )
  return start, trained(apply, *start)


def trained_nnx(rules, x):
  plain, Feedback = NNXPair(nnx.Rngs(0)), symjax_bp.nnx.Feedback
  model = symjax_bp.with_feedback(plain, rules, rngs=nnx.Rngs(feedback=0))
  wrt = nnx.Any(nnx.Param, symjax_bp.nnx.LearnedFeedback)
  optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=wrt)

  def gradient(model, wrt):
    loss = lambda model: (model(x) ** 2).mean()
    return nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, gradient(model, wrt))

  def state():
    parts = nnx.state(model, nnx.Param, Feedback)
    return jax.tree.map(jnp.copy, tuple(map(nnx.to_pure_dict, parts)))

  start = state()
  for _ in range(STEPS):
    step(model, optimizer)
  with pytest.raises(symjax_bp.FeedbackError, match='LearnedFeedback'):
    gradient(model, nnx.Any(nnx.Param, Feedback))
  return start, state()


@pytest.mark.parametrize('rule', [feedback.frsf(), feedback.product_feedback()])
@pytest.mark.parametrize('run', [trained_function, trained_linen, trained_nnx])
def test_weight_decay_reaches_what_learns_alone(run, rule):
  """And it makes V - W of Kolen-Pollack decay as it does W."""
  rules = {'a': feedback.kolen_pollack(), 'b': rule}
  (W, stored), (W_end, stored_end) = run(rules, normal(2, (6, 4)))
  learned, fixed = symjax_bp.partition(stored)
  learned_end, fixed_end = symjax_bp.partition(stored_end)
  assert len(jax.tree.leaves(fixed)) == 1
  assert_same_bits(fixed_end, fixed)
  R, R_end = (
    [x for x in jax.tree.leaves(tree) if x.shape == (4, 5)]
    for tree in (learned, learned_end)
  )
  W, W_end = (jax.tree.leaves(each['a'])[-1] for each in (W, W_end))
  shrunk = (1 - RATE * DECAY) ** STEPS
  np.testing.assert_allclose(
    R_end[0] - W_end, shrunk * (R[0] - W), rtol=1e-4, atol=1e-6
  )
  assert not np.allclose(W_end, shrunk * W, rtol=1e-2)


# --- Local losses -----------------------------------------------------------


def transposed(function, x, V, y):
  return jax.vjp(lambda x: function(V, x), x)[1](y)[0]


# The losses of local_loss's table, of V, W, x and the product op.
LOSSES = {
  'decay': lambda V, W, x, op: (V**2).sum() / 2,
  'self': lambda V, W, x, op: -(V * W).sum(),
  'amplify': lambda V, W, x, op: -(op(V, x) * op(W, x)).sum(),
  'sparse': lambda V, W, x, op: (op(V, x) ** 2).sum() / 2,
  'null': lambda V, W, x, op: (transposed(op, x, V, op(W, x)) ** 2).sum() / 2,
}


@pytest.mark.parametrize(
  'op, shape', [(lambda W, x: x @ W, (4, 5)), (convolution, (2, 3, 1, 6))]
)
@pytest.mark.parametrize('name', LOSSES)
def test_local_losses_have_their_gradients(name, op, shape):
  with jax.enable_x64(True):
    W, x = normal(0, shape, jnp.float64), normal(1, (24, 4), jnp.float64)
    rule = feedback.local_loss(factors={name: 0.5})
    _, dV, stored = gradients(op, rule, W, x)
    V = stored['learned']
    expected = jax.jit(jax.grad(lambda V: LOSSES[name](V, W, x, op) / 2))(V)
    np.testing.assert_allclose(dV, expected, rtol=1e-10, atol=1e-10)


def test_local_losses_add_up():
  W, x = normal(0, (4, 5)), normal(1, (24, 4))
  rule = feedback.local_loss(factors={'decay': 0.5, 'self': 2})
  _, dV, stored = gradients(lambda W, x: x @ W, rule, W, x)
  V = stored['learned']
  np.testing.assert_allclose(dV, 0.5 * V - 2 * W, rtol=1e-6)


# --- Weight mirror ----------------------------------------------------------


def test_the_weight_mirror_aligns_without_labels():
  """R converges to W / decay up to noise and the borders of the image."""

  def network(params, x):
    y = lax.conv_general_dilated(
      x, params['conv'], (2, 2), 'SAME', dimension_numbers=NHWC
    )
    return nn.relu(y).mean((1, 2)) @ params['dense']

  params = {'conv': normal(0, (3, 3, 2, 6)), 'dense': normal(1, (6, 10))}
  f = symjax_bp.with_feedback(network, feedback.weight_mirror())
  x = jnp.zeros((64, 12, 12, 2))  # Only its shape matters.
  stored = f.init(jax.random.key(2), params)

  def step(stored, key):
    gradient = f.mirror(key, params, stored, x, decay=0.5)
    return jax.tree.map(lambda R, dR: R - 0.1 * dR, stored, gradient), None

  keys = jax.random.split(jax.random.key(3), 150)
  mirrored, _ = jax.jit(lambda stored: lax.scan(step, stored, keys))(stored)
  V = f.weights(params, mirrored)
  angles = metrics.alignment_angle(params, V)
  assert angles['dense'] < 5 and angles['conv'] < 15
  np.testing.assert_allclose(
    metrics.norm_ratio(params, V)['dense'], 2, rtol=0.1
  )
  before = metrics.alignment_angle(params, f.weights(params, stored))
  assert min(before.values()) > 60
