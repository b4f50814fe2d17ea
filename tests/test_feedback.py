"""Rules: values, draws, statistics, identity and errors."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from symjax_bp import feedback
from tests.cases import RULES, assert_same_bits, normal

KERNELS = {
  'dense': (60, 50),
  'conv': (5, 5, 8, 16),
  'heads': (32, 4, 8),
}
every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)
drawing = [rule for rule in RULES.values() if rule.draws]


def draw_and_weights(rule, key, kernel):
  draw = rule.draw(key, kernel)
  return draw, rule.weights(kernel, draw)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('shape', KERNELS.values(), ids=KERNELS)
@every_rule
def test_V_has_the_shape_and_dtype_of_W(rule, shape, dtype):
  draw, V = jax.eval_shape(
    lambda W: draw_and_weights(rule, jax.random.key(1), W),
    jax.ShapeDtypeStruct(shape, dtype),
  )
  assert V.shape == shape and V.dtype == dtype
  assert (draw is None) == (not rule.draws)
  if draw is not None:
    assert draw.shape == shape and draw.dtype == dtype


@pytest.mark.parametrize('shape', KERNELS.values(), ids=KERNELS)
def test_deterministic_rules_are_the_equations(shape):
  W = normal(0, shape).at[0].set(0.0)
  sign = np.sign(np.asarray(W))
  fan_in = math.prod(shape[:-1])
  fan_out = math.prod(shape[:-2]) * shape[-1]
  for rule, expected in (
    (feedback.symmetric(), np.asarray(W)),
    (feedback.usf(), sign),
    (feedback.usf(scale=0.25), 0.25 * sign),
    (feedback.nusf(), sign / fan_in),
    (feedback.usf(scale='fan_in'), sign / fan_in),
    (feedback.usf(scale='he'), sign * math.sqrt(2 / fan_in)),
    (feedback.usf(scale='xavier'), sign * math.sqrt(2 / (fan_in + fan_out))),
  ):
    np.testing.assert_allclose(rule.weights(W), expected, rtol=1e-6)
  assert not np.asarray(feedback.usf().weights(W))[0].any(), 'sign(0) = 0'


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('in_features', [7, 8192])
def test_nusf_is_the_quotient_in_float32(in_features, dtype):
  """A fan_in above 65504 is infinite in float16; its inverse is not 0."""
  W = normal(0, (3, 3, in_features, 1), dtype)
  quotient = np.sign(np.asarray(W, np.float32)) / np.float32(9 * in_features)
  V = feedback.nusf().weights(W)
  assert_same_bits(V, jnp.asarray(quotient, dtype))
  assert np.all(V)


@pytest.mark.parametrize('make', [feedback.brsf, feedback.frsf])
@pytest.mark.parametrize('p_flip', [0.0, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0])
def test_magnitudes_and_flips_have_the_stated_distribution(make, p_flip):
  """All within 4 standard errors at a fixed key."""
  W = normal(0, (400, 500))
  count = W.size
  rule = make(p_flip)
  _, V = draw_and_weights(rule, jax.random.key(2), W)
  V, W = np.asarray(V, np.float64), np.asarray(W)
  M = np.abs(V)
  concordant = np.sign(V) == np.sign(W)
  p_error = 4 * math.sqrt(p_flip * (1 - p_flip) / count)
  assert abs(concordant.mean() - (1 - p_flip)) <= p_error
  assert M.min() > 0 and M.max() <= 1
  # Moments of U(0, 1): mean 1/2 and variance 1/12; of its square 1/3, 4/45.
  assert abs(M.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / count)
  assert abs((M**2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / count)
  for kept in (concordant, ~concordant):  # M does not depend on S_p
    if kept.sum() > 100:
      error = 4 * math.sqrt(1 / 12 / kept.sum())
      assert abs(M[kept].mean() - 1 / 2) < error


def test_flips_of_different_weights_are_independent():
  W = jnp.ones((400, 500))
  _, V = draw_and_weights(feedback.brsf(0.3), jax.random.key(0), W)
  S = np.sign(np.asarray(V, np.float64))
  neighbours = (S[:, 1:] * S[:, :-1]).mean()
  assert abs(neighbours - 0.4**2) < 4 / math.sqrt(W.size)


def test_random_feedback_is_normal_and_independent_of_W():
  W = normal(0, (400, 500))
  rule = feedback.rndf(sigma=0.05)
  draw, V = draw_and_weights(rule, jax.random.key(3), W)
  values = np.asarray(V, np.float64) / 0.05
  error = 4 / math.sqrt(W.size)
  assert abs(values.mean()) < error
  assert abs((values**2).mean() - 1) < error * math.sqrt(2)
  assert abs((values * np.asarray(W)).mean()) < error
  assert_same_bits(rule.weights(-7 * W, draw), V)


@pytest.mark.parametrize('rule', drawing, ids=str)
def test_same_key_same_V_and_other_key_other_V(rule):
  W = normal(0, (60, 50))
  first, again, other = (
    draw_and_weights(rule, jax.random.key(seed), W)[1] for seed in (0, 0, 1)
  )
  assert_same_bits(first, again)
  assert (np.asarray(first) != np.asarray(other)).mean() > 0.99


@pytest.mark.parametrize('p_flip', [0.0, 0.3])
def test_a_stored_draw_follows_the_sign_of_W(p_flip):
  rule = feedback.frsf(p_flip)
  W = normal(0, (60, 50))
  draw, V = draw_and_weights(rule, jax.random.key(0), W)
  assert_same_bits(rule.weights(-W, draw), -V)
  assert_same_bits(rule.weights(100 * W, draw), V)


def test_a_draw_is_the_same_in_every_dtype_up_to_rounding():
  shape = (60, 50)
  rule = feedback.brsf(0.3)
  full = rule.draw(jax.random.key(0), jnp.zeros(shape))
  low = rule.draw(jax.random.key(0), jnp.zeros(shape, jnp.bfloat16))
  assert_same_bits(full.astype(jnp.bfloat16), low)


def test_which_rules_draw_and_redraw():
  assert [r.draws for r in map(feedback.from_name, _NAMES)] == [
    False, False, False, True, True, True, True, True,
  ]  # fmt: skip
  assert [r.redraws for r in map(feedback.from_name, _NAMES)] == [
    False, False, False, True, True, False, False, False,
  ]  # fmt: skip


_NAMES = {
  'BP': feedback.symmetric(),
  'uSF': feedback.usf(),
  'NuSF': feedback.nusf(),
  'brSF': feedback.brsf(),
  'brSF-75%': feedback.brsf(0.75),
  'frSF': feedback.frsf(),
  'frSF-2.5%': feedback.frsf(0.025),
  'RndF': feedback.rndf(),
}


@pytest.mark.parametrize('name', _NAMES)
def test_the_names_of_the_paper(name):
  assert feedback.from_name(name) == _NAMES[name]
  assert feedback.from_name(name.upper()) == _NAMES[name]


@every_rule
def test_rules_are_values(rule):
  copy = pickle.loads(pickle.dumps(rule))
  assert copy == rule and hash(copy) == hash(rule)
  assert eval(repr(rule), vars(feedback)) == rule
  others = [other for other in RULES.values() if other is not rule]
  assert all(other != rule and repr(other) != repr(rule) for other in others)
  with pytest.raises(AttributeError):
    rule.scale = 2.0


def test_the_repr_states_the_scale_when_it_is_not_one():
  assert repr(feedback.usf()) == 'usf()'
  assert repr(feedback.usf(scale='he')) == "usf(scale='he')"
  assert repr(feedback.brsf(0.25, scale=2)) == 'brsf(p_flip=0.25, scale=2.0)'


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: feedback.brsf(1.5), r'p_flip must be .* \[0, 1\], not 1.5'),
    (lambda: feedback.frsf(-0.1), 'p_flip must be .* not -0.1'),
    (lambda: feedback.frsf(float('nan')), 'p_flip must be .* not nan'),
    (lambda: feedback.brsf('25%'), "p_flip must be .* not '25%'"),
    (lambda: feedback.brsf(None), 'p_flip must be .* not None'),
    (lambda: feedback.rndf(0.0), 'sigma must be positive'),
    (lambda: feedback.rndf(-1.0), 'sigma must be .* not -1.0'),
    (lambda: feedback.usf(scale='lecun'), "scale must be .* not 'lecun'"),
    (lambda: feedback.usf(scale=0.0), 'scale must be positive'),
    (lambda: feedback.usf(scale=-2.0), 'scale must be .* not -2.0'),
    (lambda: feedback.from_name('xSF'), "one of BP, uSF.* not 'xSF'"),
    (lambda: feedback.from_name('uSF-25%'), "not 'uSF-25%'"),
    (lambda: feedback.from_name('brSF-250%'), 'p_flip must be .* not 2.5'),
    (lambda: feedback.from_name(''), "not ''"),
  ],
)
def test_bad_arguments_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_missing_or_misshapen_draw_is_refused():
  W = jnp.ones((4, 3))
  with pytest.raises(ValueError, match=r'frsf\(\) needs its random draw'):
    feedback.frsf().weights(W)
  with pytest.raises(ValueError, match=r'shape of the kernel, \(4, 3\)'):
    feedback.frsf().weights(W, jnp.ones((3, 4)))
  with pytest.raises(TypeError, match='real floating dtype, not int32'):
    feedback.usf().weights(jnp.ones((4, 3), jnp.int32))
