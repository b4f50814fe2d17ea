"""Unmodified NNX models, as users have them, and what tests ask of them."""

import jax
from flax import nnx


class CNN(nnx.Module):
  """Plain Flax, as users have it."""

  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.layers = nnx.List([
      nnx.Linear(4 * 9, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs),
    ])  # fmt: skip

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
    return self.layers[1](nnx.relu(self.layers[0](x)))


SHAPE = (4, 6, 6, 2)


class Stack(nnx.Module):
  """Three layers in one, as large models have them."""

  def __init__(self, make):
    make = nnx.split_rngs(splits=3)(nnx.vmap(make))
    self.layers = make(nnx.Rngs(0, feedback=2))

  def __call__(self, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def layer(layer, x):
      return layer(x)

    return layer(self.layers, x)


def params(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def input_gradient(model, x, g):
  graph, state = nnx.split(model)

  def call(x):  # On a copy: Flax's transforms take no modules from outside.
    return nnx.merge(graph, state, copy=True)(x)

  return jax.vjp(call, x)[1](g)[0]
