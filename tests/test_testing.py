"""Assertions pass on sound models and name by path what is wrong in others."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import testing, transform
from tests import nnx_models
from tests import small_models as small
from tests.cases import assert_same_bits
from tests.small_models import PATHS, X, every_kind, fails, loss, make

asymmetric = testing.assert_asymmetric_gradients
symmetric = testing.assert_symmetric_gradients
matches = testing.assert_feedback_matches_params
concordant = testing.assert_sign_concordant

# --- assert_sign_concordant


@every_kind
def test_signs_of_a_model_are_those_of_its_rule(kind):
  model, variables = make(kind, sbp.frsf(1.0))
  W, V = small.weights(kind, model, variables)
  concordant(W, V, 1.0)
  first, last = PATHS[kind]
  with fails('p_flip = 0:', f'{first}: 30 of 30 signs', f'{last}: 18 of 18'):
    concordant(W, V)


@pytest.mark.parametrize(
  'expected, p_flip, num_sigmas, within, beyond',
  [
    # sigma = sqrt(0.2 * 0.8 / 400) = 0.02: 8 of 400 weights
    (80, 0.2, 4.0, 31, 33),
    (80, 0.2, 4.0, -31, -33),
    (80, 0.2, 2.0, 15, 17),
    (0, 0.0, 4.0, 0, 1),
    (400, 1.0, 4.0, 0, -1),
  ],
)
def test_the_bound_is_that_of_a_binomial_share(
  expected, p_flip, num_sigmas, within, beyond
):
  def check(flipped):
    V = jnp.ones(400).at[:flipped].set(-0.1)
    # Weights without a sign do not count, or the share would be halved.
    W, V = (jnp.concatenate([a, jnp.zeros(400)]) for a in (jnp.ones(400), V))
    concordant(W, V, p_flip, num_sigmas=num_sigmas)

  check(expected + within)
  bound = f'{p_flip:g} +- {0.02 * num_sigmas if p_flip == 0.2 else 0:g}'
  with fails(f'{expected + beyond} of 400 signs flipped, a share of', bound):
    check(expected + beyond)


@pytest.mark.parametrize(
  'W, V, message',
  [
    ([1.0, 2.0], [1.0, 0.0], '1 of 2 weights are 0 in W or V alone'),
    ([1.0, 0.0], [1.0, 3.0], '1 of 2 weights are 0 in W or V alone'),
    ([1.0, 2.0], [1.0, jnp.nan], '1 of 2 weights are not finite'),
    ([jnp.inf, 2.0], [1.0, 1.0], '1 of 2 weights are not finite'),
    ([[1.0, 2.0]], [[1.0], [2.0]], 'has shape (2, 1), W has (1, 2)'),
  ],
)
def test_what_is_no_sign_of_W_fails_at_any_share(W, V, message):
  good, W, V = jnp.ones(2), jnp.array(W), jnp.array(V)
  W = {'a': {'kernel': W, 'bias': W}, 'b': good, 'c': good}
  V = {'a': {'kernel': V}, 'b': good, 'c': -good}
  with fails('a/kernel: ', message):
    concordant(W, V, 0.5, num_sigmas=9.0)
  with fails('a/kernel: ', message, 'c: 2 of 2 signs flipped') as caught:
    concordant(W, V)
  assert 'b: ' not in str(caught.value)


def test_trees_must_belong_together():
  W = {'a': {'kernel': jnp.ones(3, jnp.bfloat16)}}
  concordant(W, {'a': {'kernel': jnp.ones(3)}})
  concordant(jnp.zeros(3), jnp.zeros(3), 0.5)
  with fails("b: not in W, which has ['a/kernel']"):
    concordant(W, {'b': jnp.ones(3)})
  with fails('V has no leaves'):
    concordant(W, {'a': None})


# --- assert_feedback_matches_params


@every_kind
@pytest.mark.parametrize('rule', [sbp.brsf(0.3), sbp.kolen_pollack()], ids=str)
def test_the_state_of_a_rule_matches(kind, rule):
  model, variables = make(kind, rule)
  matches(model, variables, X)
  if kind == 'linen' and rule.redraws:  # A call can draw the seed.
    del variables['feedback']
    matches(model, variables, X)


def test_the_states_of_stacked_and_tied_layers_match():
  @nnx.split_rngs(splits=2)
  @nnx.vmap
  def stack(rngs):
    return sbp.nnx.Linear(4, 4, feedback=sbp.brsf(), rngs=rngs)

  matches(stack(nnx.Rngs(0)))
  a, b = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
  a.kernel = b.kernel
  matches(sbp.with_feedback(nnx.List([a, b]), sbp.rndf(), rngs=nnx.Rngs(0)))


@every_kind
@pytest.mark.parametrize('state, message', small.STATES.values())
def test_a_state_that_does_not_match_is_named(kind, state, message):
  first, last = PATHS[kind]
  with fails('must match the parameters:', f'{last}:{message}') as caught:
    matches(*small.with_last_state(kind, state), X)
  assert first not in str(caught.value)


def test_a_state_without_a_parameter_is_named():
  model, variables = make('linen', sbp.rndf())
  variables['feedback']['Dense_9'] = {'kernel:rndf()': jnp.ones(3)}
  with fails('Dense_9/kernel:rndf(): no parameter Dense_9/kernel, only ['):
    matches(model, variables, X)


@every_kind
def test_feedback_among_the_parameters_is_named(kind):
  model, variables = make(kind, sbp.rndf())
  if kind == 'nnx':
    setattr(model.layers[0].feedback, '0:rndf()', nnx.Param(jnp.ones((5, 6))))
  else:
    variables['params']['feedback'] = variables['feedback']
  with fails('feedback', 'rndf(): feedback is among the trained variables'):
    matches(model, variables, X)


@pytest.mark.parametrize(
  'wrt, is_trained',
  [(nnx.Param, False), (nnx.PathContains('kernel', exact=False), False),
   (nnx.PathContains('layers'), True), (sbp.nnx.Feedback, True)],
)  # fmt: skip
def test_feedback_that_an_optimizer_trains_is_named(wrt, is_trained):
  model, _ = make('nnx', sbp.rndf())
  before = sbp.nnx.feedback_weights(model)['layers/2/kernel']
  optimizer = nnx.Optimizer(model, sbp.optim.sgd(0.1, 0.0, 0.5), wrt=wrt)
  # Weight decay changes all that is trained.
  optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, wrt)))
  after = sbp.nnx.feedback_weights(model)['layers/2/kernel']
  assert (after != before).any() == is_trained
  message = 'layers/2/feedback/', 'rndf(): feedback is among the trained'
  with fails(*message) if is_trained else contextlib.nullcontext():
    matches(model, wrt=optimizer.wrt)
  matches(make('nnx', sbp.kolen_pollack())[0], wrt=wrt)


# --- assert_asymmetric_gradients, assert_symmetric_gradients


@every_kind
def test_an_asymmetric_model_is_told_from_backpropagation(kind):
  rules = {'function': sbp.brsf(), 'linen': sbp.frsf()}
  rule = rules.get(kind, sbp.kolen_pollack())
  model, variables = make(kind, rule)
  asymmetric(model, variables, loss, X)
  first, last = PATHS[kind]
  differ = f'{first}: 30 of 30 values differ, by up to '
  rows = f'{first} ', f'(5, 6)  {rule!r}  ', f'{last} ', f'(6, 3)  {rule!r}  '
  with fails('plain backpropagation:', differ, *rows, 'at 0\n') as caught:
    symmetric(model, variables, loss, X)
  assert f'{last}: ' not in str(caught.value)


@pytest.mark.optimized
@pytest.mark.parametrize('kind', ['function', 'nnx'])
def test_a_symmetric_model_is_backpropagation(kind):
  model, variables = make(kind, sbp.symmetric())
  symmetric(model, variables, loss, X)
  first, last = PATHS[kind]
  line = '  symmetric()  product, gradient at 0\n'
  with fails('than 0.01 degrees', first, f'(5, 6){line}', last, line):
    asymmetric(model, variables, loss, X)


def test_no_layer_below_an_asymmetric_one_is_backpropagation():
  first = make('function', {'W1': sbp.rndf(), '': sbp.symmetric()})
  symmetric(*first, loss, X)
  with fails('rndf()       product, gradient at 0', 'symmetric()  '):
    asymmetric(*first, loss, X)
  with fails('Dense_1/kernel', 'plain backpropagation', 'gradient at 0'):
    asymmetric(small.MLP(), small.MLP().init(small.KEY, X), loss, X)


def test_min_angle_is_the_bound():
  f, variables = make('function', sbp.usf())
  own, true = (
    jax.jit(jax.grad(lambda params, g=g: loss(g(params))))(variables['params'])
    for g in (lambda params: f(params, None, X), lambda W: small.mlp(W, X))
  )
  angle = float(sbp.metrics.alignment_angle(true['W1'], own['W1']))
  asymmetric(f, variables, loss, X, min_angle=0.99 * angle)
  with fails(f'{1.01 * angle:g} degrees', 'W1', f'at {angle:.4g}\n'):
    asymmetric(f, variables, loss, X, min_angle=1.01 * angle)


def test_linen_models_with_state_and_keys():
  rngs = {'params': small.KEY, 'dropout': small.KEY}
  options = {'rngs': rngs, 'mutable': ['batch_stats'], 'train': True}
  variables = jax.jit(lambda: small.MLP().init(rngs, X, train=True))()
  model = sbp.with_feedback(small.MLP(), sbp.symmetric())
  symmetric(model, variables, loss, X, **options)


def test_an_nnx_model_is_left_as_it_was():
  model = sbp.with_feedback(nnx_models.Noisy(nnx.Rngs(0)), sbp.usf())
  before = nnx_models.state(model, ...)
  asymmetric(model, None, loss, nnx_models.X)
  assert_same_bits(nnx_models.state(model, ...), before)


def test_feedback_and_output_are_checked_first(monkeypatch):
  with fails('must match the parameters:', 'W2:', 'nothing, but'):
    asymmetric(*small.with_last_state('function', {}), loss, X)
  use_V = lambda op, xs, W, V, *_: op(xs, V)
  monkeypatch.setattr(transform, 'asymmetric', use_V)
  with fails('output must be that of the plain model:', '12 of 12 values'):
    asymmetric(*make('function', sbp.usf()), loss, X)


@pytest.mark.parametrize('factor', [0.0, float('nan')])
def test_gradients_that_prove_nothing_fail(factor):
  model = make('function', sbp.symmetric())
  for check in (asymmetric, symmetric):
    with fails('backpropagation', 'gradient at nan'):
      check(*model, lambda y: (factor * y).sum(), X)


@pytest.mark.parametrize(
  'subject, error, message',
  [
    ((small.mlp, None), TypeError, 'a function of with_feedback, a flax'),
    ((small.MLP(), None), ValueError, "'params', not PyTreeDef.None"),
    ((small.MLP(), {'w': X}), ValueError, "'params', not PyTreeDef.{'w'"),
    ((nnx_models.Noisy(nnx.Rngs(0)), {}), ValueError, 'variables must be None'),
  ],
)
def test_models_and_variables_must_go_together(subject, error, message):
  with pytest.raises(error, match=message):
    asymmetric(*subject, loss, X)


@pytest.mark.parametrize('number', [-1.0, 180.0, float('nan')])
def test_numbers_must_be_in_range(number):
  with pytest.raises(ValueError, match=f'p_flip must be .*not {number}'):
    concordant(X, X, number)
  with pytest.raises(ValueError, match=f'min_angle must be.*not {number}'):
    asymmetric(small.mlp, {}, loss, X, min_angle=number)
