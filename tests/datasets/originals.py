"""Small archives in the original formats of the sets with builders of ours."""

import functools
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.io

from experiments.datasets.builders import (
  IcubWorld,
  OxfordFlowers17,
  TimitSubphones,
)
from tests.datasets import archives


@functools.cache
def jpeg(number: int) -> bytes:
  """A small JPEG file, different for each number."""
  return archives.encoded(archives.picture(number, (8, 9)), 'JPEG')


def tar(
  path: Path,
  files: Mapping[str, bytes],
  mode: Literal['w', 'w:gz'] = 'w',
) -> Path:
  """A tar archive with the files in the given order."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as packed:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      packed.addfile(member, io.BytesIO(content))
  return path


def zipped(path: Path, files: Mapping[str, bytes]) -> Path:
  """A zip archive."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, 'w') as packed:
    for name, content in files.items():
      packed.writestr(name, content)
  return path


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
  """The files as a folder."""
  for name, content in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return path


def flowers17(manual: Path) -> None:
  """17flowers.tgz with files.txt, and datasplits.mat: the first of 3 splits.

  The real size, 1360 pictures: the builder checks the lists against it.
  """
  files = {'jpg/files.txt': b'image_0001.jpg\n'}
  files |= {f'jpg/image_{i:04d}.jpg': jpeg(i) for i in range(1, 1361)}
  tar(manual / '17flowers.tgz', files, 'w:gz')
  scipy.io.savemat(manual / 'datasplits.mat', flowers17_lists())


def flowers17_lists() -> dict[str, np.ndarray]:
  """Lists of picture numbers from 1, by class in a shuffled order."""
  rng = np.random.default_rng(0)
  lists: dict[str, list[int]] = {'trn1': [], 'val1': [], 'tst1': []}
  for label in range(len(OxfordFlowers17.CLASSES)):
    numbers = rng.permutation(np.arange(1, 81) + 80 * label)
    lists['trn1'] += numbers[:40].tolist()
    lists['val1'] += numbers[40:60].tolist()
    lists['tst1'] += numbers[60:].tolist()
  return {key: np.array([value], np.uint16) for key, value in lists.items()}


def caltech256(manual: Path, each: int = 5) -> None:
  """256_ObjectCategories.tar: 4 categories, clutter, and stray files."""
  root = '256_ObjectCategories'
  names = ['001.ak47', '002.american-flag', '056.dog', '198.spider']
  files, number = {}, 0
  for name in [*names, '257.clutter']:
    for i in range(each):
      number += 1
      files[f'{root}/{name}/{name[:3]}_{i + 1:04d}.jpg'] = jpeg(number)
  files[f'{root}/056.dog/greg/vision309/x.m'] = b'% stray'
  files[f'{root}/198.spider/RENAME2'] = b'mv'
  tar(manual / '256_ObjectCategories.tar', files)


def icub(manual: Path, train: int = 3, test: int = 2) -> None:
  """iCubWorld.zip: 3 training objects per category, 4 kinds of test."""
  files, number = {}, 0
  for category in IcubWorld.CATEGORIES:
    for thing in range(3):
      for i in range(train):
        number += 1
        name = f'{category}/{category}_{thing}/{i:08d}.jpg'
        files[f'iCubWorld/train/{name}'] = jpeg(number)
    for kind in ('categorization', 'demonstrator', 'robot'):
      for i in range(test):
        number += 1
        name = f'{kind}/{category}/{category}_9/{i:08d}.jpg'
        files[f'iCubWorld/test/{name}'] = jpeg(number)
  zipped(manual / 'icub_world' / 'iCubWorld.zip', files)


def pubfig83(manual: Path, people: int = 4, each: int = 5) -> None:
  """pubfig83.v1.tgz: a folder per person."""
  files = {
    f'pubfig83/Person {person}/{i}.jpg': jpeg(100 * person + i)
    for person in range(people)
    for i in range(each + person)
  }
  tar(manual / 'pubfig83' / 'pubfig83.v1.tgz', files, 'w:gz')


