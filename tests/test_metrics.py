"""Measures of asymmetry against NumPy in float64 and against theory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import symjax_bp as sbp
from symjax_bp import linen, metrics
from tests.cases import assert_same_bits, normal

SHAPES = [(7,), (5, 4), (3, 3, 2, 4)]
every_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


def wide(array):
  return np.asarray(array, np.float64).ravel()


def numpy_angle(a, b):
  a, b = wide(a), wide(b)
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def numpy_ratio(a, b):
  return np.linalg.norm(wide(a)) / np.linalg.norm(wide(b))


def numpy_concordance(W, V):
  return np.mean(np.sign(wide(W)) == np.sign(wide(V)))


MEASURES = {
  'sign_concordance': (metrics.sign_concordance, numpy_concordance),
  'alignment_angle': (metrics.alignment_angle, numpy_angle),
  'norm_ratio': (metrics.norm_ratio, numpy_ratio),
}
every_measure = pytest.mark.parametrize(
  'measure, expected', MEASURES.values(), ids=MEASURES
)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@every_shape
@every_measure
def test_measures_are_those_of_numpy(measure, expected, shape, dtype):
  a, b = normal(0, shape, dtype), normal(1, shape, dtype)
  actual = measure(a, b)
  assert actual.shape == () and actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected(a, b), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(measure)(a, b), actual, rtol=1e-6)


@every_measure
def test_dtypes_may_differ_and_integers_are_numbers(measure, expected):
  a, b = jnp.array([3, -1, 0, 2]), normal(0, (4,), jnp.bfloat16)
  for pair in ((a, b), (b, a), (a, a[::-1])):
    actual = measure(*pair)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected(*pair), rtol=1e-6)


def test_zero_is_a_sign_of_its_own():
  W = jnp.array([1.0, -1.0, 0.0, 0.0, 2.0])
  V = jnp.array([2.0, 1.0, 0.0, 1.0, 0.0])
  assert metrics.sign_concordance(W, V) == np.float32(2 / 5)


def test_known_angles():
  a = jnp.array([1.0, 0.0, 0.0])
  for degrees in (0.0, 30.0, 45.0, 60.0, 90.0, 120.0, 179.0, 180.0):
    radians = np.radians(degrees)
    b = jnp.array([np.cos(radians), np.sin(radians), 0.0], jnp.float32)
    actual = metrics.alignment_angle(a, 5 * b)
    np.testing.assert_allclose(actual, degrees, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('degrees', [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize('around', [0.0, 180.0])
def test_small_angles_are_exact_where_those_of_arccos_are_not(degrees, around):
  radians = np.radians(degrees)
  a = jnp.array([1.0, 0.0])
  b = jnp.array([1.0, np.tan(radians)], jnp.float32)
  by_arccos = jnp.degrees(
    jnp.arccos(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))
  )
  assert abs(by_arccos - degrees) > 0.2 * degrees, 'the test would be too easy'
  if around == 0:
    actual = metrics.alignment_angle(a, b)
    np.testing.assert_allclose(actual, degrees, rtol=1e-6)
  else:
    actual = metrics.alignment_angle(a, -b)
    np.testing.assert_allclose(actual, 180 - degrees, rtol=1e-7)


def test_an_array_makes_no_angle_with_its_multiples():
  a = normal(0, (300, 300))
  for wrap in (jax.jit, lambda measure: measure):
    angle, ratio = map(wrap, (metrics.alignment_angle, metrics.norm_ratio))
    for factor in (1.0, 0.25, 1024.0):
      assert angle(a, factor * a) == 0
      assert angle(a, -factor * a) == 180
      assert ratio(factor * a, a) == factor


@pytest.mark.parametrize('scale', [1e30, 1e37, 7e37, 1e-30, 1e-35])
def test_huge_and_tiny_values_neither_overflow_nor_vanish(scale):
  # Their squares are infinite or 0 in float32.
  a, b = normal(0, (6, 5)), normal(1, (6, 5))
  a, b = a / jnp.abs(a).max(), b / jnp.abs(b).max()
  scaled = a * jnp.float32(scale)
  angle, ratio = numpy_angle(a, b), numpy_ratio(a, b)
  np.testing.assert_allclose(
    metrics.alignment_angle(scaled, b), angle, rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics.alignment_angle(scaled, b * jnp.float32(scale)), angle, rtol=1e-5
  )
  assert metrics.sign_concordance(scaled, a) == 1
  np.testing.assert_allclose(
    metrics.norm_ratio(scaled, b), ratio * scale, rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics.norm_ratio(scaled, b * jnp.float32(scale)), ratio, rtol=1e-5
  )


@pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
def test_angles_with_zero_or_what_is_not_finite_are_nan(bad):
  a, b = normal(0, (4, 3)), jnp.full((4, 3), bad)
  assert np.isnan(metrics.alignment_angle(a, b))
  assert np.isnan(metrics.alignment_angle(b, a))
  assert np.isnan(metrics.alignment_angle(b, b))


def test_zero_norms():
  zero, one = jnp.zeros(3), jnp.ones(3)
  assert metrics.norm_ratio(zero, one) == 0
  assert metrics.norm_ratio(one, zero) == np.inf
  assert np.isnan(metrics.norm_ratio(zero, zero))
  assert metrics.sign_concordance(zero, zero) == 1
  assert metrics.sign_concordance(zero, one) == 0


@every_measure
def test_trees_in_and_trees_out(measure, expected):
  trees = [
    {'a': normal(seed, (4, 3)), 'b': [normal(seed + 5, (2,))]}
    for seed in range(2)
  ]
  assert_same_bits(measure(*trees), jax.tree.map(measure, *trees))
  jax.tree.map(
    lambda value, a, b: np.testing.assert_allclose(
      value, expected(a, b), rtol=1e-5
    ),
    jax.jit(measure)(*trees),
    *trees,
  )


@every_measure
def test_shapes_that_would_broadcast_or_only_fit_flat_are_errors(
  measure, expected
):
  del expected
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(3, 2\)'):
    measure(jnp.ones((2, 3)), jnp.ones((3, 2)))
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(\)'):
    measure({'a': jnp.ones((2, 3))}, {'a': jnp.ones(())})


def test_alignment_is_the_four_measures():
  W, V, dW, true = (normal(seed, (5, 4)) for seed in range(4))
  row = jax.jit(metrics.alignment)(W, V, dW, true)
  np.testing.assert_allclose(row.concordance, numpy_concordance(W, V))
  np.testing.assert_allclose(row.angle, numpy_angle(V, W), rtol=1e-5)
  np.testing.assert_allclose(row.norm_ratio, numpy_ratio(V, W), rtol=1e-5)
  np.testing.assert_allclose(
    row.gradient_angle, numpy_angle(dW, true), rtol=1e-5
  )


# Cosine of the angle between W and V = M sign(W) S_p of many weights:
#   E[W V] / sqrt(E[W^2] E[V^2])
#     = (1 - 2p) * E|W| / sqrt(E[W^2]) * E[M] / sqrt(E[M^2])
# where the factor of W is sqrt(3) / 2 (uniform) or sqrt(2 / pi) (gaussian), and
# that of M is 1 (uSF, NuSF) or sqrt(3) / 2 (brSF, frSF). For p = 0 the angles
# are 30.0 and 41.4 degrees (uniform W), 37.1 and 46.3 degrees (gaussian W).
KERNELS = {
  'uniform': nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform'),
  'gaussian': nn.initializers.normal(0.01),
}
FACTOR = {'uniform': np.sqrt(3) / 2, 'gaussian': np.sqrt(2 / np.pi)}
RULES = [
  sbp.usf(), sbp.nusf(), sbp.brsf(), sbp.frsf(), sbp.brsf(0.25),
  sbp.frsf(0.5), sbp.frsf(1.0), sbp.rndf(),
]  # fmt: skip


def theory(rule, init):
  """Angle and concordance."""
  if rule.name == 'rndf':
    return 90.0, 0.5
  p_flip = getattr(rule, 'p_flip', 0.0)
  magnitude = np.sqrt(3) / 2 if rule.draws else 1.0
  cosine = (1 - 2 * p_flip) * FACTOR[init] * magnitude
  return np.degrees(np.arccos(cosine)), 1 - p_flip


def angle_error(W, V):
  """Standard error of the angle of a sample, by the delta method."""
  W, V = wide(W), wide(V)
  product, W2, V2 = W * V, np.mean(W**2), np.mean(V**2)
  norm = np.sqrt(W2 * V2)
  cosine = np.mean(product) / norm
  influence = product / norm - cosine / 2 * (W**2 / W2 + V**2 / V2)
  sine = np.sqrt(1 - cosine**2)
  return np.degrees(np.std(influence) / sine / np.sqrt(W.size))


@pytest.mark.parametrize('init', KERNELS)
@pytest.mark.parametrize('rule', RULES, ids=str)
def test_a_fresh_layer_has_the_angle_and_concordance_of_theory(rule, init):
  layer = linen.Dense(512, feedback=rule, kernel_init=KERNELS[init])
  x = normal(0, (1, 512))
  rngs = {'feedback': jax.random.key(1)}
  variables = layer.init({'params': jax.random.key(0), **rngs}, x)
  loss = lambda y: (y**2).sum()
  row = linen.layer_alignment(layer, variables, loss, x, rngs=rngs)['']
  _, sown = layer.apply(variables, x, rngs=rngs, mutable='feedback_weights')
  W, V = variables['params']['kernel'], sown['feedback_weights']['kernel']
  angle, concordance = theory(rule, init)
  tolerance = 4 * angle_error(W, V)
  assert tolerance < 1
  np.testing.assert_allclose(row.angle, angle, atol=tolerance, rtol=0)
  np.testing.assert_allclose(row.angle, numpy_angle(W, V), rtol=1e-5)
  deviation = np.sqrt(concordance * (1 - concordance) / W.size)
  np.testing.assert_allclose(
    row.concordance, concordance, atol=4 * deviation, rtol=0
  )
  assert row.gradient_angle == 0, 'nothing is above a single layer'


def test_the_symmetric_rule_is_perfectly_aligned():
  layer = linen.Dense(64, feedback=sbp.symmetric())
  x = normal(0, (1, 64))
  variables = layer.init(jax.random.key(0), x)
  loss = lambda y: (y**2).sum()
  row = linen.layer_alignment(layer, variables, loss, x)['']
  assert tuple(map(float, row)) == (1.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize('rule', [sbp.usf(), sbp.usf(scale=3.0)], ids=str)
def test_scale_changes_the_norm_and_not_the_angle(rule):
  W = normal(0, (20, 10))
  V = rule.weights(W)
  expected = np.sqrt(200) * rule.scale / np.linalg.norm(wide(W))
  np.testing.assert_allclose(metrics.norm_ratio(V, W), expected, rtol=1e-6)
  np.testing.assert_allclose(
    metrics.alignment_angle(V, W), numpy_angle(jnp.sign(W), W), rtol=1e-6
  )
