r"""Measures of asymmetry: signs, angles and norms of feedback and errors.

``W`` is a forward kernel, ``V`` its feedback kernel; arguments come in this
order. The functions of both take arrays, or whole trees of arrays, of the same
shapes and return scalars, or trees of scalars, in float32 at least; None where
V is None (``weights`` of a function). All work under ``jax.jit``.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from symjax_bp.transform import differentiable, observed

__all__ = [
  'Alignment',
  'alignment_angle',
  'effective_rank',
  'layer_alignment',
  'norm_ratio',
  'sign_concordance',
]


class Alignment(NamedTuple):
  """Agreement of one weight's feedback with backpropagation; scalars.

  W and V are taken as the products use them, after masks and normalization, and
  over all uses together. The error signal is the cotangent of a product's
  output. Angles are in degrees, and NaN where one of two vectors is 0.

  Attributes:
    concordance: share of weights with sign(V) = sign(W), in [0, 1].
    angle: between W and V.
    norm_ratio: |V| / |W|.
    update_angle: between the weight's gradient and that of backpropagation for
      the same batch.
    error_angle: between the error signal and that of backpropagation.
    effective_rank: of the error signal, see ``effective_rank``.
  """

  concordance: Any  # shape=(), dtype=float32
  angle: Any  # shape=(), dtype=float32
  norm_ratio: Any  # shape=(), dtype=float32
  update_angle: Any  # shape=(), dtype=float32
  error_angle: Any  # shape=(), dtype=float32
  effective_rank: Any  # shape=(), dtype=float32


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


def _over_trees(function, a, b):
  def checked(a, b):
    if b is None:
      return None
    if jnp.shape(a) != jnp.shape(b):
      raise ValueError(
        'both arrays must have the same shape, not '
        f'{jnp.shape(a)} and {jnp.shape(b)}.'
      )
    return function(a, b)

  return jax.tree.map(checked, a, b)


def sign_concordance(W, V):
  r"""Share of weights whose feedback has the same sign.

  .. math:: \mathrm{mean}[\mathrm{sign}(W) = \mathrm{sign}(V)]

  >>> W, V = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 1.0, 1.0])
  >>> print(sign_concordance(W, V))
  0.6666667

  Returns:
    Scalars in [0, 1]; 0 counts as a sign of its own.
  """
  return _over_trees(
    lambda W, V: jnp.mean(jnp.sign(_wide(W)) == jnp.sign(_wide(V))), W, V
  )


def alignment_angle(W, V):
  r"""Angle between two arrays taken as vectors, in degrees.

  .. math:: \angle(a, b) = 2 \arctan(|\hat a - \hat b| / |\hat a + \hat b|)

  This form (Kahan) is exact for small angles too, where arccos is not.

  >>> print(alignment_angle(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])))
  45.0

  Returns:
    Scalars in [0, 180]; NaN where an array is 0 or not finite.
  """

  def angle(a, b):
    (x, x_norm), (y, _) = _direction_and_norm(a), _direction_and_norm(b)
    sides = (jnp.sqrt(jnp.sum(vector**2)) for vector in (x - y, x + y))
    # Under jit, the directions of equal arrays may differ by rounding.
    equal = jnp.all(_wide(a) == _wide(b)) & (x_norm > 0) & (x_norm < jnp.inf)
    return jnp.where(equal, 0, jnp.degrees(2 * jnp.arctan2(*sides)))

  return _over_trees(angle, W, V)


def norm_ratio(W, V):
  r"""Norm of the feedback over that of the forward weights, |V| / |W|.

  >>> print(norm_ratio(jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0])))
  5.0

  Returns:
    Scalars; infinite where W is 0, NaN where both are.
  """
  return _over_trees(
    lambda W, V: _direction_and_norm(V)[1] / _direction_and_norm(W)[1], W, V
  )


def effective_rank(x) -> jax.Array:
  r"""Number of directions that the rows of x use, by their variance.

  .. math:: (\sum_i \lambda_i)^2 / \sum_i \lambda_i^2

  with the eigenvalues :math:`\lambda_i` of :math:`x^T x` (the participation
  ratio).

  >>> print(effective_rank(jnp.eye(4)), effective_rank(jnp.ones((4, 4))))
  4.0 1.0

  Args:
    x: activity or error signal, (..., features).

  Returns:
    A scalar in [1, features]; NaN where x is 0.
  """
  x = _near_one(_wide(x).reshape(-1, jnp.shape(x)[-1]))
  return _rank_of(x.T @ x)


def _near_one(x: jax.Array) -> jax.Array:
  """Scales x by a power of 2, so that its squares are in range."""
  largest = jnp.max(jnp.abs(x), initial=0)
  return jnp.ldexp(x, -jnp.frexp(largest)[1])


# In smaller sums of squares, some squares are 0 in float32.
_LEAST_SUM = 1e-30


def _rank_of(gram: jax.Array) -> jax.Array:
  def rank(gram):
    return jnp.trace(gram) ** 2 / jnp.sum(gram**2)

  total = jnp.trace(gram)
  # Where it is not needed, scaling would change the last bit.
  in_range = (total > 1e-15) & (total < 1e15)
  found = jnp.where(in_range, rank(gram), rank(_near_one(gram)))
  return jnp.where(total > _LEAST_SUM, found, jnp.nan)


def _angle_of_sums(aa, bb, dd) -> jax.Array:
  """Degrees between a and b from |a|^2, |b|^2 and |a - b|^2."""
  a, b, c = map(jnp.sqrt, (jnp.maximum(aa, bb), jnp.minimum(aa, bb), dd))
  # Kahan's formula for a triangle with sides a >= b and c, exact for needles.
  mu = jnp.where(b >= c, c - (a - b), b - (a - c))
  ratio = ((a - b) + c) * mu / ((a + (b + c)) * ((a - c) + b))
  angle = jnp.degrees(2 * jnp.arctan(jnp.sqrt(jnp.maximum(ratio, 0))))
  return jnp.where(jnp.minimum(aa, bb) > _LEAST_SUM, angle, jnp.nan)


_CALLS = itertools.count()


def _squares(a, b) -> list[jax.Array]:
  """What _angle_of_sums takes."""
  # A fused multiply-subtract would leave the rounding of equal numbers.
  difference = jnp.where(a == b, 0, a - b)
  return [jnp.sum(jnp.square(each)) for each in (a, b, difference)]


def _measure(axis, op, xs, W, V, g, dW, slot):
  """Learning that learns nothing: the slot's gradient is what it measures."""
  both = (_wide(lax.all_gather(array, axis)) for array in (V, g))
  (V, W), (g, true_g) = ((a[0], a[1]) for a in both)
  same, count = jnp.sum(jnp.sign(V) == jnp.sign(W)), jnp.asarray(W.size)
  sums = [*_squares(W, V), *_squares(g, true_g), same, count]
  gram = jnp.zeros_like(slot['gram'])
  if gram.size:
    axes = op.feature_axes(g.ndim, W.ndim)
    rows = jnp.moveaxis(g, axes, range(g.ndim - len(axes), g.ndim))
    rows = rows.reshape(-1, gram.shape[0])
    gram = rows.T @ rows
  sums = jnp.stack([each.astype(slot['sums'].dtype) for each in sums])
  return None, {'sums': sums, 'gram': gram.astype(slot['gram'].dtype)}


