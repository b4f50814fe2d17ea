"""Two small models, in Linen and in NNX, and how an assertion on them fails."""

import re

import flax.linen as nn
import jax
import pytest
from flax import nnx

from symjax_bp import linen
from symjax_bp import nnx as asymmetric
from tests.cases import normal

KEY = jax.random.key(0)
RNGS = {'feedback': jax.random.key(7)}
X = normal(0, (4, 5))


class MLP(nn.Module):
  """Plain Flax; ``train`` needs a key stream and changes a collection."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.tanh(nn.Dense(6)(x))
    if train:
      x = nn.BatchNorm(use_running_average=False)(x)
      x = nn.Dropout(0.5, deterministic=False)(x)
    return nn.Dense(3)(x)


def linen_model(rule, **options):
  """The model with the rule, and its variables."""
  model = linen.with_feedback(MLP(), rule, **options)
  return model, model.init({'params': KEY, **RNGS}, X)


def nnx_model(rule, **options):
  """The same architecture in NNX."""
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(5, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 3, rngs=rngs)
  )
  return asymmetric.with_feedback(model, rule, rngs=nnx.Rngs(1), **options)


def fails(*parts):
  """Expects an AssertionError with these texts in this order."""
  pattern = '(?s)' + '.*'.join(map(re.escape, parts))
  return pytest.raises(AssertionError, match=pattern)
