"""Datasets as a folder of pictures: NAME/train/CLASS/*.jpg, NAME/test/...

Each file is used, counted in the note or refused. Names that begin with a dot
and those that operating systems add are neither classes nor pictures.
"""

import collections
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np

from experiments.datasets.samples import (
  Part,
  Raw,
  Source,
  is_jpeg,
  is_picture,
  labels_of,
  readable,
)
from experiments.datasets.specs import DatasetError

# Of macOS, Windows and network storage; compared without case.
_SYSTEM = frozenset(
  (
    '__macosx',
    'icon\r',
    'thumbs.db',
    'ehthumbs.db',
    'desktop.ini',
    '$recycle.bin',
    'system volume information',
    '@eadir',
    '#recycle',
    'lost+found',
    '__pycache__',
  )
)
_PARTS = ('train', 'test')
# Where these are folders of classes, they are parts that were not asked for.
_OTHER_PARTS = ('val', 'valid', 'validation', 'dev', 'training', 'testing')

_Classes = dict[str, list[Path]]


def hidden(name: str) -> bool:
  """Whether a file or folder name is hidden or made by a system."""
  return name.startswith('.') or name.lower() in _SYSTEM


def ignored_text(ignored: Counter[str]) -> str:
  """'ignored 5 files: 3 .txt, 2 .csv', or nothing."""
  if not ignored.total():
    return ''
  kinds = ', '.join(f'{count} {kind}' for kind, count in sorted(ignored.items()))
  return f'ignored {ignored.total()} files: {kinds}'


def kind(name: str) -> str:
  """What a file that is not used is counted as."""
  if any(map(hidden, PurePath(name).parts)):
    return 'hidden or of the system'
  return readable(PurePath(name).suffix.lower()) or 'without extension'


def source(path: Path, *, own: bool, share: float | None = None) -> Source:
  """The dataset in an image folder.

  Args:
    path: the folder.
    own: one of the user's own, which may lack a test part.
    share: share of each class to test on, drawn where there is no test part.

  Raises:
    DatasetError: a part is missing, the parts have different classes, or
      something in the folder is not understood.
  """
  ignored: Counter[str] = collections.Counter()
  try:
    parts = {
      name: _classes(folder, ignored)
      for name, folder in _parts(path, own, share, ignored).items()
    }
    files = [file for part in parts.values() for f in part.values() for file in f]
    key = fingerprint(path, files)
  except OSError as error:
    raise DatasetError(
      f'{path}: cannot be read: {error}; give this user access'
    ) from error
  classes = tuple(sorted(parts['train']))
  if odd := sorted(set(classes) ^ set(parts.get('test', classes))):
    raise DatasetError(
      f'{path}: class {odd[0]!r} has pictures in only one of train and test '
      f'({len(odd)} such classes); each class needs both'
    )
  return Source(
    text=f'image folder {readable(str(path))}',
    key=key,
    read=functools.cache(
      lambda: Raw(
        train=_part(path, parts['train'], classes),
        test=_part(path, parts['test'], classes) if 'test' in parts else None,
        classes=classes,
        jpeg=any(is_jpeg(file.name) for file in files),
      )
    ),
    note=ignored_text(ignored),
  )


def fingerprint(root: Path, files: Iterable[Path]) -> str:
  """A hash of the files' places, sizes and times, without reading them.

  Raises:
    DatasetError: a file is none, or lies outside of the folder.
  """
  inside = root.resolve()
  lines = [str(inside)]
  for file in files:
    check_inside(file, inside)
    stat = file.stat()
    lines.append(f'{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}')
  return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def check_inside(file: Path, root: Path) -> None:
  """Checks that a file is one, and not a link that leads out of its folder.

  Raises:
    DatasetError: it is not.
  """
  try:
    target = file.resolve()
  except RuntimeError:  # a loop, before Python 3.13
    target = Path()
  if not target.is_relative_to(root):
    raise DatasetError(
      f'{file}: a link that leads out of {root}, which is not followed; copy '
      'the file there'
    )
  if not file.is_file():
    raise DatasetError(f'{file}: not a file; remove it')


def _parts(
  path: Path, own: bool, share: float | None, ignored: Counter[str]
) -> dict[str, Path]:
  """The folders of the training and test part; 'train' alone without one."""
  folders = {entry.name.lower(): entry for entry in _folders(path)}
  parts = {name: folders[name] for name in _PARTS if name in folders}
  expected = (
    f'expected {path.name}/train/CLASS/*.jpg and {path.name}/test/CLASS/*.jpg '
    '(or .png)'
  )
  if own:
    expected += f', or {path.name}/CLASS/*.jpg and a share to test on'
  if share is None or 'test' in parts:
    for name in _PARTS:
      if name not in parts:
        raise DatasetError(f'{path}: has no folder {name}; {expected}')
    if share is not None:
      raise DatasetError(
        f'test_share is {share}, but {path} has a folder test; leave the '
        'share out, or remove the folder'
      )
  if not parts:
    if other := sorted(folders.keys() & set(_OTHER_PARTS)):
      raise DatasetError(
        f'{path}: is {folders[other[0]].name} a class? It looks like a part; '
        + expected
      )
    return {'train': path}
  for entry in path.iterdir():
    if entry not in parts.values():
      ignored[_kind(entry)] += 1
  return parts


def _folders(path: Path) -> list[Path]:
  return sorted(
    (entry for entry in path.iterdir() if entry.is_dir()),
    key=lambda entry: readable(entry.name),
  )


def _kind(entry: Path) -> str:
  if entry.is_dir() and not hidden(entry.name):
    return f'folder {readable(entry.name)}'
  return kind(entry.name)


def _classes(part: Path, ignored: Counter[str]) -> _Classes:
  found: _Classes = {}
  for entry in part.iterdir():
    if not entry.is_dir() or hidden(entry.name):
      ignored[_kind(entry)] += 1
  for folder in _folders(part):
    if hidden(folder.name):
      continue
    name = readable(folder.name)
    if name in found:
      raise DatasetError(
        f'{part}: two folders are named {name!r}, spelled '
        f'{folder.name!a} and {found[name][0].parent.name!a}; merge them'
      )
    found[name] = _pictures(folder, ignored)
  if not found:
    raise DatasetError(
      f'{part}: has no class folders; expected {part.name}/CLASS/*.jpg or .png'
    )
  return found


def _pictures(folder: Path, ignored: Counter[str]) -> list[Path]:
  pictures = []
  for entry in sorted(folder.iterdir(), key=lambda entry: readable(entry.name)):
    if not hidden(entry.name) and entry.is_dir():
      raise DatasetError(
        f'{entry}: a folder in the class folder {folder.name}; move its '
        'pictures up, or remove it'
      )
    if hidden(entry.name) or not is_picture(entry.name):
      ignored[_kind(entry)] += 1
    else:
      pictures.append(entry)
  if not pictures:
    raise DatasetError(
      f'{folder}: class without pictures; add .jpg or .png files, or remove '
      'the folder'
    )
  return pictures


def _part(root: Path, part: _Classes, classes: tuple[str, ...]) -> Part:
  files = [file for name in sorted(part) for file in part[name]]
  labels = np.repeat(
    np.arange(len(classes), dtype=np.int32),
    [len(part[name]) for name in classes],
  )
  return Part(
    sample=lambda i: files[i].read_bytes(),
    labels=labels_of(labels, classes, str(root)),
    names=[readable(file.relative_to(root).as_posix()) for file in files],
  )
