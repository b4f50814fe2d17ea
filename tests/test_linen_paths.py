"""Which layer gets which rule, and what is refused or left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import symjax_bp as sbp
from symjax_bp import linen
from tests.cases import assert_same_bits, normal
from tests.linen_models import (
  CNN,
  KEY,
  RNGS,
  Custom,
  gradient,
  weights_used,
)


def test_rules_by_path():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(
    CNN(), {'Conv': sbp.rndf(), '^Dense_0$': sbp.usf(), '.*': sbp.symmetric()}
  )
  rules = {
    path: rule for path, (_, rule) in linen.layer_rules(model, x).items()
  }
  assert rules == {
    'Conv_0': sbp.rndf(), 'Dense_0': sbp.usf(), 'Dense_1': sbp.symmetric(),
  }  # fmt: skip
  variables = model.init(KEY, x)
  assert list(variables['feedback']) == ['Conv_0']
  V = weights_used(model, variables, x, RNGS)
  assert_same_bits(
    V['Dense_1'], {'kernel': variables['params']['Dense_1']['kernel']}
  )


def test_rules_by_path_change_just_the_layers_below():
  """A layer's V is seen by what comes before it, never by its own dW."""
  x = normal(0, (4, 6, 6, 2))
  variables = CNN().init(KEY, x)
  plain = gradient(CNN(), variables, x)
  last = linen.with_feedback(CNN(), {'Dense_1': sbp.usf(), '': sbp.symmetric()})
  actual = gradient(last, variables, x)
  assert_same_bits(actual['Dense_1'], plain['Dense_1'])
  for name in ('Dense_0', 'Conv_0'):
    assert not np.allclose(actual[name]['kernel'], plain[name]['kernel'])
  first = linen.with_feedback(CNN(), {'Conv': sbp.usf(), '': sbp.symmetric()})
  assert_same_bits(gradient(first, variables, x), plain)


@pytest.mark.parametrize(
  'rule, exclude, message',
  [
    ({'Conv_9': sbp.usf(), '': sbp.usf()}, (), r"'Conv_9' matches nothing.*"
     r"'Conv_0', 'Dense_0', 'Dense_1'"),
    ({'Conv_0': sbp.usf()}, (), "layer 'Dense_0' matches none of"),
    (sbp.usf(), 'Conv_7', "'Conv_7' matches nothing"),
  ],
)  # fmt: skip
def test_patterns_that_miss_are_errors(rule, exclude, message):
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), rule, exclude)
  with pytest.raises(ValueError, match=message):
    model.init(KEY, x)
  with pytest.raises(ValueError, match=message):
    model.apply(CNN().init(KEY, x), x)


class Tied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(5, 4)
    return embed.attend(nn.Dense(4)(embed(tokens)))


class LookUp(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(4)(nn.Embed(5, 4)(tokens))


TOKENS = jnp.array([[0, 1, 4]])


UNSUPPORTED = {
  'ConvLocal': (nn.ConvLocal(3, (2,)), normal(0, (2, 5, 3)), 'kernel'),
  'ConvTranspose': (nn.ConvTranspose(3, (2,)), normal(0, (2, 5, 3)), 'kernel'),
  'Einsum': (nn.Einsum((3, 4), 'bi,io->bo'), normal(0, (2, 3)), 'kernel'),
  'custom': (
    nn.Sequential([Custom(), nn.Dense(2)]), normal(0, (2, 3)), 'layers_0/W'
  ),
  'LSTM': (
    nn.RNN(nn.OptimizedLSTMCell(3)), normal(0, (2, 5, 3)), 'cell/(if|hf|ii)'
  ),
  'tied embedding': (Tied(), TOKENS, 'Embed_0/embedding'),
}  # fmt: skip


@pytest.mark.parametrize(
  'model, x, path', UNSUPPORTED.values(), ids=UNSUPPORTED
)
def test_weights_that_can_not_be_asymmetric_are_refused_by_name(model, x, path):
  asymmetric = linen.with_feedback(model, sbp.usf())
  with pytest.raises(ValueError, match=f"asymmetric: '.*{path}"):
    asymmetric.init(KEY, x)
  allowed = linen.with_feedback(model, sbp.usf(), exclude='.*')
  assert_same_bits(allowed.init(KEY, x), model.init(KEY, x))


def test_an_embedding_that_is_only_looked_up_needs_no_feedback():
  model = linen.with_feedback(LookUp(), sbp.usf())
  gradient(model, model.init(KEY, TOKENS), TOKENS)


def test_excluded_layers_are_left_alone():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), sbp.usf(), exclude=['Dense_1$'])
  variables = model.init(KEY, x)
  assert set(weights_used(model, variables, x, None)) == {'Conv_0', 'Dense_0'}
  assert linen.layer_rules(model, x)['Dense_1'][1] is None


def test_an_operation_of_the_users_own_is_not_replaced_silently():
  layer = nn.Dense(3, dot_general=jax.lax.dot_general)
  with pytest.raises(ValueError, match='operation of its own'):
    linen.with_feedback(layer, sbp.usf()).init(KEY, normal(0, (2, 4)))


def test_the_table_says_what_is_plain():
  x = normal(0, (2, 3))
  model = nn.Sequential([Custom(), nn.Dense(2)])
  wrapped = linen.with_feedback(model, sbp.brsf(0.25), exclude='layers_0/W')
  assert linen.feedback_table(wrapped, x).splitlines() == [
    'layer       shape   feedback',
    'layers_0/W  (3, 4)  plain backpropagation',
    'layers_1    (4, 2)  brsf(p_flip=0.25)',
  ]
  assert 'brsf' not in linen.feedback_table(model, x)
