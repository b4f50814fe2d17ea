"""dx is the transpose at V, dW never sees V, V gets zero, also transformed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from symjax_bp import primitives
from tests.cases import (
  OPERATIONS,
  assert_close,
  assert_same_bits,
  normal,
  operands,
)


def value_and_cotangents(function, *primals):
  """Of y = function(*primals), at cotangents that are random numbers."""
  y, pullback = jax.vjp(function, *primals)
  return y, pullback(normal(9, y.shape, y.dtype))


LOW, SINGLE = jnp.bfloat16, jnp.float32
IN_LOW = ('dense', 'conv 2d', 'dense, float32 sums', 'conv 2d, float32 sums')


@pytest.mark.accelerator
@pytest.mark.parametrize(
  'name, x_dtype, W_dtype',
  [
    *((name, SINGLE, SINGLE) for name in OPERATIONS),
    *((name, LOW, LOW) for name in IN_LOW),
    ('dense, float32 sums', LOW, SINGLE),
  ],
)
def test_cotangents_are_bit_equal_to_those_of_jax(name, x_dtype, W_dtype):
  """dx is that of JAX at V, everything else that of JAX at W."""
  operation = OPERATIONS[name]
  x, W, V = operands(operation)
  x, W, V = x.astype(x_dtype), W.astype(W_dtype), V.astype(W_dtype)
  compiled = jax.jit(value_and_cotangents, static_argnums=0)
  y, (dx, dW) = compiled(operation.plain, x, W)
  _, (dx_at_V, _) = compiled(operation.plain, x, V)
  assert not np.array_equal(dx, dx_at_V)
  zero = jnp.zeros_like(V)
  asymmetric = lambda V: compiled(operation.asymmetric, x, W, V)
  assert_same_bits(asymmetric(V), (y, (dx_at_V, dW, zero)))
  assert_same_bits(asymmetric(W), (y, (dx, dW, zero)))


def test_float64_of_numpy_is_float32_without_a_warning():
  operation = OPERATIONS['dense, ragged']
  x, W, V = operands(operation)
  wide = [np.asarray(array, np.float64) for array in (x, W)]
  assert_same_bits(
    operation.asymmetric(*wide, V), operation.asymmetric(x, W, V)
  )


def test_V_of_another_dtype_is_cast_and_its_zero_gradient_is_not():
  x, W, V = operands(OPERATIONS['conv 1d'])
  low = V.astype(jnp.bfloat16)
  loss = lambda x, W, V: primitives.conv(x, W, V).sum()
  dx, dV = jax.grad(loss, argnums=(0, 2))(x, W, low)
  assert_same_bits(dx, jax.grad(loss)(x, W, low.astype(jnp.float32)))
  assert_same_bits(dV, jnp.zeros_like(low))


def test_an_integer_input_has_no_gradient():
  operation = OPERATIONS['dense']
  x, W, V = operands(operation)
  x = x.astype(jnp.int32)
  _, (dx, dW, _) = value_and_cotangents(operation.asymmetric, x, W, V)
  _, (expected,) = value_and_cotangents(lambda W: operation.plain(x, W), W)
  assert_same_bits(dW, expected)
  assert dx.shape == x.shape and dx.dtype == jax.dtypes.float0


@pytest.mark.parametrize('axes', [1, 3])
def test_conv_is_the_convolution_of_flax(axes):
  x, V = normal(0, (2, *(9, 8, 7)[:axes], 4)), normal(1, (3,) * axes + (2, 6))
  shared = {'padding': [(1, 2)] * axes, 'feature_group_count': 2}
  layer = nn.Conv(
    6, (3,) * axes, 2, kernel_dilation=2, use_bias=False, **shared
  )
  y = layer.apply({'params': {'kernel': V}}, x)
  assert_same_bits(primitives.conv(x, V, V, 2, rhs_dilation=2, **shared), y)


@pytest.mark.parametrize('name', OPERATIONS)
def test_fan_and_features_by_counting(name):
  """Ones count terms; with W = 1 nothing varies along the features of y."""
  operation = OPERATIONS[name]
  options = dict(operation.product.options)
  images = options.get('batch_group_count', 1)
  groups = images * options.get('feature_group_count', 1)
  x = normal(0, operation.x)
  if groups > 1:  # All see the same, so that only W tells features apart.
    x = jnp.concatenate([x[: len(x) // images, ..., :1]] * images)
    x = jnp.broadcast_to(x, operation.x)

  @jax.jit
  def run(x, W):
    y, pullback = jax.vjp(lambda x: operation.plain(x, W), jnp.ones_like(x))
    return y.max(), pullback(jnp.ones_like(y))[0].max(), operation.plain(x, W)

  inputs, outputs, y = map(np.asarray, run(x, jnp.ones(operation.W)))
  fan = operation.product.fan(operation.W)
  if 'lhs_dilation' not in options:  # Its zeros are inputs too.
    assert fan.inputs == inputs
  if set(options.get('window_strides', ())) <= {1}:
    # Initializers count the features of all groups.
    assert fan.outputs == outputs * groups
  same = [i for i in range(y.ndim) if np.ptp(y, i).max() < 1e-5 * np.ptp(y)]
  features = operation.product.feature_axes(y.ndim, len(operation.W))
  assert features == tuple(same)


@pytest.mark.parametrize(
  'V, error, message',
  [
    (jnp.ones((3, 4)), ValueError, r'V must have the shape of W, \(4, 3\)'),
    (jnp.ones((4, 3), jnp.int32), TypeError, 'float32 and int32'),
    (jnp.ones((4, 3), jnp.complex64), TypeError, 'float32 and complex64'),
  ],
)
def test_a_wrong_V_is_refused(V, error, message):
  with pytest.raises(error, match=message):
    primitives.dense(jnp.ones((5, 4)), jnp.ones((4, 3)), V)


def test_a_kernel_of_another_rank_is_refused():
  W = jnp.ones((3, 2, 2))
  with pytest.raises(ValueError, match='same number of axes'):
    primitives.conv(jnp.ones((1, 4, 4, 2)), W, W)


# --- Transformed --------------------------------------------------------------


SUBSETS = [tuple(map(int, f'{number:03b}')) for number in range(1, 8)]


@pytest.mark.accelerator
@pytest.mark.parametrize('name', ['dense', 'conv 2d, groups'])
def test_vmap_over_any_subset_is_a_loop(float64, name):
  operation = OPERATIONS[name]
  stacked = operands(operation, lead=(3,))

  @jax.jit
  def one(x, W, V):
    at_V, at_W = (
      value_and_cotangents(operation.plain, x, A)[1] for A in (V, W)
    )
    return at_V[0], at_W[1], jnp.zeros_like(V)

  def pick(i, mapped):
    return [
      a[i if axis else 0] for a, axis in zip(stacked, mapped, strict=True)
    ]

  @jax.jit
  def every(*stacked):
    results = []
    for mapped in SUBSETS:
      axes = tuple(0 if axis else None for axis in mapped)
      xWV = [a if b else a[0] for a, b in zip(stacked, mapped, strict=True)]
      f = lambda *xWV: value_and_cotangents(operation.asymmetric, *xWV)[1]
      results.append(jax.vmap(f, axes)(*xWV))
    return results

  for mapped, actual in zip(SUBSETS, every(*stacked), strict=True):
    for i in range(3):
      assert_close(tuple(a[i] for a in actual), one(*pick(i, mapped)))


@pytest.mark.parametrize(
  'policy', ['dots_saveable', 'everything_saveable', 'nothing_saveable']
)
def test_policies_of_checkpoint_see_the_product(policy):
  policy = getattr(jax.checkpoint_policies, policy)

  def products(dense):
    def loss(W, x):
      for _ in range(3):
        x = jnp.sin(dense(x, W))
      return x.sum()

    gradient = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))
    program = gradient.lower(normal(0, (4, 4)), normal(1, (5, 4))).as_text()
    return program.count('stablehlo.dot_general')

  asymmetric = lambda x, W: primitives.dense(x, W, W)
  assert products(asymmetric) == products(jnp.matmul) >= 8


@pytest.mark.parametrize('with_dx', [True, False])
@pytest.mark.parametrize('name', ['dense', 'conv 2d'])
def test_no_more_products_than_plain_jax(name, with_dx):
  operation = OPERATIONS[name]
  x, W, V = operands(operation)
  argnums = (0, 1) if with_dx else 1
  asymmetric = lambda x, W: (operation.asymmetric(x, W, V) ** 2).sum()
  plain = lambda x, W: (operation.plain(x, W) ** 2).sum()

  def count(loss):
    hlo = jax.jit(jax.grad(loss, argnums)).lower(x, W).compile().as_text()
    return hlo.count(' dot(') + hlo.count(' convolution(')

  # y, dW and, only when asked for, dx.
  assert count(asymmetric) == count(plain) == (3 if with_dx else 2)


def test_shard_map_may_split_W_and_not_V(float64):
  """Output features on 4 devices, with the same V for the part of each."""
  x, W, V = normal(0, (5, 4)), normal(1, (4, 4)), normal(2, (4, 1))
  loss = lambda x, W, V: (primitives.dense(x, W, V) ** 2).sum()

  def per_device(x, W, V):
    total = lambda x, W, V: lax.psum(loss(x, W, V), 'model')
    return jax.grad(total, argnums=(0, 1, 2))(x, W, V)

  whole, features = PartitionSpec(), PartitionSpec(None, 'model')
  mapped = jax.shard_map(
    per_device,
    mesh=jax.sharding.Mesh(np.array(jax.devices()[:4]), ('model',)),
    in_specs=(whole, features, whole),
    out_specs=(whole, features, whole),
  )
  expected = jax.grad(loss, argnums=(0, 1))(x, W, jnp.concatenate([V] * 4, -1))
  assert_close(jax.jit(mapped)(x, W, V), (*expected, jnp.zeros_like(V)))


@pytest.mark.parametrize('split', ['V', 'x, W'])
def test_W_and_V_may_lie_differently_on_an_explicit_mesh(float64, split):
  xWV = normal(0, (6, 4)), normal(1, (4, 8)), normal(2, (4, 8))
  loss = lambda x, W, V: (primitives.dense(x, W, V) ** 2).sum()
  gradients = jax.grad(loss, argnums=(0, 1, 2))
  expected = gradients(*xWV)
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
  specs = tuple(
    PartitionSpec(*axes) if name in split else PartitionSpec(None, None)
    for name, axes in (
      ('x', ('x', None)),
      ('W', (None, 'y')),
      ('V', (None, 'y')),
    )
  )
  with jax.set_mesh(mesh):
    actual = jax.jit(gradients)(*map(jax.device_put, xWV, specs))
  assert tuple(a.sharding.spec for a in actual) == specs
  assert_close(*(tuple(map(np.asarray, each)) for each in (actual, expected)))


def test_every_reverse_pass_uses_V(float64):
  """The second reverse pass through y = x W sends dx through V as well."""
  x, W, V = normal(0, (3,)), normal(1, (3, 2)), normal(2, (3, 2))
  squared = lambda x: (primitives.dense(x, W, V) ** 2).sum()  # dx = 2 V y
  assert_close(jax.jacrev(jax.grad(squared))(x), 2 * V @ V.T)


def test_forward_mode_fails_with_the_error_of_jax():
  x, W, V = normal(0, (5, 4)), normal(1, (4, 3)), normal(2, (4, 3))
  with pytest.raises(TypeError, match='forward-mode autodiff .* custom_vjp'):
    jax.jvp(lambda x: primitives.dense(x, W, V), (x,), (x,))
