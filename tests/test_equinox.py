"""An unmodified Equinox model: its module is the parameters of a function."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import symjax_bp
from tests.cases import assert_same_bits, normal

X, Y = normal(0, (8, 3)), normal(1, (8, 2))
MODEL = eqx.nn.MLP(3, 2, width_size=6, depth=2, key=jax.random.key(0))
PARAMS, STATIC = eqx.partition(MODEL, eqx.is_inexact_array)


def predict(params, x):
  return jax.vmap(eqx.combine(params, STATIC))(x)


def trained(predict, steps=5):
  optimizer = optax.sgd(0.1, momentum=0.9)

  @jax.jit
  def step(params, state):
    def loss(params):
      return jnp.mean((predict(params, X) - Y) ** 2)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value

  params, state, history = PARAMS, optimizer.init(PARAMS), []
  for _ in range(steps):
    params, state, value = step(params, state)
    history.append((value, params))
  return history


def test_the_symmetric_twin_trains_bit_for_bit_as_plain_equinox():
  f = symjax_bp.with_feedback(predict, symjax_bp.symmetric())
  asymmetric = trained(lambda params, x: f(params, None, x))
  plain = trained(predict)
  assert_same_bits(asymmetric, plain)
  assert plain[-1][0] < plain[0][0]


def test_random_feedback_in_closed_form():
  f = symjax_bp.with_feedback(predict, {'weight': symjax_bp.rndf()})
  feedback = f.init(jax.random.key(1), PARAMS)
  V = f.weights(PARAMS, feedback)
  assert [row.path for row in f.rows(PARAMS, X)] == [
    'layers/0/weight', 'layers/1/weight', 'layers/2/weight',
  ]  # fmt: skip

  def loss(params):
    return jnp.sum(f(params, feedback, X))

  gradient = jax.jit(jax.grad(loss))(PARAMS)
  W, U, x = (
    [np.asarray(layer.weight, np.float64) for layer in tree.layers]
    for tree in (PARAMS, V, PARAMS)
  )
  b = [np.asarray(layer.bias, np.float64) for layer in PARAMS.layers]
  x = np.asarray(X, np.float64)
  a = x @ W[0].T + b[0]
  c = np.maximum(a, 0) @ W[1].T + b[1]
  delta = (np.ones((8, 2)) @ U[2] * (c > 0)) @ U[1] * (a > 0)
  # Sums of at most 8 products, none above 10, in float32.
  np.testing.assert_allclose(
    gradient.layers[0].weight, delta.T @ x, atol=80 * np.finfo('f4').eps
  )


def test_a_whole_model_with_its_functions_can_be_the_parameters():
  def gradient(predict, params):
    f = symjax_bp.with_feedback(predict, symjax_bp.rndf())
    feedback = f.init(jax.random.key(1), params)
    total = lambda params: f(params, feedback, X).sum()
    return jax.tree.leaves(eqx.filter_grad(total)(params))

  whole = gradient(lambda model, x: jax.vmap(model)(x), MODEL)
  assert_same_bits(whole, gradient(predict, PARAMS))


def test_a_module_in_the_place_of_a_function_is_refused():
  with pytest.raises(TypeError, match=r'lambda model, x: model\(x\)'):
    symjax_bp.with_feedback(MODEL, symjax_bp.usf())
