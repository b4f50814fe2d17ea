"""dx is the transpose at V, dW never sees V, V gets zero: for every case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from symjax_bp import primitives
from tests.cases import OPERATIONS, assert_same_bits, normal, operands

DTYPES = (jnp.float32, jnp.bfloat16)
every_operation = pytest.mark.parametrize('name', OPERATIONS)
every_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=lambda d: d.__name__)


def expected_cotangents(operation, x, W, V, g):
  """dx at V and dW at W, each by JAX's own gradient of the plain operation."""
  dx = jax.vjp(lambda x: operation.plain(x, V), x)[1](g)[0]
  dW = jax.vjp(lambda W: operation.plain(x, W), W)[1](g)[0]
  return dx, dW, jnp.zeros_like(V)


def cotangents(operation, x, W, V, g):
  return jax.vjp(operation.asymmetric, x, W, V)[1](g)


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


SUBSETS = [
  (mapped_x, mapped_W, mapped_V)
  for mapped_x in (0, 1)
  for mapped_W in (0, 1)
  for mapped_V in (0, 1)
  if mapped_x or mapped_W or mapped_V
]


@pytest.mark.parametrize('mapped', SUBSETS, ids=str)
@pytest.mark.parametrize('name', ['dense', 'conv 2d', 'conv 2d, groups'])
def test_vmap_over_any_subset_is_a_loop(name, mapped):
  operation = OPERATIONS[name]
  x, W, V, g = operands(operation, lead=mapped)
  one = lambda x, W, V: cotangents(operation, x, W, V, g)
  axes = tuple(0 if axis else None for axis in mapped)
  actual = jax.vmap(one, in_axes=axes)(x, W, V)
  for i in range(3):
    pick = lambda array, axis, i=i: array[i] if axis else array
    expected = one(*map(pick, (x, W, V), mapped))
    for a, e in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a[i], e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'wrap', [jax.jit, jax.checkpoint], ids=['jit', 'remat']
)
@pytest.mark.parametrize('name', ['dense', 'conv 2d'])
def test_transformations_keep_the_cotangents(name, wrap):
  operation = OPERATIONS[name]
  x, W, V, g = operands(operation)
  actual = jax.vjp(wrap(operation.asymmetric), x, W, V)[1](g)
  expected = expected_cotangents(operation, x, W, V, g)
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)


def test_scan_over_layers_is_the_unrolled_loop():
  W, V = normal(0, (3, 4, 4)), normal(1, (3, 4, 4))
  x = normal(2, (5, 4))

  def layer(x, WV):
    return jnp.tanh(primitives.dense(x, *WV)), None

  def scanned(x, W, V):
    return jax.lax.scan(layer, x, (W, V))[0].sum()

  def unrolled(x, W, V):
    for i in range(3):
      x, _ = layer(x, (W[i], V[i]))
    return x.sum()

  actual = jax.grad(scanned, argnums=(0, 1, 2))(x, W, V)
  expected = jax.grad(unrolled, argnums=(0, 1, 2))(x, W, V)
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['dense', 'conv 2d'])
def test_pmap_and_shard_map_agree_with_one_device(name):
  operation = OPERATIONS[name]
  devices = jax.devices()[:4]
  assert len(devices) == 4
  x, W, V, g = operands(operation)
  x, g = (jnp.stack([a, 2 * a, -a, a + 1]) for a in (x, g))
  expected = [
    expected_cotangents(operation, x[i], W, V, g[i]) for i in range(4)
  ]

  def per_device(x, W, V, g):
    dx, dW, dV = cotangents(operation, x, W, V, g)
    return dx, jax.lax.psum(dW, 'data'), dV

  mapped = jax.pmap(
    per_device, 'data', in_axes=(0, None, None, 0), devices=devices
  )
  dx, dW, dV = mapped(x, W, V, g)
  mesh = Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))
  split, whole = PartitionSpec('data'), PartitionSpec()

  def cotangents_of(function, x, W, V, g):
    return jax.vjp(function, x, W, V)[1](g)

  # In shard_map JAX itself sums the cotangent of what is not sharded.
  def per_shard(x, W, V, g):
    batched = jax.vmap(operation.asymmetric, in_axes=(0, None, None))
    return cotangents_of(batched, x, W, V, g)

  sharded = jax.jit(
    jax.shard_map(
      per_shard,
      mesh=mesh,
      in_specs=(split, whole, whole, split),
      out_specs=(split, whole, whole),
    )
  )
  sdx, sdW, sdV = sharded(x, W, V, g)
  total = sum(np.asarray(e[1]) for e in expected)
  for i in range(4):
    np.testing.assert_allclose(dx[i], expected[i][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sdx[i], expected[i][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dW[i], total, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(sdW, total, rtol=1e-5, atol=1e-4)
  assert not dV.any() and not sdV.any()


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


def test_second_order_with_V_equal_to_W_is_that_of_backpropagation():
  x, W1, W2 = normal(0, (5, 4)), normal(1, (4, 6)), normal(2, (6, 2))

  def loss(layer, W1, W2):
    return (layer(jnp.tanh(layer(x, W1)), W2) ** 2).sum()

  def hessian(layer):
    function = lambda W1: loss(layer, W1, W2)
    return jax.jacrev(jax.jacrev(function))(W1)

  np.testing.assert_allclose(
    hessian(lambda x, W: primitives.dense(x, W, W)),
    hessian(lambda x, W: x @ W),
    rtol=1e-4,
    atol=1e-4,
  )


def test_every_reverse_pass_uses_V():
  """The second reverse pass through y = x W sends dx through V as well."""
  x, W, V = normal(0, (3,)), normal(1, (3, 2)), normal(2, (3, 2))

  def squared(x):  # gradient by the rule: 2 V y
    y = primitives.dense(x, W, V)
    return (y**2).sum()

  jacobian = jax.jacrev(jax.grad(squared))(x)
  np.testing.assert_allclose(jacobian, 2 * V @ V.T, rtol=1e-5)


def test_forward_mode_fails_with_the_error_of_jax():
  x, W, V = normal(0, (5, 4)), normal(1, (4, 3)), normal(2, (4, 3))
  with pytest.raises(TypeError, match='forward-mode autodiff .* custom_vjp'):
    jax.jvp(lambda x: primitives.dense(x, W, V), (x,), (x,))


def count(hlo: str, operation: str) -> int:
  return hlo.count(f' {operation}(')


@pytest.mark.parametrize('with_dx', [True, False])
@pytest.mark.parametrize('name', ['dense', 'conv 2d', 'conv 2d, groups'])
def test_no_more_products_than_plain_jax(name, with_dx):
  operation = OPERATIONS[name]
  x, W, V, _ = operands(operation)
  argnums = (0, 1) if with_dx else 1
  asymmetric = lambda x, W, V: (operation.asymmetric(x, W, V) ** 2).sum()
  plain = lambda x, W, V: (operation.plain(x, W) ** 2).sum()
  products = {}
  for label, loss in (('asymmetric', asymmetric), ('plain', plain)):
    compiled = jax.jit(jax.grad(loss, argnums)).lower(x, W, V).compile()
    hlo = compiled.as_text()
    products[label] = count(hlo, 'dot') + count(hlo, 'convolution')
  assert products['asymmetric'] == products['plain']
  # y, dW and, only when asked for, dx.
  assert products['asymmetric'] == (3 if with_dx else 2)


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
