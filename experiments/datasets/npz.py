"""Datasets in one NAME.npz, raw or as joined JPEG files.

Keys: `classes`, `y_train`, `y_test`, and for each part S either `x_S` (uint8
[N, H, W] or [N, H, W, C]; float32 [N, features]) or `jpeg_S` (uint8, all files
joined) with `off_S` (int64 [N + 1], their limits) and, optionally, `file_S`
(names).
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from experiments.datasets.errors import DatasetError
from experiments.datasets.raw import Part, Raw, Sample, Source, labels_of
from experiments.datasets.spec import Spec

_FORM = (
  'a dataset file holds classes, y_train, y_test and, for S = train and test, '
  'x_S or jpeg_S with off_S'
)


def source(path: Path, spec: Spec) -> Source:
  """The dataset in an npz file.

  Raises:
    DatasetError: the file cannot be read.
  """
  try:
    with open(path, 'rb') as file:
      key = hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise DatasetError(f'{path}: cannot be read: {error}') from error
  return Source(text=f'file {path}', key=key, read=lambda: _read(path, spec))


def _read(path: Path, spec: Spec) -> Raw:
  arrays = _load(path)
  missing = [
    key for key in ('classes', 'y_train', 'y_test') if key not in arrays
  ]
  for part in ('train', 'test'):
    if f'x_{part}' not in arrays:
      keys = (f'jpeg_{part}', f'off_{part}')
      missing += [key for key in keys if key not in arrays]
  if missing:
    raise DatasetError(
      f'{path}: has no {", ".join(missing)} (it has {", ".join(arrays)}): '
      f'{_FORM}'
    )
  names = arrays['classes']
  if names.ndim != 1 or not len(names):
    raise DatasetError(
      f'{path}: classes must be a vector of names, found shape {names.shape}'
    )
  classes = tuple(str(name) for name in names)
  return Raw(
    train=_part(path, arrays, 'train', classes, spec),
    test=_part(path, arrays, 'test', classes, spec),
    classes=classes,
    jpeg='jpeg_train' in arrays or 'jpeg_test' in arrays,
  )


def _load(path: Path) -> dict[str, np.ndarray]:
  key = ''
  arrays = {}
  try:
    # numpy leaves a damaged file open if it opened it itself.
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as stored:
      for key in stored.files:
        arrays[key] = stored[key]
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


def _part(
  path: Path,
  arrays: Mapping[str, np.ndarray],
  part: str,
  classes: tuple[str, ...],
  spec: Spec,
) -> Part:
  labels = labels_of(arrays[f'y_{part}'], classes, f'{path}: y_{part}')
  if f'x_{part}' in arrays:
    count, sample = _arrays(path, arrays[f'x_{part}'], f'x_{part}', spec)
  else:
    count, sample = _joined(path, arrays, part)
  names = arrays.get(f'file_{part}', np.empty(0))
  if f'file_{part}' not in arrays:
    names = np.array([f'{part} row {i}' for i in range(count)])
  for key, found in ((f'y_{part}', len(labels)), (f'file_{part}', len(names))):
    if found != count:
      raise DatasetError(
        f'{path}: {key} has {found} entries for {count} {part} samples; there '
        'must be as many'
      )
  return Part(sample=sample, labels=labels, names=[str(n) for n in names])


_Samples = tuple[int, Callable[[int], Sample]]


def _arrays(path: Path, x: np.ndarray, key: str, spec: Spec) -> _Samples:
  if len(spec.shape) == 1:
    if x.dtype != np.float32 or x.shape[1:] != spec.shape:
      raise DatasetError(
        f'{path}: {key} must be float32 [N, {spec.shape[0]}], found {x.dtype} '
        f'of shape {x.shape}'
      )
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
      f'channels, found {x.dtype} of shape {x.shape}; save pictures as 0 to 255'
    )
  return len(pictures), pictures.__getitem__


def _joined(
  path: Path, arrays: Mapping[str, np.ndarray], part: str
) -> _Samples:
  joined, limits = arrays[f'jpeg_{part}'], arrays[f'off_{part}']
  if joined.dtype != np.uint8 or joined.ndim != 1:
    raise DatasetError(
      f'{path}: jpeg_{part} must be a uint8 vector, found {joined.dtype} of '
      f'shape {joined.shape}'
    )
  if (
    limits.ndim != 1
    or len(limits) < 2
    or not np.issubdtype(limits.dtype, np.integer)
    or limits[0] < 0
    or limits[-1] > len(joined)
    or (np.diff(limits) < 0).any()
  ):
    raise DatasetError(
      f'{path}: off_{part} must be rising integers from 0 to {len(joined)}, '
      f'the length of jpeg_{part}; copy or download the file again'
    )
  encoded = memoryview(joined.data)
  return len(limits) - 1, lambda i: encoded[limits[i] : limits[i + 1]]
