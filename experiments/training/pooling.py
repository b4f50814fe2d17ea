"""Max and average pooling over the pixels that exist, as in MatConvNet.

Both directions are elementwise operations on strided slices, several times
faster on a CPU than XLA's windowed reduction and its gradient. Padding is on
the right and at the bottom.
"""

import dataclasses
import functools

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
  return _forward(x, layer)[0]


def _forward(x, layer):
  # An array of no images carries the shape.
  like = jnp.zeros((0, *x.shape[1:]), x.dtype)
  if layer.kind == 'average':
    share = _share(x.shape, layer, x.dtype)
    # A sum comes last, not a product with a constant: XLA:CPU would recompute
    # the whole pooling at every use of the product.
    shares = [pixel * share for pixel in _windows(x, layer, 0.0)]
    return functools.reduce(jnp.add, shares), (like, None)
  best, *others = _windows(x, layer, -jnp.inf)
  place = jnp.zeros(best.shape, jnp.int16)
  for number, pixel in enumerate(others, 1):
    better = pixel > best
    best = jnp.where(better, pixel, best)
    row, column = divmod(number, layer.size)
    place = jnp.where(better, _code(layer, row, column), place)
  return best, (like, place)


def _backward(layer, residuals, g):
  """Sums over the windows in which a pixel is; the transpose of pooling.

  Pixels are numbered ``stride * block + rest`` along both axes, and a window
  begins with each block: a pixel is in the windows that began with its block
  and with those before, as far as a window reaches.
  """
  like, place = residuals
  height, width, channels = like.shape[1:]
  batch, *counts = g.shape[:3]
  stride, size = layer.stride, layer.size
  back = -(-size // stride) - 1
  blocks = -(-height // stride), -(-width // stride)
  sixfold = (batch, blocks[0], stride, blocks[1], stride, channels)

  def framed(entries):
    """Entries of the windows, with 0 around them where no window begins."""
    ends = [n - m for n, m in zip(blocks, counts, strict=True)]
    edges = [(back, end, 0) for end in ends]
    outside = jnp.asarray(0, entries.dtype)
    return jax.lax.pad(entries, outside, ((0, 0, 0), *edges, (0, 0, 0)))

  def before(entries, down, right):
    """The entries of the windows that began so many blocks before a pixel."""
    top, left = back - down, back - right
    part = entries[
      :, top : top + blocks[0], None, left : left + blocks[1], None
    ]
    return jnp.broadcast_to(part, sixfold)

  def spread(values):
    return jnp.broadcast_to(values[None, None, :, None, :, None], sixfold)

  if place is None:
    g = g * _share((batch, height, width, channels), layer, g.dtype)
  else:
    place = framed(place)
  g = framed(g)
  total = jnp.zeros(sixfold, g.dtype)
  rest = jnp.arange(stride)
  for down in range(back + 1):
    for right in range(back + 1):
      row, column = rest + stride * down, rest + stride * right
      if place is None:
        chosen = spread((row < size)[:, None] & (column < size)[None])
      else:
        code = _code(layer, row[:, None], column[None])
        chosen = before(place, down, right) == spread(code)
      zero = jnp.zeros((), g.dtype)
      total += jnp.where(chosen, before(g, down, right), zero)
  full = (batch, blocks[0] * stride, blocks[1] * stride, channels)
  return (total.reshape(full)[:, :height, :width],)


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
  return jnp.broadcast_to(1 / count, (shape[0], *count.shape[1:3], shape[3]))
