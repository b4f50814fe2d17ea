"""Samples: what each source gives, and how pictures become arrays.

What a picture file means:

- Any format that Pillow decodes by itself, recognized by content. Formats that
  need another program (EPS, WMF) or that Pillow only identifies are refused.
- The EXIF orientation is applied.
- Colors of a palette are looked up. Transparency is dropped: the stored color
  of a transparent pixel counts. CMYK, YCbCr and HSV are converted to RGB.
- 16 bits per pixel are scaled to 8 by the full range of 16 bits. Other pixels
  with more than 8 bits are refused, because they state no white.
- Of an animation or a file with several pages, the first picture is used.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from experiments.datasets.specs import DatasetError, Draw
from experiments.datasets.splits import draw_split

if TYPE_CHECKING:
  from PIL import Image

# An encoded picture, or a sample that is an array already.
Sample = bytes | memoryview | np.ndarray

# Samples per task: a task must outweigh the cost of handing it to a thread.
_CHUNK = 64
# Pillow only identifies these, or has another program draw them.
_NOT_PICTURES = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF')
_ORIENTATION = 0x0112

# What is counted of decoded pictures, for the note.
JPEG = 'pictures kept as JPEG'
_TURNED = 'pictures turned by their EXIF orientation'
_FIRST = 'pictures of several frames or pages, of which the first is used'
_UPPER = 'pictures of 16 bits, scaled to 8'


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """The training or the test set.

  Attributes:
    sample: gives the sample of a row; called from several threads.
    labels: int32 [N], indices into the class names.
    names: N names, a file name where there is one.
  """

  sample: Callable[[int], Sample]
  labels: np.ndarray
  names: Sequence[str]

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, rows: np.ndarray, labels: np.ndarray) -> 'Part':
    """The rows in the given order, under new labels."""
    return Part(
      sample=lambda i: self.sample(int(rows[i])),
      labels=labels,
      names=[self.names[row] for row in map(int, rows)],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Raw:
  """Both parts of a dataset, and the class names."""

  train: Part
  test: Part
  classes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Where a dataset comes from.

  Attributes:
    text: in words, with the path.
    key: changes when the content changes.
    read: reads what is needed to decode samples one by one.
    note: what of the source is not used; empty if all is.
  """

  text: str
  key: str
  read: Callable[[], Raw]
  note: str = ''


def drawn(
  whole: Part,
  classes: Sequence[str],
  draw: Draw | None,
  seed: int,
  at: str,
) -> Raw:
  """The parts that `draw` makes of a whole; errors name the source, `at`."""
  assert draw is not None
  try:
    split = draw_split(whole.names, whole.labels, classes, draw, seed)
  except DatasetError as error:
    raise DatasetError(f'{at}: {error}') from error
  return Raw(
    train=whole.take(split.train, split.train_labels),
    test=whole.take(split.test, split.test_labels),
    classes=split.classes,
  )


def readable(name: str) -> str:
  """A file name as text that can be printed, in one Unicode normal form."""
  text = name.encode('utf-8', 'backslashreplace').decode()
  return unicodedata.normalize('NFC', text)


def labels_of(
  values: np.ndarray, classes: Sequence[str], at: str
) -> np.ndarray:
  """Labels as int32 [N], every class present.

  Args:
    values: integers [N] or [N, 1], or one-hot rows [N, classes].
    classes: names; labels are indices into them.
    at: the file and array, for errors.
  """
  found = f'{values.dtype} of shape {values.shape}'
  if values.ndim == 2 and values.shape[1] == 1:
    values = values[:, 0]
  elif values.shape[1:] == (len(classes),) and values.dtype.kind in 'biuf':
    ones = values == 1
    if (ones.sum(axis=1) != 1).any() or (values[~ones] != 0).any():
      raise DatasetError(
        f'{at}: a row of one-hot labels must have a single 1 and else 0; '
        'correct it or save the labels as an int64 vector'
      )
    values = ones.argmax(axis=1)
  if values.ndim != 1 or values.dtype.kind not in 'iu':
    raise DatasetError(
      f'{at}: labels must be integers in one dimension, or one-hot rows of '
      f'{len(classes)}, found {found}; save them as an int64 vector'
    )
  wrong = np.flatnonzero((values < 0) | (values >= len(classes)))
  if len(wrong):
    raise DatasetError(
      f'{at}: label {values[wrong[0]]} in row {wrong[0]} is not in 0 to '
      f'{len(classes) - 1}, the {len(classes)} classes of the set '
      f'({len(wrong)} such rows); correct the label or the class names'
    )
  labels = values.astype(np.int32)
  counts = np.bincount(labels, minlength=len(classes))
  if not counts.all():
    empty = [classes[i] for i in np.flatnonzero(counts == 0).tolist()]
    raise DatasetError(
      f'{at}: no sample of class {empty[0]!r} ({len(empty)} empty of '
      f'{len(classes)} classes); add samples or remove the class'
    )
  return labels


@functools.cache
def _formats() -> tuple[str, ...]:
  """The formats that are decoded, common ones first."""
  from PIL import Image

  Image.preinit()
  Image.init()
  return tuple(form for form in Image.ID if form not in _NOT_PICTURES)


def is_picture(name: str | PurePath) -> bool:
  """Whether a file name has the suffix of a picture, in any case."""
  from PIL import Image

  suffix = PurePath(name).suffix.lower()
  return Image.registered_extensions().get(suffix) in _formats()


