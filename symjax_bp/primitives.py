r"""Products whose backward pass uses feedback weights V.

``x`` is the input, ``W`` the forward kernel, ``V`` the feedback kernel of the
same shape and ``g`` the cotangent of y. ``op`` is linear in each operand:

.. code-block:: text

  forward           y  = op(x, W)
  input gradient    dx = transpose of x -> op(x, V), at g    <- only use of V
  kernel gradient   dW = transpose of W -> op(x, W), at g    <- never sees V
  feedback          dV = 0, unless the feedback is learned

Both transposes are JAX's own (``jax.linear_transpose``). With ``V = W`` the
gradients are those of ``jax.grad`` bit for bit, and every option, batching and
sharding of the operations works. Nothing here knows where V comes from; see
``symjax_bp.feedback``.

Reverse mode over reverse mode works, and every reverse pass uses V: use
``jax.jacrev(jax.jacrev(f))`` for second derivatives. Forward mode (``jax.jvp``,
``jax.linearize``, ``jax.hessian``) would not agree with it; JAX refuses it.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.sharding import NamedSharding

__all__ = [
  'Fan',
  'Product',
  'asymmetric',
  'conv',
  'conv_general_dilated',
  'dense',
  'dot_general',
]


class Fan(NamedTuple):
  """Sizes of a product, as initializers count them.

  Attributes:
    inputs: how many inputs an output sums over: the contracted axes.
    outputs: how many features of the output come from the kernel, of all
      groups, times the positions of the kernel's window.
  """

  inputs: int
  outputs: int

  @classmethod
  def of_kernel(cls, shape: Sequence[int]) -> 'Fan':
    """Fans of a kernel in Flax's layout: the last axis is the outputs."""
    shape = (1,) * (2 - len(shape)) + tuple(shape)
    return cls(math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1])


