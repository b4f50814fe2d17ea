"""The tables that the tests of the library run over: rules and operations."""

import dataclasses
from collections.abc import Callable

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
  )
}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One bilinear operation in both forms, with the shapes to try it on."""

  asymmetric: Callable  # (x, W, V) -> y
  plain: Callable  # (x, W) -> y
  x: tuple[int, ...]
  W: tuple[int, ...]


def _pair(asymmetric, plain, x, W, *args, **kwargs) -> Operation:
  return Operation(
    asymmetric=lambda x, W, V: asymmetric(x, W, V, *args, **kwargs),
    plain=lambda x, W: plain(x, W, *args, **kwargs),
    x=x,
    W=W,
  )


def _dot(x, W, dimension_numbers) -> Operation:
  return _pair(primitives.dot_general, lax.dot_general, x, W, dimension_numbers)


def _conv(x, W, strides=1, padding='SAME', batch_groups=1, **options):
  rank = len(x) - 2
  layout = (0, rank + 1, *range(1, rank + 1))
  kernel_layout = (rank + 1, rank, *range(rank))
  return _pair(
    primitives.conv_general_dilated,
    lax.conv_general_dilated,
    x,
    W,
    window_strides=(strides,) * rank,
    padding=padding,
    batch_group_count=batch_groups,
    dimension_numbers=lax.ConvDimensionNumbers(layout, kernel_layout, layout),
    **options,
  )


OPERATIONS = {
  'dense': _dot((5, 4), (4, 3), (((1,), (0,)), ((), ()))),
  'dense, 3-d input': _dot((2, 5, 4), (4, 3), (((2,), (0,)), ((), ()))),
  'dense, 2 output axes': _dot((5, 4), (4, 3, 2), (((1,), (0,)), ((), ()))),
  'dense, 2 contracted axes': _dot(
    (5, 4, 3), (4, 3, 2), (((1, 2), (0, 1)), ((), ()))
  ),
  'dense, batch axis': _dot((6, 5, 4), (6, 4, 3), (((2,), (1,)), ((0,), (0,)))),
  'conv 1d': _conv((2, 9, 3), (3, 3, 4)),
  'conv 1d, stride 2': _conv((2, 9, 3), (3, 3, 4), 2, 'VALID'),
  'conv 2d': _conv((2, 8, 7, 3), (3, 3, 3, 4)),
  'conv 2d, valid': _conv((2, 8, 7, 3), (3, 2, 3, 4), 1, 'VALID'),
  'conv 2d, same lower, stride 2': _conv(
    (2, 8, 7, 3), (2, 2, 3, 4), 2, 'SAME_LOWER'
  ),
  'conv 2d, unused pixels': _conv((2, 8, 8, 3), (3, 3, 3, 4), 3, 'VALID'),
  'conv 2d, explicit padding': _conv(
    (2, 8, 7, 3), (3, 3, 3, 4), 2, ((2, 0), (1, 3))
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
  'conv 2d, batch groups': _conv((4, 6, 6, 3), (3, 3, 3, 4), batch_groups=2),
  'conv 3d': _conv((2, 5, 4, 6, 2), (2, 3, 3, 2, 3), 2),
}


def normal(seed: int, shape, dtype=jnp.float32) -> jax.Array:
  """Standard normal numbers: the same for every dtype up to rounding."""
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, dtype)


def operands(operation: Operation, dtype=jnp.float32, lead=(0, 0, 0)):
  """x, W, V and g of an operation, each with ``lead`` extra leading axes."""
  shapes = (operation.x, operation.W, operation.W)
  x, W, V = (
    normal(seed, (3,) * extra + shape, dtype)
    for seed, (shape, extra) in enumerate(zip(shapes, lead, strict=True))
  )
  y = jax.eval_shape(
    operation.plain,
    jax.ShapeDtypeStruct(operation.x, dtype),
    jax.ShapeDtypeStruct(operation.W, dtype),
  )
  return x, W, V, normal(9, y.shape, y.dtype)


def assert_same_bits(actual, expected) -> None:
  """Trees of equal structure, dtypes and bits."""
  jax.tree.map(_assert_leaf_same_bits, actual, expected)


def _assert_leaf_same_bits(actual, expected) -> None:
  assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
  np.testing.assert_array_equal(
    np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  )
