"""Rules: equations, draws, statistics, identity and errors."""

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import symjax_bp
from symjax_bp import feedback
from symjax_bp.primitives import Fan
from tests.cases import RULES, assert_same_bits, normal

pytestmark = pytest.mark.optimized
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)
W = normal(0, (400, 504))
DEVIATIONS = 4  # Statistics at fixed keys lie within 4 standard errors.


def state_and_weights(rule, W=W, seed=0):
  state = rule.init(jax.random.key(seed), W)
  return state, rule.weights(W, rule.expand(W, state))


def weights(rule, W=W, seed=0):
  return state_and_weights(rule, W, seed)[1]


def assert_is_normal(values, sigma):
  values = np.asarray(values, np.float64) / sigma
  error = DEVIATIONS / math.sqrt(values.size)
  assert abs(values.mean()) < error
  assert abs((values**2).mean() - 1) < error * math.sqrt(2)


def assert_is_independent(a, b):
  correlation = np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
  assert abs(correlation) < DEVIATIONS / math.sqrt(np.size(a))


# --- Equations --------------------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
@every_rule
def test_V_has_the_shape_and_dtype_of_W(rule, dtype):
  shape = (32,) if dtype == jnp.float16 else (5, 5, 8, 16)
  with jax.enable_x64(dtype == jnp.float64):
    kernel = jax.ShapeDtypeStruct(shape, dtype)
    state, V = jax.eval_shape(lambda W: state_and_weights(rule, W), kernel)
  assert V.shape == shape and V.dtype == dtype
  assert (state is not None) == rule.keeps_state
  kept = jnp.uint32 if rule.redraws else dtype
  assert all(leaf.dtype == kept for leaf in jax.tree.leaves(state))


# Fans of kernels in Flax's layout, and of a product in another one.
FANS = {
  'dense': ((60, 50), None, (60, 50)),
  'conv': ((5, 5, 8, 16), None, (200, 400)),
  'vector': ((32,), None, (1, 32)),
  'given': ((16, 5, 8), Fan(40, 80), (40, 80)),
}


@pytest.mark.parametrize('shape, fan, fans', FANS.values(), ids=FANS)
def test_rules_without_a_state_are_their_equations(shape, fan, fans):
  inputs, outputs = fans
  kernel = normal(0, shape).at[0].set(0.0)
  sign = np.sign(np.asarray(kernel, np.float64))
  assert not sign[0].any()
  for rule, expected in (
    (feedback.symmetric(), kernel),
    (feedback.symmetric(scale='xiao'), kernel * math.sqrt(2 / outputs)),
    (feedback.usf(), sign),
    (feedback.usf(scale=0.25), sign / 4),
    (feedback.usf(scale='fan_in'), sign / inputs),
    (feedback.usf(scale='he'), sign * math.sqrt(2 / inputs)),
    (feedback.usf(scale='xavier'), sign * math.sqrt(2 / (inputs + outputs))),
    (feedback.usf(scale='biotorch'), sign * math.sqrt(2 / (inputs + outputs))),
    (feedback.usf(scale='xiao'), sign * math.sqrt(2 / outputs)),
    (feedback.nusf(), sign / inputs),
    (feedback.nusf(scale=3), 3 * sign / inputs),
  ):
    # Two roundings of float32: of the scale and of the product.
    found = rule.weights(kernel, None, fan)
    np.testing.assert_allclose(found, expected, rtol=2**-22, err_msg=rule)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_nusf_is_the_quotient_in_float32(dtype):
  """A fan_in above 65504 is infinite in float16; its inverse is not 0."""
  kernel = normal(0, (3, 3, 8192, 1), dtype)
  quotient = np.sign(np.asarray(kernel, np.float32)) / np.float32(9 * 8192)
  V = feedback.nusf().weights(kernel)
  assert_same_bits(V, jnp.asarray(quotient, dtype))
  assert np.all(V)


