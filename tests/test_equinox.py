"""An unmodified Equinox model: its module is the parameters of a function."""

import equinox as eqx
import jax
import pytest

import symjax_bp
from symjax_bp import direct, metrics, testing
from tests.cases import assert_same_bits, normal

X = normal(0, (8, 3))
MODEL = eqx.nn.MLP(3, 2, width_size=6, depth=2, key=jax.random.key(0))
PARAMS, STATIC = eqx.partition(MODEL, eqx.is_inexact_array)


def predict(params, x):
  return jax.vmap(eqx.combine(params, STATIC))(x)


def test_a_whole_model_with_its_functions_can_be_the_parameters():
  def gradient(predict, params):
    f = symjax_bp.with_feedback(predict, symjax_bp.rndf())
    feedback = f.init(jax.random.key(1), params)
    total = lambda params: f(params, feedback, X).sum()
    return jax.tree.leaves(eqx.filter_grad(total)(params))

  whole = gradient(lambda model, x: jax.vmap(model)(x), MODEL)
  assert_same_bits(whole, gradient(predict, PARAMS))


def test_numbers_of_a_model_stay_numbers():
  """Without a key, a dropout rate of 0 must be known to be 0."""
  model = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))
  x = normal(1, (5, 4))
  call = lambda model, x: model(x, x, x)
  f = symjax_bp.with_feedback(call, symjax_bp.usf())
  assert_same_bits(f(model, None, x), call(model, x))
  assert not [row for row in f.rows(model, x) if row.use != 'product']


def test_assertions_and_metrics_take_a_whole_model():
  function = lambda model, x: jax.vmap(model)(x)
  f = symjax_bp.with_feedback(function, symjax_bp.rndf())
  feedback = f.init(jax.random.key(1), MODEL)
  variables = {'params': MODEL, 'feedback': feedback}
  testing.assert_feedback_matches_params(f, variables, X)
  testing.assert_asymmetric_gradients(f, variables, lambda y: (y**2).sum(), X)
  weights = {f'layers/{i}/weight' for i in range(3)}
  loss = lambda model: (f(model, feedback, X) ** 2).sum()
  assert set(metrics.layer_alignment(loss, MODEL)) == weights
  f = direct.with_direct_feedback(function)
  B = f.init(jax.random.key(1), MODEL, X)
  assert set(f.layer_alignment(lambda y: y.sum(), MODEL, B, X)) == weights


def test_a_module_in_the_place_of_a_function_is_refused():
  with pytest.raises(TypeError, match=r'lambda model, x: model\(x\)'):
    symjax_bp.with_feedback(MODEL, symjax_bp.usf())
