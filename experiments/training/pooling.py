"""Max and average pooling over the pixels that exist, as in MatConvNet.

Both directions are elementwise operations on strided slices, several times
faster on a CPU than XLA's windowed reduction and its gradient. Padding is on
the right and at the bottom.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pool:
  """Pooling over ``size x size`` pixels, padding on the right and bottom."""

  kind: str
  size: int
  stride: int
  padding: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pool(x: jax.Array, layer: Pool) -> jax.Array:
  """Max or average pooling; of equal maxima the first gets the gradient.

  Args:
    x: ``(batch, height, width, channels)``.
    layer: what to do.
  """
  if layer.kind == 'max':
    windows = _windows(x, layer, -jnp.inf)
    return functools.reduce(lambda a, b: jnp.where(b > a, b, a), windows)
  share = _share(x.shape, layer, x.dtype)
  # A sum comes last, not a product with a constant: XLA:CPU would recompute the
  # whole pooling at every use of the product.
  return functools.reduce(
    jnp.add, [pixel * share for pixel in _windows(x, layer, 0.0)]
  )


def _forward(x, layer):
  # An array of no images carries the shape.
  like = jnp.zeros((0, *x.shape[1:]), x.dtype)
  if layer.kind == 'average':
    return pool(x, layer), (like, None)
  best, *others = _windows(x, layer, -jnp.inf)
  place = jnp.zeros(best.shape, jnp.int16)
  for number, pixel in enumerate(others, 1):
    better = pixel > best
    best = jnp.where(better, pixel, best)
    row, column = divmod(number, layer.size)
    place = jnp.where(better, _code(layer, row, column), place)
  return best, (like, place)


def _backward(layer, residuals, g):
  like, place = residuals
  windows = g, place
  if place is None:
    windows = (g * _share((g.shape[0], *like.shape[1:]), layer, g.dtype),)

  def term(code, inside, g, place=None):
    chosen = inside if place is None else place == code
    return jnp.where(chosen, g, jnp.zeros((), g.dtype))

  return (_unpool(layer, like.shape, windows, term),)


pool.defvjp(_forward, _backward)


def _code(layer: Pool, row, column) -> jax.Array:
  """The number of a pixel in its window, which no pixel outside of it has."""
  reach = layer.size + layer.stride
  return jnp.asarray(row * reach + column, jnp.int16)


def _windows(x: jax.Array, layer: Pool, fill: float) -> list[jax.Array]:
  """The pixels of every window: ``size**2`` strided slices of the image."""
  end = 0, layer.padding
  x = jnp.pad(x, ((0, 0), end, end, (0, 0)), constant_values=fill)
  rows, columns = (n - layer.size + 1 for n in x.shape[1:3])
  return [
    x[:, i : i + rows : layer.stride, j : j + columns : layer.stride]
    for i in range(layer.size)
    for j in range(layer.size)
  ]


def _share(shape, layer: Pool, dtype) -> jax.Array:
  """One over the number of pixels that exist in each window."""
  one = jnp.ones((1, *shape[1:3], 1), dtype)
  count = functools.reduce(jnp.add, _windows(one, layer, 0.0))
  rows, columns = count.shape[1:3]
  return jnp.broadcast_to(1 / count, (shape[0], rows, columns, shape[3]))


def _unpool(
  layer: Pool,
  shape: tuple[int, ...],
  windows: tuple[jax.Array, ...],
  term: Callable[..., jax.Array],
) -> jax.Array:
  """Sums over the windows in which a pixel is; the transpose of pooling.

  Pixels are numbered ``stride * block + rest`` along both axes, and a window
  begins with each block: a pixel is in the windows that began with its block
  and with those before, as far as a window reaches.

  Args:
    layer: what is transposed.
    shape: of the image, ``(any, height, width, channels)``.
    windows: arrays ``(batch, rows, columns, channels)`` with an entry per
      window; the first one gives the dtype.
    term: (code of the pixel, whether it is in the window, entries) -> what the
      window adds to the pixel.
  """
  height, width, channels = shape[1:]
  stride, size = layer.stride, layer.size
  back = -(-size // stride) - 1
  blocks = -(-height // stride), -(-width // stride)

  def framed(entries):
    ends = [n - m for n, m in zip(blocks, entries.shape[1:3], strict=True)]
    edges = [(back, end, 0) for end in ends]
    outside = jnp.asarray(0, entries.dtype)
    return jax.lax.pad(entries, outside, ((0, 0, 0), *edges, (0, 0, 0)))

  framed_windows = [framed(entries) for entries in windows]
  batch = windows[0].shape[0]
  sixfold = (batch, blocks[0], stride, blocks[1], stride, channels)
  total = jnp.zeros(sixfold, windows[0].dtype)
  rest = jnp.arange(stride)
  for down in range(back + 1):
    for right in range(back + 1):
      row, column = rest + stride * down, rest + stride * right
      inside = (row < size)[:, None] & (column < size)[None]
      code = _code(layer, row[:, None], column[None])
      top, left = back - down, back - right
      entries = [
        jnp.broadcast_to(
          array[:, top : top + blocks[0], None, left : left + blocks[1], None],
          sixfold,
        )
        for array in framed_windows
      ]

      def spread(values):
        return jnp.broadcast_to(values[None, None, :, None, :, None], sixfold)

      total += term(spread(code), spread(inside), *entries)
  full = (batch, blocks[0] * stride, blocks[1] * stride, channels)
  return total.reshape(full)[:, :height, :width]
