"""`load`: a dataset by its name, as arrays ready for its architecture."""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets import (
  archives,
  cache,
  folders,
  npz,
  prepared,
  samples,
  specs,
)
from experiments.datasets.samples import Part, Raw, Source
from experiments.datasets.specs import SHAPES, DatasetError, Draw, Spec
from experiments.datasets.splits import balanced_rows

Folder = str | os.PathLike[str] | None


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
    note: how it differs from the paper's set, and what was ignored or changed
      as it was read; empty if nothing.
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
  data_dir: Folder = None,
  cache_dir: Folder = None,
  seed: int = 0,
  train_size: int | None = None,
  architecture: str | None = None,
  test_share: float | None = None,
) -> Dataset:
  """Loads a dataset.

  Looked up in this order, the first that exists is taken: `data_dir/NAME.npz`;
  the image folder `data_dir/NAME/train/CLASS/*.jpg|png` with `test` beside
  `train`; a folder prepared by tensorflow-datasets in `data_dir`, then one in
  its own default folder. NAME is the name given, then each of the aliases of
  the spec, in any case. `digits` is embedded and needs no file. Any other name
  is the user's own file or image folder.

  Args:
    name: the paper's name or an alias, in any case, or one of the user's own.
    data_dir: folder with data.
    cache_dir: folder for decoded arrays; default: the user's cache folder.
    seed: of the drawn split and of the subset.
    train_size: train on a class-balanced subset of so many samples.
    architecture: network for a dataset of the user's own, a key of `SHAPES`;
      default: the first of mnist (gray), cifar and general whose input is at
      least as large as the first training picture of each class.
    test_share: share of each class to test on, for a dataset of the user's own
      without a test part.

  Raises:
    DatasetError: unknown name, data that is missing or broken, or an
      impossible argument.
  """
  own = {'architecture': architecture, 'test_share': test_share}
  spec, source = locate(name, data_dir, seed, **own)
  config = {
    'form': 3,
    'source': source.key,
    'draw': f'{spec.draw}, seed {seed}' if spec.draw else '',
    'shape': spec.shape,
    'pillow': importlib.metadata.version('pillow'),
  }
  arrays = cache.fetch(
    Path(cache_dir) if cache_dir is not None else cache.default_dir(),
    spec.name,
    config,
    lambda: _arrays(source, spec),
  )
  facts = json.loads(arrays['facts'].tobytes())
  classes = tuple(facts['classes'])
  if len(classes) < 2:
    raise DatasetError(
      f'{source.text}: has the class {", ".join(classes)!r} alone; a network '
      'learns to tell two or more apart'
    )
  train, test = (
    {key: arrays[f'{key}_{part}'] for key in ('x', 'y', 'hash', 'file')}
    for part in ('train', 'test')
  )
  notes = _notes(spec, source, facts, len(train['y']), len(test['y']))
  if train_size is not None and train_size != len(train['y']):
    rows = balanced_rows(train['y'], train_size, seed)
    notes.append(f'trained on {train_size} of {len(train["y"])} samples')
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
    note='; '.join(notes),
    files_train=train['file'],
    files_test=test['file'],
  )


@dataclasses.dataclass(frozen=True)
class Loader:
  """`load` with the options of a command; two equal ones load equal data.

  Attributes:
    data_dir: as for `load`, and so are the others.
    architecture: for datasets of the user's own.
    test_share: for datasets of the user's own.
  """

  data_dir: Path | None = None
  architecture: str | None = None
  test_share: float | None = None

  def absolute(self) -> 'Loader':
    """The same loader, independent of the working folder."""
    data_dir = self.data_dir and self.data_dir.absolute()
    return dataclasses.replace(self, data_dir=data_dir)

  def __call__(self, name: str, train_size: int | None = None) -> Dataset:
    """Loads a dataset and keeps the last one; errors are those of `load`."""
    return _loaded(self, name, train_size)

  def forget(self) -> None:
    """Frees the memory of the last dataset."""
    _loaded.cache_clear()


@functools.lru_cache(maxsize=1)
def _loaded(loader: Loader, name: str, train_size: int | None) -> Dataset:
  own = specs.find_known(name) is None
  return load(
    name,
    data_dir=loader.data_dir,
    train_size=train_size,
    architecture=loader.architecture if own else None,
    test_share=loader.test_share if own else None,
  )


def find(name: str, data_dir: Folder = None, **own: Any) -> Spec:
  """The spec of a dataset; only one of the user's own must be there.

  Arguments (`own` is architecture and test_share) and errors are those of
  `load`.
  """
  return _known(name, **own) or _own(name, data_dir, **own)[0]