def test_rules_with_something_of_the_start():
  later, length = -3 * W, lambda a: np.linalg.norm(np.asarray(a, np.float64))
  signs, noisy, random = (
    rule.init(jax.random.key(0), W)
    for rule in (
      feedback.frozen_sign(), feedback.frozen_noise(0.1), feedback.tied_norm()
    )
  )  # fmt: skip
  assert_same_bits(feedback.frozen_sign().weights(later, signs), jnp.sign(W))
  assert_is_normal(noisy - W, 0.1)
  assert_same_bits(feedback.frozen_noise(0.1).weights(later, noisy), noisy)
  assert_is_normal(random, 1.0)
  tied = feedback.tied_norm().weights(later, random)
  # Sums of squares in float32, whose terms are positive.
  expected = random * (length(later) / length(random))
  np.testing.assert_allclose(tied, expected, rtol=2 * W.size * 2**-24)


@pytest.mark.parametrize(
  'rule', [feedback.product_feedback(0.1), feedback.low_rank(0.1, rank=5)]
)
def test_factored_feedback_is_the_product_of_its_factors(rule):
  state, V = state_and_weights(rule, normal(1, (5, 5, 2, 60)))
  if isinstance(rule, feedback.product_feedback):
    first, second, rank = state['fixed'], state['learned'], 50
  else:
    first, second, rank = state['learned']['Q'], state['learned']['P'], 5
  assert first.shape == (50, rank)
  V = np.asarray(V, np.float64).reshape(50, 60)
  first, second = (np.asarray(each, np.float64) for each in (first, second))
  # Sums of up to 50 products in float32.
  assert np.all(
    abs(V - first @ second) <= 51 * 2**-24 * (abs(first) @ abs(second))
  )
  assert np.linalg.matrix_rank(V, tol=1e-4) == rank
  # Not the entries of V are independent, but 250 and more of the factors.
  assert abs(V.std() / 0.1 - 1) < DEVIATIONS * math.sqrt(1 / 250)


# --- Draws ------------------------------------------------------------------


@pytest.mark.accelerator
@pytest.mark.parametrize(
  'rule',
  [*map(feedback.frsf, (0.0, 0.25, 0.999, 1.0)), feedback.brsf(0.25)],
  ids=str,
)
def test_magnitudes_and_flips_have_the_stated_distribution(rule):
  p_flip, V = rule.p_flip, np.asarray(weights(rule), np.float64)
  M, kept = np.abs(V), np.sign(V) == np.sign(W)
  error = DEVIATIONS * math.sqrt(p_flip * (1 - p_flip) / W.size)
  assert abs(kept.mean() - (1 - p_flip)) <= error
  assert M.min() > 0 and M.max() <= 1
  for part in (M.ravel(), M[kept], M[~kept]):  # M does not depend on S_p.
    if part.size > 100:
      ranks = np.arange(part.size) / part.size
      # Kolmogorov and Smirnov: exceeded once in 3,000 draws of U(0, 1).
      assert abs(np.sort(part) - ranks).max() < 2.1 / math.sqrt(part.size)


def test_successive_draws_seeds_and_neighbors_are_independent():
  nudged = W.at[7, 7].set(jnp.nextafter(W[7, 7], jnp.float32(9)))
  swapped = W.at[0, :2].set(W[0, 1::-1])
  kernels = [(W, 0), (nudged, 0), (swapped, 0), (-W, 0), (jnp.ones_like(W), 0)]
  draws = [
    weights(feedback.brsf(0.3), kernel, seed) / jnp.sign(kernel)
    for kernel, seed in (*kernels, (W, 1))
  ]
  for i, draw in enumerate(draws):
    assert_is_independent(draw[:, 1:], draw[:, :-1])
    assert_is_independent(draw[1:], draw[:-1])
    for other in draws[:i]:
      assert_is_independent(draw, other)


@pytest.mark.accelerator
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32, jnp.float64])
def test_brsf_is_drawn_anew_for_every_bit_of_W(dtype):
  with jax.enable_x64(dtype == jnp.float64):
    rule, kernel = feedback.brsf(), normal(0, (4, 8), dtype)
    bits = kernel.dtype.itemsize * 8
    words = np.asarray(kernel).view(f'uint{bits}').ravel()
    # Of entry i bit i is flipped; of the last two kernels none.
    flips = np.zeros((34, 32), words.dtype)
    np.fill_diagonal(flips, [1 << i % bits for i in range(32)])
    several = (words ^ flips).view(kernel.dtype).reshape(34, 4, 8)
    state = rule.init(jax.random.key(0), kernel)
    draw = jax.jit(jax.vmap(lambda W: rule.expand(W, state)))
    R = np.asarray(draw(jnp.asarray(several)), np.float64)
  assert len(np.unique(R, axis=0)) == 33
  assert (R[-1] == R[-2]).all()


