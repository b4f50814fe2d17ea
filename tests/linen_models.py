"""Unmodified Linen models, as users have them, and what tests ask of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.cases import RULES

KEY = jax.random.key(0)


RNGS = {'feedback': jax.random.key(7)}


every_rule = pytest.mark.parametrize('rule', RULES.values(), ids=str)


class CNN(nn.Module):
  """Plain Flax, as users have it."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(8)(x))
    return nn.Dense(3)(x)


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
    x = x + y
    return nn.Dense(3)(nn.relu(nn.Dense(8)(nn.LayerNorm()(x))).mean(1))


class Remat(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.remat(nn.Dense)(8)(x)
    return nn.remat(CNN)(name='cnn')(x)


class Shared(nn.Module):
  def setup(self):
    self.layer = nn.Dense(6)
    self.head = nn.Dense(3)

  def __call__(self, x):
    return self.head(jnp.tanh(self.layer(jnp.tanh(self.layer(x)))))

  def encode(self, x):
    return self.layer(x)


class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    recur = nn.RNN(
      nn.GRUCell(5),
      variable_broadcast=['params', 'feedback'],
      split_rngs={'params': False, 'feedback': False},
    )
    return nn.Dense(3)(recur(x)[:, -1])


class Nested(nn.Module):
  model: nn.Module  # the name of the wrapper's own property, on purpose

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.relu(self.model(x)))


MODELS = {
  'CNN': (CNN(), (4, 6, 6, 2)),
  'attention': (Attention(), (4, 5, 6)),
  'remat': (Remat(), (4, 6, 6, 2)),
  'shared': (Shared(), (4, 6)),
  'recurrent': (Recurrent(), (4, 5, 3)),
  'nested': (Nested(nn.Sequential([nn.Dense(4), jnp.tanh])), (4, 5)),
}


every_model = pytest.mark.parametrize(
  'model, shape', MODELS.values(), ids=MODELS
)


def gradient(model, variables, x, rngs=RNGS):
  def loss(params):
    y = model.apply({**variables, 'params': params}, x, rngs=rngs)
    return (y**2).sum()

  return jax.jit(jax.grad(loss))(variables['params'])


def weights_used(model, variables, x, rngs):
  _, sown = model.apply(variables, x, rngs=rngs, mutable='feedback_weights')
  return sown['feedback_weights']


class Custom(nn.Module):
  @nn.compact
  def __call__(self, x):
    W = self.param('W', nn.initializers.normal(), (x.shape[-1], 4))
    return x @ W
