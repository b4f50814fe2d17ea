"""The primitives under vmap, scan, remat, devices and a second reverse pass.

Values are compared in float64, where rounding is far below the tolerance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from symjax_bp import primitives
from tests.cases import (
  OPERATIONS,
  cotangents,
  expected_cotangents,
  fast_jit,
  normal,
  operands,
)

wide = functools.partial(normal, dtype=jnp.float64)


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def assert_close(actual, expected):
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == e.dtype == jnp.float64
    np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10)


SUBSETS = [tuple(map(int, f'{number:03b}')) for number in range(1, 8)]


@pytest.mark.accelerator
@pytest.mark.parametrize('name', ['dense', 'conv 2d, groups'])
def test_vmap_over_any_subset_is_a_loop(float64, name):
  operation = OPERATIONS[name]
  *stacked, g = operands(operation, jnp.float64, lead=(1, 1, 1))
  one = fast_jit(lambda *xWV: expected_cotangents(operation, *xWV, g))

  def pick(i, mapped):
    return [
      a[i if axis else 0] for a, axis in zip(stacked, mapped, strict=True)
    ]

  @fast_jit
  def every(*stacked):
    results = []
    for mapped in SUBSETS:
      axes = tuple(0 if axis else None for axis in mapped)
      xWV = [a if b else a[0] for a, b in zip(stacked, mapped, strict=True)]
      f = jax.vmap(lambda *xWV: cotangents(operation, *xWV, g), axes)
      results.append(f(*xWV))
    return results

  for mapped, actual in zip(SUBSETS, every(*stacked), strict=True):
    for i in range(3):
      assert_close([a[i] for a in actual], one(*pick(i, mapped)))


def plain_conv(x, W):
  return lax.conv_general_dilated(
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


@pytest.mark.parametrize('with_dx', [True, False])
@pytest.mark.parametrize('name', ['dense', 'conv 2d'])
def test_no_more_products_than_plain_jax(name, with_dx):
  operation = OPERATIONS[name]
  x, W, V, _ = operands(operation)
  argnums = (0, 1) if with_dx else 1
  asymmetric = lambda x, W: (operation.asymmetric(x, W, V) ** 2).sum()
  plain = lambda x, W: (operation.plain(x, W) ** 2).sum()

  def count(loss):
    hlo = jax.jit(jax.grad(loss, argnums)).lower(x, W).compile().as_text()
    return hlo.count(' dot(') + hlo.count(' convolution(')

  # y, dW and, only when asked for, dx.
  assert count(asymmetric) == count(plain) == (3 if with_dx else 2)


@pytest.mark.parametrize('name', LAYERS)
def test_shard_map_may_split_W_and_not_V(float64, name):
  """Output features on 4 devices, with the same V for the part of each."""
  layer, _, x_shape, W_shape = LAYERS[name]
  x, W, V = wide(0, x_shape), wide(1, W_shape), wide(2, W_shape)[..., :1]
  loss = lambda x, W, V: (layer(x, W, V) ** 2).sum()

  def per_device(x, W, V):
    total = lambda x, W, V: lax.psum(loss(x, W, V), 'model')
    return jax.grad(total, argnums=(0, 1, 2))(x, W, V)

  whole = PartitionSpec()
  features = PartitionSpec(*(None,) * (W.ndim - 1), 'model')
  mapped = jax.shard_map(
    per_device,
    mesh=jax.sharding.Mesh(np.array(jax.devices()[:4]), ('model',)),
    in_specs=(whole, features, whole),
    out_specs=(whole, features, whole),
  )
  expected = jax.grad(loss, argnums=(0, 1))(x, W, jnp.concatenate([V] * 4, -1))
  assert_close(jax.jit(mapped)(x, W, V), (*expected, jnp.zeros_like(V)))


@pytest.mark.parametrize('split', ['W', 'V', 'x, W'])
def test_W_and_V_may_lie_differently_on_an_explicit_mesh(float64, split):
  xWV = wide(0, (6, 4)), wide(1, (4, 8)), wide(2, (4, 8))
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
  assert_close(map(np.asarray, actual), map(np.asarray, expected))


def test_every_reverse_pass_uses_V(float64):
  """The second reverse pass through y = x W sends dx through V as well."""
  x, W, V = wide(0, (3,)), wide(1, (3, 2)), wide(2, (3, 2))
  squared = lambda x: (primitives.dense(x, W, V) ** 2).sum()  # dx = 2 V y
  assert_close(jax.jacrev(jax.grad(squared))(x), 2 * V @ V.T)


def test_forward_mode_fails_with_the_error_of_jax():
  x, W, V = normal(0, (5, 4)), normal(1, (4, 3)), normal(2, (4, 3))
  with pytest.raises(TypeError, match='forward-mode autodiff .* custom_vjp'):
    jax.jvp(lambda x: primitives.dense(x, W, V), (x,), (x,))