@dataclasses.dataclass(frozen=True)
class Product:
  """A function of JAX that is linear in two of its operands.

  Attributes:
    function: takes the operands, then the options by name.
    options: pairs of name and value.
    at: where W stands among the operands; the input is the other of the first
      two.
    rows: whether dx of a large convolution may come from ``_row_convolution``
      on a CPU.
  """

  function: Callable[..., Any]
  options: tuple[tuple[str, Any], ...] = ()
  at: int = 1
  rows: bool = False

  @classmethod
  def create(cls, function: Callable[..., Any], options, **kwargs):
    """Makes the options hashable, as static arguments have to be."""
    pairs = ((name, _hashable(value)) for name, value in options.items())
    return cls(function, tuple(pairs), **kwargs)

  def __call__(self, xs: Sequence[Any], W: jax.Array) -> jax.Array:
    """Applies the function; ``xs`` are all operands but W."""
    operands = (*xs[: self.at], W, *xs[self.at :])
    return self.function(*operands, **dict(self.options))

  def input_gradient(self, xs, V: jax.Array, g: jax.Array, i: int = 0):
    """The transpose of ``op(x, V)`` in x, at g."""

    def transpose(op, V, g):
      def function(x):
        return op((*xs[:i], x, *xs[i + 1 :]), V)

      return jax.linear_transpose(function, xs[i])(g)[0]

    default = functools.partial(transpose, self)
    if not (self.rows and _rows_are_faster(xs[0], V, dict(self.options))):
      return default(V, g)
    rows = dataclasses.replace(self, function=_row_convolution)
    return lax.platform_dependent(
      V, g, cpu=functools.partial(transpose, rows), default=default
    )

  def weight_gradient(self, xs, W: jax.Array, g: jax.Array) -> jax.Array:
    """The transpose of ``op(x, W)`` in W, at g."""
    return jax.linear_transpose(lambda W: self(xs, W), W)(g)[0]

  def fan(self, W_shape: Sequence[int]) -> Fan | None:
    """Fans by the axes that the product contracts; None if it has none."""
    axes = self._axes(len(W_shape))
    if axes is None:
      return None
    sizes = (math.prod(W_shape[axis] for axis in each) for each in axes)
    inputs, outputs, window = sizes
    return Fan(inputs * window, outputs * window)

  def feature_axes(self, y_ndim: int, W_ndim: int) -> tuple[int, ...] | None:
    """The axes of y that come from W: its features."""
    axes = self._axes(W_ndim)
    if axes is None:
      return None
    if self._is_conv:
      return (self._numbers.out_spec[1 if self.at else 0],)
    count = len(axes[1])
    if self.at == 1:
      return tuple(range(y_ndim - count, y_ndim))
    batch = W_ndim - len(axes[0]) - count
    return tuple(range(batch, batch + count))

  def batch_axis(self, x_ndim: int) -> int | None:
    """The first axis of the input that is not contracted; vmap moves it."""
    numbers = self._numbers
    if self._is_conv:
      return numbers.lhs_spec[0] if self.at else 0
    contracted = numbers[0][1 - self.at] if numbers else ()
    return next((i for i in range(x_ndim) if i not in contracted), None)

  @property
  def _numbers(self) -> Any:
    options = dict(self.options)
    ragged = options.get('ragged_dot_dimension_numbers')
    if ragged is not None:
      return ragged.dot_dimension_numbers
    return options.get('dimension_numbers')

  @property
  def _is_conv(self) -> bool:
    return isinstance(self._numbers, lax.ConvDimensionNumbers)

  def _axes(self, W_ndim: int) -> tuple[Sequence[int], ...] | None:
    """Axes of W: contracted, features of y, and window of a convolution."""
    numbers = self._numbers
    if self._is_conv:
      if self.at == 0:  # A kernel in the place of the image.
        batch, features, *window = numbers.lhs_spec
        return (features,), (batch,), window
      features, inputs, *window = numbers.rhs_spec
      return (inputs,), (features,), window
    if numbers is None:
      return None
    ragged = dict(self.options).get('ragged_dot_dimension_numbers')
    groups = () if ragged is None else tuple(ragged.rhs_group_dimensions)
    contracted, batch = numbers[0][self.at], numbers[1][self.at]
    others = {*contracted, *batch, *groups}
    return contracted, sorted(set(range(W_ndim)) - others), ()


def _hashable(value):
  """Nested lists as tuples."""
  if isinstance(value, (list, tuple)) and not hasattr(value, '_fields'):
    return tuple(map(_hashable, value))
  return value


# How V learns: (product, xs, W, V, g, dW, extra) -> (dV, gradient of extra).
Learning = Callable[..., tuple[Any, Any]]


