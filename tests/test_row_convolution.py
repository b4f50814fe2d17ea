"""A CPU's own formulation of dx: opt-in, and different in rounding only."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import export, lax

import symjax_bp
from symjax_bp import primitives
from tests.cases import assert_close, assert_same_bits, normal

# Shapes of x and W and the options that are not the defaults.
MNIST = ((2, 12, 12, 20), (5, 5, 20, 50), {})  # Its second layer.
UNEVEN = (
  (12, 5, 9, 6),
  (6, 5, 70, 4),
  {'dimension_numbers': ('HNWC', 'IHOW', 'WNCH'), 'padding': ((1, 0), (3, 1))},
)
LEFT_ALONE = {
  'keeps the size': ((20, 12, 9, 6), (5, 4, 6, 70), {'padding': 'SAME'}),
  'rows with a stride': (
    (20, 12, 9, 6), (5, 4, 6, 70), {'window_strides': (2, 1)}
  ),
  'dilated kernel': ((20, 12, 9, 6), (5, 4, 6, 70), {'rhs_dilation': (2, 1)}),
  'dilated input': (
    (20, 12, 9, 6), (5, 4, 6, 70),
    {'lhs_dilation': (2, 1), 'padding': ((0, 0), (0, 0))},
  ),
  'groups': ((20, 12, 9, 6), (5, 4, 3, 140), {'feature_group_count': 2}),
  'kernel larger than image': ((200, 4, 4, 64), (6, 6, 64, 64), {}),
  'small': ((2, 12, 9, 6), (5, 4, 6, 7), {}),
}  # fmt: skip


def functions(case, **option):
  """The convolution with feedback and the plain one; x, W, V and g."""
  x, W, options = case
  options = {
    'window_strides': (1, 1),
    'padding': 'VALID',
    'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'),
    **options,
  }
  plain = functools.partial(lax.conv_general_dilated, **options)
  rows = functools.partial(primitives.conv_general_dilated, **options, **option)
  x, W, V = map(normal, range(3), (x, W, W))
  g = normal(3, jax.eval_shape(plain, x, W).shape)
  return rows, plain, (x, W, V, g)


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, g, *operands):
  y, pullback = jax.vjp(function, *operands)
  return y, *pullback(g)


def lowered(function, x, W, V, g, platform='cpu') -> str:
  loss = lambda x: jnp.vdot(function(x, W, V), g)
  traced = jax.jit(jax.grad(loss)).trace(x)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.optimized
def test_only_dx_differs_from_jax_and_only_by_rounding():
  rows, plain, (x, W, V, g) = functions(UNEVEN, row_convolution=True)
  assert 'concatenate' in lowered(rows, x, W, V, g)
  y, dx, dW = gradients(plain, g, x, W)
  zero = jnp.zeros_like(V)
  rows_y, rows_dx, rows_dW, dV = gradients(rows, g, x, W, V)
  assert_same_bits((rows_y, rows_dW, dV), (y, dW, zero))
  with jax.enable_x64(True):
    x, W, V, g = (jnp.asarray(a, jnp.float64) for a in (x, W, V, g))
    transpose = jax.jit(lambda W, g: jax.vjp(lambda x: plain(x, W), x)[1](g)[0])
    # n products of float32 and their sum in any order are off by at most
    # n u / (1 - n u) sum |terms|, with u = 2^-24 (Higham, section 3.1).
    rounding = transpose(jnp.ones_like(W), jnp.ones_like(g)) * 2**-24
    for found, A in ((dx, W), (rows_dx, V)):
      error = abs(found.astype(jnp.float64) - transpose(A, g))
      size = transpose(abs(A), abs(g))
      assert (error <= rounding / (1 - rounding) * size).all()


@pytest.mark.parametrize('platform', ['cpu', 'cuda'])
def test_rows_are_for_those_who_ask_on_a_cpu(platform):
  for option in (True, False):
    rows, _, operands = functions(MNIST, row_convolution=option)
    concatenates = 'concatenate' in lowered(rows, *operands, platform)
    assert concatenates == (option and platform == 'cpu')


@pytest.mark.parametrize('case', LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_other_convolutions_are_left_alone(case):
  rows, _, operands = functions(case, row_convolution=True)
  assert 'concatenate' not in lowered(rows, *operands)


@pytest.mark.parametrize('option', [True, False])
def test_the_option_of_with_feedback(option):
  _, plain, (x, W, _, g) = functions(MNIST)
  given = {'rules': symjax_bp.usf(), 'row_convolution': option}
  f = symjax_bp.with_feedback(lambda W, x: plain(x, W), **given)
  layer = nn.Conv(50, (5, 5), padding='VALID', use_bias=False)
  layer = symjax_bp.with_feedback(layer, **given)
  for function in (
    lambda x, W, V: f(W, None, x),
    lambda x, W, V: layer.apply({'params': {'kernel': W}}, x),
  ):
    assert ('concatenate' in lowered(function, x, W, W, g)) == option


@pytest.mark.parametrize('shape', ['b, 12, 12, 20', '2, h, 12, 20'])
def test_export_with_a_symbolic_size(shape):
  rows, plain, (x, W, V, _) = functions(MNIST, row_convolution=True)
  loss = lambda function: lambda x: (function(x) ** 2).sum() / 2
  gradient = jax.jit(jax.grad(loss(lambda x: rows(x, W, V))))
  sizes = export.symbolic_shape(shape, constraints=('h >= 5',) * ('h' in shape))
  exported = export.export(gradient)(jax.ShapeDtypeStruct(sizes, jnp.float32))
  expected = gradients(plain, plain(x, W), x, V)[1]
  # Without the option used, it is the program of JAX.
  assert_same_bits(exported.call(x), expected)


def test_under_vmap_and_a_second_reverse_pass(float64):
  rows, plain, (x, W, V, g) = functions(MNIST, row_convolution=True)
  dx = lambda x, V: jax.vjp(lambda x: rows(x, W, V), x)[1](g)[0]
  batched = jax.jit(jax.vmap(dx, (None, 0)))(x, jnp.stack([V, -2 * V]))
  expected = gradients(plain, g, x, V)[1]
  # dx is linear in g; its reverse pass is the product at V.
  dg = jax.jit(jax.grad(lambda g: jax.vjp(rows, x, W, V)[1](g)[0].sum()))(g)
  wanted = expected, -2 * expected, plain(jnp.ones_like(x), V)
  assert_close((*batched, dg), wanted, atol=1e-9)
