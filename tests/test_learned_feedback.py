"""Feedback that learns: its gradients in closed form, and that it aligns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import symjax_bp
from symjax_bp import feedback, metrics
from tests import small_models as small
from tests.cases import assert_close, assert_same_bits, normal, scanned

NHWC = ('NHWC', 'HWIO', 'NHWC')


# --- Gradients in closed form -----------------------------------------------


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
def test_gradients_reach_the_state_by_the_chain_rule(float64, rule):
  W, x = normal(0, (2, 3, 1, 6)), normal(1, (24, 4))
  dW, found, R = gradients(convolution, rule, W, x)
  R = jax.tree.map(np.asarray, R)
  expected = LEARNED[rule](np.asarray(dW).reshape(6, 6), R)
  assert_close(found, expected)


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
  feedback.product_feedback(),
  feedback.weight_mirror(),
]
DECAY, RATE, STEPS = 0.3, 0.5, 10


TRANSFORMED = {
  'alone': lambda f: f,
  'checkpoint': jax.checkpoint,
  'vmap': lambda f: jax.vmap(f, (None, None, 0)),
  'scan': lambda f: (
    lambda *args: lax.scan(lambda x, _: (x, f(*args)), 0, length=2)[1]
  ),
}


@pytest.mark.parametrize(
  'rule, transform',
  [(FIXED[0], name) for name in TRANSFORMED]
  + [(rule, 'alone') for rule in FIXED[1:]],
  ids=str,
)
def test_what_does_not_learn_is_not_differentiated(rule, transform):
  """Weight decay would shrink it, and no gradient would bring it back."""
  rules = {'W1': feedback.kolen_pollack(), 'W2': rule}
  f, variables = small.make('function', rules)
  call, x = TRANSFORMED[transform](f), jnp.stack([small.X] * 2)

  def loss(params, stored):
    return (call(params, stored, x) ** 2).sum()

  params, stored = variables['params'], variables['feedback']
  jax.grad(loss)(params, stored)
  message = r"the feedback of 'W2', which .* is differentiated.*partition"
  with pytest.raises(symjax_bp.FeedbackError, match=message):
    jax.grad(loss, 1)(params, stored)


OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE))


def trained(kind, rules):
  """Parameters and feedback before and after some steps with weight decay."""
  model, variables = small.make(kind, rules)
  start = variables['params'], variables['feedback']
  learned, fixed = symjax_bp.partition(start[1])
  both = start[0], learned
  state = OPTIMIZER.init(both)

  def call(params, stored):
    if kind == 'function':
      return model(params, stored, small.X)
    return model.apply({'params': params, 'feedback': stored}, small.X)

  @jax.jit
  def step(both, state):
    def loss(both):
      return (call(both[0], symjax_bp.combine(both[1], fixed)) ** 2).mean()

    updates, state = OPTIMIZER.update(jax.grad(loss)(both), state, both)
    return optax.apply_updates(both, updates), state

  for _ in range(STEPS):
    both, state = step(both, state)
  return start, (both[0], symjax_bp.combine(both[1], fixed))


def trained_nnx(kind, rules):
  model, Feedback = small.make(kind, rules)[0], symjax_bp.nnx.Feedback
  wrt = nnx.Any(nnx.Param, symjax_bp.nnx.LearnedFeedback)
  optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=wrt)

  def gradient(model, wrt):
    loss = lambda model: (model(small.X) ** 2).mean()
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


@small.every_kind
def test_weight_decay_reaches_what_learns_alone(kind):
  """And it makes V - W of Kolen-Pollack decay as it does W."""
  rules = feedback.kolen_pollack(), feedback.product_feedback()
  run = trained_nnx if kind == 'nnx' else trained
  start, end = run(kind, dict(zip(small.PATHS[kind], rules, strict=True)))
  (learned, fixed), (learned_end, fixed_end) = (
    symjax_bp.partition(stored) for _, stored in (start, end)
  )
  assert len(jax.tree.leaves(fixed)) == 1
  assert_same_bits(fixed_end, fixed)
  W, W_end, R, R_end = (
    next(a for a in jax.tree.leaves(tree) if a.shape == (5, 6))
    for tree in (start[0], end[0], learned, learned_end)
  )
  shrunk = (1 - RATE * DECAY) ** STEPS
  np.testing.assert_allclose(
    R_end - W_end, shrunk * (R - W), rtol=1e-4, atol=1e-6
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


@pytest.mark.parametrize('name', LOSSES)
def test_local_losses_have_their_gradients(float64, name):
  W, x = normal(0, (2, 3, 1, 6)), normal(1, (24, 4))
  rule = feedback.local_loss(factors={name: 0.5})
  _, dV, stored = gradients(convolution, rule, W, x)
  V, loss = stored['learned'], LOSSES[name]
  expected = jax.jit(jax.grad(lambda V: loss(V, W, x, convolution) / 2))(V)
  np.testing.assert_allclose(dV, expected, rtol=1e-10, atol=1e-10)


def test_local_losses_add_up():
  W, x = normal(0, (4, 5)), normal(1, (24, 4))
  rule = feedback.local_loss(factors={'decay': 0.5, 'self': 2})
  _, dV, stored = gradients(lambda W, x: x @ W, rule, W, x)
  V = stored['learned']
  np.testing.assert_allclose(dV, 0.5 * V - 2 * W, rtol=1e-6)


# --- Weight mirror ----------------------------------------------------------


def test_the_weight_mirror_takes_keys_of_any_kind():
  f = symjax_bp.with_feedback(lambda W, x: x @ W, feedback.weight_mirror())
  W = normal(0, (2, 3))
  stored = f.init(jax.random.key(0), W)
  x = jnp.zeros((9999, 2))
  dR = f.mirror(jax.random.key(1, impl='rbg'), W, stored, x)
  np.testing.assert_allclose(jax.tree.leaves(dR)[0], -W, atol=0.1)


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
