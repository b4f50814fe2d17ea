"""dx is the transpose at V, dW never sees V, V gets zero: for every case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from symjax_bp import primitives
from tests.cases import OPERATIONS, assert_same_bits, normal, operands
from tests.primitive_gradients import (
  cotangents,
  expected_cotangents,
)

DTYPES = (jnp.float32, jnp.bfloat16)


every_operation = pytest.mark.parametrize('name', OPERATIONS)


every_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=lambda d: d.__name__)


@every_dtype
@every_operation
def test_cotangents_are_bit_equal_to_jax(name, dtype):
  operation = OPERATIONS[name]
  x, W, V, g = operands(operation, dtype)
  y = operation.asymmetric(x, W, V)
  assert_same_bits(y, operation.plain(x, W))
  actual = cotangents(operation, x, W, V, g)
  assert_same_bits(actual, expected_cotangents(operation, x, W, V, g))
  assert not np.array_equal(actual[0], cotangents(operation, x, W, W, g)[0])


@every_dtype
@every_operation
def test_V_equal_to_W_is_jax_grad_under_jit(name, dtype):
  operation = OPERATIONS[name]
  x, W, _, g = operands(operation, dtype)

  def vjp(operation, x, W, g):
    y, pullback = jax.vjp(operation, x, W)
    return y, pullback(g)

  symmetric = jax.jit(
    lambda *a: vjp(lambda x, W: operation.asymmetric(x, W, W), *a)
  )
  plain = jax.jit(lambda *a: vjp(operation.plain, *a))
  assert_same_bits(symmetric(x, W, g), plain(x, W, g))


@every_operation
def test_dW_does_not_depend_on_V(name):
  operation = OPERATIONS[name]
  x, W, V, g = operands(operation)
  first = cotangents(operation, x, W, V, g)
  second = cotangents(operation, x, W, 3 * V + 1, g)
  assert_same_bits(first[1], second[1])
  assert not np.array_equal(first[0], second[0])


def test_mixed_dtypes_follow_jax():
  x, W, V = (
    normal(0, (5, 4), jnp.bfloat16),
    normal(1, (4, 3)),
    normal(2, (4, 3)),
  )
  numbers = (((1,), (0,)), ((), ()))

  def asymmetric(x, W):
    return primitives.dot_general(
      x, W, V, numbers, preferred_element_type=jnp.float32
    )

  def plain(x, W):
    return jax.lax.dot_general(
      x, W, numbers, preferred_element_type=jnp.float32
    )

  y, pullback = jax.vjp(asymmetric, x, W)
  assert y.dtype == jnp.float32
  g = normal(3, y.shape)
  dx, dW = pullback(g)
  assert_same_bits(y, plain(x, W))
  assert_same_bits(dW, jax.vjp(plain, x, W)[1](g)[1])
  assert_same_bits(dx, jax.vjp(plain, x, V)[1](g)[0])
  assert dx.dtype == jnp.bfloat16 and dW.dtype == jnp.float32


def test_V_of_another_floating_dtype_is_cast():
  x, W, V = normal(0, (5, 4)), normal(1, (4, 3)), normal(2, (4, 3))
  low = V.astype(jnp.bfloat16)
  loss = lambda x, W, V: primitives.dense(x, W, V).sum()
  dx, dV = jax.grad(loss, argnums=(0, 2))(x, W, low)
  assert_same_bits(dx, jax.grad(loss)(x, W, low.astype(jnp.float32)))
  assert dV.dtype == jnp.bfloat16 and not dV.any()


@pytest.mark.parametrize('dtype', (jnp.int32, jnp.uint8, jnp.bool_))
def test_an_integer_input_has_no_gradient(dtype):
  x, W, V = (
    normal(0, (5, 4)).astype(dtype),
    normal(1, (4, 3)),
    normal(2, (4, 3)),
  )
  numbers = (((1,), (0,)), ((), ()))
  y, pullback = jax.vjp(primitives.dense, x, W, V)
  plain_y, plain_pullback = jax.vjp(
    lambda x, W: jax.lax.dot_general(x, W, numbers), x, W
  )
  dx, dW, dV = pullback(y)
  _, plain_dW = plain_pullback(y)
  assert_same_bits((y, dW), (plain_y, plain_dW))
  assert dx.shape == x.shape and dx.dtype == jax.dtypes.float0
  assert not dV.any()


def test_preferred_element_type_of_a_convolution():
  operation = OPERATIONS['conv 2d']
  x, W, V, _ = operands(operation, jnp.bfloat16)
  options = dict(
    window_strides=(1, 1),
    padding='SAME',
    preferred_element_type=jnp.float32,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )

  def vjp(function, *primals):
    y, pullback = jax.vjp(function, *primals)
    return y, pullback(jnp.ones_like(y))

  conv = lambda x, W: jax.lax.conv_general_dilated(x, W, **options)
  asymmetric = lambda x, W: primitives.conv_general_dilated(x, W, V, **options)
  y, (dx, dW) = vjp(asymmetric, x, W)
  assert y.dtype == jnp.float32
  assert_same_bits((y, dW), (conv(x, W), vjp(conv, x, W)[1][1]))
  assert_same_bits(dx, vjp(conv, x, V)[1][0])


def test_a_dense_net_in_closed_form():
  """Two layers with relu against the paper's equations in NumPy."""
  x, W1, W2, V1, V2 = (
    normal(seed, shape)
    for seed, shape in enumerate([(7, 4), (4, 5), (5, 3), (4, 5), (5, 3)])
  )

  def loss(x, W1, W2):
    hidden = jax.nn.relu(primitives.dense(x, W1, V1))
    return (primitives.dense(hidden, W2, V2) ** 2).sum() / 2

  dx, dW1, dW2 = jax.grad(loss, argnums=(0, 1, 2))(x, W1, W2)
  x, W1, W2, V1, V2 = (np.asarray(a, np.float64) for a in (x, W1, W2, V1, V2))
  a = x @ W1
  h = np.maximum(a, 0)
  g = h @ W2
  delta = (g @ V2.T) * (a > 0)
  np.testing.assert_allclose(dW2, h.T @ g, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dW1, x.T @ delta, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dx, delta @ V1.T, rtol=1e-4, atol=1e-4)


