"""The layers' own operations, one after the other: what a step can't go below.

Forward, dW and dx of every layer of weights (no dx of the first), each compiled
alone on random arrays: no pooling, no batch norm, no update.
"""

from collections.abc import Callable, Iterator

import jax

from experiments.bench.contenders import Contender
from experiments.bench.results import OPERATIONS
from experiments.bench.workload import Workload
from experiments.datasets import SHAPES
from experiments.training.models import ARCHITECTURES, Conv, Full
from symjax_bp import primitives

Operation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def contender(workload: Workload) -> Contender:
  """All operations of a network, as one step."""
  steps = [
    step
    for at, (operation, x, W) in enumerate(_layers(workload))
    for step in _steps(operation, x, W, wants_dx=at > 0)
  ]
  return Contender(
    name=OPERATIONS,
    step=lambda: [jax.block_until_ready(step()) for step in steps],
  )


def _layers(
  workload: Workload,
) -> Iterator[tuple[Operation, tuple[int, ...], tuple[int, ...]]]:
  """Operation, shape of x and shape of W of each layer of weights."""
  shape = (workload.batch, *SHAPES[workload.architecture])
  for layer in ARCHITECTURES[workload.architecture]:
    batch, *spatial, features = shape
    if isinstance(layer, Full):
      inputs = features
      for size in spatial:
        inputs *= size
      outputs = layer.features(workload.classes)
      yield primitives.dense, (batch, inputs), (inputs, outputs)
      shape = (batch, outputs)
      continue
    ends = layer.padding * (2 if isinstance(layer, Conv) else 1)
    spatial = [(n + ends - layer.size) // layer.stride + 1 for n in spatial]
    if isinstance(layer, Conv):
      yield _conv(layer), shape, (layer.size, layer.size, features,
                                  layer.features)  # fmt: skip
      features = layer.features
    shape = (batch, *spatial, features)


def _conv(layer: Conv) -> Operation:
  padding = ((layer.padding, layer.padding),) * 2
  return lambda x, W, V: primitives.conv(
    x, W, V, layer.stride, padding, row_convolution=True
  )


def _steps(
  operation: Operation, x_shape, W_shape, wants_dx: bool
) -> Iterator[Callable[[], jax.Array]]:
  """The compiled operations of a layer."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, W, V = map(jax.random.normal, keys, (x_shape, W_shape, W_shape))
  forward = jax.jit(operation)
  g = forward(x, W, V)
  dW = jax.jit(lambda W, g: jax.vjp(lambda W: operation(x, W, V), W)[1](g)[0])
  dx = jax.jit(lambda x, g: jax.vjp(lambda x: operation(x, W, V), x)[1](g)[0])
  yield lambda: forward(x, W, V)
  yield lambda: dW(W, g)
  if wants_dx:
    yield lambda: dx(x, g)
