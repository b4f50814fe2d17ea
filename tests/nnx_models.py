"""NNX models as users write them, and what the tests ask of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from symjax_bp.nnx import Feedback
from tests.cases import normal

X, IMAGES, SEQUENCES = (
  normal(0, shape) for shape in ((4, 3), (4, 6, 6, 2), (2, 5, 6))
)


def weight(rngs, *shape):
  return nnx.Param(jax.random.normal(rngs.params(), shape))


class Net(nnx.Module):
  """Any attributes, and a function that is called with them."""

  def __init__(self, call, **attributes):
    self.call = call
    for name, value in attributes.items():
      setattr(self, name, value)

  def __call__(self, x):
    return self.call(self, x)


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(3, 5, rngs=rngs)
    self.head = nnx.Linear(5, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.encode(x))

  def encode(self, x):
    return nnx.tanh(self.body(x))


class Noisy(MLP):
  """Its calls change statistics and keys."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)

  def encode(self, x):
    return self.dropout(self.norm(super().encode(x)))


class CNN(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    layers = nnx.Linear(4 * 9, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
    self.layers = nnx.List(layers)

  def __call__(self, x):
    x = nnx.relu(self.conv(x))
    x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
    return self.layers[1](nnx.relu(self.layers[0](x)))


class NoPytree(nnx.Module, pytree=False):
  def __init__(self, rngs):
    self.layers = [nnx.Linear(3, 3, rngs=rngs) for _ in range(2)]

  def __call__(self, x):
    return self.layers[1](nnx.tanh(self.layers[0](x)))


class Mixin:
  """Comes behind nnx.Module, and has products of its own."""

  def __call__(self, x):
    return nnx.tanh(x @ self.body.kernel[...]) @ self.head.kernel[...]


class Mixed(nnx.Module, Mixin):
  __init__ = MLP.__init__


class Methods(MLP):
  """Products by hand behind each kind of method."""

  @nnx.jit
  def __call__(self, x):
    return super().__call__(x)

  def _private(self, x, sign=1):
    return sign * nnx.tanh(x @ self.body.kernel[...]) @ self.head.kernel[...]

  negative = functools.partialmethod(_private, sign=-1)
  __matmul__ = __rmul__ = _private
  rematted = nnx.remat(_private)

  def stream(self, x):
    yield (x := nnx.tanh(x @ self.body.kernel[...]))
    yield x @ self.head.kernel[...]

  def branched(self, x):
    call = lambda model, x: model._private(x)
    return nnx.cond(x[0, 0] > 9, call, call, self, x)


class Transposed(nnx.Module):
  def __init__(self, kernel):
    self.kernel = kernel

  def __call__(self, x):
    return x @ self.kernel[...].T


class Autoencoder(nnx.Module):
  """The decoder holds the encoder's own parameter, or one of its own."""

  def __init__(self, rngs, tied=True):
    self.enc = nnx.Linear(3, 5, use_bias=False, rngs=rngs)
    kernel = self.enc.kernel
    self.dec = Transposed(kernel if tied else nnx.Param(kernel[...] * 2))

  def __call__(self, x):
    return self.dec(nnx.tanh(self.enc(x)))

  def by_hand(self, x):
    return nnx.tanh(self.enc(x)) @ self.enc.kernel[...].T


class LowRank(nnx.Linear):
  """A layer with a product beside Flax's, and a second name of its kernel."""

  def __init__(self, size, rngs):
    super().__init__(size, size, rngs=rngs)
    self.down, self.up = weight(rngs, size, 2), weight(rngs, 2, size)
    self.alias = self.kernel

  def __call__(self, x):
    return super().__call__(x) + x @ self.down[...] @ self.up[...] @ self.alias


class Stack(nnx.Module):
  """Four layers in one, more than the three numbers of a seed of brSF."""

  def __init__(self, make, rngs=None, axes=0):
    make = nnx.split_rngs(splits=4)(nnx.vmap(make))
    self.layers, self.axes = make(rngs or nnx.Rngs(0, feedback=2)), axes

  def __call__(self, x):
    scan = nnx.scan(in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
    return scan(lambda layer, x: layer(x))(self.layers, x)


def containers(rngs):
  def call(self, x):
    for name in self.weights:
      x = nnx.tanh(x @ self.weights[name][...])
    x = nnx.tanh(self.raw[0]['layer'](self.layers[0][0](x))) @ self.raw[1][...]
    return nnx.tanh(x) @ self.tree.get_value()['w'][0]

  make = lambda: nnx.Linear(3, 3, rngs=rngs)
  return Net(
    call,
    layers=nnx.List([nnx.List([make()])]),
    weights=nnx.Dict(a=weight(rngs, 3, 3), b=weight(rngs, 3, 3)),
    raw=nnx.data([{'layer': make()}, weight(rngs, 3, 3)]),
    tree=nnx.Param({'w': [jax.random.normal(rngs.params(), (3, 2))]}),
  )


def masked(rngs):
  return Net(
    lambda m, x: nnx.tanh(x @ (m.kernel * m.mask)) @ m.head[...],
    kernel=weight(rngs, 3, 3),
    head=weight(rngs, 3, 2),
    mask=jnp.tril(jnp.ones((3, 3))),
  )


def stateful(rngs):
  """Its data are in a variable."""

  def call(self, x):
    for _ in range(2):
      self.h[...] = nnx.tanh(self.h[...] @ self.kernel[...])
    return self.h[...]

  return Net(call, kernel=weight(rngs, 3, 3), h=nnx.Variable(X))


def normalized(rngs):
  make = lambda: nnx.Linear(3, 3, rngs=rngs)
  spectral = nnx.SpectralNorm(make(), rngs=rngs)
  return Net(
    # It returns all arrays, also those that are attributes: the scales.
    lambda m, x: nnx.remat(lambda layers, x: layers(x))(m.layers, x),
    layers=nnx.Sequential(nnx.WeightNorm(make(), rngs=rngs), spectral, make()),
  )


def linen_in_nnx(rngs):
  model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
  return nnx.bridge.ToNNX(model, rngs=rngs).lazy_init(X)


MODELS = {
  'containers': (containers, X),
  'no pytree': (NoPytree, X),
  'mixin': (Mixed, X),
  'statistics and keys': (Noisy, X),
  'jitted method': (Methods, X),
  'tied': (Autoencoder, X),
  'low rank': (lambda rngs: nnx.Sequential(*[LowRank(3, rngs)] * 2), X),
  'mask': (masked, X),
  'state': (stateful, X),
  'stack': (
    lambda rngs: Stack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), rngs),
    X,
  ),
  'normalized': (normalized, X),
  'Linen': (linen_in_nnx, X),
}


def plain_arrays(tree):
  """Keys as the integers that they hold."""
  is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda a: jax.random.key_data(a) if is_key(a) else a, tree
  )


def state(model, kind=None):
  """{path: arrays} of a model; by default all but feedback."""
  kind = kind or nnx.Not(Feedback)
  return plain_arrays(nnx.to_pure_dict(nnx.state(model, kind)))


def params(model):
  return state(model, nnx.Param)


def gradient_and_output(model, x, call=lambda model, x: model(x)):
  """Gradient of sum(y^2) in the parameters, and y."""

  def loss(model, x):
    y = call(model, x)
    return (y**2).sum(), y

  dW, y = nnx.grad(loss, has_aux=True)(model, x)
  return nnx.to_pure_dict(dW), y


def gradient(model, x, **kwargs):
  return gradient_and_output(model, x, **kwargs)[0]
