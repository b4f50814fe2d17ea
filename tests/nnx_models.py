"""NNX models as users write them, and what the tests ask of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from symjax_bp.nnx import Feedback
from tests.cases import normal

X, IMAGES, SEQUENCES = (
  normal(0, shape) for shape in ((4, 3), (4, 6, 6, 2), (2, 5, 6))
)
# Compiles in half the time; what is trained has the default options.
fast_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def weight(rngs, *shape):
  return nnx.Param(jax.random.normal(rngs.params(), shape))


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.body = nnx.Linear(3, 5, rngs=rngs)
    self.head = nnx.Linear(5, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.encode(x))

  def encode(self, x):
    return nnx.tanh(self.body(x))


class CNN(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)
    layers = nnx.Linear(4 * 9, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
    self.layers = nnx.List(layers)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
    return self.layers[1](self.dropout(nnx.relu(self.layers[0](x))))


class Containers(nnx.Module):
  def __init__(self, rngs):
    make = lambda: nnx.Linear(3, 3, rngs=rngs)
    self.layers = nnx.List([nnx.List([make()]), make()])
    self.weights = nnx.Dict(a=weight(rngs, 3, 3), b=weight(rngs, 3, 3))
    self.raw = nnx.data([{'layer': make()}, weight(rngs, 3, 3)])
    self.tree = nnx.Param({'w': [jax.random.normal(rngs.params(), (3, 2))]})

  def __call__(self, x):
    for name in self.weights:
      x = nnx.tanh(x @ self.weights[name][...])
    x = self.layers[1](nnx.tanh(self.layers[0][0](x)))
    x = nnx.tanh(self.raw[0]['layer'](x)) @ self.raw[1][...]
    return nnx.tanh(x) @ self.tree.get_value()['w'][0]


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

  def stream(self, x):
    yield (x := nnx.tanh(x @ self.body.kernel[...]))
    yield x @ self.head.kernel[...]

  def __matmul__(self, x):
    return self._private(x)

  @nnx.remat
  def rematted(self, x):
    return self._private(x)

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


class Masked(nnx.Module):
  def __init__(self, rngs):
    self.kernel, self.head = weight(rngs, 3, 3), weight(rngs, 3, 2)
    self.mask = jnp.tril(jnp.ones((3, 3)))

  def __call__(self, x):
    return nnx.tanh(x @ (self.kernel * self.mask)) @ self.head[...]


class Stateful(nnx.Module):
  """Takes no input: its data are in a variable."""

  def __init__(self, rngs):
    self.kernel, self.h = weight(rngs, 3, 3), nnx.Variable(X)

  def step(self):
    self.h[...] = nnx.tanh(self.h[...] @ self.kernel[...])
    return self.h[...]

  def __call__(self, x):
    return self.step() + self.step()


class Recurrent(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=rngs)
    self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(6, 4, rngs=rngs))
    self.gru = nnx.GRUCell(4, 4, rngs=rngs)

  def __call__(self, x):
    x = self.rnn(self.attention(x))
    carry = jnp.zeros((2, 4))
    for i in range(2):
      carry, _ = self.gru(carry, x[:, i])
    return carry


class Language(nnx.Module):
  def __init__(self, rngs):
    self.embed, self.layer = nnx.Embed(5, 4, rngs=rngs), weight(rngs, 4, 4)

  def __call__(self, tokens):
    return self.embed.attend(nnx.tanh(self.embed(tokens) @ self.layer[...]))


class Stack(nnx.Module):
  """Three layers in one."""

  def __init__(self, make, axes=0, rngs=None):
    make = nnx.split_rngs(splits=3)(nnx.vmap(make))
    self.layers = make(rngs or nnx.Rngs(0, feedback=2))
    self.axes = axes

  def __call__(self, x):
    @nnx.scan(in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
    def layer(layer, x):
      return layer(x)

    return layer(self.layers, x)


class Changing(MLP):
  """Changes itself in all ways."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.twin = nnx.Linear(3, 5, rngs=rngs)
    self.seen = nnx.Variable({'sum': jnp.zeros(3), 'n': jnp.array(0)})
    self.items, self.head.extra = nnx.data([self.body]), 'gone'
    self.count, self.late = jnp.array(0), nnx.data(None)

  def __call__(self, x):
    y = super().__call__(x)
    self.calls = getattr(self, 'calls', 0) + 1
    self.count = self.count + 1
    self.body.bias[...] += 1
    self.seen['sum'] = self.seen['sum'] + x.sum(0)
    self.body, self.twin = self.twin, self.body
    self.items.append(self.body)
    if hasattr(self.head, 'extra'):
      del self.head.extra
    self.hidden = nnx.Intermediate((x, y))
    if self.late is None:
      self.late = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), self.head)
    return y


def linen_in_nnx(rngs):
  model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
  return nnx.bridge.ToNNX(model, rngs=rngs).lazy_init(X)


def sequence(*layers):
  return lambda rngs: nnx.Sequential(*(layer(rngs=rngs) for layer in layers))


_linear = functools.partial(nnx.Linear, 3, 3)
MODELS = {
  'CNN': (CNN, IMAGES),
  'containers': (Containers, X),
  'no pytree': (NoPytree, X),
  'mixin': (Mixed, X),
  'jitted method': (Methods, X),
  'tied': (Autoencoder, X),
  'low rank': (sequence(*[functools.partial(LowRank, 3)] * 2), X),
  'mask': (Masked, X),
  'state': (Stateful, X),
  'attention, recurrent': (Recurrent, SEQUENCES),
  'embedding': (Language, jnp.array([[0, 1, 4]])),
  'stack': (lambda rngs: Stack(lambda rngs: _linear(rngs=rngs), rngs=rngs), X),
  'generator': (
    sequence(
      functools.partial(nnx.ConvTranspose, 6, 4, (2,)),
      functools.partial(nnx.Einsum, 'bld,df->blf', (4, 4)),
      functools.partial(nnx.LinearGeneral, 4, (2, 3)),
    ),
    SEQUENCES,
  ),
  'LoRA': (
    sequence(_linear, functools.partial(nnx.LoRALinear, 3, 3, lora_rank=2)),
    X,
  ),
  'normalized': (
    lambda rngs: nnx.Sequential(
      nnx.WeightNorm(_linear(rngs=rngs), rngs=rngs),
      nnx.SpectralNorm(_linear(rngs=rngs), rngs=rngs),
      nnx.LayerNorm(3, rngs=rngs),
      _linear(rngs=rngs),
    ),
    X,
  ),
  'Linen': (linen_in_nnx, X),
}


def plain_arrays(tree):
  """Keys as the integers that they hold."""
  return jax.tree.map(
    lambda a: (
      jax.random.key_data(a)
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
      else a
    ),
    tree,
  )


def state(model, kind=nnx.Not(Feedback)):
  """{path: arrays} of a model."""
  return plain_arrays(nnx.to_pure_dict(nnx.state(model, kind)))


def params(model):
  return state(model, nnx.Param)


def gradient(model, *args, call=lambda model, *args: model(*args), **kwargs):
  """Of sum(y^2) in the parameters."""

  def loss(model, *args):
    return (call(model, *args) ** 2).sum()

  return nnx.to_pure_dict(nnx.grad(loss, **kwargs)(model, *args))


def differ(actual, expected):
  """Whether any leaf is another one, by more than rounding."""
  pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
  return any(not np.allclose(a, b, rtol=1e-3) for a, b in pairs)
