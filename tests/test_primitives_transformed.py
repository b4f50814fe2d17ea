"""The primitives under vmap, scan, remat, devices and a second reverse pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from symjax_bp import primitives
from tests.cases import OPERATIONS, normal, operands
from tests.primitive_gradients import (
  cotangents,
  expected_cotangents,
)

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


def plain_conv(x, W):
  return jax.lax.conv_general_dilated(
    x, W, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


# In both forms, with shapes of x and W, by their names in StableHLO.
LAYERS = {
  'dot_general': (primitives.dense, jnp.matmul, (5, 4), (4, 4)),
  'convolution': (primitives.conv, plain_conv, (2, 5, 6, 4), (3, 3, 4, 4)),
}


@pytest.mark.parametrize(
  'policy', ['dots_saveable', 'everything_saveable', 'nothing_saveable']
)
@pytest.mark.parametrize('name', LAYERS)
def test_policies_of_checkpoint_see_the_product(name, policy):
  layer, plain, x_shape, W_shape = LAYERS[name]
  policy = getattr(jax.checkpoint_policies, policy)

  def products(layer):
    def loss(W, x):
      for _ in range(3):
        x = jnp.sin(layer(x, W))
      return x.sum()

    gradient = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))
    program = gradient.lower(normal(0, W_shape), normal(1, x_shape)).as_text()
    return program.count(f'stablehlo.{name}')

  assert products(lambda x, W: layer(x, W, W)) == products(plain) >= 8


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


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['eager', 'jit'])
@pytest.mark.parametrize('split', ['W', 'V', 'x, W'])
def test_W_and_V_may_lie_differently_on_an_explicit_mesh(split, wrap):
  x, W, V = normal(0, (6, 4)), normal(1, (4, 8)), normal(2, (4, 8))
  loss = lambda x, W, V: (primitives.dense(x, W, V) ** 2).sum()
  cotangents_of = jax.grad(loss, argnums=(0, 1, 2))
  expected = cotangents_of(x, W, V)
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
  whole, columns = PartitionSpec(None, None), PartitionSpec(None, 'y')
  specs = (
    PartitionSpec('x', None) if 'x' in split else whole,
    columns if 'W' in split else whole,
    columns if split == 'V' else whole,
  )
  with jax.set_mesh(mesh):
    actual = wrap(cotangents_of)(*map(jax.device_put, (x, W, V), specs))
  assert tuple(a.sharding.spec for a in actual) == specs
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', LAYERS)
def test_shard_map_may_split_W_and_not_V(name):
  """Output features on 4 devices, with the same V for the part of each."""
  layer, _, x_shape, W_shape = LAYERS[name]
  x, W, V = normal(0, x_shape), normal(1, W_shape), normal(2, W_shape)
  V = V[..., :1]
  loss = lambda x, W, V: (layer(x, W, V) ** 2).sum()

  def per_device(x, W, V):
    total = lambda x, W, V: jax.lax.psum(loss(x, W, V), 'model')
    return jax.grad(total, argnums=(0, 1, 2))(x, W, V)

  whole = PartitionSpec()
  features = PartitionSpec(*(None,) * (W.ndim - 1), 'model')
  mapped = jax.shard_map(
    per_device,
    mesh=Mesh(np.array(jax.devices()[:4]), ('model',)),
    in_specs=(whole, features, whole),
    out_specs=(whole, features, whole),
  )
  dx, dW, dV = jax.jit(mapped)(x, W, V)
  expected = jax.grad(loss, argnums=(0, 1))(x, W, jnp.concatenate([V] * 4, -1))
  np.testing.assert_allclose(dx, expected[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dW, expected[1], rtol=1e-5, atol=1e-4)
  assert dV.shape == V.shape and not dV.any()


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