def test_brsf_is_the_same_in_every_program():
  """Eager, compiled, batched and sharded, whatever PRNG a program uses."""
  rule, kernels = feedback.brsf(0.3), jnp.stack([W, -W])
  state = rule.init(jax.random.key(0), W)
  draw = lambda W: rule.expand(W, state)
  expected = jnp.stack([draw(W), draw(-W)])
  mesh = jax.make_mesh((4, 2), ('x', 'y'))
  with jax.default_prng_impl('unsafe_rbg'):
    assert_same_bits(jax.jit(draw)(W), expected[0])
    assert_same_bits(jax.jit(jax.vmap(draw))(kernels), expected)
    # The sharding is a part of the type of an array on this mesh.
    sharded = jax.device_put(
      W, NamedSharding(mesh, PartitionSpec(None, ('x', 'y')))
    )
    np.testing.assert_array_equal(jax.jit(draw)(sharded), expected[0])
    assert rule.init(jax.random.key(1), W).dtype == jnp.uint32


def test_redraw_chooses_the_draw_whatever_the_bits_of_W():
  rule = feedback.brsf(0.3)
  state = rule.init(jax.random.key(0), W)

  def draw(W, step):
    return rule.expand(W, symjax_bp.redraw(state, step))

  typed, raw = jax.random.key(0), jax.random.PRNGKey(0)
  assert_same_bits(draw(W, typed), draw(W, raw))
  for first, second in ((0, 1), (typed, jax.random.key(1))):
    assert_same_bits(draw(W, first), draw(-3 * W, first))
    assert_is_independent(draw(W, first), draw(W, second))
    assert_is_independent(draw(W, first), rule.expand(W, state))


@pytest.mark.parametrize(
  'make, name, numbers',
  [
    # 1 - p is exact in float32, so that all agree on what is flipped.
    (feedback.frsf, 'p_flip', [0.0, 0.25, 0.5, 0.75, 1.0]),
    (feedback.rndf, 'sigma', [0.25, 1.0, 3.0]),
    (feedback.usf, 'scale', [0.25, 1.0, 3.0]),
  ],
)
def test_vmap_over_a_number_is_a_loop(make, name, numbers):
  of = lambda number: weights(make(**{name: number}))
  found = jax.jit(jax.vmap(of))(jnp.array(numbers))
  assert_same_bits(
    found, jnp.stack([of(number) for number in jnp.array(numbers)])
  )
  # A quotient by a constant may be a product: two roundings each.
  constant = jnp.stack([of(number) for number in numbers])
  np.testing.assert_allclose(found, constant, rtol=2**-22)
  assert repr(make(**{name: jnp.float32(1)})) == f'{make.__name__}({name}=...)'


def test_what_stays_and_what_follows_W():
  state, V = state_and_weights(feedback.rndf())
  assert_is_normal(V, 0.05)
  assert_is_independent(V, W)
  assert_same_bits(feedback.rndf().weights(-7 * W, state), V)
  rule = feedback.frsf(0.3)
  state, V = state_and_weights(rule)
  assert_same_bits(rule.weights(-100 * W, state), -V)
  low = rule.init(jax.random.key(0), W.astype(jnp.bfloat16))
  assert_same_bits(low, state.astype(jnp.bfloat16))


# --- Rules of the user ------------------------------------------------------


def clipped(W):
  return jnp.clip(W, -1, 1)


def initial(key, W):
  return 0.5 * jax.random.normal(key, W.shape, W.dtype)


def mixed(W, R):
  return W + R


@dataclasses.dataclass(frozen=True, repr=False)
class Blend(feedback.FeedbackRule):
  """Between backpropagation and feedback alignment."""

  share: float = 0.5
  keeps_state = True

  def init(self, key, W):
    return initial(key, W)

  def unscaled(self, W, R, fan):
    return self.share * W + (1 - self.share) * R


