r"""Convolutions that a CPU transposes quickly: a kernel's rows as features.

The transpose of a convolution that shrinks the image, such as 5 x 5 without
padding, is a convolution of the padded cotangent. XLA's CPU code multiplies the
padding too, and is slow where the image has few features. Over rows that are
stacked as features the same convolution goes along the other axes only, and its
transpose multiplies no rows of zeros:

.. math::
  y_{hw} = \sum_{ij} x_{h+i,\,w+j} W_{ij}
         = \sum_j [x_{h,\,w+j} \dots x_{h+k,\,w+j}] [W_{0j} \dots W_{kj}]

The numbers are the same, summed in another order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax

# From these on it pays: rows of x for a row of y, and pixels of x times kernel.
_ROWS = 1.15
_PRODUCTS = 2**22


def pays(
  x_shape: Sequence[int], W_shape: Sequence[int], options: Mapping[str, Any]
) -> bool:
  """Whether a CPU transposes ``row_convolution`` noticeably quicker.

  Args:
    x_shape: of the input.
    W_shape: of the kernel.
    options: of ``jax.lax.conv_general_dilated``.
  """
  spatial = len(x_shape) - 2
  strides, ones = tuple(options['window_strides']), (1,) * spatial
  if (
    any(map(export.is_symbolic_dim, (*x_shape, *W_shape)))
    or spatial < 2
    or strides[0] != 1
    or options['lhs_dilation'] not in (None, ones)
    or options['rhs_dilation'] not in (None, ones)
    or (options['feature_group_count'], options['batch_group_count']) != (1, 1)
    or options['out_sharding'] is not None
  ):
    return False
  lhs, rhs, _ = _layout(x_shape, W_shape, options)
  low, high = _pads(x_shape, W_shape, options)[0]
  rows = x_shape[lhs[2]]
  rows_of_y = rows + low + high - W_shape[rhs[2]] + 1
  pixels = math.prod(x_shape) // x_shape[lhs[1]]
  return (
    0 < _ROWS * rows_of_y <= rows and pixels * math.prod(W_shape) >= _PRODUCTS
  )


def row_convolution(x: jax.Array, W: jax.Array, **options: Any) -> jax.Array:
  """``jax.lax.conv_general_dilated``, where ``pays`` is true."""
  lhs, rhs, _ = layout = _layout(x.shape, W.shape, options)
  (low, high), *padding = _pads(x.shape, W.shape, options)
  edges = [(0, 0, 0)] * x.ndim
  edges[lhs[2]] = (low, high, 0)
  size = W.shape[rhs[2]]

  def stacked(array, features, rows):
    count = array.shape[rows] - size + 1
    parts = [
      lax.slice_in_dim(array, row, row + count, axis=rows)
      for row in range(size)
    ]
    return lax.concatenate(parts, features)

  return lax.conv_general_dilated(
    stacked(lax.pad(x, jnp.zeros((), x.dtype), edges), *lhs[1:3]),
    stacked(W, *rhs[1:3]),
    **{**options, 'padding': ((0, 0), *padding), 'dimension_numbers': layout},
  )


def _layout(x_shape, W_shape, options) -> lax.ConvDimensionNumbers:
  return lax.conv_dimension_numbers(
    x_shape, W_shape, options['dimension_numbers']
  )


def _pads(x_shape, W_shape, options) -> Sequence[tuple[int, int]]:
  """What stands at both ends of each spatial axis."""
  if not isinstance(options['padding'], str):
    return options['padding']
  lhs, rhs, _ = _layout(x_shape, W_shape, options)
  return lax.padtype_to_pads(
    [x_shape[axis] for axis in lhs[2:]],
    [W_shape[axis] for axis in rhs[2:]],
    options['window_strides'],
    options['padding'],
  )
