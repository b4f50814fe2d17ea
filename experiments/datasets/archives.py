"""The original archives of the sets that have builders of their own.

Nothing is unpacked to disk: members are read from the archive, or from a
folder in which a person unpacked it. Archives within archives are read too.
Hidden files and those that a system adds, as in a zip file made on macOS, are
left out.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from experiments.datasets.folders import check_inside, hidden
from experiments.datasets.samples import readable
from experiments.datasets.specs import DatasetError


@dataclasses.dataclass(frozen=True)
class Original:
  """What the builder of a dataset starts from.

  Attributes:
    files: the address of each file; {'': None} for a file or folder of any
      name that a person must get.
    layout: what is expected inside, for errors.
    steps: what a person does to get it.
    md5: known checksum of the first file.
  """

  files: Mapping[str, str | None]
  layout: str
  steps: str
  md5: str = ''


_BY_HAND = {'': None}
_FLOWERS17 = 'https://www.robots.ox.ac.uk/~vgg/data/flowers/17/'
_INDOOR = 'https://web.mit.edu/torralba/www/'

# The checksum is the one of torchvision.datasets.Caltech256.
ORIGINALS: Mapping[str, Original] = {
  'oxford_flowers17': Original(
    {
      name: f'{_FLOWERS17}{name}'
      for name in ('17flowers.tgz', 'datasplits.mat')
    },
    layout='jpg/image_0001.jpg to jpg/image_1360.jpg, 80 of each class in turn',
    steps=f'get 17flowers.tgz and datasplits.mat from {_FLOWERS17}',
  ),
  'caltech256': Original(
    {
      '256_ObjectCategories.tar': 'https://data.caltech.edu/records/'
      'nyy15-4j048/files/256_ObjectCategories.tar?download=1'
    },
    layout='256_ObjectCategories/001.ak47/001_0001.jpg and so on',
    steps='get 256_ObjectCategories.tar from '
    'https://data.caltech.edu/records/nyy15-4j048',
    md5='67b4f42ca05d46448c6bb8ecd2220f6d',
  ),
  'icub_world': Original(
    _BY_HAND,
    layout='train/CATEGORY/OBJECT/* and test/categorization/CATEGORY/* for the '
    'ten categories bananas to yogurt',
    steps='get iCubWorld.zip ("iCubWorld 1.0", cropped images) from '
    'https://robotology.github.io/iCubWorld/',
  ),
  'pubfig83': Original(
    _BY_HAND,
    layout='pubfig83/PERSON/*.jpg',
    steps='accept the terms at http://vision.seas.harvard.edu/pubfig83/, get '
    'pubfig83.v1.tgz',
  ),
  'sufr_w': Original(
    _BY_HAND,
    layout='SUFR_in_the_wild/*.jpg and SUFR_in_the_wild_info.txt',
    steps='accept the terms at https://cbmm.mit.edu/knowledge-transfer/sufr, '
    'get the image and info archives of SUFR-W',
  ),
  'mit_indoor67': Original(
    {
      'indoorCVPR_09.tar': 'http://groups.csail.mit.edu/vision/LabelMe/'
      'NewImages/indoorCVPR_09.tar',
      'TrainImages.txt': f'{_INDOOR}TrainImages.txt',
      'TestImages.txt': f'{_INDOOR}TestImages.txt',
    },
    layout='Images/CATEGORY/*.jpg',
    steps='get indoorCVPR_09.tar, TrainImages.txt and TestImages.txt from '
    f'{_INDOOR}indoor.html',
  ),
  'timit_subphones': Original(
    _BY_HAND,
    layout='TEST/DR1/SPEAKER/*.WAV with a .PHN file beside each',
    steps='license TIMIT (LDC93S1) at https://catalog.ldc.upenn.edu/LDC93S1 '
    'and get its archive',
  ),
}

_PACKED = re.compile(r'\.(zip|tar|tgz|tbz2?|txz|tar\.\w+)$', re.IGNORECASE)
_AGAIN = 'delete it, with the .INFO file beside a download, and get it again'
_DEEPEST = 3  # archives in archives


def is_archive(name: str) -> bool:
  """Whether a file name has the suffix of an archive."""
  return _PACKED.search(name) is not None


def place(builder: str, name: str, manual_dir: Path) -> Path:
  """Where a person puts a file, or has put it in another form.

  A folder, or another kind of archive, of the same name does as well.
  """
  path = manual_dir / (name or builder)
  if path.exists() or not manual_dir.is_dir():
    return path
  stem = _PACKED.sub('', path.name)
  found = (e for e in manual_dir.iterdir() if _PACKED.sub('', e.name) == stem)
  return min(found, default=path)


def in_place(builder: str, manual_dir: Path) -> bool:
  """Whether a person has put all original files of a builder there."""
  return builder in ORIGINALS and all(
    place(builder, name, manual_dir).exists()
    for name in ORIGINALS[builder].files
  )


def instructions(builder: str, manual_dir: str | Path) -> str:
  """What a person does to get the original files of a builder."""
  original = ORIGINALS[builder]
  if files := ' and '.join(original.files):
    return f'{original.steps}; put {files} into {manual_dir}'
  return (
    f'{original.steps}; put it, or the folder unpacked from it, into '
    f'{manual_dir}/{builder}'
  )


def verify(path: Path, md5: str) -> None:
  """Compares a file with its checksum."""
  with open(path, 'rb') as file:
    found = hashlib.file_digest(file, 'md5').hexdigest()
  if found != md5:
    raise DatasetError(
      f'{path}: MD5 is {found}, expected {md5}: truncated or another file; '
      f'{_AGAIN}'
    )


Members = Iterator[tuple[str, Callable[[], bytes]]]


def members(path: Path) -> Members:
  """All files in an archive or folder, as (name, function that reads it).

  The functions must be called before the next member is asked for.
  """
  if path.is_dir():
    inside = path.resolve()
    for file in sorted(entry for entry in path.rglob('*') if entry.is_file()):
      if any(map(hidden, file.relative_to(path).parts)):
        continue
      check_inside(file, inside)
      if is_archive(file.name):
        yield from members(file)
      else:
        name = readable(file.relative_to(path.parent).as_posix())
        opened = functools.partial(file.open, 'rb')
        yield name, functools.partial(_read, str(file), opened)
  elif path.is_file():
    with _reading(str(path)), open(path, 'rb') as file:
      yield from _unpacked(file, str(path), 1)
  else:
    raise DatasetError(f'{path}: no such file or folder')


def _unpacked(file: IO[bytes], at: str, depth: int) -> Members:
  with _reading(at):
    if depth > _DEEPEST:
      raise ValueError(f'archives are nested more than {_DEEPEST} deep')
    zip_file = file.read(2) == b'PK'
    file.seek(0)
    if zip_file:
      with zipfile.ZipFile(file) as packed:
        for info in packed.infolist():
          if not info.is_dir():
            opened = functools.partial(packed.open, info)
            yield from _member(_zip_name(info), opened, at, depth)
      return
    with tarfile.open(fileobj=file) as packed:
      for member in packed:
        if member.isreg() or member.islnk():
          opened = functools.partial(packed.extractfile, member)
          yield from _member(member.name, opened, at, depth)
      # tarfile takes a cut before or inside of a header for the end, which is
      # two empty blocks, of which it has read one.
      if packed.fileobj and packed.fileobj.read(512) != bytes(512):
        raise tarfile.ReadError('it has no end')


def _zip_name(info: zipfile.ZipInfo) -> str:
  """The name of a member; macOS writes UTF-8 without the flag that says so."""
  name = info.filename.replace('\\', '/')
  if not info.flag_bits & 0x800:
    with contextlib.suppress(UnicodeError):
      return name.encode('cp437').decode()
  return name


def _member(
  name: str, opened: Callable[[], IO[bytes] | None], at: str, depth: int
) -> Members:
  parts = PurePosixPath(name).parts
  if any(hidden(part) for part in parts if part != '..'):
    return
  if is_archive(name):
    if (file := opened()) is not None:
      with file:
        yield from _unpacked(file, f'{at}/{readable(name)}', depth + 1)
  else:
    yield readable(name), functools.partial(_read, at, opened)


def _read(at: str, opened: Callable[[], IO[bytes] | None]) -> bytes:
  with _reading(at):
    if (file := opened()) is None:
      raise tarfile.ReadError('a member is no file')
    with file:
      return file.read()


@contextlib.contextmanager
def _reading(at: str) -> Iterator[None]:
  try:
    yield
  except DatasetError:
    raise
  # Damaged, encrypted or unsupported archives surface as anything.
  except Exception as error:
    raise DatasetError(
      f'{at}: damaged or truncated archive, or of an unknown kind: {error}; '
      f'{_AGAIN}'
    ) from error
