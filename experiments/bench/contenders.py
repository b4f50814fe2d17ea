"""Programs that make the same training step, and take turns at it.

Those in JAX are here: a step as ``experiments run`` makes it, under a rule or
with Flax's own layers; the operations of the layers alone, which no step can be
faster than; and a matrix product, which shows what the machine can do.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets import SHAPES
from experiments.paper.conditions import Condition
from experiments.paper.protocol import Protocol
from experiments.training import models, plugins
from experiments.training.data import Arrays, Images
from experiments.training.pooling import Pool, pool
from experiments.training.step import Setup, program
from symjax_bp import primitives

FLAX, PRODUCT, OPERATIONS = 'Flax', 'product', 'operations alone'
_BATCHES = 4
# Thread pools keep spinning for a while after their work and would take the
# cores from the next program.
_REST = 0.02  # seconds
_UNMEASURED = 2  # rounds; memory has to be mapped, caches have to fill

Shape = tuple[int, ...]
Operation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
  """A program that is measured."""

  name: str
  step: Callable[[], Any]  # makes one step (or several), waits for its end
  steps: int = 1  # that it makes
  flops: int = 0  # of a product
  variant: str = ''  # of one name, the fastest variant counts
  compile_seconds: float | None = None
  bytes: int | None = None  # memory of a step at its peak
  draw_bytes: int = 0  # the part of it that stored random draws take


def take_turns(
  contenders: Sequence[Contender], rounds: int, seconds: float = 0.0
) -> np.ndarray:
  """Seconds of every step, (rounds, contenders).

  In each round every contender calls ``step`` twice, in a random order, so that
  other load on the machine meets all of them. Only the second call is measured,
  because training makes steps in a row: the first one finds another program's
  arrays in the caches and its own threads asleep. There are at least ``rounds``
  of them, and more until ``seconds`` have passed.
  """
  random, measured = np.random.default_rng(0), []
  end = time.perf_counter() + seconds
  while len(measured) < rounds + _UNMEASURED or time.perf_counter() < end:
    times = np.zeros(len(contenders))
    for at in random.permutation(len(contenders)):
      time.sleep(_REST)
      contenders[at].step()
      start = time.perf_counter()
      contenders[at].step()
      times[at] = (time.perf_counter() - start) / contenders[at].steps
    measured.append(times)
  return np.array(measured[_UNMEASURED:])


@dataclasses.dataclass(frozen=True)
class Workload:
  """The network, images and update of every contender."""

  setup: Setup  # of plain backpropagation
  batch: int  # examples in a mini-batch
  repeat: int = 1  # steps in a row; the program waits for the last one only
  precision: str = 'float32'
  rate: float = 0.0  # so a step takes as long, and no weights diverge

  @property
  def layers(self) -> models.Layers | None:
    """The layers of the network, if it is one of the paper's."""
    return models.NETWORKS.get(self.setup.network)

  @property
  def flops(self) -> int:
    """Floating point operations of a step."""
    shape, classes = self.setup.shape, self.setup.classes
    if self.layers is not None:
      return self.batch * models.training_flops(self.layers, shape, classes)
    # XLA's count, of the step in Flax's own layers.
    functions = program(self.setup, plain=True)
    shape_of: Any = jax.ShapeDtypeStruct
    index = shape_of((self.batch,), jnp.int32)
    images = Images(shape_of((self.batch, *shape), jnp.uint8), index)
    arrays = Arrays(images, images, shape_of(shape, jnp.float32))
    state = jax.eval_shape(functions.initialize, jax.random.key(0))
    step: Any = functions.step
    # CUDA's backend counts compiled programs only, without cuDNN's kernels.
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      lowered = step.lower(state, arrays, index, shape_of((), jnp.float32))
      return int(lowered.cost_analysis()['flops'])

  def data(self) -> tuple[np.ndarray, np.ndarray, Iterator[np.ndarray]]:
    """Images (or features), labels, and rows of mini-batches without end."""
    random, count = np.random.default_rng(0), _BATCHES * self.batch
    shape = count, *self.setup.shape
    if len(shape) == 2:
      x = random.normal(size=shape).astype(np.float32)
    else:
      x = random.integers(0, 256, shape, np.uint8)
    y = random.integers(0, self.setup.classes, count, np.int32)
    rows = random.permutation(count).astype(np.int32)
    return x, y, itertools.cycle(rows.reshape(_BATCHES, self.batch))

  def order(self, indices: Iterator[np.ndarray]) -> np.ndarray:
    """The rows of the next ``repeat`` mini-batches."""
    return np.stack([*itertools.islice(indices, self.repeat)])

  def weights(self) -> Iterator[tuple[Operation, Shape, Shape]]:
    """The operation and the shapes of x and W of each layer of weights."""

    def shape_of(function: Callable, *shapes: Shape) -> Shape:
      arrays = [jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes]
      return jax.eval_shape(function, *arrays).shape

    x = (self.batch, *self.setup.shape)
    for layer in self.layers or ():
      if isinstance(layer, Pool):
        x = shape_of(lambda x, layer=layer: pool(x, layer), x)
        continue
      if isinstance(layer, models.Full):
        x = (self.batch, math.prod(x[1:]))
        W = (x[1], layer.features(self.setup.classes))
        operation = primitives.dense
      else:
        W = (layer.size, layer.size, x[-1], layer.features)
        operation = _convolution(layer)
      yield operation, x, W
      x = shape_of(operation, x, W, W)


