r"""How asymmetric is it? Signs, angles and norms of feedback and gradients.

``W`` is a forward kernel, ``V`` its feedback kernel. The functions of two
arguments take arrays or whole trees of arrays and return scalars or trees of
scalars, in float32 at least, and work under ``jax.jit``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Alignment(NamedTuple):
  """One layer's agreement with backpropagation; scalars.

  Attributes:
    concordance: share of weights with sign(V) = sign(W), in [0, 1].
    angle: between V and W, degrees.
    norm_ratio: \\|V\\| / \\|W\\|.
    gradient_angle: between the kernel's gradient and the one that plain
      backpropagation gives for the same batch, degrees.
  """

  concordance: Any  # shape=(), dtype=float32
  angle: Any  # shape=(), dtype=float32
  norm_ratio: Any  # shape=(), dtype=float32
  gradient_angle: Any  # shape=(), dtype=float32


def _wide(array) -> jax.Array:
  """At least float32, whatever the dtype of the model."""
  array = jnp.asarray(array)
  wide = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize > 4
  return array if wide else array.astype(jnp.float32)


def _direction_and_norm(array) -> tuple[jax.Array, jax.Array]:
  """A vector of length 1 (NaN for 0) and the length; safe for huge numbers."""
  vector = _wide(array).ravel()
  largest = jnp.max(jnp.abs(vector))
  # By its root twice: the reciprocal of a huge number would be subnormal.
  root = jnp.sqrt(jnp.where(largest > 0, largest, 1))
  scaled = vector / root / root
  length = jnp.sqrt(jnp.sum(scaled**2))
  return scaled / length, length * root * root


def _check_shapes(a, b) -> None:
  if jnp.shape(a) != jnp.shape(b):
    raise ValueError(
      'both arrays must have the same shape, not '
      f'{jnp.shape(a)} and {jnp.shape(b)}.'
    )


def sign_concordance(W, V):
  r"""Share of weights whose feedback has the same sign.

  .. math:: \mathrm{mean}[\mathrm{sign}(W) = \mathrm{sign}(V)]

  >>> print(
  ...   sign_concordance(
  ...     jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 1.0, 1.0])
  ...   )
  ... )
  0.6666667

  Args:
    W: array or tree of arrays.
    V: the same of the same shapes.

  Returns:
    Scalars in [0, 1]; 0 counts as a sign of its own.
  """

  def concordance(W, V):
    _check_shapes(W, V)
    return jnp.mean(jnp.sign(_wide(W)) == jnp.sign(_wide(V)))

  return jax.tree.map(concordance, W, V)


def alignment_angle(a, b):
  r"""Angle between two arrays taken as vectors, in degrees.

  .. math:: \angle(a, b) = 2 \arctan(|\hat a - \hat b| / |\hat a + \hat b|)

  This form (Kahan) is exact for small angles too, where arccos is not.

  >>> print(alignment_angle(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])))
  45.0

  Args:
    a: array or tree of arrays.
    b: the same of the same shapes.

  Returns:
    Scalars in [0, 180]; NaN where an array is 0 or not finite.
  """

  def angle(a, b):
    _check_shapes(a, b)
    (a, _), (b, _) = _direction_and_norm(a), _direction_and_norm(b)
    difference, total = (
      jnp.sqrt(jnp.sum(vector**2)) for vector in (a - b, a + b)
    )
    return jnp.degrees(2 * jnp.arctan2(difference, total))

  return jax.tree.map(angle, a, b)


def norm_ratio(V, W):
  r"""Norm of the feedback over that of the forward weights, |V| / |W|.

  >>> print(norm_ratio(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])))
  5.0

  Args:
    V: array or tree of arrays.
    W: the same of the same shapes.

  Returns:
    Scalars; infinite where W is 0, NaN where both are.
  """

  def ratio(V, W):
    _check_shapes(V, W)
    return _direction_and_norm(V)[1] / _direction_and_norm(W)[1]

  return jax.tree.map(ratio, V, W)


def alignment(W, V, gradient, true_gradient) -> Alignment:
  """All four measures of one layer.

  >>> W = jnp.array([1.0, -2.0])
  >>> row = alignment(W, jnp.sign(W), gradient=W, true_gradient=-W)
  >>> print(*(round(float(value), 2) for value in row))
  1.0 18.43 0.63 180.0

  Args:
    W: forward kernel.
    V: feedback kernel, as it was used.
    gradient: gradient of the kernel, as it was used.
    true_gradient: gradient of the kernel by plain backpropagation.
  """
  return Alignment(
    concordance=sign_concordance(W, V),
    angle=alignment_angle(V, W),
    norm_ratio=norm_ratio(V, W),
    gradient_angle=alignment_angle(gradient, true_gradient),
  )