def locate(
  name: str, data_dir: Folder, seed: int = 0, **own: Any
) -> tuple[Spec, Source]:
  """The spec and the source of a dataset, looked up as `load` documents."""
  spec = _known(name, **own)
  if spec is None:
    return _own(name, data_dir, seed, **own)
  source = find_source(spec, name, data_dir, seed)
  if source is None:
    raise DatasetError(missing(spec, data_dir))
  return spec, source


def find_source(
  spec: Spec, name: str, data_dir: Folder, seed: int = 0
) -> Source | None:
  """The source of a dataset of the table, None where there is nothing."""
  if spec.source == 'embedded':
    return _embedded(spec, seed)
  if data_dir is not None:
    path = _entry(data_dir, name, *spec.aliases)
    if path is not None:
      return (folders if path.is_dir() else npz).source(path)
  for root in prepared.roots(data_dir):
    if (path := prepared.version_folder(root, spec)) is not None:
      return prepared.source(path, spec, seed)
  return None


def missing(spec: Spec, data_dir: Folder) -> str:
  """Says that a dataset was not found, and how to get it."""
  alias = spec.aliases[0]
  where = f'in {data_dir}' if data_dir is not None else '(no data_dir is given)'
  text = (
    f'{spec.name} was not found {where}: neither {alias}.npz nor {alias}/train '
    'nor a prepared folder. '
  )
  for root in prepared.roots(data_dir):
    for path in prepared.unfinished(root, spec):
      text += f'The unfinished preparation in {path} is not used. '
  advice = how_to_get(spec, data_dir)
  return text + advice[0].upper() + advice[1:]


def how_to_get(spec: Spec, data_dir: Folder) -> str:
  """What a person does to get a dataset of the paper."""
  run = prepared.advice(spec, data_dir)
  if spec.source == 'download':
    return run
  manual_dir = prepared.manual_dir(prepared.roots(data_dir)[0])
  if archives.in_place(spec.builder, manual_dir):
    return f'original files in {manual_dir}; {run}'
  return f'First {archives.instructions(spec.builder, manual_dir)}, then {run}'


def _known(
  name: str, architecture: str | None = None, test_share: float | None = None
) -> Spec | None:
  """The spec of the table, None for the user's own; checks the options."""
  if architecture is not None and architecture not in SHAPES:
    raise DatasetError(
      f'architecture is {architecture!r}; it must be one of {", ".join(SHAPES)}'
    )
  if test_share is not None and not 0 < test_share < 1:
    raise DatasetError(
      f'test_share is {test_share}; it must be between 0 and 1'
    )
  spec = specs.find_known(name)
  if spec is None:
    return None
  if architecture not in (None, spec.architecture) or test_share is not None:
    raise DatasetError(
      f'{spec.name} has a network ({spec.architecture}) and a split of its '
      'own; leave architecture and test_share out'
    )
  return spec


def _entry(data_dir: str | os.PathLike[str], *wanted: str) -> Path | None:
  """The npz file or image folder of the first name that fits."""
  root = Path(data_dir)
  if not root.is_dir():
    raise DatasetError(
      f'data_dir {str(root)!r} is not a folder; name the folder that holds '
      f'{wanted[-1]}.npz or {wanted[-1]}/train'
    )
  try:
    found = [p for p in sorted(root.iterdir()) if not folders.hidden(p.name)]
    for name in wanted:
      for suffix in ('.npz', ''):
        key = specs.plain(name) + suffix
        fits = [p for p in found if specs.plain(p.name) == key and _has_data(p)]
        exact = [path for path in fits if path.name == name + suffix]
        if len(fits) > 1 and not exact:
          raise DatasetError(
            f'{fits[0]} and {fits[1]} are both {name!r}; rename one'
          )
        if fits:
          return (exact or fits)[0]
  except OSError as error:
    raise DatasetError(f'{root}: cannot be read: {error}') from error
  return None


def _has_data(path: Path) -> bool:
  if path.is_dir():
    return not prepared.is_tfds(path)
  return path.suffix.lower() == '.npz'