def asymmetric(
  op: Product,
  xs: Sequence[jax.Array],
  W: jax.Array,
  V: jax.Array,
  learning: Learning | None = None,
  extra: Any = None,
) -> jax.Array:
  """``op(xs, W)`` whose input gradients are those of ``op(xs, V)``.

  Args:
    op: the product.
    xs: all of its operands but W.
    W: forward kernel; real floating point.
    V: feedback kernel of the shape of W; takes its dtype and sharding.
    learning: gives V a gradient; see ``Learning``. By default V has none.
    extra: further operands of ``learning``, which have gradients too.
  """
  xs = tuple(xs)
  # By its type: NumPy's float64 is float32 unless JAX enables x64.
  V = _sharded_like(W, V.astype(jax.typeof(W).dtype))
  # Outside of custom_vjp, so that policies of jax.checkpoint see the product.
  y = op(lax.stop_gradient(xs), lax.stop_gradient(W))
  return _attach(op, learning, y, xs, W, V, extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach(op, learning, y, xs, W, V, extra):
  """The identity on y, with the derivative of ``op(xs, W)`` but V in dx."""
  del op, learning, xs, W, V, extra
  return y


def _forward(op, learning, y, xs, W, V, extra):
  # _attach, not y: a second reverse pass goes through here and must see V too.
  return _attach(op, learning, y, xs, W, V, extra), (xs, W, V, extra)


def _backward(op, learning, operands, g):
  xs, W, V, extra = operands
  # Integers have no gradient, and no transpose either.
  dxs = tuple(
    op.input_gradient(xs, V, g, i)
    if jnp.issubdtype(x.dtype, jnp.inexact)
    else None
    for i, x in enumerate(xs)
  )
  dW = op.weight_gradient(xs, W, g)
  dV = dextra = None
  if learning is not None:
    dV, dextra = learning(op, xs, W, V, g, dW, extra)
  return None, dxs, dW, dV, dextra


_attach.defvjp(_forward, _backward)


def _sharded_like(W, V):
  """Reshards V like W, because the cotangent g is sharded like op(x, W)."""
  expected, actual = jax.typeof(W), jax.typeof(V)
  sharding = expected.sharding
  if actual.sharding.spec != sharding.spec:
    mesh = actual.sharding.mesh if sharding.mesh.empty else sharding.mesh
    V = jax.sharding.reshard(V, NamedSharding(mesh, sharding.spec))
  varying = expected.manual_axis_type.varying - actual.manual_axis_type.varying
  return lax.pcast(V, tuple(varying), to='varying')


def _apply(function, xWV, args, options, rows=False) -> jax.Array:
  """Checks V against W and applies a function of JAX, with its arguments."""
  x, W, V = map(jnp.asarray, xWV)
  if V.shape != W.shape:
    raise ValueError(
      f'V must have the shape of W, {W.shape}, not {V.shape}: one feedback '
      'weight for each forward weight.'
    )
  if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (W, V)):
    raise TypeError(
      'W and V must have real floating dtypes (float32, bfloat16, ...), not '
      f'{W.dtype} and {V.dtype}.'
    )
  bound = inspect.signature(function).bind(x, W, *args, **options)
  bound.apply_defaults()
  named = dict(list(bound.arguments.items())[2:])
  op = Product.create(function, named, rows=rows)
  return asymmetric(op, (x,), W, V)


