"""Datasets prepared by tensorflow-datasets, read without TensorFlow."""

import collections
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets import samples, speech
from experiments.datasets.folders import fingerprint
from experiments.datasets.samples import Part, Raw, Source
from experiments.datasets.specs import DatasetError, Spec, require

_INFO = 'dataset_info.json'
# All but the last one train. Unlabeled pictures of STL10 and extra ones of SVHN
# are not used.
_SPLITS = ('train', 'validation', 'test')
_FEATURES = 'tensorflow_datasets.core.features.'
# Keys of class names, old ones too.
_CLASSES = ('pythonClassName', 'python_class_name', 'type')
_NAMES = ('file', 'file_name', 'image/file_name')


class OtherFormat(DatasetError):
  """A folder was prepared in a format that needs TensorFlow."""


def roots(data_dir: str | os.PathLike[str] | None) -> list[Path]:
  """Where prepared folders are looked for: `data_dir`, then TFDS's own."""
  constants = require('tensorflow_datasets.core.constants', 'finding data')
  own = Path(constants.DATA_DIR)
  return [own] if data_dir is None else [Path(data_dir), own]


def advice(spec: Spec, data_dir: str | os.PathLike[str] | None) -> str:
  """'run `...`', the command that prepares a dataset in a data folder."""
  words = ['data', 'prepare', spec.name]
  if data_dir is not None:
    words += ['--data-dir', str(data_dir)]
  return f'run `python -m experiments {shlex.join(words)}`'


def manual_dir(root: Path) -> Path:
  """Where a person puts original files, by the convention of TFDS."""
  return root / 'downloads' / 'manual'


def version_folder(root: Path, spec: Spec) -> Path | None:
  """The newest prepared version of a dataset below `root`, None without one.

  tensorflow-datasets writes to another folder and renames it when all is
  written, so an unfinished one has no name that is a version.
  """
  return max(_versions(root / spec.builder), key=_number, default=None)


def unfinished(root: Path, spec: Spec) -> list[Path]:
  """Folders of interrupted preparations."""
  return sorted((root / spec.builder).glob('incomplete.*'))


def is_tfds(path: Path) -> bool:
  """Whether a folder is one that TFDS keeps versions in, or left empty."""
  return (
    bool(_versions(path))
    or any(path.glob('incomplete.*'))
    or not any(path.iterdir())
  )


def _versions(path: Path) -> list[Path]:
  found = (info.parent for info in path.glob(f'*/{_INFO}'))
  return [path for path in found if re.fullmatch(r'\d+(\.\d+)*', path.name)]


def _number(version: Path) -> list[int]:
  return [int(n) for n in version.name.split('.')]


def check_path(path: Path) -> None:
  """Refuses a folder that tensorflow-datasets cannot write or read."""
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise DatasetError(
      f'{path}: tensorflow-datasets takes only names in UTF-8; name another '
      'data_dir or rename the folder'
    ) from error


def source(path: Path, spec: Spec, seed: int) -> Source:
  """The dataset in a folder prepared by tensorflow-datasets."""
  check_path(path)
  return Source(
    text=f'prepared folder {samples.readable(str(path))}',
    key=fingerprint(path, _files(path, spec)),
    read=lambda: _read(path, spec, seed),
  )


def _files(path: Path, spec: Spec) -> list[Path]:
  again = _again(path, spec)
  try:
    info = json.loads((path / _INFO).read_text())
    form = info.get('fileFormat', 'tfrecord')
    shards = {s['name']: len(s.get('shardLengths', ())) for s in info['splits']}
  except Exception as error:  # JSON of any form may be there
    raise DatasetError(
      f'{path / _INFO}: cannot be read ({error!r}); {again}'
    ) from error
  if form != 'array_record':
    raise OtherFormat(
      f'{path}: prepared as {form}, array_record is needed to read without '
      f'TensorFlow; {again}, or prepare into another --data-dir'
    )
  files = [path / _INFO]
  for split, count in shards.items():
    for i in range(count):
      name = f'{spec.builder}-{split}.{form}-{i:05d}-of-{count:05d}'
      if not (path / name).is_file():
        raise DatasetError(f'{path / name}: missing, half prepared; {again}')
      files.append(path / name)
  _check_features(path / 'features.json', again)
  return files


def _check_features(path: Path, again: str) -> None:
  """TFDS imports the modules that this file names: its own alone may be."""
  names: list[str] = []

  def collect(item: Mapping[str, Any]) -> Mapping[str, Any]:
    names.extend(str(item[key]) for key in _CLASSES if key in item)
    return item

  try:
    json.loads(path.read_text(), object_hook=collect)
  except FileNotFoundError:
    return
  except Exception as error:
    raise DatasetError(
      f'{path}: cannot be read ({error!r}); {again}'
    ) from error
  for name in names:
    if not name.startswith(_FEATURES):
      raise DatasetError(
        f'{path}: names {name!r}, which is no feature of TFDS and is not '
        f'imported; {again}'
      )