def test_a_small_convolution_in_loops():
  x, W, V = (
    normal(0, (2, 5, 6, 2)),
    normal(1, (3, 2, 2, 3)),
    normal(2, (3, 2, 2, 3)),
  )
  y, pullback = jax.vjp(
    lambda x, W: primitives.conv(x, W, V, strides=(2, 1), padding='VALID'), x, W
  )
  g = normal(3, y.shape)
  dx, dW = pullback(g)
  X, U, B, G = (np.asarray(a, np.float64) for a in (x, W, V, g))
  want_y, want_dx, want_dW = (
    np.zeros(y.shape),
    np.zeros(X.shape),
    np.zeros(U.shape),
  )
  batch, height, width, features = y.shape
  for n, i, j, c in np.ndindex(batch, height, width, features):
    for a, b, d in np.ndindex(3, 2, 2):
      want_y[n, i, j, c] += X[n, 2 * i + a, j + b, d] * U[a, b, d, c]
      want_dx[n, 2 * i + a, j + b, d] += G[n, i, j, c] * B[a, b, d, c]
      want_dW[a, b, d, c] += X[n, 2 * i + a, j + b, d] * G[n, i, j, c]
  np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dW, want_dW, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('spatial', [1, 2, 3])
@pytest.mark.parametrize('padding', ['SAME', 'VALID', 'explicit'])
def test_conv_shorthand_is_flax_convolution(spatial, padding):
  import flax.linen as nn

  if padding == 'explicit':
    padding = [(1, 2)] * spatial
  shape = (2, *(9, 8, 7)[:spatial], 4)
  x, V = normal(0, shape), normal(1, (3,) * spatial + (2, 6))
  layer = nn.Conv(
    6,
    (3,) * spatial,
    strides=2,
    padding=padding,
    kernel_dilation=2,
    feature_group_count=2,
    use_bias=False,
  )
  W = layer.init(jax.random.key(0), x)['params']['kernel']
  actual = primitives.conv(
    x, W, V, 2, padding, rhs_dilation=2, feature_group_count=2
  )
  assert_same_bits(actual, layer.apply({'params': {'kernel': W}}, x))


@pytest.mark.parametrize(
  'V, error, message',
  [
    (jnp.ones((3, 4)), ValueError, r'V must have the shape of W, \(4, 3\)'),
    (jnp.ones((4, 3), jnp.int32), TypeError, 'float32 and int32'),
    (jnp.ones((4, 3), jnp.complex64), TypeError, 'float32 and complex64'),
    (jnp.ones((4, 3), bool), TypeError, 'float32 and bool'),
  ],
)
def test_a_wrong_V_is_refused(V, error, message):
  with pytest.raises(error, match=message):
    primitives.dense(jnp.ones((5, 4)), jnp.ones((4, 3)), V)


def test_a_kernel_of_another_rank_is_refused():
  W = jnp.ones((3, 2, 2))
  with pytest.raises(ValueError, match='same number of axes'):
    primitives.conv(jnp.ones((1, 4, 4, 2)), W, W)
