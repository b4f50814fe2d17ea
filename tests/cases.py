"""The tables that the tests of the library run over: rules and operations."""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from symjax_bp import feedback, primitives

RULES = {
  repr(rule): rule
  for rule in (
    feedback.symmetric(),
    feedback.usf(),
    feedback.usf(scale='he'),
    feedback.nusf(),
    feedback.brsf(),
    feedback.brsf(0.3),
    feedback.brsf(1.0),
    feedback.frsf(),
    feedback.frsf(0.5, scale='xavier'),
    feedback.rndf(),
    feedback.rndf(0.5, scale=2.0),
    feedback.frozen_sign(),
    feedback.frozen_noise(),
    feedback.tied_norm(),
    feedback.kolen_pollack(),
    feedback.product_feedback(width=8),
    feedback.low_rank(rank=2),
    feedback.weight_mirror(),
    feedback.local_loss(factors={'decay': 0.5, 'self': 0.5}),
  )
}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One bilinear operation in both forms, with the shapes to try it on."""

  asymmetric: Callable  # (x, W, V) -> y
  plain: Callable  # (x, W) -> y
  x: tuple[int, ...]
  W: tuple[int, ...]
  product: primitives.Product


def _dot(x, W, dimension_numbers, at=1, **options) -> Operation:
  options |= {'dimension_numbers': dimension_numbers}
  product = primitives.Product.create(lax.dot_general, options, at=at)
  public = functools.partial(primitives.dot_general, **options)
  return _operation(product, x, W, public if at == 1 else None)


def _ragged(x, W, sizes) -> Operation:
  """Rows of x times the matrix of their group; the sizes are integers."""
  numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
  options = {'ragged_dot_dimension_numbers': numbers}
  product = primitives.Product(lax.ragged_dot_general, tuple(options.items()))
  return _operation(product, x, W, None, jnp.array(sizes))


def _conv(x, W, strides=1, padding='SAME', layout=None, **options):
  rank = len(x) - 2
  last = (0, rank + 1, *range(1, rank + 1))
  kernel = (rank + 1, rank, *range(rank))
  layout = layout or lax.ConvDimensionNumbers(last, kernel, last)
  options |= {
    'window_strides': (strides,) * rank,
    'padding': padding,
    'dimension_numbers': lax.conv_dimension_numbers(x, W, layout),
  }
  product = primitives.Product.create(lax.conv_general_dilated, options)
  public = functools.partial(primitives.conv_general_dilated, **options)
  return _operation(product, x, W, public)


def _operation(product, x, W, public, *others) -> Operation:
  def asymmetric(x, W, V):
    return primitives.asymmetric(product, (x, *others), W, V)

  plain = lambda x, W: product((x, *others), W)
  return Operation(public or asymmetric, plain, x, W, product)


_MATMUL = (((1,), (0,)), ((), ()))
_SUMS = {'preferred_element_type': jnp.float32}
OPERATIONS = {
  'dense': _dot((5, 4), (4, 3), _MATMUL),
  'dense, float32 sums': _dot((5, 4), (4, 3), _MATMUL, **_SUMS),
  'dense, 2 output axes': _dot((5, 4), (4, 3, 2), _MATMUL),
  'dense, 2 contracted axes': _dot(
    (5, 4, 3), (4, 3, 2), (((1, 2), (0, 1)), ((), ()))
  ),
  'dense, batch axis': _dot((6, 5, 4), (6, 4, 3), (((2,), (1,)), ((0,), (0,)))),
  'dense, W first, batch axes': _dot(
    (7, 2, 4, 3), (3, 4, 5, 6, 2), (((1,), (2,)), ((0, 4), (3, 1))), 0
  ),
  'dense, ragged': _ragged((7, 4), (3, 4, 5), (2, 0, 5)),
  'conv 1d': _conv((2, 9, 3), (3, 3, 4)),
  'conv 1d, stride 2': _conv((2, 9, 3), (3, 3, 4), 2, 'VALID'),
  'conv 2d': _conv((2, 8, 7, 3), (3, 3, 3, 4)),
  'conv 2d, float32 sums': _conv((2, 8, 7, 3), (3, 3, 3, 4), **_SUMS),
  'conv 2d, same lower, stride 2': _conv(
    (2, 8, 7, 3), (2, 2, 3, 4), 2, 'SAME_LOWER'
  ),
  'conv 2d, unused pixels': _conv((2, 8, 8, 3), (3, 3, 3, 4), 3, 'VALID'),
  'conv 2d, explicit padding': _conv(
    (2, 8, 7, 3), (3, 3, 3, 4), 2, ((2, 0), (1, 3))
  ),
  'conv 2d, odd layout': _conv(
    (7, 2, 8, 4), (4, 3, 5, 2), layout=('HNWC', 'IHOW', 'WNCH')
  ),
  'conv 2d, kernel dilation': _conv(
    (2, 9, 9, 3), (3, 3, 3, 4), rhs_dilation=(2, 3)
  ),
  'conv 2d, input dilation': _conv(
    (2, 5, 5, 3), (3, 3, 3, 4), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)
  ),
  'conv 2d, groups': _conv((2, 8, 7, 4), (3, 3, 2, 6), feature_group_count=2),
  'conv 2d, depthwise': _conv(
    (2, 8, 7, 4), (3, 3, 1, 8), 2, feature_group_count=4
  ),
  'conv 2d, batch groups': _conv(
    (4, 6, 6, 3), (3, 3, 3, 4), batch_group_count=2
  ),
  'conv 3d': _conv((2, 5, 4, 6, 2), (2, 3, 3, 2, 3), 2),
}


def normal(seed: int, shape, dtype=float) -> jax.Array:
  """Standard normal numbers: the same for every dtype up to rounding.

  By default in double precision where that is enabled, and in float32 else.
  """
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, dtype)


def wide(arrays):
  """The numbers of arrays, in double precision."""
  flat = [np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(arrays)]
  return np.concatenate(flat)


def numpy_angle(a, b):
  """Degrees between two arrays, or two lists of arrays."""
  a, b = (v / np.linalg.norm(v) for v in map(wide, (a, b)))
  return np.degrees(
    2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
  )


def chain(layers, x):
  """A layer for each matrix."""
  for W in layers:
    x = jnp.tanh(x @ W)
  return x


def scanned(W, x):
  """The same for a stack of matrices."""
  return lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, W)[0]


def operands(operation: Operation, lead=()):
  """x, W and V of an operation, each with these leading axes."""
  shapes = operation.x, operation.W, operation.W
  return [normal(seed, lead + shape) for seed, shape in enumerate(shapes)]


def assert_same_bits(actual, expected) -> None:
  """Trees of equal structure, dtypes and bits."""
  chex.assert_trees_all_equal_dtypes(actual, expected)
  chex.assert_trees_all_equal(actual, expected)


def assert_close(actual, expected, atol=1e-10) -> None:
  """Trees of equal structure and dtypes, close for double precision."""
  chex.assert_trees_all_equal_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=0, atol=atol)


def differ(actual, expected) -> bool:
  """Whether any leaf is another one, by more than rounding."""
  pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
  return any(not np.allclose(a, b, rtol=1e-3) for a, b in pairs)