def _again(path: Path, spec: Spec) -> str:
  return f'delete {path} and {advice(spec, path.parents[1])}'


def _read(path: Path, spec: Spec, seed: int) -> Raw:
  try:
    return _split(path, spec, seed)
  except DatasetError:
    raise
  # Damaged record files surface as anything, also as records of None.
  except Exception as error:
    raise DatasetError(
      f'{path}: damaged record files ({error!r}); {_again(path, spec)}'
    ) from error


def _split(path: Path, spec: Spec, seed: int) -> Raw:
  import tensorflow_datasets as tfds

  # TFDS takes a leading "~" for the home folder, and types
  # the features of any builder as any feature.
  builder: Any = tfds.builder_from_directory(path.absolute())
  checked = {file.absolute() for file in _files(path, spec)}
  for split in builder.info.splits.values():
    if not checked.issuperset(map(Path, split.filepaths)):
      raise DatasetError(
        f'{path / _INFO}: names other files for {split.name} than those of '
        f'this folder; {_again(path, spec)}'
      )
  features = builder.info.features
  skip = {'image': tfds.decode.SkipDecoding()} if 'image' in features else None
  records = {
    split: builder.as_data_source(split=split, decoders=skip)
    for split in _SPLITS
    if split in builder.info.splits
  }
  if spec.architecture == 'timit':
    return _utterances(records['train'], spec, seed, str(path))
  if spec.draw is not None:
    whole, classes = _pictures(list(records.values()), features)
    return samples.drawn(whole, classes, spec.draw, seed, str(path))
  if 'train' not in records or 'test' not in records:
    raise DatasetError(
      f'{path}: has splits {", ".join(builder.info.splits)}; expected train '
      'and test'
    )
  *learning, tested = records.values()
  train, classes = _pictures(learning, features)
  test, _ = _pictures([tested], features, classes)
  for part in (train, test):
    samples.labels_of(part.labels, classes, str(path))
  return Raw(train=train, test=test, classes=classes)


def _pictures(
  records: Sequence[Sequence[Mapping[str, Any]]],
  features: Mapping[str, Any],
  classes: tuple[str, ...] | None = None,
) -> tuple[Part, tuple[str, ...]]:
  """One part over several splits, and the class names."""
  where = [(split, i) for split in records for i in range(len(split))]
  key = next((key for key in _NAMES if key in features), None)
  labels, names = [], []
  repeats: collections.Counter[str] = collections.Counter()
  for split, i in where:
    record = split[i]
    labels.append(record['label'])
    if key is not None:
      names.append(record[key].decode())
    else:
      # Where a set keeps no names, content gives an order. Which of two equal
      # pictures comes first does not matter.
      content = hashlib.sha256(record['image']).hexdigest()
      names.append(f'{content}.{repeats[content]}')
      repeats[content] += 1
  if hasattr(features['label'], 'names'):
    classes = tuple(features['label'].names)
    indices = np.array(labels, np.int32)
  else:
    texts = [label.decode() for label in labels]
    classes = classes or tuple(sorted(set(texts)))
    index = {name: i for i, name in enumerate(classes)}
    indices = np.array([index.get(text, -1) for text in texts], np.int32)

  def sample(row: int) -> bytes:
    split, i = where[row]
    return split[i]['image']

  return Part(sample=sample, labels=indices, names=names), classes


def _utterances(
  records: Sequence[Mapping[str, Any]], spec: Spec, seed: int, at: str
) -> Raw:
  """Frames with their context; each coefficient has mean 0 and variance 1.

  Mean and variance are those of the drawn training frames.
  """
  scaled = [record['features'] for record in records]
  where, labels, names = [], [], []
  for i, record in enumerate(records):
    file = record['file'].decode()
    for frame in map(int, np.flatnonzero(record['labels'] >= 0)):
      where.append((i, frame))
      labels.append(record['labels'][frame])
      names.append(f'{file}:{frame:05d}')

  def sample(row: int) -> np.ndarray:
    utterance, frame = where[row]
    return speech.stacked(scaled[utterance], frame)

  whole = Part(sample=sample, labels=np.array(labels, np.int32), names=names)
  raw = samples.drawn(whole, speech.SUBPHONES, spec.draw, seed, at)
  windows = np.stack([raw.train.sample(row) for row in range(len(raw.train))])
  frames = windows.reshape(len(windows), -1, speech.FEATURES)[:, speech.CONTEXT]
  mean = frames.mean(axis=0, dtype=np.float64)
  deviation = frames.std(axis=0, dtype=np.float64)
  deviation[deviation == 0] = 1  # a coefficient that never changes becomes 0
  scaled[:] = [((v - mean) / deviation).astype(np.float32) for v in scaled]
  return raw
