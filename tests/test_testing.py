"""Assertions on signs and state pass where they should and fail by path."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from symjax_bp import testing
from tests.cases import RULES, normal
from tests.small_models import RNGS, X, fails, linen_model, nnx_model

every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)


def weights_used(model, variables):
  _, sown = model.apply(variables, X, rngs=RNGS, mutable='feedback_weights')
  return sown['feedback_weights']


@every_rule
def test_the_feedback_of_every_rule_has_the_signs_it_says(rule):
  model, variables = linen_model(rule)
  W, V = variables['params'], weights_used(model, variables)
  if rule.name == 'rndf':
    with fails('p_flip = 0:', 'Dense_0/kernel: ', ' of 30 signs flipped'):
      testing.assert_sign_concordant(W, V)
    return
  p_flip = getattr(rule, 'p_flip', 0.0)
  testing.assert_sign_concordant(W, V, p_flip)
  testing.assert_sign_concordant(
    W['Dense_0']['kernel'], V['Dense_0']['kernel'], p_flip
  )
  for wrong in {0.0, 1.0} - {p_flip}:
    with fails(f'p_flip = {wrong:g}:', 'Dense_0/kernel', 'Dense_1/kernel'):
      testing.assert_sign_concordant(W, V, wrong)


@pytest.mark.parametrize('p_flip', [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
def test_sound_draws_pass_at_twenty_keys_and_other_shares_fail(p_flip):
  W = normal(0, (50, 40))
  rule = sbp.frsf(p_flip)
  for seed in range(20):
    V = rule.weights(W, rule.draw(jax.random.key(seed), W))
    testing.assert_sign_concordant(W, V, p_flip)
    for wrong in (p_flip - 0.1, p_flip + 0.1):
      if 0 <= wrong <= 1:
        with fails(f'p_flip = {wrong:g}:', 'of 2000 signs flipped'):
          testing.assert_sign_concordant(W, V, wrong)


@pytest.mark.parametrize(
  'flipped, p_flip, num_sigmas, within',
  [
    # sigma = sqrt(0.2 * 0.8 / 400) = 0.02: 8 of 400 weights
    (80 + 31, 0.2, 4.0, True),
    (80 + 33, 0.2, 4.0, False),
    (80 - 31, 0.2, 4.0, True),
    (80 - 33, 0.2, 4.0, False),
    (80 + 15, 0.2, 2.0, True),
    (80 + 17, 0.2, 2.0, False),
    (0, 0.0, 4.0, True),
    (1, 0.0, 4.0, False),
    (400, 1.0, 4.0, True),
    (399, 1.0, 4.0, False),
  ],
)
def test_the_bound_is_that_of_the_binomial_share(
  flipped, p_flip, num_sigmas, within
):
  W = jnp.ones((400,))
  V = W.at[:flipped].set(-0.1)
  # Weights without a sign do not count, or the share would be halved.
  W, V = (jnp.concatenate([a, jnp.zeros(400)]) for a in (W, V))
  check = lambda: testing.assert_sign_concordant(
    W, V, p_flip, num_sigmas=num_sigmas
  )
  if within:
    check()
  else:
    with fails(f'{flipped} of 400 signs flipped, a share of '):
      check()


def test_the_message_has_the_bound():
  W = jnp.ones((400,))
  with fails('p_flip = 0.2:\n  400 of 400 signs flipped, a share of 1, not 0.2 '
             '+- 0.08 (4 sigmas)'):  # fmt: skip
    testing.assert_sign_concordant(W, -W, 0.2)


@pytest.mark.parametrize(
  'W, V, message',
  [
    ([1.0, 2.0], [1.0, 0.0], 'V alone is 0 at 1 of 2 weights'),
    ([1.0, 0.0], [1.0, 3.0], 'W alone is 0 at 1 of 2 weights'),
    ([1.0, 2.0], [1.0, jnp.nan], '1 of 2 values of V are not finite'),
    ([jnp.inf, 2.0], [1.0, 1.0], '1 of 2 values of W are not finite'),
    ([1.0, 2.0], [1.0], 'V has shape (1,), W has (2,)'),
    ([[1.0, 2.0]], [[1.0], [2.0]], 'V has shape (2, 1), W has (1, 2)'),
  ],
)
@pytest.mark.parametrize('p_flip', [0.0, 0.5])
def test_what_is_no_sign_of_W_fails_at_any_p_flip(W, V, message, p_flip):
  W, V = jnp.array(W), jnp.array(V)
  with fails('V must have the signs of W', message):
    testing.assert_sign_concordant(W, V, p_flip, num_sigmas=9.0)
  with fails('a/kernel: ', message):
    testing.assert_sign_concordant(
      {'a': {'kernel': W, 'bias': W}},
      {'a': {'kernel': V}},
      p_flip,
      num_sigmas=9.0,
    )


def test_every_layer_that_is_wrong_is_listed():
  W = {name: {'kernel': jnp.ones(3)} for name in 'abc'}
  V = {**W, 'a': {'kernel': -jnp.ones(3)}, 'c': {'kernel': jnp.zeros(3)}}
  with fails('a/kernel: 3 of 3', 'c/kernel: V alone is 0 at 3') as caught:
    testing.assert_sign_concordant(W, V)
  assert 'b/kernel' not in str(caught.value)


def test_feedback_without_a_counterpart_fails():
  W = {'a': {'kernel': jnp.ones(3)}}
  with fails("b/kernel: not in W, which has ['a/kernel']"):
    testing.assert_sign_concordant(W, {'b': {'kernel': jnp.ones(3)}})
  with fails("V: not in W, which has ['a/kernel']"):
    testing.assert_sign_concordant(W, jnp.ones(3))
  with fails('V has no leaves'):
    testing.assert_sign_concordant(W, {})


def test_dtypes_need_not_agree_and_zero_kernels_have_zero_feedback():
  W = normal(0, (3, 4))
  testing.assert_sign_concordant(W, W.astype(jnp.bfloat16))
  testing.assert_sign_concordant(jnp.zeros(3), jnp.zeros(3), 0.5)


@pytest.mark.parametrize('p_flip', [-0.1, 1.5, float('nan')])
def test_p_flip_must_be_a_probability(p_flip):
  with pytest.raises(ValueError, match=rf'p_flip must be .*not {p_flip}'):
    testing.assert_sign_concordant(jnp.ones(3), jnp.ones(3), p_flip)


def test_num_sigmas_must_not_be_negative():
  with pytest.raises(ValueError, match='num_sigmas must be 0 or more, not -1'):
    testing.assert_sign_concordant(jnp.ones(3), jnp.ones(3), num_sigmas=-1)


# --- assert_feedback_matches_params


@every_rule
def test_the_state_of_every_rule_matches(rule):
  testing.assert_feedback_matches_params(linen_model(rule)[1])
  testing.assert_feedback_matches_params(nnx_model(rule))


def broken(change):
  _, variables = linen_model(sbp.rndf())
  change(variables)
  return variables


def set_kernel(value):
  return lambda v: v['feedback']['Dense_0'].update(kernel=value)


@pytest.mark.parametrize(
  'change, message',
  [
    (set_kernel(jnp.ones((6, 5))),
     'Dense_0/kernel: feedback has shape (6, 5), the kernel has (5, 6)'),
    (set_kernel(jnp.ones((5, 6), jnp.bfloat16)),
     'Dense_0/kernel: feedback has dtype bfloat16, the kernel has float32'),
    (set_kernel(jnp.ones((5, 6)).at[1, 2].set(jnp.nan)),
     'Dense_0/kernel: 1 of 30 values are not finite'),
    (lambda v: v['feedback'].update(Dense_9={'kernel': jnp.ones(3)}),
     "Dense_9/kernel: no such kernel; the parameters are ['Dense_0/bias', "
     "'Dense_0/kernel',"),
    (lambda v: v['params'].update(feedback=v['feedback']),
     'feedback/Dense_0/kernel: feedback is among the parameters'),
    (lambda v: v['params'].update(feedback=v.pop('feedback')),
     'feedback/Dense_1/kernel: feedback is among the parameters'),
    (lambda v: v['params']['Dense_1'].update(feedback=jnp.ones((6, 3))),
     'Dense_1/feedback: feedback is among the parameters'),
    (lambda v: v['params'].update(feedback=jnp.ones(3)),
     '  feedback: feedback is among the parameters'),
  ],
)  # fmt: skip
def test_state_that_does_not_match_is_named(change, message):
  with fails('feedback must match the kernels:', message):
    testing.assert_feedback_matches_params(broken(change))


def test_all_mismatches_are_listed():
  def change(variables):
    first, second = (variables['feedback'][f'Dense_{i}'] for i in range(2))
    first['kernel'], second['kernel'] = second['kernel'], first['kernel']

  with fails(
    'Dense_0/kernel: feedback has shape (6, 3), the kernel has (5, 6)',
    'Dense_1/kernel: feedback has shape (5, 6), the kernel has (6, 3)',
  ):
    testing.assert_feedback_matches_params(broken(change))


def test_a_module_named_feedback_may_have_parameters():
  params = {'feedback': {'kernel': jnp.ones((2, 3))}}
  testing.assert_feedback_matches_params({'params': params})


def test_variables_must_have_params():
  with pytest.raises(ValueError, match=r"with 'params'.*not \['kernel'\]"):
    testing.assert_feedback_matches_params({'kernel': jnp.ones(3)})


def test_nnx_state_that_does_not_match_is_named():
  model = nnx_model(sbp.frsf())
  operation = model.layers[2].dot_general
  operation.kernel = asymmetric.Feedback(jnp.ones((3, 6)))
  with fails('layers/2/kernel: feedback has shape (3, 6)', '(6, 3)'):
    testing.assert_feedback_matches_params(model)
  operation.kernel = nnx.Param(jnp.ones((6, 3)))
  with fails('layers/2/kernel: feedback is among the parameters'):
    testing.assert_feedback_matches_params(model)
  operation.kernel = asymmetric.Feedback(jnp.full((6, 3), jnp.inf))
  with fails('layers/2/kernel: 18 of 18 values are not finite'):
    testing.assert_feedback_matches_params(model)
