"""Measures of asymmetry against NumPy in float64 and against theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import symjax_bp
from symjax_bp import metrics
from tests.cases import (
  assert_same_bits,
  chain,
  normal,
  numpy_angle,
  scanned,
  wide,
)


def numpy_ratio(W, V):
  return np.linalg.norm(wide(V)) / np.linalg.norm(wide(W))


def numpy_concordance(W, V):
  return np.mean(np.sign(wide(W)) == np.sign(wide(V)))


def numpy_rank(x):
  x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  eigenvalues = np.linalg.eigvalsh(x.T @ x)
  return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


MEASURES = {
  'sign_concordance': (metrics.sign_concordance, numpy_concordance),
  'alignment_angle': (metrics.alignment_angle, numpy_angle),
  'norm_ratio': (metrics.norm_ratio, numpy_ratio),
}
every_measure = pytest.mark.parametrize(
  'measure, expected', MEASURES.values(), ids=MEASURES
)


@pytest.mark.parametrize(
  'dtypes', [('bfloat16', 'float16'), ('int32', 'float32')]
)
@every_measure
def test_measures_are_those_of_numpy(measure, expected, dtypes):
  W = (3 * normal(0, (3, 3, 2, 4))).astype(dtypes[0])
  V = normal(1, W.shape, dtypes[1])
  actual = jax.jit(measure)(W, V)
  assert actual.shape == () and actual.dtype == jnp.float32
  # Sums of 72 terms in float32.
  np.testing.assert_allclose(actual, expected(W, V), rtol=100 * 2**-24)


def test_weights_of_a_function_may_lack_feedback():
  params = {'kernel': normal(0, (3, 2)), 'bias': normal(1, (2,))}
  f = symjax_bp.with_feedback(
    lambda p, x: x @ p['kernel'] + p['bias'], symjax_bp.usf()
  )
  found = metrics.sign_concordance(params, f.weights(params, None))
  assert found == {'kernel': 1, 'bias': None}


def test_zero_is_a_sign_of_its_own():
  W = jnp.array([1.0, -1.0, 0.0, 0.0, 2.0])
  V = jnp.array([2.0, 1.0, 0.0, 1.0, 0.0])
  assert metrics.sign_concordance(W, V) == np.float32(2 / 5)


@pytest.mark.parametrize('degrees', [90.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize('around', [0.0, 180.0])
def test_small_angles_are_exact(degrees, around):
  """Arccos is wrong by 20 % and more at 0.01 degrees."""
  radians = np.radians(degrees)
  a = jnp.array([1.0, 0.0])
  b = jnp.array([np.cos(radians), np.sin(radians)], jnp.float32)
  if around:
    b, degrees = -b, 180 - degrees
  for factor in (1.0, 5.0):
    angle = metrics.alignment_angle(a, factor * b)
    np.testing.assert_allclose(angle, degrees, rtol=1e-6)


def test_an_array_makes_no_angle_with_its_multiples():
  a = normal(0, (300, 300))
  for factor in (1.0, 0.25, 1024.0):
    assert metrics.alignment_angle(a, factor * a) == 0
    assert metrics.alignment_angle(a, -factor * a) == 180
    assert metrics.norm_ratio(a, factor * a) == factor


@pytest.mark.parametrize('scale', [1e30, 7e37, 1e-30, 1e-35])
def test_huge_and_tiny_values_neither_overflow_nor_vanish(scale):
  """Their squares are infinite or 0 in float32."""
  W, V = normal(0, (6, 5)) / 4, normal(1, (6, 5)) / 4
  scaled = W * jnp.float32(scale)
  for other, factor in ((V, scale), (V * jnp.float32(scale), 1)):
    # Sums of 30 terms, of numbers that are rounded three times.
    for measure, expected in (
      (metrics.alignment_angle, numpy_angle(V, W)),
      (metrics.norm_ratio, factor * numpy_ratio(V, W)),
    ):
      found = measure(other, scaled)
      np.testing.assert_allclose(found, expected, rtol=40 * 2**-24)


def test_zero_and_what_is_not_finite():
  W = normal(0, (4, 3))
  for bad in (0.0, np.nan, np.inf):
    V = jnp.full((4, 3), bad)
    for pair in ((W, V), (V, W), (V, V)):
      assert np.isnan(metrics.alignment_angle(*pair))
  zero = jnp.zeros((4, 3))
  assert metrics.norm_ratio(W, zero) == 0
  assert metrics.norm_ratio(zero, W) == np.inf
  assert np.isnan(metrics.norm_ratio(zero, zero))


@every_measure
def test_trees_in_and_trees_out_and_shapes_must_fit(measure, expected):
  W, V = ({'a': normal(i, (4, 3)), 'b': [normal(i + 5, (2,))]} for i in (0, 1))
  assert_same_bits(measure(W, V), jax.tree.map(measure, W, V))
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(3, 2\)'):
    measure(jnp.ones((2, 3)), jnp.ones((3, 2)))
  with pytest.raises(ValueError, match=r'\(2, 3\) and \(\)'):
    measure({'a': jnp.ones((2, 3))}, {'a': jnp.ones(())})


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_effective_rank_is_the_participation_ratio(dtype):
  x = normal(0, (2, 9, 5), dtype) * jnp.array([[[9, 3, 1, 0.1, 0]]], dtype)
  rank = jax.jit(metrics.effective_rank)(x)
  assert rank.dtype == jnp.float32
  np.testing.assert_allclose(rank, numpy_rank(x), rtol=100 * 2**-24)
  assert np.isnan(metrics.effective_rank(jnp.zeros((3, 2))))
  if dtype == jnp.float32:
    for scale in (1e-35, 1e-10, 1e10, 1e35):  # Fourth powers are out of range.
      found = metrics.effective_rank(x * scale)
      np.testing.assert_allclose(found, rank, rtol=100 * 2**-24)


# --- Alignment of all layers ------------------------------------------------


def numpy_backward(layers, feedback, x, target):
  """Errors at the products and gradients of the chain, sum of squares / 2."""
  inputs = [x]
  for W in layers:
    inputs.append(np.tanh(inputs[-1] @ W))
  g, errors, updates = inputs[-1] - target, [], []
  for V, x, y in zip(
    feedback[::-1], inputs[-2::-1], inputs[:0:-1], strict=True
  ):
    errors.insert(0, g * (1 - y**2))
    updates.insert(0, x.T @ errors[0])
    g = errors[0] @ V.T
  return errors, updates


def loss_of(f, feedback, x, target):
  return lambda params: ((f(params, feedback, x) - target) ** 2).sum() / 2


def flipped(arrays):
  """The second of three turned around."""
  return [arrays[0], arrays[1].T, arrays[2]]


# A function of W, the shape of W, and the three matrices that it uses.
MODELS = {
  'layers': (chain, (3, 4, 4), list),
  'scan': (scanned, (3, 4, 4), list),
  'tied': (
    lambda W, x: chain(flipped([W] * 3), x), (4, 4), lambda W: flipped([W] * 3)
  ),
}  # fmt: skip


@pytest.mark.parametrize('model', MODELS)
def test_alignment_is_that_of_the_equations(float64, model):
  function, shape, used = MODELS[model]
  x, target, W = map(normal, range(3), [(6, 4), (6, 4), shape])
  params = [*W] if model == 'layers' else W
  f = symjax_bp.with_feedback(function, symjax_bp.rndf())
  feedback = f.init(jax.random.key(0), params)
  loss = loss_of(f, feedback, x, target)
  found = jax.jit(lambda p: metrics.layer_alignment(loss, p))(params)
  V = f.weights(params, feedback)
  x, target = np.asarray(x), np.asarray(target)
  Ws, Vs = (used(np.asarray(A)) for A in (params, V))
  errors, updates = numpy_backward(Ws, Vs, x, target)
  true_errors, true_updates = numpy_backward(Ws, Ws, x, target)
  if model == 'tied':
    updates, true_updates = (
      [sum(flipped(each))] for each in (updates, true_updates)
    )
  if model == 'layers':
    groups = {str(i): slice(i, i + 1) for i in range(3)}
  else:
    groups = {'': slice(0, 3)}
  assert list(found) == list(groups)
  for path, group in groups.items():
    expected = metrics.Alignment(
      numpy_concordance(Ws[group], Vs[group]),
      numpy_angle(Ws[group], Vs[group]),
      numpy_ratio(Ws[group], Vs[group]),
      numpy_angle(updates[group], true_updates[group]),
      numpy_angle(errors[group], true_errors[group]),
      numpy_rank(np.stack(errors[group])),
    )
    # An angle that comes from squares is exact to the root of their rounding.
    np.testing.assert_allclose(found[path], expected, rtol=1e-9, atol=1e-5)


def test_errors_of_any_size_are_measured_or_nan():
  """uSF makes errors huge in deep networks, other feedback tiny."""
  f = symjax_bp.with_feedback(chain, symjax_bp.usf())
  W, x = [normal(0, (4, 4)), normal(2, (4, 4))], normal(1, (6, 4))

  @jax.jit
  def measured(scale):
    loss = lambda W: scale * f(W, None, x).sum()
    return metrics.layer_alignment(loss, W)['0']

  expected = measured(1.0)
  for scale in (1e-12, 1e12):
    np.testing.assert_allclose(measured(scale), expected, rtol=1e-4)
  for scale in (1e-18, 1e20):
    row = measured(scale)
    np.testing.assert_allclose(row[:4], expected[:4], rtol=1e-4)
    assert np.isnan(row.error_angle) and np.isnan(row.effective_rank)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_V_equal_to_W_is_perfectly_aligned(dtype):
  W, x = normal(0, (3, 4, 4), dtype), normal(1, (6, 4), dtype)
  f = symjax_bp.with_feedback(scanned, symjax_bp.symmetric())
  loss = loss_of(f, None, x, 0 * x)
  row = jax.jit(lambda W: metrics.layer_alignment(loss, W))(W)['']
  assert all(value.dtype == jnp.float32 for value in row)
  assert tuple(map(float, row))[:5] == (1, 0, 1, 0, 0)


def test_W_and_V_are_those_of_the_product():
  """After the mask: at the zeros, V is 0 as well."""
  W, x = normal(0, (4, 4)), normal(1, (6, 4))
  mask = jnp.eye(4) == 0
  f = symjax_bp.with_feedback(
    lambda W, x: x @ jnp.where(mask, W, 0.0), symjax_bp.frsf(1.0)
  )
  loss = loss_of(f, f.init(jax.random.key(0), W), x, x)
  row = jax.jit(lambda W: metrics.layer_alignment(loss, W))(W)['']
  assert row.concordance == 4 / 16 and row.update_angle == 0


def test_a_loss_may_be_jitted_and_is_measured_at_every_call():
  W, x = [normal(0, (4, 4)), normal(2, (4, 4))], normal(1, (6, 4))
  f = symjax_bp.with_feedback(chain, symjax_bp.usf())
  plain = lambda W: f(W, None, x).sum()
  jitted = jax.jit(plain)
  gradient = jax.grad(jitted)(W)
  first, second, unjitted = (
    jax.jit(lambda W, loss=loss: metrics.layer_alignment(loss, W))(W)['0']
    for loss in (jitted, jitted, plain)
  )
  assert all(value > 5 for value in first[3:5]), 'angles'
  np.testing.assert_allclose(first, second, rtol=0)
  np.testing.assert_allclose(first, unjitted, rtol=1e-5)
  assert_same_bits(jax.grad(jitted)(W), gradient)


def test_no_feedback_is_an_error():
  with pytest.raises(ValueError, match='no weight with feedback'):
    metrics.layer_alignment(lambda W: chain(W, W[0]).sum(), [normal(0, (4, 4))])
