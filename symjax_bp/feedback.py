r"""Feedback rules: how the feedback weights V follow from the weights W.

A rule knows no layer and no product. It takes and returns arrays, in two steps:

.. code-block:: text

  state = rule.init(key, W)        once, beside the parameters; may be None
  R     = rule.expand(W, state)    of the shape of W, at every call; may be None
  V     = rule.weights(W, R, fan)  where W meets data in a product

R travels with W through reshapes, transposes, slices and so on, so ``weights``
sees both as the product does: ``fan`` has the sizes of that very product.
Arrays that learn are under the key ``'learned'`` of a state. No optimizer may
see the rest, see ``symjax_bp.partition``.

``sign(0) = 0``. A rule of your own is ``rule(function)``, or a subclass of
``FeedbackRule`` like those here. Their names are in lower case because they are
written like functions, ``usf()``.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from symjax_bp.primitives import Fan, Product

__all__ = [
  'FeedbackRule',
  'brsf',
  'from_name',
  'frozen_noise',
  'frozen_sign',
  'frsf',
  'kolen_pollack',
  'local_loss',
  'low_rank',
  'nusf',
  'product_feedback',
  'rndf',
  'rule',
  'symmetric',
  'tied_norm',
  'usf',
  'weight_mirror',
]

Kernel = jax.Array | jax.ShapeDtypeStruct
Number = float | jax.Array

# Standard deviations of common initializers, and the scales of sign(W) that
# other libraries use: BioTorch (2021), and Xiao et al. (2018) for convolutions.
_SCALES: dict[str, Callable[[Fan], float]] = {
  'fan_in': lambda fan: 1 / fan.inputs,
  'xavier': lambda fan: math.sqrt(2 / (fan.inputs + fan.outputs)),
  'he': lambda fan: math.sqrt(2 / fan.inputs),
  'biotorch': lambda fan: math.sqrt(2 / (fan.inputs + fan.outputs)),
  'xiao': lambda fan: math.sqrt(2 / fan.outputs),
}


def _check_number(
  name: str, value: Any, low: float, high: float, allowed: str
) -> Any:
  """Returns a number in (low, high) or [low, high]; arrays pass unchecked."""
  if isinstance(value, jax.Array):
    return value
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if isinstance(value, (bool, str)) or not low <= number <= high:
    raise ValueError(f'{name} must be {allowed}, not {value!r}.')
  return number


def _check_positive(name: str, value: Any) -> Any:
  tiny, huge = math.ulp(0.0), math.nextafter(math.inf, 0)
  return _check_number(name, value, tiny, huge, 'a positive, finite number')


def _wide_dtype(kernel: Kernel) -> Any:
  """Float32 at least: bfloat16 has 128 values of M, float16 ends at 65504."""
  return kernel.dtype if jnp.finfo(kernel.dtype).bits > 32 else jnp.float32


def _normal(key: jax.Array, W: Kernel, sigma: Number, shape=None) -> jax.Array:
  """N(0, sigma^2), of the shape and dtype of W."""
  wide = _wide_dtype(W)
  shape = W.shape if shape is None else shape
  normal = jax.random.normal(key, shape, wide)
  return (jnp.asarray(sigma, wide) * normal).astype(W.dtype)


def _hash_of_bits(W: jax.Array) -> jax.Array:
  """A uint32 that changes when any bit of W does, on every device alike."""
  width = W.dtype.itemsize * 8
  words = lax.bitcast_convert_type(W, jnp.dtype(f'uint{min(width, 32)}'))
  words = words.astype(jnp.uint32)
  # W keeps its shape, because its sharding may allow no reshape.
  odd = 2 * lax.iota(jnp.uint32, words.size).reshape(words.shape) + 1
  # Mixed before the sum, whose order does not matter modulo 2^32.
  mixed = (words ^ (odd * jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


@dataclasses.dataclass(frozen=True, repr=False)
class FeedbackRule:
  """A feedback rule; your own overrides ``unscaled``, and ``init`` for a state.

  Rules are frozen, comparable and picklable, and hashable unless a number in
  them is an array (which may be traced: a schedule, or a vmap over numbers).

  Attributes:
    scale: factor on V: a positive number, ``'fan_in'`` (1 / fan_in),
      ``'xavier'`` (sqrt(2 / (fan_in + fan_out))), ``'he'``
      (sqrt(2 / fan_in)), ``'biotorch'`` (its xavier) or ``'xiao'``
      (sqrt(2 / fan_out), for convolutions). The paper's rules have 1.
    keeps_state: whether ``init`` returns a state.
    redraws: whether that state is a seed from which R is drawn for each W.
    learning: gives V a gradient, which reaches ``state['learned']`` through
      ``expand``; see ``symjax_bp.primitives``. None for a V that does not
      learn.
  """

  scale: Number | str = dataclasses.field(default=1.0, kw_only=True)
  keeps_state: ClassVar[bool] = False
  redraws: ClassVar[bool] = False
  learning: ClassVar[Any] = None

  def __post_init__(self):
    if isinstance(self.scale, str):
      if self.scale not in _SCALES:
        raise ValueError(
          f'scale must be a positive number or one of {sorted(_SCALES)}, '
          f'not {self.scale!r}.'
        )
    else:
      self._set('scale', _check_positive('scale', self.scale))

  def _set(self, name: str, value: Any) -> None:
    object.__setattr__(self, name, value)

  def _described(self, without: tuple[str, ...] = ()) -> str:
    parts = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in without or not field.repr:
        continue
      if isinstance(value, jax.Array):
        parts.append(f'{field.name}=...')
      elif value != field.default:
        parts.append(f'{field.name}={value!r}')
    return f'{self.name}({", ".join(sorted(parts))})'

  def __repr__(self) -> str:
    return self._described()

  @property
  def name(self) -> str:
    """The name in messages and tables."""
    return type(self).__name__

  @property
  def state_name(self) -> str:
    """The rule without its scale: what a state was made by."""
    return self._described(without=('scale',))

  @property
  def needs_fan(self) -> bool:
    """Whether V depends on the sizes of the product."""
    return isinstance(self.scale, str)

  def init(self, key: jax.Array, W: Kernel) -> Any:
    """Makes the state for a kernel: arrays, or None for a rule without one.

    Arrays that learn are in a dictionary under ``'learned'``.

    Args:
      key: a PRNG key. The same key gives the same state.
      W: the kernel, with its initial values where the rule uses these.
    """
    del key, W

  def expand(self, W: jax.Array, state: Any) -> jax.Array | None:
    """Returns R, of the shape of W, or None for a rule without one."""
    del W
    return state['learned'] if isinstance(state, dict) else state

  def unscaled(self, W: jax.Array, R: Any, fan: Fan) -> jax.Array:
    """Returns V before it is scaled; see ``weights``."""
    raise NotImplementedError

  def weights(
    self,
    W: jax.Array,
    R: jax.Array | None = None,
    fan: Fan | None = None,
  ) -> jax.Array:
    """Returns V, of the shape and dtype of ``W``.

    Args:
      W: kernel of a real floating dtype.
      R: as ``expand`` returned it.
      fan: sizes of the product; by default those of a kernel in Flax's layout,
        whose last axis is the outputs.

    Raises:
      TypeError: if W is not of a real floating dtype.
      ValueError: if R is missing, or R or V is not of the shape of W.
    """
    W = jnp.asarray(W)
    if not jnp.issubdtype(W.dtype, jnp.floating):
      raise TypeError(
        f'W must have a real floating dtype for {self!r}, not {W.dtype}.'
      )
    if self.keeps_state:
      if R is None:
        raise ValueError(
          f'R must be given for {self!r}: weights(W, rule.expand(W, state)) '
          'with state = rule.init(key, W).'
        )
      if R.shape != W.shape:
        raise ValueError(
          f'R must have the shape of W, {W.shape}, not {R.shape}.'
        )
      R = R.astype(W.dtype)
    fan = fan or Fan.of_kernel(W.shape)
    V, scale = self.unscaled(W, R, fan), self.scale
    shape = getattr(V, 'shape', None)
    if shape != W.shape:
      raise ValueError(
        f'rule {self.name!r} must return V of the shape of W, {W.shape}, not '
        f'{type(V).__name__ if shape is None else shape}.'
      )
    V = jnp.asarray(V).astype(W.dtype)
    scale = _SCALES[scale](fan) if isinstance(scale, str) else scale
    if not isinstance(scale, jax.Array) and scale == 1:
      return V
    return V * jnp.asarray(scale, W.dtype)


class symmetric(FeedbackRule):
  r"""Backpropagation, :math:`V = W`: the control of every experiment.

  >>> rule = symmetric()
  >>> rule
  symmetric()
  >>> print(rule.weights(jnp.array([[0.3, -2.0]])))
  [[ 0.3 -2. ]]
  """

  def unscaled(self, W, R, fan):
    """V = W."""
    return W


class usf(FeedbackRule):
  r"""Uniform sign-concordant feedback (uSF), :math:`V = \mathrm{sign}(W)`.

  Also known as sign symmetry. Later work scales sign(W) by an initializer's
  standard deviation; the paper does not.

  >>> print(usf().weights(jnp.array([[0.3, -2.0, 0.0]])))
  [[ 1. -1.  0.]]
  >>> usf(scale='xavier')
  usf(scale='xavier')
  """

  def unscaled(self, W, R, fan):
    """V = sign(W)."""
    return jnp.sign(W)


class nusf(FeedbackRule):
  r"""Normalized uSF, :math:`V = \mathrm{sign}(W) / \mathrm{fan\_in}`.

  The paper divides "by the number of inputs of the feedforward filter (filter
  width * filter height * input feature number)": the axes that the product
  contracts.

  >>> print(nusf().weights(jnp.array([[0.3], [-2.0]])).T)
  [[ 0.5 -0.5]]
  """

  needs_fan: ClassVar[bool] = True

  def unscaled(self, W, R, fan):
    """V = sign(W) / fan_in."""
    dtype = _wide_dtype(W)
    sign = jnp.sign(W).astype(dtype)
    return (sign / jnp.asarray(fan.inputs, dtype)).astype(W.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class frsf(FeedbackRule):
  r"""Fixed random magnitudes (frSF), :math:`V = M\,\mathrm{sign}(W)\,S_p`.

  M ~ U(0, 1] and S_p are drawn once; the sign of V follows W.

  >>> frsf(), frsf(0.5, scale=2)
  (frsf(), frsf(p_flip=0.5, scale=2.0))

  Attributes:
    p_flip: probability of a flipped sign in [0, 1]; 0 is the paper's "same
      sign", 0.25 its "frSF-25%". May be a traced scalar.
  """

  p_flip: Number = 0.0
  keeps_state: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    allowed = 'a probability in [0, 1]'
    self._set('p_flip', _check_number('p_flip', self.p_flip, 0, 1, allowed))

  def init(self, key, W):
    """Draws R = M * S_p, both from one uniform number u in (0, 1] a weight.

    Given ``u <= 1 - p`` the sign is kept and ``u / (1 - p)`` is again uniform;
    given ``u > 1 - p`` it is flipped and ``(u - (1 - p)) / p`` is. M is never
    0, so the share of flipped signs is that of S_p.
    """
    wide = _wide_dtype(W)
    u, p = 1 - jax.random.uniform(key, W.shape, wide), self.p_flip
    if isinstance(p, jax.Array):
      p = jnp.asarray(p, wide)
      keep, p = 1 - p, jnp.where(p > 0, p, 1)
      flipped = u > keep
      R = jnp.where(flipped, (keep - u) / p, u / jnp.where(flipped, 1, keep))
    elif p in (0.0, 1.0):
      R = -u if p else u
    else:
      keep = 1 - p
      R = jnp.where(u > keep, (keep - u) / p, u / keep)
    return R.astype(W.dtype)

  def unscaled(self, W, R, fan):
    """V = R sign(W)."""
    return R * jnp.sign(W)


class brsf(frsf):
  r"""Batchwise random magnitudes (brSF), :math:`V = M\,\mathrm{sign}(W)\,S_p`.

  M ~ U(0, 1] and S_p are drawn from a seed and the bits of W: they change when
  W changes, and only then.

  >>> rule = brsf(p_flip=0.25)
  >>> W = jnp.array([[0.3, -2.0, 0.1, 0.7]])
  >>> seed = rule.init(jax.random.key(0), W)
  >>> for W in (W, W, W + 1e-6):
  ...   print((100 * rule.weights(W, rule.expand(W, seed))).round())
  [[ 71.   1. -20. -91.]]
  [[ 71.   1. -20. -91.]]
  [[ 62. -31.  78.  -0.]]
  """

  redraws: ClassVar[bool] = True

  @property
  def state_name(self):
    """One seed serves every p_flip."""
    return f'{self.name}()'

  def init(self, key, W):
    """Returns uint32 (3,): a seed, and 1 to fold the bits of W into it."""
    return jax.random.bits(key, (3,), jnp.uint32).at[2].set(1)

  def expand(self, W, state):
    """Draws R for the bits of W, or for the seed alone; see ``redraw``."""
    if state.ndim > 1:  # Stacked layers have a seed each.
      return jax.vmap(self.expand)(W, state)
    # Of one kind whatever PRNG a program uses: the same V everywhere.
    key = jax.random.wrap_key_data(state[:2], impl='threefry2x32')
    bits = _hash_of_bits(lax.stop_gradient(W))
    return super().init(jax.random.fold_in(key, state[2] * bits), W)


@dataclasses.dataclass(frozen=True, repr=False)
class rndf(FeedbackRule):
  r"""Fixed random feedback (RndF), :math:`V \sim \mathcal{N}(0, \sigma^2)`.

  Independent of W and drawn once: feedback alignment (Lillicrap et al. 2014).

  >>> rule = rndf()
  >>> W = jnp.zeros((2, 2))
  >>> print(rule.weights(W, rule.init(jax.random.key(0), W)).round(3))
  [[ 0.081  0.101]
   [-0.022 -0.004]]

  Attributes:
    sigma: standard deviation of V; 0.05 in all of the paper's experiments. May
      be a traced scalar. Rules that start from RndF have it too.
  """

  sigma: Number = 0.05
  keeps_state: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    self._set('sigma', _check_positive('sigma', self.sigma))

  def init(self, key, W):
    """Draws R."""
    return _normal(key, W, self.sigma)

  def unscaled(self, W, R, fan):
    """V = R."""
    return R


class frozen_sign(FeedbackRule):
  r"""Signs of the initial weights, :math:`V = \mathrm{sign}(W_0)`.

  >>> rule = frozen_sign()
  >>> R = rule.init(jax.random.key(0), jnp.array([0.3, -2.0]))
  >>> print(rule.weights(jnp.array([-1.0, -1.0]), R))
  [ 1. -1.]
  """

  keeps_state: ClassVar[bool] = True

  def init(self, key, W):
    """R = sign(W)."""
    return jnp.sign(jnp.asarray(W))

  def unscaled(self, W, R, fan):
    """V = R."""
    return R


class frozen_noise(rndf):
  r"""Soft alignment at the start, :math:`V = W_0 + \mathcal{N}(0, \sigma^2)`.

  After arXiv 2505.20892.

  >>> rule = frozen_noise(sigma=1e-3)
  >>> R = rule.init(jax.random.key(0), jnp.array([0.25, -2.0]))
  >>> print((4 * R).round())
  [ 1. -8.]
  """

  def init(self, key, W):
    """R = W + noise."""
    return W + super().init(key, W)


class tied_norm(FeedbackRule):
  r"""Random directions with the norm of W, :math:`V = R\,|W| / |R|`.

  R ~ N(0, 1) is fixed; norms are of whole kernels. After Moskovitz,
  Litwin-Kumar and Abbott (2018).

  >>> rule, W = tied_norm(), jnp.array([3.0, 4.0])
  >>> V = rule.weights(W, rule.init(jax.random.key(0), W))
  >>> print(jnp.linalg.norm(V).round(3))
  5.0
  """

  keeps_state: ClassVar[bool] = True

  def init(self, key, W):
    """Draws R."""
    return _normal(key, W, 1.0)

  def unscaled(self, W, R, fan):
    """V = R |W| / |R|."""
    wide = _wide_dtype(W)
    norm = [jnp.sqrt(jnp.sum(jnp.square(a.astype(wide)))) for a in (W, R)]
    return R * (norm[0] / norm[1]).astype(W.dtype)


def _as_weight(op, xs, W, V, g, dW, extra):
  """dV = dW."""
  return dW, None


class _Learned(rndf):
  """Starts from RndF, and learns."""

  def init(self, key, W):
    """Draws R."""
    return {'learned': super().init(key, W)}


class kolen_pollack(_Learned):
  r"""Learned feedback, :math:`V = R` with the gradient :math:`dR = dW`.

  If R has the optimizer and the weight decay of W, V converges to W, because
  their difference decays. After Kolen and Pollack (1994), Akrout et al. (2019).

  >>> f = lambda rule, W, R: rule.learning(None, None, W, R, None, 2 * W, None)
  >>> print(f(kolen_pollack(), jnp.ones(2), jnp.zeros(2))[0])
  [2. 2.]
  """

  learning: ClassVar[Any] = staticmethod(_as_weight)


@dataclasses.dataclass(frozen=True, repr=False)
class product_feedback(rndf):
  r"""Product feedback (PFA), :math:`V = B A` with :math:`dA = B^T dW`.

  B is fixed. Kernels count as matrices whose columns are the last axis. After
  "Deep Learning without Weight Symmetry" (2024).

  >>> rule = product_feedback(width=8)
  >>> jax.tree.map(jnp.shape, rule.init(jax.random.key(0), jnp.ones((3, 2))))
  {'fixed': (3, 8), 'learned': (8, 2)}

  Attributes:
    width: rows of A; by default the inputs of W.
  """

  width: int | None = None
  learning: ClassVar[Any] = staticmethod(_as_weight)

  def __post_init__(self):
    super().__post_init__()
    if self.width is not None:
      _check_count('width', self.width)

  def init(self, key, W):
    """Draws A and B; entries of B A have standard deviation sigma."""
    B, A = _factors(key, W, self.width, self.sigma)
    return {'fixed': B, 'learned': A}

  def expand(self, W, state):
    """R = B A."""
    return (state['fixed'] @ state['learned']).reshape(W.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class low_rank(rndf):
  r"""Low-rank feedback, :math:`V = Q P` learned by :math:`dV = dW`.

  After arXiv 2502.20580.

  >>> state = low_rank(rank=2).init(jax.random.key(0), jnp.ones((3, 3, 4, 8)))
  >>> jax.tree.map(jnp.shape, state)
  {'learned': {'P': (2, 8), 'Q': (36, 2)}}

  Attributes:
    rank: number of rows of P.
  """

  rank: int = dataclasses.field(kw_only=True)
  learning: ClassVar[Any] = staticmethod(_as_weight)

  def __post_init__(self):
    super().__post_init__()
    _check_count('rank', self.rank)

  def init(self, key, W):
    """Draws P and Q; entries of Q P have standard deviation sigma."""
    Q, P = _factors(key, W, self.rank, self.sigma)
    return {'learned': {'P': P, 'Q': Q}}

  def expand(self, W, state):
    """R = Q P."""
    factors = state['learned']
    return (factors['Q'] @ factors['P']).reshape(W.shape)


def _check_count(name: str, value: Any) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise ValueError(f'{name} must be a positive integer, not {value!r}.')


def _factors(
  key: jax.Array, W: Kernel, rank: int | None, sigma: Number
) -> tuple[jax.Array, jax.Array]:
  """Matrices whose product has the size of W, and entries of sigma.

  W is a matrix here whose columns are its last axis.
  """
  outputs = W.shape[-1] if W.ndim else 1
  inputs = math.prod(W.shape[:-1])
  rank, keys = rank or inputs, jax.random.split(key)
  left = _normal(keys[0], W, 1 / math.sqrt(rank), (inputs, rank))
  return left, _normal(keys[1], W, sigma, (rank, outputs))


class weight_mirror(_Learned):
  r"""Weight mirror: :math:`V = R`, learned from noise in a phase of its own.

  Training steps do not change R. The method ``mirror`` of a function with
  feedback returns the gradient :math:`dR \sim -x^T (x W)` at inputs
  x ~ N(0, 1), without labels. After Akrout et al. (2019).
  """


# Gradients of Kunin et al.'s primitives in V, by the losses of y = op(x, W);
# means over the inputs are left to the factors.
_LOCAL: dict[str, Callable[[Product, Any, jax.Array, jax.Array], jax.Array]] = {
  'decay': lambda op, xs, W, V: V,
  'self': lambda op, xs, W, V: -W,
  'amplify': lambda op, xs, W, V: -op.weight_gradient(xs, V, op(xs, W)),
  'sparse': lambda op, xs, W, V: op.weight_gradient(xs, V, op(xs, V)),
  'null': lambda op, xs, W, V: op.weight_gradient(
    (op.input_gradient(xs, V, op(xs, W)), *xs[1:]), V, op(xs, W)
  ),
}


@dataclasses.dataclass(frozen=True, repr=False)
class local_loss(_Learned):
  r"""Feedback learned by local losses, after Kunin et al. (2020).

  By factor, the loss and its gradient in V, with y = op(x, W):

  - ``decay``: :math:`\lVert V \rVert^2 / 2`; :math:`V`
  - ``self``: :math:`-\langle V, W \rangle`; :math:`-W`
  - ``amplify``: :math:`-\langle xV, xW \rangle`; :math:`-x^T x W`
  - ``sparse``: :math:`\lVert xV \rVert^2 / 2`; :math:`x^T x V`
  - ``null``: :math:`\lVert V y \rVert^2 / 2`; :math:`(V y)^T y`

  >>> symmetric_alignment = local_loss(factors={'decay': 0.5, 'self': 0.5})

  Attributes:
    factors: one or more of those above, with their numbers.
  """

  factors: Any = dataclasses.field(kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    try:
      factors = {k: float(v) for k, v in dict(self.factors).items()}
    except (TypeError, ValueError):
      factors = {}
    if not factors or not set(factors) <= set(_LOCAL):
      raise ValueError(
        f'factors must be one or more of {sorted(_LOCAL)} with their numbers, '
        f'not {self.factors!r}.'
      )
    self._set('factors', tuple(factors.items()))

  def learning(self, op, xs, W, V, g, dW, extra):
    """The gradient of the losses."""
    terms = [
      jnp.asarray(factor, W.dtype) * _LOCAL[name](op, xs, W, V)
      for name, factor in self.factors
    ]
    return sum(terms[1:], terms[0]), None


@dataclasses.dataclass(frozen=True, repr=False)
class rule(FeedbackRule):
  """A rule of your own.

  >>> def clipped(W):
  ...   return jnp.clip(W, -1, 1)
  >>> clip = rule(clipped)
  >>> clip, clip.weights(jnp.array([0.5, -3.0]))
  (clipped(), Array([ 0.5, -1. ], dtype=float32))

  Attributes:
    function: ``W -> V``, or ``(W, R) -> V`` if there is an ``initial``; V has
      the shape of W.
    initial: ``(key, W) -> R``, of the shape of W, called once.
    learns: whether V has the gradient dW, which reaches R by the chain rule.
  """

  function: Callable[..., jax.Array] = dataclasses.field(repr=False)
  initial: Callable[..., jax.Array] | None = dataclasses.field(
    repr=False, default=None
  )
  learns: bool = dataclasses.field(repr=False, default=False, kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    if not callable(self.function):
      raise TypeError(f'function must be a function, not {self.function!r}.')
    if not (self.initial is None or callable(self.initial)):
      raise TypeError(
        f'initial must be a function or None, not {self.initial!r}.'
      )
    if self.learns and self.initial is None:
      raise ValueError(
        'learns must be False without an initial, which makes the R that '
        'learns.'
      )

  @property
  def name(self):
    """The name of the function."""
    return getattr(self.function, '__name__', 'rule')

  @property
  def keeps_state(self):
    """Whether there is an initial R."""
    return self.initial is not None

  @property
  def learning(self):
    """dV = dW, if V learns."""
    return _as_weight if self.learns else None

  def init(self, key, W):
    """R = initial(key, W)."""
    R = None if self.initial is None else self.initial(key, W)
    return {'learned': R} if self.learns else R

  def unscaled(self, W, R, fan):
    """V = function(W) or function(W, R)."""
    return self.function(W) if R is None else self.function(W, R)


_NAMES = {
  'bp': symmetric,
  'sgd': symmetric,
  'symmetric': symmetric,
  'usf': usf,
  'nusf': nusf,
  'brsf': brsf,
  'frsf': frsf,
  'rndf': rndf,
}


def from_name(name: str) -> FeedbackRule:
  """Returns the rule with the paper's name, e.g. ``uSF`` or ``brSF-25%``.

  >>> from_name('NuSF'), from_name('frSF-25%'), from_name('BP')
  (nusf(), frsf(p_flip=0.25), symmetric())

  Args:
    name: BP (or SGD), uSF, NuSF, brSF, frSF or RndF, in upper or lower case;
      brSF and frSF may end in ``-p%``, the percentage of flipped signs.

  Raises:
    ValueError: if there is no such rule.
  """
  match = re.fullmatch(r'([a-z]+)(?:-(\d+(?:\.\d+)?)%)?', str(name).lower())
  constructor = _NAMES.get(match[1]) if match else None
  percent = match[2] if match else None
  if constructor is None or (percent and constructor not in (brsf, frsf)):
    raise ValueError(
      f'name must be one of BP, uSF, NuSF, brSF, brSF-p%, frSF, frSF-p% or '
      f'RndF with a percentage p of flipped signs, not {name!r}.'
    )
  return constructor(float(percent) / 100) if percent else constructor()
