"""An unmodified Equinox model: its module is the parameters of a function."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import symjax_bp
from symjax_bp import metrics, testing
from tests.cases import assert_same_bits, normal

X = normal(0, (8, 3))
MODEL = eqx.nn.MLP(3, 2, width_size=6, depth=2, key=jax.random.key(0))


def test_a_whole_model_can_be_measured_and_tested():
  apply, loss = lambda model, x: jax.vmap(model)(x), jnp.sum
  f = symjax_bp.with_feedback(apply, symjax_bp.rndf())
  direct = symjax_bp.direct.with_direct_feedback(apply)
  feedback = f.init(jax.random.key(1), MODEL)
  variables = {'params': MODEL, 'feedback': feedback}
  testing.assert_asymmetric_gradients(f, variables, loss, X)
  plain = symjax_bp.with_feedback(apply, symjax_bp.symmetric())
  testing.assert_symmetric_gradients(plain, {'params': MODEL}, loss, X)
  B = direct.init(jax.random.key(2), MODEL, X)
  for rows in (
    metrics.layer_alignment(lambda model: loss(f(model, feedback, X)), MODEL),
    direct.layer_alignment(loss, MODEL, B, X),
  ):
    assert list(rows) == [f'layers/{i}/weight' for i in range(3)]
    assert rows['layers/0/weight'].update_angle > 1


def test_numbers_of_a_model_stay_numbers():
  """Without a key, a dropout rate of 0 must be known to be 0."""
  model = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))
  x = normal(1, (5, 4))
  call = lambda model, x: model(x, x, x)
  f = symjax_bp.with_feedback(call, symjax_bp.usf())
  assert_same_bits(f(model, None, x), call(model, x))
  assert not [row for row in f.rows(model, x) if row.use != 'product']


def test_a_module_in_the_place_of_a_function_is_refused():
  with pytest.raises(TypeError, match=r'lambda model, x: model\(x\)'):
    symjax_bp.with_feedback(MODEL, symjax_bp.usf())
