"""Datasets as a folder of pictures: NAME/train/CLASS/*.jpg, NAME/test/..."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.datasets.errors import DatasetError
from experiments.datasets.raw import Part, Raw, Source, labels_of

_LOSSY = ('.jpg', '.jpeg')
PICTURES = (*_LOSSY, '.png', '.ppm', '.pgm', '.bmp')


def source(path: Path) -> Source:
  """The dataset in an image folder.

  Raises:
    DatasetError: a part is missing, or the parts have different classes.
  """
  for part in ('train', 'test'):
    if not (path / part).is_dir():
      raise DatasetError(
        f'{path}: has no folder {part}; expected {path.name}/train/CLASS/*.jpg '
        f'and {path.name}/test/CLASS/*.jpg (or .png)'
      )
  files = {part: _files(path / part) for part in ('train', 'test')}
  train, test = (
    sorted({file.parent.name for file in files[part]})
    for part in ('train', 'test')
  )
  if train != test:
    odd = sorted(set(train) ^ set(test))
    raise DatasetError(
      f'{path}: class {odd[0]!r} has pictures in only one of train and test '
      f'({len(odd)} such classes); each class needs both'
    )
  classes = tuple(train)
  return Source(
    text=f'image folder {path}',
    key=fingerprint(path, [*files['train'], *files['test']]),
    read=lambda: Raw(
      train=_part(path, files['train'], classes),
      test=_part(path, files['test'], classes),
      classes=classes,
      jpeg=any(
        file.suffix.lower() in _LOSSY
        for part in files.values()
        for file in part
      ),
    ),
  )


def fingerprint(root: Path, files: Iterable[Path]) -> str:
  """A hash of the files' places, sizes and times, without reading them.

  Raises:
    DatasetError: a file is none, or lies outside of the folder.
  """
  inside = root.resolve()
  lines = [str(inside)]
  for file in files:
    if not file.resolve().is_relative_to(inside):
      raise DatasetError(
        f'{file}: a link that leads out of {root}, which is not followed; copy '
        'the file there'
      )
    if not file.is_file():
      raise DatasetError(f'{file}: not a file; remove it')
    stat = file.stat()
    lines.append(f'{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}')
  return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _files(part: Path) -> list[Path]:
  found = []
  for folder in sorted(entry for entry in part.iterdir() if entry.is_dir()):
    pictures = [
      file for file in folder.iterdir() if file.suffix.lower() in PICTURES
    ]
    if not pictures:
      raise DatasetError(
        f'{folder}: class without pictures; add .jpg or .png files, or remove '
        'the folder'
      )
    found += sorted(pictures)
  if not found:
    raise DatasetError(
      f'{part}: has no class folders; expected {part.name}/CLASS/*.jpg or .png'
    )
  return found


def _part(root: Path, files: list[Path], classes: tuple[str, ...]) -> Part:
  index = {name: i for i, name in enumerate(classes)}
  labels = np.array([index[file.parent.name] for file in files], np.int32)
  return Part(
    sample=lambda i: files[i].read_bytes(),
    labels=labels_of(labels, classes, str(root)),
    names=[str(file.relative_to(root)) for file in files],
  )
