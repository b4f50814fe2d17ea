"""Datasets in one NAME.npz, raw or as joined JPEG files.

Keys: `classes`, `y_train`, `y_test`, and for each part S either `x_S` (uint8
[N, H, W] or [N, H, W, C]; float32 [N, features]) or `jpeg_S` (uint8, all files
joined) with `off_S` (int64 [N + 1], their limits) and, optionally, `file_S`
(names). Where both are there, `x_S` is used. Names may be text, bytes or
integers; labels are integers [N] or [N, 1], or one-hot rows.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.datasets import samples
from experiments.datasets.samples import Part, Raw, Sample, Source
from experiments.datasets.specs import DatasetError, Draw

_Arrays = Mapping[str, np.ndarray]


def source(path: Path, draw: Draw | None = None, seed: int = 0) -> Source:
  """The dataset in an npz file; `draw` splits one without a test part."""
  try:
    with open(path, 'rb') as file:
      key = hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise DatasetError(f'{path}: cannot be read: {error}') from error
  return Source(
    text=f'file {samples.readable(str(path))}',
    key=key,
    read=functools.cache(lambda: _read(path, draw, seed)),
  )


def _read(path: Path, draw: Draw | None, seed: int) -> Raw:
  arrays = _load(path)
  tested = [key for key in arrays if key in ('x_test', 'y_test', 'jpeg_test')]
  if draw is not None and tested:
    raise DatasetError(
      f'test_share is {draw.test}, but {path} has {tested[0]}; leave the share '
      'out'
    )
  parts = ('train', 'test') if draw is None else ('train',)
  needed = ['classes', *(f'y_{part}' for part in parts)]
  for part in parts:
    if f'x_{part}' not in arrays:
      needed += [f'jpeg_{part}', f'off_{part}']
  if missing := [key for key in needed if key not in arrays]:
    raise DatasetError(
      f'{path}: has no {", ".join(missing)} (it has {", ".join(arrays)}): a '
      'dataset file holds classes, y_train, y_test and, for S = train and '
      'test, x_S or jpeg_S with off_S. A dataset of your own needs no test '
      'arrays with --test-share'
    )
  classes = _names(arrays, 'classes', path)
  if len(set(classes)) != len(classes):
    twice = next(name for name in classes if classes.count(name) > 1)
    raise DatasetError(f'{path}: two classes are named {twice!r}; rename one')
  train, *test = (_part(path, arrays, part, classes) for part in parts)
  if draw is not None:
    return samples.drawn(train, classes, draw, seed, str(path))
  return Raw(train, test[0], tuple(classes))


def _load(path: Path) -> dict[str, np.ndarray]:
  key = ''
  arrays = {}
  try:
    # numpy leaves a damaged file open if it opened it itself.
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as stored:
      for key in stored.files:
        value = stored[key]  # reads and unpacks it
        if isinstance(value, np.ndarray):  # not a stray file
          arrays[key] = value
  # Damage surfaces as anything from BadZipFile to zlib.error to MemoryError.
  except Exception as error:
    if key and 'pickle' in str(error):
      raise DatasetError(
        f'{path}: {key} is stored as Python objects (pickle), which can run '
        'code and is never read; save numbers and strings as plain arrays'
      ) from error
    raise DatasetError(
      f'{path}: broken or truncated npz file{f" at {key}" if key else ""}: '
      f'{error}; copy or download it again'
    ) from error
  return arrays


def _names(arrays: _Arrays, key: str, path: Path) -> list[str]:
  """Names stored as text, bytes or integers."""
  values = arrays[key]
  if values.dtype.kind not in 'SUiu' or values.ndim != 1 or not len(values):
    raise DatasetError(
      f'{path}: {key} must be a vector of names, found {values.dtype} of shape '
      f'{values.shape}; save them as text'
    )
  try:
    if values.dtype.kind == 'S':
      return [name.decode('utf-8', 'backslashreplace') for name in values]
    names = [str(name) for name in values.tolist()]
    return [name.encode('utf-8', 'backslashreplace').decode() for name in names]
  except (ValueError, SystemError) as error:  # code points beyond Unicode
    raise DatasetError(f'{path}: {key} is no text: {error}') from error


def _part(
  path: Path, arrays: _Arrays, part: str, classes: Sequence[str]
) -> Part:
  labels = samples.labels_of(arrays[f'y_{part}'], classes, f'{path}: y_{part}')
  if f'x_{part}' in arrays:
    count, sample = _stored(path, arrays[f'x_{part}'], f'x_{part}')
  else:
    count, sample = _joined(path, arrays, part)
  names = [f'{part} row {i}' for i in range(count)]
  if f'file_{part}' in arrays:
    names = _names(arrays, f'file_{part}', path)
  for key, found in ((f'y_{part}', labels), (f'file_{part}', names)):
    if len(found) != count:
      raise DatasetError(
        f'{path}: {key} has {len(found)} entries for {count} {part} samples; '
        'there must be as many'
      )
  return Part(sample=sample, labels=labels, names=names)


_Samples = tuple[int, Callable[[int], Sample]]


def _stored(path: Path, x: np.ndarray, key: str) -> _Samples:
  if x.dtype == np.float32 and x.ndim == 2:
    return len(x), x.__getitem__
  pictures = x[..., np.newaxis] if x.ndim == 3 else x
  if (
    x.dtype != np.uint8
    or pictures.ndim != 4
    or pictures.shape[-1] not in (1, 3)
    or 0 in pictures.shape
  ):
    raise DatasetError(
      f'{path}: {key} must be uint8 [N, H, W] or [N, H, W, C] with 1 or 3 '
      f'channels, or vectors, float32 [N, features], found {x.dtype} of shape '
      f'{x.shape}; save pictures as 0 to 255'
    )
  return len(pictures), pictures.__getitem__


def _joined(path: Path, arrays: _Arrays, part: str) -> _Samples:
  joined, limits = arrays[f'jpeg_{part}'], arrays[f'off_{part}']
  if joined.dtype != np.uint8 or joined.ndim != 1:
    raise DatasetError(
      f'{path}: jpeg_{part} must be a uint8 vector, found {joined.dtype} of '
      f'shape {joined.shape}'
    )
  if (
    limits.ndim != 1
    or len(limits) < 2
    or limits.dtype.kind not in 'iu'
    or limits.min() < 0
    or limits.max() > len(joined)
    or (limits[1:] < limits[:-1]).any()
  ):
    raise DatasetError(
      f'{path}: off_{part} must be rising integers from 0 to {len(joined)}, '
      f'the length of jpeg_{part}; copy or download the file again'
    )
  encoded = memoryview(np.ascontiguousarray(joined).data)
  return len(limits) - 1, lambda i: encoded[limits[i] : limits[i + 1]]
