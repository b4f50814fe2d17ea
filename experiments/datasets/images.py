"""Pictures as arrays: decoded and resized once, on all cores."""

import functools
import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.datasets.errors import DatasetError
from experiments.datasets.raw import Part, Sample

# Samples per task: a task must outweigh the cost of handing it to a thread.
_CHUNK = 64


def decode(
  part: Part, shape: tuple[int, ...], at: str
) -> tuple[np.ndarray, np.ndarray]:
  """All samples of a part in the shape that the architecture takes.

  Pictures are resized with Pillow's antialiased bilinear filter, each side on
  its own (the paper: "resized to fit"), and converted to grey or RGB.

  Args:
    part: N samples.
    shape: (height, width, channels), or (features,) for vectors.
    at: the source, for errors.

  Returns:
    The samples, uint8 [N, *shape] (vectors: float32), and the SHA-256 of each
    sample's stored bytes, uint8 [N, 32].

  Raises:
    DatasetError: a sample that cannot be decoded; the message has its name.
  """
  dtype = np.uint8 if len(shape) == 3 else np.float32
  samples = np.empty((len(part), *shape), dtype)
  hashes = np.empty((len(part), 32), np.uint8)
  array = functools.partial(_picture if len(shape) == 3 else _vector, shape)

  def fill(start: int) -> None:
    for i in range(start, min(start + _CHUNK, len(part))):
      sample = part.sample(i)
      try:
        samples[i] = array(sample)
      except _UNDECODABLE as error:
        raise DatasetError(
          f'{at}: sample {part.names[i]} (row {i}) cannot be decoded: {error}; '
          'replace the file or get the dataset again'
        ) from error
      hashes[i] = np.frombuffer(hashlib.sha256(_bytes(sample)).digest(), 'u1')

  with ThreadPoolExecutor(os.cpu_count()) as pool:
    # The list makes the first error of any task surface here.
    list(pool.map(fill, range(0, len(part), _CHUNK)))
  return samples, hashes


# What Pillow raises on damaged or hostile files (its "bomb" limits derive from
# Exception and Warning), and what assignment raises on a wrong shape.
_UNDECODABLE = (OSError, SyntaxError, ValueError, ArithmeticError, Warning)


def _bytes(sample: Sample) -> bytes | memoryview:
  return sample.tobytes() if isinstance(sample, np.ndarray) else sample


def _picture(shape: tuple[int, ...], sample: Sample) -> np.ndarray:
  from PIL import Image

  height, width, channels = shape
  if isinstance(sample, np.ndarray):
    if sample.shape == shape:
      return sample
    squeezed = sample[..., 0] if sample.shape[-1] == 1 else sample
    picture = Image.fromarray(squeezed)
  else:
    try:
      picture = Image.open(io.BytesIO(sample))
    except Image.DecompressionBombError as error:
      raise ValueError(str(error)) from error
  if picture.mode.startswith(('I', 'F')):  # would be cut off at 255
    raise ValueError(
      f'it has more than 8 bits a pixel and channel (mode {picture.mode})'
    )
  mode = 'L' if channels == 1 else 'RGB'
  if picture.mode != mode:
    picture = picture.convert(mode)
  if picture.size != (width, height):
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(picture).reshape(shape)


def _vector(shape: tuple[int, ...], sample: Sample) -> np.ndarray:
  if not isinstance(sample, np.ndarray) or sample.shape != shape:
    raise ValueError(
      f'expected a vector of {shape[0]} features, found '
      f'{getattr(sample, "shape", "an encoded file")}'
    )
  return sample
