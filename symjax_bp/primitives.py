r"""Bilinear operations whose backward pass uses feedback weights.

In this file, as in all of the library,

* ``x`` is the input, ``W`` the forward kernel, ``V`` the feedback kernel (of
  the shape of W), ``g`` the cotangent of the output,
* ``op`` is the bilinear operation, ``jax.lax.dot_general`` or
  ``jax.lax.conv_general_dilated`` with all its options.

The four equations:

.. code-block:: text

  forward           y  = op(x, W)
  input gradient    dx = transpose of x -> op(x, V), at g    <- only use of V
  kernel gradient   dW = transpose of W -> op(x, W), at g    <- never sees V
  feedback          dV = 0

Both transposes are JAX's own (``jax.linear_transpose``), so with ``V = W`` the
gradients are those of ``jax.grad`` bit for bit, and every option of the
operations, every batching and every sharding works. One thing differs, on a CPU
alone: dx of a large convolution that shrinks the image is the transpose of the
same convolution in another formulation, ``symjax_bp.row_convolution``, which is
several times quicker there and rounds differently. Nothing here knows where V
comes from; see ``symjax_bp.feedback`` for the rules of the paper.

Reverse mode over reverse mode works, and every reverse pass uses V. Forward
mode (``jax.jvp``, ``jax.linearize``, ``jax.hessian``) does not: JAX says
"can't apply forward-mode autodiff (jvp) to a custom_vjp function". A function
whose reverse pass is not the transpose of its derivative has no forward mode
to agree with; use ``jax.jacrev(jax.jacrev(f))`` for second derivatives.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from symjax_bp.row_convolution import pays, row_convolution

Padding = str | Sequence[tuple[int, int]]


def _asymmetric(op, x, W, V):
  # Outside custom_vjp, where the policies of jax.checkpoint see the product.
  y = op(*lax.stop_gradient((x, W)))
  return _attach(op, y, x, W, V)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attach(op, y, x, W, V):
  """Returns y, a constant, as the function of x, W and V that it is."""
  del op, x, W, V
  return y


def _forward(op, y, x, W, V):
  # Not y: a second reverse pass goes through here and must see V too.
  return _attach(op, y, x, W, V), (x, W, V)


def _backward(op, operands, g):
  x, W, V = operands
  # Integers have no gradient, and no transpose either.
  inexact = jnp.issubdtype(x.dtype, jnp.inexact)
  dx = _input_gradient(op, x, V, g) if inexact else None
  (dW,) = jax.linear_transpose(lambda W: op(x, W), W)(g)
  return None, dx, dW, None


def _input_gradient(op, x, V, g):
  """The transpose of ``op(x, V)`` in x, on a CPU in the quicker formulation."""

  def transpose(function, V, g):
    formulation = dataclasses.replace(op, function=function)
    return jax.linear_transpose(lambda x: formulation(x, V), x)(g)[0]

  if op.function_on_cpu is None:
    return transpose(op.function, V, g)
  return lax.platform_dependent(
    V,
    g,
    cpu=functools.partial(transpose, op.function_on_cpu),
    default=functools.partial(transpose, op.function),
  )


_attach.defvjp(_forward, _backward)


def _apply(op, x, W, V):
  """Checks V against W and applies the operation."""
  x, W, V = jnp.asarray(x), jnp.asarray(W), jnp.asarray(V)
  if V.shape != W.shape:
    raise ValueError(
      f'V must have the shape of W, {W.shape}, not {V.shape}: one feedback '
      'weight for each forward weight.'
    )
  if not (_is_real(W) and _is_real(V)):
    raise TypeError(
      'W and V must have real floating dtypes (float32, bfloat16, ...), not '
      f'{W.dtype} and {V.dtype}.'
    )
  return _asymmetric(op, x, W, _spread_as(W, V.astype(W.dtype)))


def _spread_as(W, V):
  """Gives V the sharding in the type of W, which is what g is made for."""
  expected, actual = jax.typeof(W), jax.typeof(V)
  sharding = expected.sharding
  if actual.sharding.spec != sharding.spec:
    mesh = actual.sharding.mesh if sharding.mesh.empty else sharding.mesh
    V = jax.sharding.reshard(V, NamedSharding(mesh, sharding.spec))
  varying = expected.manual_axis_type.varying - actual.manual_axis_type.varying
  return lax.pcast(V, tuple(varying), to='varying')


def _is_real(array) -> bool:
  return jnp.issubdtype(array.dtype, jnp.floating)


def _hashable(value):
  """Nested lists as tuples: operations are static, hence hashable."""
  if isinstance(value, (list, tuple)) and not hasattr(value, '_fields'):
    return tuple(_hashable(item) for item in value)
  return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Operation:
  """A function of ``jax.lax`` with all options set: ``op(x, W)``.

  Attributes:
    function: of x, W and the options.
    options: names and values.
    function_on_cpu: the same function, if there is one whose transpose is
      quicker on a CPU.
  """

  function: Any
  options: tuple[tuple[str, Any], ...]
  function_on_cpu: Any = None

  def __call__(self, x, W):
    return self.function(x, W, **dict(self.options))


def _operation(function, **options) -> _Operation:
  hashable = {name: _hashable(value) for name, value in options.items()}
  return _Operation(function=function, options=tuple(hashable.items()))


def dot_general(
  x: jax.Array,
  W: jax.Array,
  V: jax.Array,
  dimension_numbers,
  precision=None,
  preferred_element_type=None,
  *,
  out_sharding=None,
) -> jax.Array:
  r"""``jax.lax.dot_general`` with feedback weights.

  .. math:: y = x \cdot W, \qquad dx = g \cdot V^T, \qquad dW = x^T \cdot g

  >>> x, W, V = (
  ...   jnp.array([1.0, 2.0]),
  ...   jnp.array([3.0, 4.0]),
  ...   jnp.array([5.0, 6.0]),
  ... )
  >>> dot = lambda *xWV: dot_general(*xWV, (((0,), (0,)), ((), ())))
  >>> print(dot(x, W, V), *jax.grad(dot, argnums=(0, 1, 2))(x, W, V))
  11.0 [5. 6.] [1. 2.] [0. 0.]

  Args:
    x: input of any shape.
    W: forward kernel; real floating point.
    V: feedback kernel of the shape of W; takes its dtype and sharding.
    dimension_numbers: ``((x_contracting, W_contracting), (x_batch, W_batch))``
      as in ``jax.lax.dot_general``.
    precision: as in ``jax.lax.dot_general``; also of both transposes.
    preferred_element_type: as in ``jax.lax.dot_general``.
    out_sharding: as in ``jax.lax.dot_general``.

  Returns:
    y, exactly as ``jax.lax.dot_general(x, W, ...)`` returns it.

  Raises:
    ValueError: if V does not have the shape of W.
    TypeError: if W or V is not real floating point.
  """
  operation = _operation(
    lax.dot_general,
    dimension_numbers=dimension_numbers,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  return _apply(operation, x, W, V)


def conv_general_dilated(
  x: jax.Array,
  W: jax.Array,
  V: jax.Array,
  window_strides: Sequence[int],
  padding: Padding,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers=None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision=None,
  preferred_element_type=None,
  *,
  out_sharding=None,
) -> jax.Array:
  """``jax.lax.conv_general_dilated`` with feedback weights.

  ``dx`` is the transposed convolution of g with V, ``dW`` the correlation of
  x with g. Arguments besides V are those of ``jax.lax.conv_general_dilated``.

  >>> x = jnp.arange(4.0).reshape(1, 1, 4)  # NCH, OIH: JAX's own layout
  >>> W, V = jnp.array([[[1.0, 2.0]]]), jnp.array([[[10.0, 100.0]]])
  >>> conv = lambda *xWV: conv_general_dilated(*xWV, (1,), 'VALID').sum()
  >>> dx, dW, dV = jax.grad(conv, argnums=(0, 1, 2))(x, W, V)
  >>> print(dx.ravel(), dW.ravel(), dV.ravel())
  [ 10. 110. 110. 100.] [3. 6.] [0. 0.]

  Args:
    x: input of n + 2 axes.
    W: forward kernel of n + 2 axes; real floating point.
    V: feedback kernel of the shape of W; takes its dtype and sharding.
    window_strides: n strides.
    padding: 'SAME', 'VALID', 'SAME_LOWER' or n pairs (low, high).
    lhs_dilation: n dilations of x.
    rhs_dilation: n dilations of W.
    dimension_numbers: layout of x, W and y.
    feature_group_count: groups of input features.
    batch_group_count: groups of batch entries.
    precision: as in JAX; also of both transposes.
    preferred_element_type: as in JAX.
    out_sharding: as in JAX.

  Returns:
    y, exactly as ``jax.lax.conv_general_dilated(x, W, ...)`` returns it.

  Raises:
    ValueError: if V does not have the shape of W.
    TypeError: if W or V is not real floating point.
  """
  operation = _operation(
    lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  if pays(jnp.shape(x), jnp.shape(W), dict(operation.options)):
    operation = dataclasses.replace(operation, function_on_cpu=row_convolution)
  return _apply(operation, x, W, V)


def dense(
  x: jax.Array, W: jax.Array, V: jax.Array, precision=None
) -> jax.Array:
  """Last axis of x times first axis of W, with feedback weights.

  >>> x, W, V = jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.full((3, 1), 7.0)
  >>> y, vjp = jax.vjp(dense, x, W, V)
  >>> dx, dW, dV = vjp(jnp.ones_like(y))
  >>> print(dx[0], dW.ravel(), dV.ravel())
  [7. 7. 7.] [2. 2. 2.] [0. 0. 0.]

  Args:
    x: ``(..., in_features)``.
    W: ``(in_features, ...)``.
    V: of the shape of W.
    precision: as in ``jax.lax.dot_general``.

  Returns:
    y: ``x.shape[:-1] + W.shape[1:]``.

  Raises:
    ValueError: if V does not have the shape of W.
    TypeError: if W or V is not real floating point.
  """
  contract = (((jnp.ndim(x) - 1,), (0,)), ((), ()))
  return dot_general(x, W, V, contract, precision)


def conv(
  x: jax.Array,
  W: jax.Array,
  V: jax.Array,
  strides: int | Sequence[int] = 1,
  padding: Padding = 'SAME',
  lhs_dilation: int | Sequence[int] = 1,
  rhs_dilation: int | Sequence[int] = 1,
  feature_group_count: int = 1,
  precision=None,
) -> jax.Array:
  """Convolution with any number n of spatial axes, features last.

  >>> x = jnp.arange(4.0).reshape(1, 4, 1)
  >>> W, V = jnp.array([[[1.0]], [[2.0]]]), jnp.array([[[10.0]], [[100.0]]])
  >>> y, vjp = jax.vjp(lambda x: conv(x, W, V, padding='VALID'), x)
  >>> print(y.ravel(), vjp(jnp.ones_like(y))[0].ravel())
  [2. 5. 8.] [ 10. 110. 110. 100.]

  Args:
    x: ``(batch, *spatial, in_features)``: NWC, NHWC, NDHWC, ...
    W: ``(*kernel, in_features / feature_group_count, features)``: WIO, HWIO...
    V: of the shape of W.
    strides: one number or n.
    padding: 'SAME', 'VALID', 'SAME_LOWER' or n pairs (low, high).
    lhs_dilation: one number or n; dilation of x.
    rhs_dilation: one number or n; dilation of W.
    feature_group_count: groups of input features.
    precision: as in ``jax.lax.conv_general_dilated``.

  Returns:
    y: ``(batch, *spatial, features)``.

  Raises:
    ValueError: if V does not have the shape of W, or W not the rank of x.
    TypeError: if W or V is not real floating point.
  """
  rank = jnp.ndim(x)
  if jnp.ndim(W) != rank or rank < 3:
    raise ValueError(
      'x and W must have the same number of axes, at least 3 (batch, spatial '
      f'axes, features), not {jnp.shape(x)} and {jnp.shape(W)}.'
    )
  spatial = tuple(range(1, rank - 1))
  features_last = (0, rank - 1, *spatial)
  kernel_last = (rank - 1, rank - 2, *range(rank - 2))

  def each(option: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(option, int):
      return (option,) * len(spatial)
    return tuple(option)

  return conv_general_dilated(
    x,
    W,
    V,
    each(strides),
    padding,
    each(lhs_dilation),
    each(rhs_dilation),
    lax.ConvDimensionNumbers(features_last, kernel_last, features_last),
    feature_group_count,
    precision=precision,
  )
