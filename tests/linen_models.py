"""Linen models as users write them, and what the tests ask of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases import normal

KEY, RNGS = jax.random.key(0), {'feedback': jax.random.key(7)}
X, IMAGES = normal(0, (4, 5)), normal(0, (4, 6, 6, 2))


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
    return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Autoencoder(nn.Module):
  def setup(self):
    self.enc, self.dec = nn.Dense(5), nn.Dense(5)

  def __call__(self, x):
    return self.dec(self.encode(jnp.tanh(self.dec(self.encode(x)))))

  def encode(self, x):
    return jnp.tanh(self.enc(x))

  def score(self, x):
    return self(x).sum()


class Outer(nn.Module):
  detached: nn.Module  # A name that with_feedback's own class uses too.

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(self.detached(x) + self.detached(2 * x))


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    each = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
    scan = nn.scan(lambda layer, x, _: (jnp.tanh(layer(x)), None), **each)
    x, _ = scan(nn.Dense(5, name='stack'), x, jnp.zeros(3))
    return nn.vmap(nn.Dense, in_axes=None, axis_size=3, **each)(2)(x).sum(0)


class OneScope(nn.Module):
  def setup(self):
    self.first, self.second = nn.Dense(3), nn.Dense(2)
    nn.share_scope(self, self.first)

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x)))


class ByHand(nn.Module):
  """A layer that is called, applied by hand (F1) and transposed (F2b)."""

  def setup(self):
    self.body = nn.Dense(4, use_bias=False)
    self.head = nn.Dense(2, use_bias=False)

  def __call__(self, x):
    h = nn.tanh(self.body(x))
    y = self.head(h)
    params = self.head.variables['params']
    return (y + self.head.apply({'params': params}, h)) @ params['kernel'].T


_boxed = nn.with_logical_partitioning(
  nn.initializers.lecun_normal(), ('in', 'out')
)
MODELS = {
  'methods, shared layers': (Autoencoder(), X),
  'jit, remat': (
    nn.Sequential([nn.jit(nn.Dense)(5), nn.remat(nn.Dense)(4)]),
    X,
  ),
  'scan, vmap': (Stack(), X),
  'nested': (Outer(nn.Sequential([nn.Dense(4), jnp.tanh])), X),
  'shared scope': (OneScope(), X[:, :3]),
  'by hand': (ByHand(), X),
  'boxed': (
    nn.Sequential(
      [nn.Dense(4), nn.WeightNorm(nn.Dense(2, kernel_init=_boxed))]
    ),
    X,
  ),
}


def gradient(model, variables, x, **options):
  """Of sum(y^2) in the parameters."""

  def loss(params):
    y = model.apply({**variables, 'params': params}, x, **options)
    return (y**2).sum()

  return jax.grad(loss)(variables['params'])


def without_feedback(variables):
  names = [name for name in variables if 'feedback' not in name]
  return {name: variables[name] for name in names}