def _convolution(layer: models.Conv) -> Operation:
  padding = ((layer.padding, layer.padding),) * 2
  return lambda x, W, V: primitives.conv(
    x, W, V, layer.stride, padding, row_convolution=True
  )


def of_network(
  architecture: str, batch_norm: str, batch: int, **options: Any
) -> Workload:
  """A network of the paper's Table 1, or of ``experiments.bench.large``.

  Args:
    architecture: its name.
    batch_norm: as in a condition.
    batch: examples in a mini-batch.
    **options: ``repeat`` and ``precision`` of the workload.

  Raises:
    ValueError: if the mini-batch is too small for batch normalization.
  """
  if batch < 2:
    raise ValueError(f'batch must be at least 2, not {batch}.')
  condition = Condition(batch_norm=batch_norm)
  plugin, shape = '', SHAPES.get(architecture, (224, 224, 3))
  if architecture not in SHAPES:
    plugin = plugins.read(Path(__file__).with_name('large.py'))
  classes = {'general': 102, 'timit': 80}.get(
    architecture, 1000 if plugin else 10
  )
  setup = Setup(condition, Protocol(), architecture, plugin, shape, classes)
  return Workload(setup, batch, **options)


def in_jax(workload: Workload, rule: str | None) -> Contender:
  """The step of a rule; with Flax's own layers if it is None."""
  x, y, indices = workload.data()
  images = Images(jnp.asarray(x), jnp.asarray(y))
  arrays = Arrays(images, images, jnp.asarray(x.mean(0, dtype=np.float32)))
  setup, rate = workload.setup, np.float32(workload.rate)
  condition = dataclasses.replace(setup.condition, rule=rule or 'BP')
  setup = dataclasses.replace(setup, condition=condition)
  functions = program(setup, plain=rule is None)
  state = functions.initialize(jax.random.key(0))
  several = workload.repeat > 1
  jitted: Any = functions.scan if several else functions.step
  began = time.perf_counter()
  rows = np.zeros((workload.repeat, workload.batch), np.int32)
  rows = rows if several else rows[0]
  compiled = jitted.lower(state, arrays, rows, rate).compile()
  compile_seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()

  def step() -> Any:
    nonlocal state
    order = workload.order(indices)
    state, _ = compiled(state, arrays, order if several else order[0], rate)
    return jax.block_until_ready(state)

  return Contender(
    name=rule or FLAX,
    step=step,
    steps=workload.repeat,
    compile_seconds=compile_seconds,
    bytes=memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    draw_bytes=sum(x.nbytes for x in jax.tree.leaves(state['feedback'])),
  )


def all_in_jax(
  workload: Workload, rules: Sequence[str | None]
) -> list[Contender]:
  """The step of each rule, and on a CPU the operations alone."""
  if jax.default_backend() == 'cpu':
    steps = [in_jax(workload, rule) for rule in rules]
    return steps if workload.layers is None else [*steps, operations(workload)]
  # A compilation takes seconds and one core. On an accelerator, an operation
  # alone takes less time than its launch, so it says nothing.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return [*pool.map(functools.partial(in_jax, workload), rules)]


def product() -> Contender:
  """A product of two matrices of float32 in the current precision."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  matrix = jax.random.normal(jax.random.key(0), (size, size))
  multiply = jax.jit(jnp.matmul)
  return Contender(
    name=PRODUCT,
    step=lambda: multiply(matrix, matrix).block_until_ready(),
    flops=2 * size**3,
  )


def set_precision(precision: str) -> None:
  """Sets the precision of JAX's products of float32.

  On a GPU, bfloat16 applies to dense layers only; convolutions use TF32 then.
  """
  on_gpu = jax.default_backend() == 'gpu'
  jax.config.update(
    'jax_default_matmul_precision',
    'BF16_BF16_F32' if on_gpu and precision == 'bfloat16' else precision,
  )


def operations(workload: Workload) -> Contender:
  """Forward, dW and dx of every layer of weights; the first needs no dx.

  Each is compiled alone, on random arrays; there is no pooling, no batch
  normalization and no update.
  """
  steps: list[Callable[[], jax.Array]] = []
  for operation, *shapes in workload.weights():
    forward, dW, dx = _operations(operation, *shapes)
    steps += [forward, dW, dx] if steps else [forward, dW]
  return Contender(
    name=OPERATIONS,
    step=lambda: [jax.block_until_ready(step()) for step in steps],
  )


def _operations(operation: Operation, x_shape: Shape, W_shape: Shape):
  """Forward, dW and dx of a layer; compiled at the first call."""
  keys = jax.random.split(jax.random.key(0), 3)
  x, W, V = map(jax.random.normal, keys, (x_shape, W_shape, W_shape))
  forward = jax.jit(operation)
  g = forward(x, W, V)
  dW = jax.jit(lambda W, g: jax.vjp(lambda W: operation(x, W, V), W)[1](g)[0])
  dx = jax.jit(lambda x, g: jax.vjp(lambda x: operation(x, W, V), x)[1](g)[0])
  return lambda: forward(x, W, V), lambda: dW(W, g), lambda: dx(x, g)
