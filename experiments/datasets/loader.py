"""`load`: a dataset by its name, as arrays ready for its architecture."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.datasets import cache, images, names, splits
from experiments.datasets.lookup import locate
from experiments.datasets.raw import Source
from experiments.datasets.spec import Spec


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A dataset in memory.

  Attributes:
    x_train: uint8 [N, H, W, C], 0 to 255; TIMIT: float32 [N, 1845].
    y_train: int32 [N], indices into `classes`.
    x_test: as `x_train`, [M, ...].
    y_test: int32 [M].
    classes: names; there may be fewer than in `spec`, see `note`.
    spec: the dataset as the paper uses it.
    digest: SHA-256 over the stored bytes of the chosen samples in order, their
      labels, the class names and the input shape: the same digest, the same
      data.
    source: where it came from, in words.
    note: how it differs from the paper's set; empty if it does not.
    files_train: N names of samples, file names where there are any.
    files_test: M names.
  """

  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  classes: tuple[str, ...]
  spec: Spec
  digest: str
  source: str
  note: str
  files_train: np.ndarray
  files_test: np.ndarray


def load(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  cache_dir: str | os.PathLike[str] | None = None,
  seed: int = 0,
  train_size: int | None = None,
) -> Dataset:
  """Loads a dataset.

  Looked up in this order, the first that exists is taken: `data_dir/NAME.npz`;
  the image folder `data_dir/NAME/train/CLASS/*.jpg|png` with `test` beside
  `train`; a folder prepared by tensorflow-datasets in `data_dir`, then one in
  its own default folder. NAME is the name given, then each of the aliases of
  the spec, in any case. `digits` is embedded and needs no file.

  Args:
    name: the paper's name or an alias, in any case.
    data_dir: folder with data.
    cache_dir: folder for decoded arrays; default: the user's cache folder.
    seed: of the drawn split and of the subset.
    train_size: train on a class-balanced subset of so many samples.

  Raises:
    DatasetError: unknown name, data that is missing or broken, or a
      `train_size` that cannot be.
  """
  spec = names.find(name)
  source = locate(name, data_dir, seed)
  arrays = cache.fetch(
    Path(cache_dir) if cache_dir is not None else cache.default_dir(),
    spec.name,
    {
      'form': 1,
      'source': source.key,
      'shape': spec.shape,
      'resize': 'bilinear',
      'pillow': importlib.metadata.version('pillow'),
    },
    lambda: _arrays(source, spec),
  )
  classes = tuple(json.loads(arrays['classes'].tobytes()))
  train = {key: arrays[f'{key}_train'] for key in ('x', 'y', 'hash', 'file')}
  test = {key: arrays[f'{key}_test'] for key in ('x', 'y', 'hash', 'file')}
  if train_size is not None and train_size != len(train['y']):
    rows = splits.balanced_rows(train['y'], train_size, seed)
    train = {key: values[rows] for key, values in train.items()}
  return Dataset(
    x_train=train['x'],
    y_train=train['y'],
    x_test=test['x'],
    y_test=test['y'],
    classes=classes,
    spec=spec,
    digest=_digest(spec.shape, classes, train, test),
    source=source.text,
    note=_note(spec, classes, arrays, len(train['y'])),
    files_train=np.char.decode(train['file'], 'utf-8'),
    files_test=np.char.decode(test['file'], 'utf-8'),
  )


def _arrays(source: Source, spec: Spec) -> cache.Arrays:
  """What is cached: numbers and byte strings only."""
  raw = source.read()
  arrays = {
    'classes': np.frombuffer(json.dumps(raw.classes).encode(), np.uint8),
    'jpeg': np.array(raw.jpeg),
  }
  for name, part in (('train', raw.train), ('test', raw.test)):
    x, hashes = images.decode(part, spec.shape, source.text)
    arrays[f'x_{name}'] = x
    arrays[f'y_{name}'] = part.labels
    arrays[f'hash_{name}'] = hashes
    arrays[f'file_{name}'] = np.char.encode(list(part.names), 'utf-8')
  return arrays


def _digest(
  shape: tuple[int, ...],
  classes: tuple[str, ...],
  train: Mapping[str, np.ndarray],
  test: Mapping[str, np.ndarray],
) -> str:
  total = hashlib.sha256()
  sizes = (len(train['y']), len(test['y']))
  total.update(json.dumps([shape, classes, sizes]).encode())
  for part in (train, test):
    total.update(part['y'].astype('<i4').tobytes())
    total.update(part['hash'].tobytes())
  return total.hexdigest()


def _note(
  spec: Spec, classes: tuple[str, ...], arrays: cache.Arrays, train_used: int
) -> str:
  notes = []
  if not spec.in_paper:
    notes.append("not one of the paper's datasets")
  if len(classes) != spec.classes:
    notes.append(f"{len(classes)} of the paper's {spec.classes} classes")
  train, test = len(arrays['y_train']), len(arrays['y_test'])
  if (train, test) != (spec.train, spec.test):
    notes.append(
      f"{train} / {test} train / test samples, the paper's are {spec.train} / "
      f'{spec.test}'
    )
  if spec.lossless and arrays['jpeg']:
    notes.append('lossy: kept as JPEG, the original pictures are not')
  if train_used != train:
    notes.append(f'trained on {train_used} of {train} samples')
  return '; '.join(notes)
