"""One small model as a function, in Linen and in NNX, sound and broken."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import symjax_bp as sbp
from tests.cases import normal

KEY = jax.random.key(0)
X = normal(0, (4, 5))
PATHS = {  # of the first kernel, (5, 6), and the last one, (6, 3)
  'function': ('W1', 'W2'),
  'linen': ('Dense_0/kernel', 'Dense_1/kernel'),
  'nnx': ('layers/0/kernel', 'layers/2/kernel'),
}
every_kind = pytest.mark.parametrize('kind', PATHS)


def mlp(params, x):
  return jnp.tanh(x @ params['W1']) @ params['W2']


def loss(y):
  return (y**2).sum()


class MLP(nn.Module):
  """Plain Flax; ``train`` needs a key stream and changes a collection."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.tanh(nn.Dense(6)(x))
    if train:
      x = nn.BatchNorm(use_running_average=False)(x)
      x = nn.Dropout(0.5, deterministic=False)(x)
    return nn.Dense(3)(x)


def make(kind, rules, exclude=()) -> tuple[Any, Any]:
  """The model with rules, and its variables."""
  if kind == 'nnx':
    rngs = nnx.Rngs(0)
    mlp_nnx = nnx.Sequential(
      nnx.Linear(5, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 3, rngs=rngs)
    )
    return sbp.with_feedback(mlp_nnx, rules, exclude, rngs=rngs), None
  if kind == 'linen':
    model = sbp.with_feedback(MLP(), rules, exclude)
    return model, model.init(KEY, X)
  model = sbp.with_feedback(mlp, rules, exclude)
  params = {'W1': normal(1, (5, 6)) / 2, 'W2': normal(2, (6, 3)) / 2}
  return model, {'params': params, 'feedback': model.init(KEY, params)}


def weights(kind, model, variables):
  """Trees of W and V."""
  if kind == 'nnx':
    return nnx.state(model, nnx.Param), sbp.nnx.feedback_weights(model)
  W = variables['params']
  if kind == 'linen':
    return W, sbp.linen.feedback_weights(model, variables, X)
  return W, model.weights(W, variables['feedback'])


# Wrong states of the last kernel under frsf(0.5), and the message for each.
NAME, KEEPS = 'frsf(p_flip=0.5)', 'frsf(p_flip=0.5) keeps float32(6, 3)'
R = jnp.ones((6, 3))
STATES = {
  'shape': ({NAME: R.T}, f'{NAME}: float32(3, 6), but {KEEPS}'),
  'dtype': ({NAME: R.astype('bfloat16')},
            f'{NAME}: bfloat16(6, 3), but {KEEPS}'),
  'values': ({NAME: R.at[1, 2].set(jnp.nan)},
             f'{NAME}: 1 of 18 values are not finite'),
  'rule': ({'rndf()': R}, f'rndf(): float32(6, 3), but {NAME} keeps nothing'),
  'nothing': ({}, f'{NAME}: nothing, but {KEEPS}'),
}  # fmt: skip


def with_last_state(kind, state):
  """The model with ``frsf(0.5)``, but this state of the last kernel."""
  model, variables = make(kind, sbp.frsf(0.5))
  if kind == 'nnx':
    store = model.layers[2].feedback
    delattr(store, '0:frsf(p_flip=0.5)')
    for name, each in state.items():
      setattr(store, f'0:{name}', sbp.nnx.Feedback(each))
  elif kind == 'linen':
    named = {f'kernel:{name}': each for name, each in state.items()}
    variables['feedback']['Dense_1'] = named
  else:
    variables['feedback']['W2'] = state
  return model, variables


def fails(*parts):
  """Expects an AssertionError with these texts in this order."""
  pattern = '(?s)' + '.*'.join(map(re.escape, parts))
  return pytest.raises(AssertionError, match=pattern)
