r"""Feedback rules: how the feedback weights V follow from the weights W.

Every rule of Liao, Leibo and Poggio (2016, section 2) is a pure function

  .. math:: V = \mathrm{rule}(W, R)

of the forward kernel ``W`` and a random draw ``R`` of its shape (or nothing):

=================  ==============================================  ========
rule               V                                               R drawn
=================  ==============================================  ========
``symmetric()``    W (backpropagation; the control)                never
``usf()``          sign(W)                                         never
``nusf()``         sign(W) / fan_in                                never
``brsf(p_flip)``   M * sign(W) * S_p,  M ~ U(0, 1]                 every update
``frsf(p_flip)``   M * sign(W) * S_p,  M ~ U(0, 1]                 once
``rndf(sigma)``    N(0, sigma^2), independent of W                 once
=================  ==============================================  ========

``S_p`` is -1 with probability ``p_flip`` and 1 otherwise, for each weight on
its own. ``sign(0) = 0``. A rule knows no layer: it takes and returns arrays,
so it works for any operation that is linear in its kernel.

Kernels have Flax's layout: the last axis is the output features, and *fan_in*
is the product of all other axes: ``kh * kw * in_features / groups`` for a
convolution (each output of a grouped convolution sees the inputs of its own
group only), ``in_features`` for a dense layer. Flax's ``DenseGeneral`` may have
several axes of output features, e.g. ``(in, heads, head_dim)``; a rule cannot
see which, so there all axes but the last count.
"""

import dataclasses
import math
import re
from typing import ClassVar

import jax
import jax.numpy as jnp

Kernel = jax.Array | jax.ShapeDtypeStruct
Scale = float | str

# Standard deviations of the usual initialisers; NuSF divides by fan_in itself.
_SCALES = {
  'fan_in': lambda fan_in, fan_out: 1 / fan_in,
  'xavier': lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
  'he': lambda fan_in, fan_out: math.sqrt(2 / fan_in),
}


def _number(name: str, value, low: float, high: float, allowed: str) -> float:
  """Returns ``value`` as a float, or says what is allowed."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if isinstance(value, (bool, str)) or not low <= number <= high:
    raise ValueError(f'{name} must be {allowed}, not {value!r}.')
  return number


def _fan_in_and_out(shape: tuple[int, ...]) -> tuple[int, int]:
  """Inputs and outputs of one position of a kernel in Flax's layout."""
  receptive_field = math.prod(shape[:-2])
  return math.prod(shape[:-1]), receptive_field * shape[-1]