def _own(
  name: str,
  data_dir: Folder,
  seed: int = 0,
  architecture: str | None = None,
  test_share: float | None = None,
) -> tuple[Spec, Source]:
  """A dataset of the user's own; its spec has no counts."""
  path = None if data_dir is None else _entry(data_dir, name)
  if path is None:
    where = '' if data_dir is None else f' and is not in {data_dir}'
    raise specs.UnknownDataset(
      f'unknown dataset {name!r}{specs.nearest(name)}; it is none of '
      f'{", ".join(specs.SPECS)}{where}. A dataset of your own is NAME.npz or '
      'NAME/{train,test}/CLASS/*.jpg in the data folder'
    )
  draw = None if test_share is None else Draw(train=None, test=test_share)
  source = (folders if path.is_dir() else npz).source(path, draw, seed)
  return Spec(
    name=samples.readable(path.name if path.is_dir() else path.stem),
    classes=0,
    architecture=architecture or _fitting(source),
    train=0,
    test=0,
    protocol=(
      'training and test set as stored'
      if draw is None
      else f'{test_share:g} of each class drawn to test on, the rest trains'
    ),
    source='own',
    draw=draw,
    license="the user's own",
    aliases=(name,),
  ), source


def _fitting(source: Source) -> str:
  """The network whose input fits the pictures; see `load`."""
  train = source.read().train
  sizes = []
  for row in np.unique(train.labels, return_index=True)[1].tolist():
    try:
      sizes.append(samples.stored_shape(train.sample(row)))
    except Exception as error:  # of Pillow, on damaged files
      raise DatasetError(
        f'{source.text}: sample {train.names[row]} cannot be decoded: {error}; '
        'replace the file'
      ) from error
  if all(len(size) == 3 for size in sizes):
    largest = np.max(sizes, axis=0)
    for name in ('mnist', 'cifar'):
      if (largest <= SHAPES[name]).all():
        return name
    return 'general'
  if sizes[0] == SHAPES['timit']:
    return 'timit'
  raise DatasetError(
    f'{source.text}: has vectors of {sizes[0][0]} features; the only network '
    f'for vectors takes {SHAPES["timit"][0]}'
  )


def _embedded(spec: Spec, seed: int) -> Source:
  """scikit-learn's 1,797 digits of 8x8 pixels."""

  def read() -> Raw:
    digits = specs.require('sklearn.datasets', spec.name).load_digits()
    # Pixels count from 0 to 16.
    pixels = np.round(digits['images'] * (255 / 16)).astype(np.uint8)
    pixels = pixels[..., np.newaxis]
    classes = [str(name) for name in digits['target_names']]
    names = [f'row {i:04d}' for i in range(len(pixels))]
    whole = Part(pixels.__getitem__, digits['target'], names)
    return samples.drawn(whole, classes, spec.draw, seed, spec.name)

  return Source(
    text='scikit-learn, sklearn.datasets.load_digits()',
    key='load_digits',
    read=read,
  )


def _arrays(source: Source, spec: Spec) -> cache.Arrays:
  """What is cached: numbers and text."""
  raw = source.read()
  arrays, remarks = {}, collections.Counter()
  for name, part in (('train', raw.train), ('test', raw.test)):
    x, hashes, said = samples.decode(part, spec.shape, source.text)
    arrays[f'x_{name}'] = x
    arrays[f'y_{name}'] = part.labels
    arrays[f'hash_{name}'] = hashes
    arrays[f'file_{name}'] = np.array(part.names)
    remarks += said
  facts = {'classes': raw.classes, 'remarks': remarks}
  arrays['facts'] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
  return arrays


def _digest(shape: tuple[int, ...], classes: tuple[str, ...], *parts) -> str:
  sizes = [len(part['y']) for part in parts]
  total = hashlib.sha256(json.dumps([shape, classes, sizes]).encode())
  for part in parts:
    total.update(part['y'].astype('<i4').tobytes())
    total.update(part['hash'].tobytes())
  return total.hexdigest()


def _notes(
  spec: Spec, source: Source, facts: Mapping, train: int, test: int
) -> list[str]:
  """How the data differ from the paper's, and what was ignored or changed."""
  notes, classes = [], len(facts['classes'])
  if spec.source in ('embedded', 'own'):
    notes.append("not one of the paper's datasets")
  if spec.source == 'own':
    shape = 'x'.join(map(str, spec.shape))
    notes.append(f'network {spec.architecture} ({shape})')
    if spec.draw is not None:
      notes.append(spec.protocol)
  else:
    if classes != spec.classes:
      notes.append(f"{classes} of the paper's {spec.classes} classes")
    if (train, test) != (spec.train, spec.test):
      notes.append(
        f"{train} / {test} train / test samples, the paper's are {spec.train} "
        f'/ {spec.test}'
      )
  remarks = dict(facts['remarks'])
  if remarks.pop(samples.JPEG, 0) and spec.lossless:
    notes.append('lossy: kept as JPEG, the original pictures are not')
  notes += [f'{count} {text}' for text, count in remarks.items()]
  if source.note:
    notes.append(source.note)
  return notes