def stored_shape(sample: Sample) -> tuple[int, ...]:
  """(height, width, 1 or 3) of a stored picture, (features,) of a vector."""
  if isinstance(sample, np.ndarray):
    return sample.shape
  with _open(sample) as picture:
    gray = picture.mode in ('1', 'L', 'LA') or picture.mode.startswith('I')
    return picture.height, picture.width, 1 if gray else 3


def decode(
  part: Part, shape: tuple[int, ...], at: str
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
  """All samples of a part in the shape that the architecture takes.

  Pictures are resized with Pillow's antialiased bilinear filter, each side on
  its own (the paper: "resized to fit"), and converted to gray or RGB.

  Args:
    part: N samples.
    shape: (height, width, channels), or (features,) for vectors.
    at: the source, for errors.

  Returns:
    The samples, uint8 [N, *shape] (vectors: float32); the SHA-256 of the
    stored bytes of each sample and of whether it was turned, uint8 [N, 32];
    remarks for the note and `JPEG`, with the number of pictures.
  """
  dtype = np.uint8 if len(shape) == 3 else np.float32
  samples = np.empty((len(part), *shape), dtype)
  hashes = np.empty((len(part), 32), np.uint8)
  array = _picture if len(shape) == 3 else _vector

  def fill(start: int) -> Counter[str]:
    remarks: Counter[str] = collections.Counter()
    for i in range(start, min(start + _CHUNK, len(part))):
      try:
        sample = part.sample(i)
        samples[i], said = array(sample, shape)
      # Pillow reports damaged and hostile files by exceptions of any type.
      except Exception as error:
        raise DatasetError(
          f'{at}: sample {part.names[i]} (row {i}) cannot be decoded: {error}; '
          'replace the file or get the dataset again'
        ) from error
      content = hashlib.sha256(
        sample.tobytes() if isinstance(sample, np.ndarray) else sample
      )
      if _TURNED in said:
        content.update(b'turned')
      hashes[i] = np.frombuffer(content.digest(), np.uint8)
      remarks.update(said)
    return remarks

  with ThreadPoolExecutor(os.cpu_count()) as pool:
    done = list(pool.map(fill, range(0, len(part), _CHUNK)))
  return samples, hashes, sum(done, collections.Counter())


_Decoded = tuple[np.ndarray, list[str]]


def _picture(sample: Sample, shape: tuple[int, ...]) -> _Decoded:
  from PIL import Image

  if isinstance(sample, np.ndarray):
    if sample.shape == shape:
      return sample, []
    if sample.ndim != 3:
      raise ValueError(f'expected a picture, found shape {sample.shape}')
    squeezed = sample[..., 0] if sample.shape[-1] == 1 else sample
    return _resized(Image.fromarray(squeezed), shape), []
  with _open(sample) as opened:
    # Pillow turns TIFF as it loads it, and forgets the orientation.
    remarks = [_TURNED] if _orientation(opened) is not None else []
    if opened.format in ('JPEG', 'MPO'):
      remarks.append(JPEG)
    opened.load()
    picture = opened
    if picture.mode.startswith('I;16') or (
      picture.mode == 'I' and picture.format in ('PNG', 'PPM')
    ):
      upper = (np.asarray(picture) >> 8).astype(np.uint8)
      picture = Image.fromarray(upper)
      remarks.append(_UPPER)
    if picture.mode in ('I', 'F'):
      raise ValueError(
        f'its pixels are numbers of 32 bits (mode {picture.mode}), which state '
        'no white; save 8 or 16 bits'
      )
    if (turn := _orientation(opened)) is not None:
      picture = picture.transpose(turn)
    array = _resized(picture, shape)
    if _several(opened):
      remarks.append(_FIRST)
  return array, remarks


def _open(sample: bytes | memoryview) -> 'Image.Image':
  from PIL import Image

  return Image.open(io.BytesIO(sample), formats=_formats())


def _orientation(picture: 'Image.Image') -> 'Image.Transpose | None':
  """How to turn the picture; None where it is upright or EXIF is damaged."""
  from PIL.Image import Transpose

  try:
    value = picture.getexif().get(_ORIENTATION)
  except Exception:  # Pillow parses what a stranger wrote
    return None
  return {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
  }.get(value if isinstance(value, int) else 1)


def _several(picture: 'Image.Image') -> bool:
  try:
    return getattr(picture, 'n_frames', 1) > 1
  except Exception:  # a later frame is damaged
    return True


def _resized(picture: 'Image.Image', shape: tuple[int, ...]) -> np.ndarray:
  from PIL import Image

  height, width, channels = shape
  if picture.mode == 'P' and 'transparency' in picture.info:
    picture = picture.convert('RGBA')  # Pillow warns without this step
  mode = 'L' if channels == 1 else 'RGB'
  if picture.mode != mode:
    picture = picture.convert(mode)
  if picture.size != (width, height):
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(picture).reshape(shape)


def _vector(sample: Sample, shape: tuple[int, ...]) -> _Decoded:
  if not isinstance(sample, np.ndarray) or sample.shape != shape:
    raise ValueError(
      f'expected a vector of {shape[0]} features, found '
      f'{getattr(sample, "shape", "an encoded file")}'
    )
  if not np.isfinite(sample).all():
    raise ValueError('a feature is not a finite number')
  return sample, []