def test_rules_of_the_user():
  kernel = W[:6, :5]
  R = initial(jax.random.key(3), kernel)
  for rule, V, text in (
    (feedback.rule(clipped), clipped(kernel), 'clipped()'),
    (
      feedback.rule(clipped, scale=2),
      2 * clipped(kernel),
      'clipped(scale=2.0)',
    ),
    (feedback.rule(mixed, initial), kernel + R, 'mixed()'),
    (Blend(0.25), 0.25 * kernel + 0.75 * R, 'Blend(share=0.25)'),
    (Blend(scale=2), kernel + R, 'Blend(scale=2.0)'),
  ):
    assert_same_bits(weights(rule, kernel, 3), V)
    assert pickle.loads(pickle.dumps(rule)) == rule and repr(rule) == text
  assert feedback.rule(mixed, initial) != feedback.rule(
    mixed, initial, learns=True
  )


class Broadcast(feedback.FeedbackRule):
  def unscaled(self, W, R, fan):
    return W[:1]


class Forgotten(feedback.FeedbackRule):
  """Without keeps_state."""

  def unscaled(self, W, R, fan):
    return R


# --- Identity, names and errors ---------------------------------------------


@every_rule
def test_rules_are_values(rule):
  copy = pickle.loads(pickle.dumps(rule))
  assert copy == rule and hash(copy) == hash(rule)
  assert eval(repr(rule), vars(feedback)) == rule  # noqa: S307
  assert 'scale' not in rule.state_name
  others = [other for other in RULES.values() if other is not rule]
  assert all(other != rule and repr(other) != repr(rule) for other in others)
  with pytest.raises(dataclasses.FrozenInstanceError):
    rule.scale = 2.0


def test_the_names_of_the_paper():
  names = {
    'BP': feedback.symmetric(), 'SGD': feedback.symmetric(),
    'uSF': feedback.usf(), 'NuSF': feedback.nusf(), 'RndF': feedback.rndf(),
    'brSF': feedback.brsf(), 'brSF-25%': feedback.brsf(0.25),
    'brSF-100%': feedback.brsf(1.0), 'frSF': feedback.frsf(),
    'frSF-2.5%': feedback.frsf(0.025),
  }  # fmt: skip
  for name, rule in names.items():
    assert (
      symjax_bp.from_name(name) == rule == symjax_bp.from_name(name.lower())
    )
  drawn = [name for name, rule in names.items() if rule.redraws]
  assert drawn == ['brSF', 'brSF-25%', 'brSF-100%']


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: feedback.brsf(1.5), r'p_flip must be .* \[0, 1\], not 1.5'),
    (lambda: feedback.frsf(math.nan), 'p_flip must be .* not nan'),
    (lambda: feedback.brsf(True), 'p_flip must be .* not True'),
    (lambda: feedback.rndf(0.0), 'sigma must be a positive.* not 0.0'),
    (lambda: feedback.kolen_pollack(math.inf), 'sigma must be .* not inf'),
    (lambda: feedback.usf(scale='lecun'), "scale must be .* not 'lecun'"),
    (lambda: feedback.low_rank(rank=0), 'rank must be .* not 0'),
    (lambda: feedback.local_loss(factors={'hebb': 1}), "not {'hebb': 1}"),
    (lambda: feedback.local_loss(factors={'decay': None}), 'factors must be'),
    (lambda: feedback.from_name('xSF'), "one of BP, uSF.* not 'xSF'"),
    (lambda: feedback.from_name('uSF-25%'), "not 'uSF-25%'"),
    (lambda: feedback.from_name('brSF-250%'), 'p_flip must be .* not 2.5'),
    (lambda: weights(feedback.rule(jnp.sum)), r"'sum' .* 504\), not \(\)"),
    (lambda: weights(Broadcast()), r"'Broadcast' .* 504\), not \(1, 504\)"),
    (lambda: weights(Forgotten()), "'Forgotten' must return V .* not NoneType"),
    (lambda: feedback.rule(mixed, learns=True), 'learns must be False'),
    (lambda: feedback.frsf().weights(W), r'R must be given for frsf\(\)'),
    (lambda: feedback.frsf().weights(W, W.T), r'R .* \(400, 504\), not \(504,'),
    (lambda: weights(feedback.usf(), W > 0), 'real floating dtype .* not bool'),
    (lambda: feedback.rule(mixed, 3), 'initial must be a function .* not 3'),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(make, message):
  with pytest.raises((ValueError, TypeError), match=message):
    make()