def dot_general(
  x: jax.Array, W: jax.Array, V: jax.Array, *args: Any, **options: Any
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
    *args: the arguments of ``jax.lax.dot_general`` after x and W.
    **options: those by name.

  Returns:
    y, exactly as JAX returns it.

  Raises:
    ValueError: if V does not have the shape of W.
    TypeError: if W or V is not real floating point.
  """
  return _apply(lax.dot_general, (x, W, V), args, options)


def conv_general_dilated(
  x: jax.Array,
  W: jax.Array,
  V: jax.Array,
  *args: Any,
  row_convolution: bool = False,
  **options: Any,
) -> jax.Array:
  """``jax.lax.conv_general_dilated`` with feedback weights.

  ``dx`` is the transposed convolution of g with V, ``dW`` the correlation of
  x with g. Operands, arguments and errors are as in ``dot_general``.

  >>> x = jnp.arange(4.0).reshape(1, 1, 4)  # NCH, OIH: JAX's own layout
  >>> W, V = jnp.array([[[1.0, 2.0]]]), jnp.array([[[10.0, 100.0]]])
  >>> conv = lambda *xWV: conv_general_dilated(*xWV, (1,), 'VALID').sum()
  >>> dx, dW, dV = jax.grad(conv, argnums=(0, 1, 2))(x, W, V)
  >>> print(dx.ravel(), dW.ravel(), dV.ravel())
  [ 10. 110. 110. 100.] [3. 6.] [0. 0.]

  Args:
    row_convolution: on a CPU, computes dx of a large convolution that shrinks
      the image from rows that are stacked as features. This is several times
      faster there and sums in another order.
  """
  function = lax.conv_general_dilated
  return _apply(function, (x, W, V), args, options, row_convolution)


def dense(
  x: jax.Array, W: jax.Array, V: jax.Array, **options: Any
) -> jax.Array:
  """Last axis of x times first axis of W; see ``dot_general``.

  >>> x, W, V = jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.full((3, 1), 7.0)
  >>> y, vjp = jax.vjp(dense, x, W, V)
  >>> dx, dW, dV = vjp(jnp.ones_like(y))
  >>> print(dx[0], dW.ravel(), dV.ravel())
  [7. 7. 7.] [2. 2. 2.] [0. 0. 0.]
  """
  contract = (((jnp.ndim(x) - 1,), (0,)), ((), ()))
  return dot_general(x, W, V, contract, **options)


def conv(
  x: jax.Array,
  W: jax.Array,
  V: jax.Array,
  strides: int | Sequence[int] = 1,
  padding: str | Sequence[tuple[int, int]] = 'SAME',
  **options: Any,
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
    **options: of ``conv_general_dilated``; ``lhs_dilation`` (of x) and
      ``rhs_dilation`` (of W) may be one number.

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
  axes = tuple(range(rank))
  features_last = (0, rank - 1, *axes[1:-1])
  kernel_last = (rank - 1, rank - 2, *axes[:-2])

  def each(option: int | Sequence[int]) -> tuple[int, ...]:
    return (option,) * (rank - 2) if isinstance(option, int) else tuple(option)

  dilations = ('lhs_dilation', 'rhs_dilation')
  options |= {name: each(options.get(name, 1)) for name in dilations}
  numbers = lax.ConvDimensionNumbers(features_last, kernel_last, features_last)
  return conv_general_dilated(
    x, W, V, each(strides), padding, dimension_numbers=numbers, **options
  )


# Rows of x for a row of y, and pixels of x times size of W, above which a CPU
# transposes _row_convolution faster (measured).
_MIN_ROW_RATIO = 1.15
_MIN_PRODUCTS = 2**22


def _rows_are_faster(x, W, options) -> bool:
  """Whether a CPU transposes ``_row_convolution`` noticeably faster.

  The transpose of a convolution that shrinks the image convolves a padded
  cotangent, and XLA's CPU code multiplies the padding too.
  """
  if 'window_strides' not in options:
    return False
  ones = (1,) * (x.ndim - 2)
  if (
    any(map(export.is_symbolic_dim, (*x.shape, *W.shape)))
    or x.ndim < 4
    or options['window_strides'][0] != 1
    or options['lhs_dilation'] not in (None, ones)
    or options['rhs_dilation'] not in (None, ones)
    or (options['feature_group_count'], options['batch_group_count']) != (1, 1)
    or options.get('out_sharding') is not None
  ):
    return False
  lhs, rhs, _ = _layout(x, W, options)
  low, high = _padding(x, W, options)[0]
  rows = x.shape[lhs[2]]
  rows_of_y = rows + low + high - W.shape[rhs[2]] + 1
  products = x.size // x.shape[lhs[1]] * W.size
  ratio = _MIN_ROW_RATIO * rows_of_y
  return 0 < ratio <= rows and products >= _MIN_PRODUCTS


def _row_convolution(x: jax.Array, W: jax.Array, **options: Any) -> jax.Array:
  r"""A convolution whose rows are stacked as features.

  .. math::
    y_{hw} = \sum_{ij} x_{h+i,\,w+j} W_{ij}
           = \sum_j [x_{h,\,w+j} \dots x_{h+k,\,w+j}] [W_{0j} \dots W_{kj}]
  """
  lhs, rhs, _ = layout = _layout(x, W, options)
  (low, high), *padding = _padding(x, W, options)
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


def _layout(x, W, options) -> lax.ConvDimensionNumbers:
  numbers = options['dimension_numbers']
  return lax.conv_dimension_numbers(x.shape, W.shape, numbers)


def _padding(x, W, options) -> Sequence[tuple[int, int]]:
  """Low and high padding of each spatial axis."""
  if not isinstance(options['padding'], str):
    return options['padding']
  lhs, rhs, _ = _layout(x, W, options)
  return lax.padtype_to_pads(
    [x.shape[axis] for axis in lhs[2:]],
    [W.shape[axis] for axis in rhs[2:]],
    options['window_strides'],
    options['padding'],
  )