def layer_alignment(
  loss: Callable[[Any], jax.Array], params: Any
) -> dict[str, Alignment]:
  """Measures how well each weight's feedback agrees with backpropagation.

  ``symjax_bp.linen`` and ``symjax_bp.nnx`` have the same for models.

  >>> import symjax_bp
  >>> f = symjax_bp.with_feedback(lambda W, x: x @ W[0] @ W[1], symjax_bp.usf())
  >>> W, x = [jnp.ones((3, 4)), jnp.eye(4)], jnp.ones((2, 3))
  >>> loss = lambda params: f(params, None, x).sum()
  >>> for path, row in layer_alignment(loss, W).items():
  ...   print(path, row.norm_ratio, row.update_angle, row.effective_rank)
  0 1.0 0.0 1.0
  1 1.0 0.0 1.0

  Args:
    loss: the scalar loss as a function of the parameters, computed by functions
      or models of ``with_feedback``. It is differentiated twice, with V and
      with W in the place of V, in one ``jax.vmap``: it must not use
      ``shard_map`` or ``ragged_dot``, which JAX cannot map here.
    params: the parameters, as for ``with_feedback``.

  Returns:
    {path of the weight: ``Alignment``}, with the V that was used. Weights that
    were joined before a product have one row, ``'W1 + W2'``. Numbers of an
    error signal shorter than 1e-15 or longer than 1e19 are NaN.

  Raises:
    ValueError: if nothing in the loss has feedback.
  """
  features: dict[str, int] = {}
  arrays, rebuilt = differentiable(params)

  def discover(path, op, W, V, eqn):
    shape = eqn.outvars[0].aval.shape
    axes = op.feature_axes(len(shape), W.ndim) or ()
    size = math.prod(shape[axis] for axis in axes) if axes else 0
    # A tied weight may have outputs of several sizes: no common rank.
    features[path] = size if features.get(path, size) == size else 0
    return V, None, None

  # jit keeps its traces by the axes around it: new ones make it trace again.
  axis = f'layer_alignment {next(_CALLS)}'
  with observed(discover):
    jax.eval_shape(
      jax.vmap(lambda _: loss(params), axis_name=f'shapes of {axis}'),
      jnp.zeros(1),
    )
  if not features:
    raise ValueError(
      'loss has no weight with feedback: compute it with what with_feedback '
      'returned.'
    )
  empty = {
    path: {'sums': jnp.zeros(8), 'gram': jnp.zeros((size, size))}
    for path, size in features.items()
  }

  def gradients(plain):
    def observed_loss(arrays, slots):
      def observer(path, op, W, V, eqn):
        V = jnp.where(plain, lax.stop_gradient(W), V)
        return V, functools.partial(_measure, axis), slots[path]

      with observed(observer):
        return loss(rebuilt(arrays))

    return jax.grad(observed_loss, argnums=(0, 1))(arrays, empty)

  # Two backward passes: with V, and with W in its place.
  updates, measured = jax.vmap(gradients, axis_name=axis)(
    jnp.array([False, True])
  )

  own, true = ({p: dW[i] for p, dW in updates.items()} for i in (0, 1))
  rows = {}
  for path in features:
    sums, gram = (measured[path][name][0] for name in ('sums', 'gram'))
    WW, VV, *_, same, count = sums
    rows[path] = Alignment(
      concordance=same / count,
      angle=_angle_of_sums(*sums[:3]),
      norm_ratio=jnp.sqrt(VV / WW),
      update_angle=angle_at(parts_of(path, own), own, true),
      error_angle=_angle_of_sums(*sums[3:6]),
      effective_rank=_rank_of(gram) if gram.size else jnp.float32(jnp.nan),
    )
  return rows


def parts_of(path: str, params: dict[str, Any]) -> list[str]:
  """The parameters of a weight; several if it was put together of them."""
  return [path] if path in params else path.split(' + ')


def angle_at(keys: Sequence[Any], a: dict, b: dict) -> jax.Array:
  """The angle between some arrays of each dictionary, taken as one vector."""
  vectors = (jnp.concatenate([of[k].ravel() for k in keys]) for of in (a, b))
  return alignment_angle(*vectors)
