"""The five networks of the paper's Table 1, in plain Flax.

A network is a list of layers as data. ``A x B x C / D`` in the paper is ``C``
feature maps of size ``A x B`` with stride ``D``. Rectified linear units follow
every layer of weights but the last. Batch normalization, where a condition has
it, precedes them and replaces the bias.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.training.pooling import Pool, pool
from symjax_bp.linen import BatchNorm


@dataclasses.dataclass(frozen=True)
class Conv:
  """``features`` maps of ``size x size``, zero padding on all sides."""

  size: int
  features: int
  stride: int = 1
  padding: int = 0


@dataclasses.dataclass(frozen=True)
class Full:
  """Fully connected; ``features`` as a function of the number of classes."""

  features: Callable[[int], int]


def _full(features: int) -> Full:
  return Full(lambda classes: features)


_CLASSES = Full(lambda classes: classes)

Layers = tuple[Conv | Pool | Full, ...]
NETWORKS: dict[str, Layers] = {
  'general': (
    Conv(9, 48, stride=2),
    Pool('max', 2, 2),
    Conv(5, 128),
    Pool('max', 2, 2),
    Full(lambda classes: max(256, 3 * classes)),
    Full(lambda classes: 2 * classes),
    _CLASSES,
  ),
  'mnist': (
    Conv(5, 20),
    Pool('max', 2, 2),
    Conv(5, 50),
    Pool('max', 2, 2),
    _full(500),
    _CLASSES,
  ),
  'cifar': (
    Conv(5, 32, padding=2),
    Pool('max', 3, 2, padding=1),
    Conv(5, 64, padding=2),
    Pool('average', 3, 2, padding=1),
    Conv(5, 64, padding=2),
    Pool('average', 3, 2, padding=1),
    _full(128),
    _CLASSES,
  ),
  'svhn': (
    Conv(5, 20),
    Pool('max', 2, 2),
    Conv(7, 512),
    Pool('max', 2, 2),
    _full(40),
    _CLASSES,
  ),
  'timit': (_full(512), _full(256), _CLASSES),
}


def rectified_once(x: jax.Array) -> jax.Array:
  """``flax.linen.relu`` as a choice between two arrays.

  XLA:CPU recomputes an operation with a single operand at every use, and with
  it everything that is fused into it: here, the pooling.
  """
  return jnp.where(x <= 0, jnp.zeros_like(x), x)


class Network(nn.Module):
  """A network under one condition.

  Attributes:
    layers: such as an entry of ``NETWORKS``; the last one has no
      rectification.
    classes: number of classes.
    batch_norm: 'none', 'plain' or 'affine'.
    initial_stds: standard deviations of the initial weights by layer, from the
      input on; the last one is that of all further layers. Biases are 0.
    epsilon: of batch normalization, in units of the variance.
    axis_name: of the devices over which batch statistics are taken.
  """

  layers: Layers
  classes: int
  batch_norm: str = 'none'
  initial_stds: tuple[float, ...] = (0.01,)
  epsilon: float = 1e-4
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits ``(batch, classes)``."""
    options: dict[str, Any] = {}
    further = itertools.repeat(self.initial_stds[-1])
    stds = itertools.chain(self.initial_stds, further)
    for layer, following in itertools.pairwise(self.layers):
      if isinstance(layer, Pool):
        x = pool(x, layer)
        x = rectified_once(x) if layer.kind == 'max' else x
        continue
      options['kernel_init'] = nn.initializers.normal(next(stds))
      options['use_bias'] = self.batch_norm == 'none'
      if isinstance(layer, Conv):
        x = nn.Conv(
          layer.features,
          (layer.size, layer.size),
          layer.stride,
          padding=layer.padding,
          **options,
        )(x)
      else:
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(layer.features(self.classes), **options)(x)
      if self.batch_norm != 'none':
        affine = self.batch_norm == 'affine'
        x = BatchNorm(
          use_running_average=not train,
          epsilon=self.epsilon,
          use_scale=affine,
          use_bias=affine,
          axis_name=self.axis_name,
        )(x)
      # Rectifying commutes with maxima: after them there is less to rectify.
      if not (isinstance(following, Pool) and following.kind == 'max'):
        x = nn.relu(x)
    options['kernel_init'] = nn.initializers.normal(next(stds))
    options['use_bias'] = True
    return nn.Dense(self.classes, name='output', **options)(x)


def multiply_adds(
  layers: Layers, shape: tuple[int, ...], classes: int
) -> list[int]:
  """Multiply-adds of a forward pass of one example, by layer of weights."""
  *spatial, features = shape
  counts = []
  for layer in layers:
    if isinstance(layer, Full):
      inputs = math.prod(spatial) * features
      spatial, features = [], layer.features(classes)
      counts.append(inputs * features)
      continue
    padding = layer.padding * (2 if isinstance(layer, Conv) else 1)
    spatial = [(n + padding - layer.size) // layer.stride + 1 for n in spatial]
    if isinstance(layer, Conv):
      window = layer.size**2 * features
      features = layer.features
      counts.append(math.prod(spatial) * features * window)
  return counts


def training_flops(layers: Layers, shape: tuple[int, ...], classes: int) -> int:
  """Floating point operations of one training step of one example.

  Forward, dW and dx of every layer of weights; the first layer needs no dx.
  """
  first, *others = multiply_adds(layers, shape, classes)
  return 2 * (2 * first + 3 * sum(others))
