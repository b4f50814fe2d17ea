"""Small archives in the original formats of the sets with builders of ours."""

import dataclasses
import functools
import io
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.io

from experiments.datasets.builders import (
  IcubWorld,
  OxfordFlowers17,
  TimitSubphones,
)
from tests.datasets import archives

PHONES = 'h# sh iy hv ae h#'.split()
PHONE = 1600  # samples


@dataclasses.dataclass
class Original:
  """What a person gets: archives by place, and files beside them."""

  packed: dict[str, dict[str, bytes]]
  beside: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

  def write(self, manual: Path) -> None:
    """Puts it into the folder for original files, as it came."""
    for place, files in self.packed.items():
      archives.packed(manual / place, files)
    archives.folder(manual, self.beside)


@functools.cache
def jpeg(number: int, size: tuple[int, int] = (8, 9)) -> bytes:
  """A small JPEG file, different for each number."""
  return archives.encoded(archives.picture(number, size), 'JPEG')


def flowers17() -> Original:
  """17flowers.tgz with files.txt, and datasplits.mat: the first of 3 splits."""
  count = OxfordFlowers17.EACH * len(OxfordFlowers17.CLASSES)
  files = {'jpg/files.txt': b'image_0001.jpg\n'}
  files |= {f'jpg/image_{i:04d}.jpg': jpeg(i) for i in range(1, count + 1)}
  lists = flowers17_lists()
  return Original({'17flowers.tgz': files}, {'datasplits.mat': mat(lists)})


def mat(arrays: Mapping[str, np.ndarray]) -> bytes:
  """A MATLAB file."""
  file = io.BytesIO()
  scipy.io.savemat(file, dict(arrays))
  return file.getvalue()


def flowers17_lists() -> dict[str, np.ndarray]:
  """Lists of picture numbers from 1, by class in a shuffled order."""
  rng = np.random.default_rng(0)
  each, counts = OxfordFlowers17.EACH, OxfordFlowers17.LISTS.values()
  lists: dict[str, list[int]] = {key: [] for key, _ in counts}
  for label in range(len(OxfordFlowers17.CLASSES)):
    numbers = rng.permutation(np.arange(1, each + 1) + each * label).tolist()
    for key, count in counts:
      lists[key] += [numbers.pop() for _ in range(count)]
  return {key: np.array([value], np.uint16) for key, value in lists.items()}


def caltech256() -> Original:
  """256_ObjectCategories.tar: 4 categories, clutter, and stray files."""
  root = '256_ObjectCategories'
  names = ['001.ak47', '002.american-flag', '056.dog', '198.spider']
  numbers = itertools.count(1)
  files = {
    f'{root}/{name}/{name[:3]}_{i:04d}.jpg': jpeg(next(numbers))
    for name in [*names, '257.clutter']
    for i in range(1, 6)
  }
  files[f'{root}/056.dog/greg/vision309/x.m'] = b'% stray'
  files[f'{root}/198.spider/RENAME2'] = b'mv'
  return Original({'256_ObjectCategories.tar': files})


def icub() -> Original:
  """iCubWorld.zip: 3 training objects per category, 3 kinds of test."""
  numbers = itertools.count(1)
  kinds = [('train', thing, 3) for thing in range(3)]
  for kind in ('categorization', 'demonstrator', 'robot'):
    kinds.append((f'test/{kind}', 9, 2))
  files = {
    f'iCubWorld/{kind}/{name}/{name}_{thing}/{i:08d}.jpg': jpeg(next(numbers))
    for name in IcubWorld.CATEGORIES
    for kind, thing, count in kinds
    for i in range(count)
  }
  return Original({'icub_world/iCubWorld.zip': files})


def pubfig83(people: int = 5, each: int = 5) -> Original:
  """pubfig83.v1.tgz: a folder per person, each with one picture more."""
  files = {
    f'pubfig83/Person {person}/{i}.jpg': jpeg(100 * person + i)
    for person in range(people)
    for i in range(each + person)
  }
  return Original({'pubfig83/pubfig83.v1.tgz': files})


def sufrw() -> Original:
  """Image and info archives; line i of the list is the person on picture i."""
  base, people = 'SUFR-W/SUFR_in_the_wild', 4
  numbers = range(1, 3 * people + 1)
  images = {f'image_files/{base}/{i}.jpg': jpeg(i) for i in numbers}
  lines = [f"{i % people} # Name O'Test-{i % people}" for i in numbers]
  name = f'info_files/{base}/SUFR_in_the_wild_info.txt'
  return Original(
    {
      'sufr_w/image_files.zip': images,
      'sufr_w/info_files.zip': {name: '\n'.join(lines).encode()},
    }
  )


def scene67() -> Original:
  """indoorCVPR_09.tar with pictures that no list has, and the lists."""
  files, lists = {}, {'TrainImages.txt': '', 'TestImages.txt': ''}
  for j, scene in enumerate(('airport_inside', 'bar', 'winecellar')):
    for i in range(6):
      name = f'{scene}/{scene}_{i:04d}.jpg'
      files[f'Images/{name}'] = jpeg(10 * j + i)
      if i < 5:
        lists['TrainImages.txt' if i < 3 else 'TestImages.txt'] += f'{name}\n'
  beside = {name: lines.encode() for name, lines in lists.items()}
  return Original({'indoorCVPR_09.tar': files}, beside)


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


def timit() -> Original:
  """The tree of the disc: development speakers, another one, SA sentences."""
  rng = np.random.default_rng(0)
  phn = ''.join(
    f'{i * PHONE} {(i + 1) * PHONE} {name}\n' for i, name in enumerate(PHONES)
  ).encode()
  sentences = ('SA1', 'SI648', 'SI1027', 'SI1657', 'SX37', 'SX127', 'SX217')
  files = {}
  for speaker in (*sorted(TimitSubphones.SPEAKERS), 'fcjf0'):
    for sentence in (*sentences, 'SX307', 'SX397'):
      samples = rng.normal(0, 300, PHONE * len(PHONES)).round()
      stem = f'TIMIT/TEST/DR{len(files) % 8 + 1}/{speaker.upper()}/{sentence}'
      files[f'{stem}.PHN'] = phn
      files[f'{stem}.TXT'] = b'0 9 She had.'
      files[f'{stem}.WAV'] = sphere(samples)
  return Original({'timit_subphones/timit_LDC93S1.zip': files})


MAKERS = {
  'Flowers17': flowers17,
  'Cal256-101': caltech256,
  'iCub': icub,
  'PubFig83-ID': pubfig83,
  'SUFR-W-ID': sufrw,
  'Scene67': scene67,
  'TIMIT80': timit,
}
