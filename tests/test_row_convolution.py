"""A CPU's own formulation of a convolution differs in rounding only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from symjax_bp import primitives
from symjax_bp.row_convolution import pays, row_convolution
from tests.cases import assert_same_bits, normal


@dataclasses.dataclass(frozen=True)
class _Case:
  x: tuple[int, ...]
  W: tuple[int, ...]
  layout: tuple[str, str, str] = ('NHWC', 'HWIO', 'NHWC')
  padding: str | tuple[tuple[int, int], ...] = 'VALID'
  changed: tuple = ()

  @property
  def options(self):
    return {
      'window_strides': (1,) * (len(self.x) - 2),
      'padding': self.padding,
      'lhs_dilation': None,
      'rhs_dilation': None,
      'dimension_numbers': self.layout,
      'feature_group_count': 1,
      'batch_group_count': 1,
      'precision': None,
      'preferred_element_type': None,
      'out_sharding': None,
      **dict(self.changed),
    }


QUICKER = {
  'MNIST, second layer': _Case((10, 12, 12, 20), (5, 5, 20, 50)),
  'SVHN, second layer': _Case((3, 14, 14, 20), (7, 7, 20, 64)),
  'columns padded': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), padding=((0, 0), (3, 1))
  ),
  'rows padded on one side': _Case(
    (20, 12, 9, 6), (7, 4, 6, 70), padding=((1, 0), (0, 0))
  ),
  'columns with a stride': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), changed=(('window_strides', (1, 2)),)
  ),
  'features first': _Case(
    (20, 6, 12, 9), (70, 6, 5, 4), ('NCHW', 'OIHW', 'NCHW')
  ),
  'an odd layout': _Case(
    (12, 20, 9, 6), (6, 5, 70, 4), ('HNWC', 'IHOW', 'WNCH')
  ),
  'three axes': _Case(
    (4, 8, 6, 7, 4), (4, 3, 2, 4, 60), ('NHWDC', 'HWDIO', 'NHWDC')
  ),
}
LEFT_ALONE = {
  'the image keeps its size': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), padding='SAME'
  ),
  'a few rows less': _Case((20, 30, 9, 6), (3, 4, 6, 70)),
  'one row of kernel': _Case((99, 12, 9, 6), (1, 4, 6, 70)),
  'rows with a stride': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), changed=(('window_strides', (2, 1)),)
  ),
  'dilated kernel': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), changed=(('rhs_dilation', (2, 1)),)
  ),
  'dilated input': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), changed=(('lhs_dilation', (2, 1)),)
  ),
  'groups': _Case(
    (20, 12, 9, 6), (5, 4, 3, 140), changed=(('feature_group_count', 2),)
  ),
  'batch groups': _Case(
    (20, 12, 9, 6), (5, 4, 6, 70), changed=(('batch_group_count', 2),)
  ),
  'a kernel larger than the image': _Case((200, 4, 4, 64), (6, 6, 64, 64)),
  'one axis': _Case((200, 12, 6), (5, 6, 999), ('NHC', 'HIO', 'NHC')),
  'small': _Case((2, 12, 9, 6), (5, 4, 6, 7)),
}
quicker = pytest.mark.parametrize('case', QUICKER.values(), ids=QUICKER)


def _close(actual, expected):
  scale = np.abs(np.asarray(expected, np.float64)).max()
  tolerance = 1e-6 if expected.dtype == jnp.float32 else 0.02
  assert actual.dtype == expected.dtype
  np.testing.assert_allclose(
    np.asarray(actual, np.float64),
    np.asarray(expected, np.float64),
    atol=tolerance * scale,
  )


@quicker
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_dx_is_the_transpose_of_the_formulation_at_V(case, dtype):
  options = case.options
  x, W, V = (
    normal(seed, shape, dtype)
    for seed, shape in enumerate((case.x, case.W, case.W))
  )
  assert pays(x.shape, W.shape, options)
  plain = lambda x, W: lax.conv_general_dilated(x, W, **options)
  asymmetric = lambda x, W, V: primitives.conv_general_dilated(
    x, W, V, **options
  )
  y, pullback = jax.vjp(asymmetric, x, W, V)
  g = normal(9, y.shape, dtype)
  dx, dW, dV = pullback(g)
  assert_same_bits(y, plain(x, W))
  assert_same_bits(dW, jax.vjp(lambda W: plain(x, W), W)[1](g)[0])
  assert not dV.any()
  by_rows = lambda x: row_convolution(x, V, **options)
  assert_same_bits(dx, jax.vjp(by_rows, x)[1](g)[0])
  _close(dx, jax.vjp(lambda x: plain(x, V), x)[1](g)[0])
  _close(by_rows(x), plain(x, V))


@quicker
def test_V_equal_to_W_is_jax_grad_of_the_formulation(case):
  options = case.options
  x, W = normal(0, case.x), normal(1, case.W)
  asymmetric = jax.jit(
    jax.grad(
      lambda x: primitives.conv_general_dilated(x, W, W, **options).sum()
    )
  )
  by_rows = jax.jit(jax.grad(lambda x: row_convolution(x, W, **options).sum()))
  assert_same_bits(asymmetric(x), by_rows(x))


@pytest.mark.parametrize('case', LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_convolutions_are_left_alone(case):
  assert not pays(case.x, case.W, case.options)


def test_a_kernel_larger_than_the_image_gets_the_gradient_of_jax():
  case = LEFT_ALONE['a kernel larger than the image']
  x, W = normal(0, case.x), normal(1, case.W)
  y, pullback = jax.vjp(
    lambda x: primitives.conv_general_dilated(x, W, W, **case.options), x
  )
  assert y.shape == (200, 0, 0, 64)
  (dx,) = pullback(y)
  assert dx.shape == case.x and not dx.any()


@pytest.mark.parametrize('shape', ['b, 12, 12, 20', '10, h, 12, 20'])
def test_export_with_a_symbolic_size(shape):
  case = QUICKER['MNIST, second layer']
  W, V = normal(1, case.W), normal(2, case.W)
  layer = lambda x: primitives.conv_general_dilated(x, W, V, **case.options)
  gradient = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum()))
  sizes = export.symbolic_shape(shape, constraints=('h >= 5',) * ('h' in shape))
  exported = export.export(gradient)(jax.ShapeDtypeStruct(sizes, jnp.float32))
  x = normal(0, case.x)
  _close(exported.call(x), gradient(x))


def test_transformations():
  case = QUICKER['MNIST, second layer']
  x, W, V = normal(0, case.x), normal(1, case.W), normal(2, case.W)

  def loss(x, V, W=W):
    y = primitives.conv_general_dilated(x, W, V, **case.options)
    return jnp.square(y).sum()

  dx = jax.grad(loss)
  several = jnp.stack([V, 2 * V])
  batched = jax.jit(jax.vmap(dx, (None, 0)))(x, several)
  for found, one in zip(batched, several, strict=True):
    _close(found, dx(x, one))
  # The reverse pass of a reverse pass is linear in dx, and sees V again.
  second = jax.grad(lambda x: dx(x, V).sum())(x)
  y_bar = lax.conv_general_dilated(jnp.ones_like(x), V, **case.options)
  plain = lambda x: lax.conv_general_dilated(x, V, **case.options)
  _close(second, 2 * jax.vjp(plain, x)[1](y_bar)[0])


def test_accelerators_keep_their_own_convolution():
  case = QUICKER['MNIST, second layer']
  x, W = normal(0, case.x), normal(1, case.W)
  loss = lambda x: primitives.conv_general_dilated(
    x, W, W, **case.options
  ).sum()
  lowered = {
    platform: jax.jit(jax.grad(loss))
    .trace(x)
    .lower(lowering_platforms=(platform,))
    .as_text()
    for platform in ('cpu', 'tpu', 'cuda')
  }
  assert 'stablehlo.concatenate' in lowered['cpu']
  assert 'stablehlo.concatenate' not in lowered['tpu'] + lowered['cuda']