def _wide_dtype(kernel):
  """Float32 at least: bfloat16 has 128 values of M, float16 ends at 65504."""
  return kernel.dtype if jnp.finfo(kernel.dtype).bits > 32 else jnp.float32


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FeedbackRule:
  """A rule ``V = rule(W, R)``; see the constructors for the paper's own.

  Rules are frozen, hashable, comparable and picklable, so they may be static
  arguments of ``jax.jit`` and fields of Flax modules.

  Attributes:
    scale: factor on V: a positive number, ``'fan_in'`` (1 / fan_in),
      ``'xavier'`` (sqrt(2 / (fan_in + fan_out))) or ``'he'``
      (sqrt(2 / fan_in)). The paper's rules have 1.
    draws: whether V depends on a random draw R at all.
    redraws: whether R is to be drawn anew for every update of W.
  """

  scale: Scale = 1.0
  name: ClassVar[str]
  draws: ClassVar[bool] = False
  redraws: ClassVar[bool] = False

  def __post_init__(self):
    if isinstance(self.scale, str):
      if self.scale not in _SCALES:
        raise ValueError(
          f'scale must be a positive number or one of {sorted(_SCALES)}, '
          f'not {self.scale!r}.'
        )
    else:
      scale = _number('scale', self.scale, 0.0, math.inf, 'a positive number')
      if scale in (0.0, math.inf):
        raise ValueError(f'scale must be positive and finite, not {scale}.')
      object.__setattr__(self, 'scale', scale)

  def __repr__(self) -> str:
    changed = (
      f'{field.name}={getattr(self, field.name)!r}'
      for field in reversed(dataclasses.fields(self))
      if getattr(self, field.name) != field.default
    )
    return f'{self.name}({", ".join(changed)})'

  def draw(self, key: jax.Array, kernel: Kernel) -> jax.Array | None:
    """Draws R for a kernel.

    Args:
      key: a PRNG key. The same key gives the same R.
      kernel: W, or anything with its shape and (floating) dtype.

    Returns:
      R, of the kernel's shape and dtype, or None for a rule without one.
    """
    del key, kernel
    return None

  def weights(
    self, kernel: jax.Array, draw: jax.Array | None = None
  ) -> jax.Array:
    """Returns V, of the shape and dtype of ``kernel``.

    Args:
      kernel: W, floating point, output features last.
      draw: R as returned by ``draw``; None for a rule without one.

    Raises:
      TypeError: if W is not of a real floating dtype.
      ValueError: if the rule needs a draw and there is none, or R does not
        have W's shape.
    """
    kernel = jnp.asarray(kernel)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
      raise TypeError(
        f'{self!r} needs a kernel of a real floating dtype, not {kernel.dtype}.'
      )
    if self.draws:
      if draw is None:
        raise ValueError(
          f'{self!r} needs its random draw: weights(kernel, draw) with '
          'draw = rule.draw(key, kernel).'
        )
      if draw.shape != kernel.shape:
        raise ValueError(
          f'draw must have the shape of the kernel, {kernel.shape}, '
          f'not {draw.shape}.'
        )
      draw = draw.astype(kernel.dtype)
    scale = self.scale
    if isinstance(scale, str):
      scale = _SCALES[scale](*_fan_in_and_out(kernel.shape))
    unscaled = self._unscaled(kernel, draw)
    return (
      unscaled if scale == 1 else unscaled * jnp.asarray(scale, kernel.dtype)
    )

  def _unscaled(self, kernel, draw):
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _Symmetric(FeedbackRule):
  name: ClassVar[str] = 'symmetric'

  def _unscaled(self, kernel, draw):
    return kernel


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _UniformSign(FeedbackRule):
  name: ClassVar[str] = 'usf'

  def _unscaled(self, kernel, draw):
    return jnp.sign(kernel)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _NormalizedSign(FeedbackRule):
  name: ClassVar[str] = 'nusf'

  def _unscaled(self, kernel, draw):
    fan_in, _ = _fan_in_and_out(kernel.shape)
    dtype = _wide_dtype(kernel)
    sign = jnp.sign(kernel).astype(dtype)
    return (sign / jnp.asarray(fan_in, dtype)).astype(kernel.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _RandomMagnitude(FeedbackRule):
  p_flip: float = 0.0
  draws: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    p_flip = _number('p_flip', self.p_flip, 0.0, 1.0, 'a probability in [0, 1]')
    object.__setattr__(self, 'p_flip', p_flip)

  def draw(self, key, kernel):
    """Draws R = M * S_p, both from one uniform number u in (0, 1] a weight.

    Given ``u <= 1 - p`` the sign is kept and ``u / (1 - p)`` is again uniform;
    given ``u > 1 - p`` it is flipped and ``(u - (1 - p)) / p`` is. M is never
    0, so the share of flipped signs is that of S_p.
    """
    u = 1 - jax.random.uniform(key, kernel.shape, _wide_dtype(kernel))
    keep = 1 - self.p_flip
    if keep == 1:
      signed = u
    elif keep == 0:
      signed = -u
    else:
      signed = jnp.where(u > keep, (keep - u) / self.p_flip, u / keep)
    return signed.astype(kernel.dtype)

  def _unscaled(self, kernel, draw):
    return draw * jnp.sign(kernel)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _BatchRandomMagnitude(_RandomMagnitude):
  name: ClassVar[str] = 'brsf'
  redraws: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _FixedRandomMagnitude(_RandomMagnitude):
  name: ClassVar[str] = 'frsf'


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _FixedRandom(FeedbackRule):
  sigma: float = 0.05
  name: ClassVar[str] = 'rndf'
  draws: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    sigma = _number('sigma', self.sigma, 0.0, math.inf, 'a positive number')
    if sigma in (0.0, math.inf):
      raise ValueError(f'sigma must be positive and finite, not {sigma}.')
    object.__setattr__(self, 'sigma', sigma)

  def draw(self, key, kernel):
    normal = jax.random.normal(key, kernel.shape, _wide_dtype(kernel))
    return (self.sigma * normal).astype(kernel.dtype)

  def _unscaled(self, kernel, draw):
    return draw


def symmetric(*, scale: Scale = 1.0) -> FeedbackRule:
  r"""Backpropagation, :math:`V = W`: the control of every experiment.

  >>> rule = symmetric()
  >>> rule
  symmetric()
  >>> print(rule.weights(jnp.array([[0.3, -2.0]])))
  [[ 0.3 -2. ]]

  Args:
    scale: factor on V, see ``FeedbackRule``.
  """
  return _Symmetric(scale=scale)


def usf(*, scale: Scale = 1.0) -> FeedbackRule:
  r"""Uniform sign-concordant feedback (uSF), :math:`V = \mathrm{sign}(W)`.

  >>> print(usf().weights(jnp.array([[0.3, -2.0, 0.0]])))
  [[ 1. -1.  0.]]
  >>> usf(scale='xavier')
  usf(scale='xavier')

  Args:
    scale: factor on V, see ``FeedbackRule``. Later work scales sign(W) by an
      initialiser's standard deviation; the paper does not.
  """
  return _UniformSign(scale=scale)


def nusf(*, scale: Scale = 1.0) -> FeedbackRule:
  r"""Normalised uSF, :math:`V = \mathrm{sign}(W) / \mathrm{fan\_in}`.

  The paper divides "by the number of inputs of the feedforward filter (filter
  width * filter height * input feature number)".

  >>> print(nusf().weights(jnp.array([[0.3], [-2.0]])).T)
  [[ 0.5 -0.5]]

  Args:
    scale: factor on V, see ``FeedbackRule``.
  """
  return _NormalizedSign(scale=scale)


def brsf(p_flip: float = 0.0, *, scale: Scale = 1.0) -> FeedbackRule:
  r"""Batchwise random magnitudes (brSF), :math:`V = M\,\mathrm{sign}(W)\,S_p`.

  M ~ U(0, 1] and S_p are drawn anew for every update of W.

  >>> rule = brsf(p_flip=0.25)
  >>> rule, rule.redraws
  (brsf(p_flip=0.25), True)
  >>> W = jnp.array([[0.3, -2.0, 0.1, 0.7]])
  >>> print(rule.weights(W, rule.draw(jax.random.key(0), W)).round(2))
  [[ 0.07 -0.03  0.89  0.71]]

  Args:
    p_flip: probability of a flipped sign in [0, 1]; 0 is the paper's "same
      sign", 0.25 its "brSF-25%".
    scale: factor on V, see ``FeedbackRule``.

  Raises:
    ValueError: if ``p_flip`` is no probability.
  """
  return _BatchRandomMagnitude(p_flip=p_flip, scale=scale)


def frsf(p_flip: float = 0.0, *, scale: Scale = 1.0) -> FeedbackRule:
  r"""Fixed random magnitudes (frSF), :math:`V = M\,\mathrm{sign}(W)\,S_p`.

  M ~ U(0, 1] and S_p are drawn once; the sign of V follows W.

  >>> frsf(), frsf(0.5, scale=2), frsf().redraws
  (frsf(), frsf(p_flip=0.5, scale=2.0), False)

  Args:
    p_flip: probability of a flipped sign in [0, 1].
    scale: factor on V, see ``FeedbackRule``.

  Raises:
    ValueError: if ``p_flip`` is no probability.
  """
  return _FixedRandomMagnitude(p_flip=p_flip, scale=scale)


def rndf(sigma: float = 0.05, *, scale: Scale = 1.0) -> FeedbackRule:
  r"""Fixed random feedback (RndF), :math:`V \sim \mathcal{N}(0, \sigma^2)`.

  Independent of W and drawn once: feedback alignment (Lillicrap et al. 2014).

  >>> rule = rndf()
  >>> W = jnp.zeros((2, 2))
  >>> print(rule.weights(W, rule.draw(jax.random.key(0), W)).round(3))
  [[ 0.081  0.101]
   [-0.022 -0.004]]

  Args:
    sigma: standard deviation of V; 0.05 in all of the paper's experiments.
    scale: factor on V, see ``FeedbackRule``.

  Raises:
    ValueError: if ``sigma`` is not positive.
  """
  return _FixedRandom(sigma=sigma, scale=scale)


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