def sufrw(manual: Path, people: int = 4, each: int = 3) -> None:
  """Image and info archives; line i of the list is the person on picture i."""
  base = 'SUFR-W/SUFR_in_the_wild'
  images, lines = {}, []
  for i in range(people * each):
    person = i % people
    images[f'image_files/{base}/{i + 1}.jpg'] = jpeg(i)
    lines.append(f"{person + 1} # Name O'Test-{person}")
  listed = {
    f'info_files/{base}/SUFR_in_the_wild_info.txt': '\n'.join(lines).encode()
  }
  zipped(manual / 'sufr_w' / 'image_files.zip', images)
  zipped(manual / 'sufr_w' / 'info_files.zip', listed)


def scene67(manual: Path, train: int = 3, test: int = 2) -> None:
  """indoorCVPR_09.tar with pictures that no list has, and the lists."""
  files, lists = {}, {'TrainImages.txt': [], 'TestImages.txt': []}
  number = 0
  for scene in ('airport_inside', 'bar', 'winecellar'):
    for i in range(train + test + 1):
      number += 1
      name = f'{scene}/{scene}_{i:04d}.jpg'
      files[f'Images/{name}'] = jpeg(number)
      if i < train:
        lists['TrainImages.txt'].append(name)
      elif i < train + test:
        lists['TestImages.txt'].append(name)
  tar(manual / 'indoorCVPR_09.tar', files)
  for name, lines in lists.items():
    (manual / name).write_text('\n'.join(lines) + '\n')


def sphere(samples: np.ndarray, **fields: object) -> bytes:
  """A NIST SPHERE file of 16 bit samples, as on the TIMIT disc."""
  known = {
    'database_id': 'TIMIT',
    'channel_count': 1,
    'sample_count': len(samples),
    'sample_rate': 16000,
    'sample_n_bytes': 2,
    'sample_byte_format': '01',
    'sample_sig_bits': 16,
  } | fields
  lines = ['NIST_1A', '   1024']
  for key, value in known.items():
    kind = '-i' if isinstance(value, int) else f'-s{len(str(value))}'
    lines.append(f'{key} {kind} {value}')
  head = '\n'.join([*lines, 'end_head', '']).encode()
  return head.ljust(1024) + samples.astype('<i2').tobytes()


_SENTENCES = (
  'SI648', 'SI1027', 'SI1657', 'SX37', 'SX127', 'SX217', 'SX307', 'SX397',
)  # fmt: skip


def timit_files(phones: str = 'h# sh iy hv ae h#') -> dict[str, bytes]:
  """The tree of the disc: development speakers, another one, SA sentences."""
  rng = np.random.default_rng(0)
  files = {}
  names = phones.split()
  length = 1600
  ends = [(i + 1) * length for i in range(len(names))]
  phn = ''.join(
    f'{end - length} {end} {name}\n'
    for end, name in zip(ends, names, strict=True)
  ).encode()
  for region, speaker in enumerate((*sorted(TimitSubphones.SPEAKERS), 'fcjf0')):
    for sentence in ('SA1', *_SENTENCES):
      samples = rng.normal(0, 300, ends[-1]).round()
      stem = f'TIMIT/TEST/DR{region % 8 + 1}/{speaker.upper()}/{sentence}'
      files[f'{stem}.PHN'] = phn
      files[f'{stem}.TXT'] = b'0 9 She had.'
      files[f'{stem}.WAV'] = sphere(samples)
  return files


def timit(manual: Path) -> None:
  """The disc as a folder."""
  folder(manual / 'timit_subphones', timit_files())


def encoded_face(number: int) -> bytes:
  """A picture of the size of LFW's."""
  return archives.encoded(archives.picture(number, (250, 250)), 'JPEG')
