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

from experiments.datasets import samples
from experiments.datasets.samples import Part, Raw, Source, readable
from experiments.datasets.specs import DatasetError, Draw

# Of macOS, Windows and network storage; compared without case.
_SYSTEM = (
  '__macosx', 'icon\r', 'thumbs.db', 'ehthumbs.db', 'desktop.ini',
  '$recycle.bin', 'system volume information', '@eadir', '#recycle',
  'lost+found', '__pycache__',
)  # fmt: skip
# Names of parts, which are no classes in a folder without train and test.
_OTHER_PARTS = {'val', 'valid', 'validation', 'dev', 'training', 'testing'}


def hidden(name: str) -> bool:
  """Whether a file or folder name is hidden or made by a system."""
  return name.startswith('.') or name.lower() in _SYSTEM


def kind(name: str) -> str:
  """How a file that is not used is counted."""
  if hidden(PurePath(name).name):
    return 'hidden or system'
  return readable(PurePath(name).suffix.lower()) or 'without extension'


def ignored_text(ignored: Counter[str]) -> str:
  """'ignored 5 files: 3 .txt, 2 .csv', or nothing."""
  kinds = ', '.join(
    f'{count} {kind}' for kind, count in sorted(ignored.items())
  )
  return f'ignored {ignored.total()} files: {kinds}' if kinds else ''


def source(path: Path, draw: Draw | None = None, seed: int = 0) -> Source:
  """The dataset in an image folder; `draw` splits one without a test part."""
  ignored: Counter[str] = collections.Counter()
  try:
    parts = {
      name: _classes(folder, ignored)
      for name, folder in _parts(path, draw, ignored).items()
    }
    files = [file for part in parts.values() for file in _files(part)]
    key = fingerprint(path, files)
  except OSError as error:
    raise DatasetError(
      f'{path}: cannot be read: {error}; give this user access'
    ) from error
  classes = tuple(parts['train'])
  if odd := sorted(set(classes) ^ parts.get('test', parts['train']).keys()):
    raise DatasetError(
      f'{path}: class {odd[0]!r} has pictures in only one of train and test '
      f'({len(odd)} such classes); each class needs both'
    )

  def read() -> Raw:
    train = _part(path, parts['train'])
    if draw is not None:
      return samples.drawn(train, classes, draw, seed, str(path))
    return Raw(train, _part(path, parts['test']), classes)

  return Source(
    text=f'image folder {readable(str(path))}',
    key=key,
    read=functools.cache(read),
    note=ignored_text(ignored),
  )


def fingerprint(root: Path, files: Iterable[Path]) -> str:
  """A hash of the files' places, sizes and times, without reading them."""
  inside = root.resolve()
  lines = [str(inside)]
  for file in files:
    check_inside(file, inside)
    stat = file.stat()
    lines.append(f'{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}')
  return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def check_inside(file: Path, root: Path) -> None:
  """Checks that a file is one, and not a link that leads out of its folder."""
  try:
    inside = file.resolve().is_relative_to(root)
  except RuntimeError:  # a loop, before Python 3.13
    inside = False
  if not inside:
    raise DatasetError(
      f'{file}: a link that leads out of {root}, which is not followed; copy '
      'the file there'
    )
  if not file.is_file():
    raise DatasetError(f'{file}: not a file; remove it')


def _sorted(folder: Path) -> list[Path]:
  return sorted(folder.iterdir(), key=lambda entry: readable(entry.name))


def _count(entry: Path, ignored: Counter[str]) -> None:
  is_folder = entry.is_dir() and not hidden(entry.name)
  ignored[
    f'folder {readable(entry.name)}' if is_folder else kind(entry.name)
  ] += 1


def _parts(
  path: Path, draw: Draw | None, ignored: Counter[str]
) -> dict[str, Path]:
  """The folders of the parts; 'train' alone if the test part is drawn.

  Without a folder train, the folder itself is the training part.
  """
  folders = {e.name.lower(): e for e in _sorted(path) if e.is_dir()}
  parts = {name: folders[name] for name in ('train', 'test') if name in folders}
  if draw is not None and 'test' in parts:
    raise DatasetError(
      f'test_share is {draw.test}, but {path} has a folder test; leave the '
      'share out, or remove the folder'
    )
  lacking = {'train', 'test'} - parts.keys() if draw is None else set()
  other = folders.keys() & _OTHER_PARTS if not parts else set()
  if lacking or other:
    found = f', but {min(other)}' if other else ''
    raise DatasetError(
      f'{path}: has no folder {min(lacking, default="train")}{found}; expected '
      f'{path.name}/train/CLASS/*.jpg and {path.name}/test/CLASS/*.jpg (or '
      f'.png). To draw the test part from {path.name}/train or '
      f'{path.name}/CLASS, give a test share, such as --test-share 0.2'
    )
  for entry in path.iterdir() if parts else ():
    if entry not in parts.values():
      _count(entry, ignored)
  return parts or {'train': path}


def _classes(part: Path, ignored: Counter[str]) -> dict[str, list[Path]]:
  """The pictures of each class of a part, sorted."""
  pictures: dict[str, list[Path]] = {}
  for entry in _sorted(part):
    name = readable(entry.name)
    if hidden(entry.name) or not entry.is_dir():
      _count(entry, ignored)
    elif name in pictures:
      raise DatasetError(
        f'{part}: two folders are named {name!r}, spelled {entry.name!a} and '
        f'{pictures[name][0].parent.name!a}; merge them'
      )
    else:
      pictures[name] = _pictures(entry, ignored)
  if not pictures:
    raise DatasetError(
      f'{part}: has no class folders; expected {part.name}/CLASS/*.jpg or .png'
    )
  return pictures


def _pictures(folder: Path, ignored: Counter[str]) -> list[Path]:
  pictures = []
  for entry in _sorted(folder):
    if not hidden(entry.name) and entry.is_dir():
      raise DatasetError(
        f'{entry}: a folder in the class folder {folder.name}; move its '
        'pictures up, or remove it'
      )
    if hidden(entry.name) or not samples.is_picture(entry):
      _count(entry, ignored)
    else:
      pictures.append(entry)
  if not pictures:
    raise DatasetError(
      f'{folder}: class without pictures; add .jpg or .png files, or remove '
      'the folder'
    )
  return pictures


def _files(part: dict[str, list[Path]]) -> list[Path]:
  return [file for pictures in part.values() for file in pictures]


def _part(root: Path, part: dict[str, list[Path]]) -> Part:
  files = _files(part)
  classes = np.arange(len(part), dtype=np.int32)
  return Part(
    sample=lambda i: files[i].read_bytes(),
    labels=np.repeat(classes, list(map(len, part.values()))),
    names=[readable(file.relative_to(root).as_posix()) for file in files],
  )
