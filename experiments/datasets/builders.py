"""tensorflow-datasets builders for the sets it lacks.

Importing this module registers them; `experiments.datasets.commands` runs them.
"""

import collections
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import archives, speech
from experiments.datasets.folders import ignored_text, kind
from experiments.datasets.samples import is_picture
from experiments.datasets.specs import SPECS, DatasetError, require


class OriginalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder over the original archives listed in `archives.ORIGINALS`.

  A file that a person has put into the manual folder is used; otherwise it is
  downloaded, where it can be. Pictures are stored byte for byte.
  """

  VERSION = tfds.core.Version('1.0.0')

  # Which members of the archive are wanted; group `file` names each once.
  FILE: re.Pattern[str]
  PARTS = ('train',)

  def __init__(self, **kwargs: Any):
    super().__init__(**kwargs)
    self._unused: set[str] = set()
    self._used: set[str] = set()

  @property
  def ignored(self) -> str:
    """'ignored 5 files: 3 .txt, 2 .csv', or nothing."""
    unused = self._unused - self._used
    return ignored_text(collections.Counter(map(kind, unused)))

  def _info(self) -> tfds.core.DatasetInfo:
    (spec,) = (spec for spec in SPECS.values() if spec.builder == self.name)
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'{spec.name}: {archives.ORIGINALS[self.name].layout}.',
      features=self._features(),
      homepage=spec.homepage,
      citation=spec.citation,
      license=spec.license,
    )

  def _features(self) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(None, None, 3)),
        'label': tfds.features.Text(),
        'file': tfds.features.Text(),
      }
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    path, *lists = self._originals(dl_manager)
    self._read_lists(path, *lists)
    return {part: self._generate_examples(path, part) for part in self.PARTS}

  def _read_lists(self, path: Path, *lists: Path) -> None:
    """Reads the lists of parts and labels, if names of pictures lack them."""

  def _place(self, match: re.Match[str]) -> tuple[str, str, str] | None:
    """Part, file name and label of a picture; None if it is not wanted."""
    return 'train', match['file'], match['label']

  def _missing(self, part: str, files: set[str], labels: set[str]) -> str:
    """Says what is missing from a part with these files and labels."""
    return '' if files else 'no picture of that form'

  def _generate_examples(
    self, path: Path, part: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    files, labels = set(), set()
    for match, content in self._matching(path):
      if (placed := self._place(match)) and placed[0] == part:
        _, file, label = placed
        files.add(file)
        labels.add(label)
        picture = io.BytesIO(content)
        yield file, {'image': picture, 'label': label, 'file': file}
    if missing := self._missing(part, files, labels):
      raise self._layout_error(path, missing)

  def _matching(
    self, path: Path, pictures: bool = True
  ) -> Iterator[tuple[re.Match[str], bytes]]:
    """Members that match `FILE`, each once, and their content."""
    known: dict[str, tuple[str, bytes]] = {}
    for name, read in archives.members(path):
      match = self.FILE.fullmatch(name)
      if match is None or (pictures and not is_picture(name)):
        self._unused.add(name)
        continue
      content = read()
      found = name, hashlib.sha256(content).digest()
      first = known.setdefault(match['file'].lower(), found)
      if first[1] != found[1]:
        raise DatasetError(
          f'{path}: {first[0]} and {name} are different files of one name; '
          'keep one copy of the set there'
        )
      if first is found:
        yield match, content

  def _originals(self, dl_manager: Any) -> list[Path]:
    """Paths of the original files, checked, in the order of the table."""
    self._manual_dir = Path(dl_manager.download_dir) / 'manual'
    original = archives.ORIGINALS[self.name]
    paths, urls = {}, {}
    for name, url in original.files.items():
      path = archives.place(self.name, name, self._manual_dir)
      if path.exists():
        paths[name] = path
      elif url is not None:
        urls[name] = url
      else:
        steps = archives.instructions(self.name, self._manual_dir)
        raise DatasetError(f'{path}: not there; {steps}')
    if urls:
      downloaded = dl_manager.download(urls)
      paths |= {name: Path(path) for name, path in downloaded.items()}
    first = next(iter(original.files))
    # What was packed again has another name, and no checksum.
    if original.md5 and (first in urls or paths[first].name == first):
      archives.verify(paths[first], original.md5)
    return [paths[name] for name in original.files]

  def _layout_error(self, path: Path, found: str) -> DatasetError:
    return DatasetError(
      f'{path}: {found}; expected {archives.ORIGINALS[self.name].layout}. '
      + archives.instructions(self.name, self._manual_dir)
    )


class Caltech256(OriginalBuilder):
  """All 257 folders (256 categories and clutter), in one split (`train`)."""

  # The archive also holds stray files, such as 056.dog/greg and
  # 198.spider/RENAME2.
  FILE = re.compile(
    r'(?:.*/)?(?P<label>(\d{3})\.[^/]+)/(?P<file>\2_\d{4}\.[^/.]+)'
  )


class Pubfig83(OriginalBuilder):
  """All people, in one split (`train`)."""

  FILE = re.compile(r'(?:.*/)?(?P<file>(?P<label>[^/]+)/[^/]+)')


class IcubWorld(OriginalBuilder):
  """iCubWorld 1.0: training folders and the test folder `categorization`.

  These names are those of the authors' own tools.
  """

  CATEGORIES = (
    'bananas bottles boxes bread cans lemons pears peppers potatos yogurt'
  ).split()
  FILE = re.compile(
    r'(?:.*/)?(?P<file>(?:(train)|test/categorization)'
    rf'/((?P<label>{"|".join(CATEGORIES)})/(?:[^/]+/)*[^/]+))',
    re.IGNORECASE,
  )
  PARTS = ('train', 'test')

  def _place(self, match: re.Match[str]) -> tuple[str, str, str]:
    return 'train' if match[2] else 'test', match[3], match['label'].lower()

  def _missing(self, part: str, files: set[str], labels: set[str]) -> str:
    missing = sorted(set(self.CATEGORIES) - labels)
    return f'no {part} pictures of {missing[0]}' if missing else ''


class _ListedBuilder(OriginalBuilder, skip_registration=True):
  """Lists give the part of each picture; every listed picture must exist."""

  def _read_lists(self, path: Path, *lists: Path) -> None:
    self._listed: dict[str, tuple[str, str, str]] = {}
    for part, file, label in self._places(*lists):
      if file in self._listed:
        raise self._layout_error(lists[-1], f'{file} is listed twice')
      self._listed[file] = part, file, label

  def _places(self, *lists: Path) -> Iterator[tuple[str, str, str]]:
    """Part, file name and label of each listed picture."""
    raise NotImplementedError

  def _place(self, match: re.Match[str]) -> tuple[str, str, str] | None:
    return self._listed.get(match['file'])

  def _missing(self, part: str, files: set[str], labels: set[str]) -> str:
    listed = {file for of, file, _ in self._listed.values() if of == part}
    if not (missing := listed - files):
      return ''
    return f'{len(missing)} listed pictures are missing, such as {min(missing)}'


class OxfordFlowers17(_ListedBuilder):
  """The first official split: 40 / 20 / 20 pictures per class."""

  # In the order of the pictures, 80 of each.
  CLASSES = (
    'daffodil', 'snowdrop', 'lily of the valley', 'bluebell', 'crocus', 'iris',
    'tiger lily', 'tulip', 'fritillary', 'sunflower', 'daisy', "colt's foot",
    'dandelion', 'cowslip', 'buttercup', 'windflower', 'pansy',
  )  # fmt: skip
  EACH = 80
  # The first of three official splits: its key, and pictures of each class.
  LISTS = {
    'train': ('trn1', 40),
    'validation': ('val1', 20),
    'test': ('tst1', 20),
  }
  FILE = re.compile(r'(?:.*/)?(?P<file>image_\d{4}\.jpg)')
  PARTS = tuple(LISTS)

  def _places(self, *lists: Path) -> Iterator[tuple[str, str, str]]:
    scipy_io = require('scipy.io', 'reading the lists of Flowers17')
    for part, (key, count) in self.LISTS.items():
      try:
        numbers = np.ravel(scipy_io.loadmat(lists[0])[key]).astype(int)
      except Exception as error:  # scipy reports damage in many ways
        raise self._layout_error(
          lists[0], f'not a list of splits with trn1, val1 and tst1 ({error!r})'
        ) from error
      labels = (numbers - 1) // self.EACH
      expected = np.repeat(np.arange(len(self.CLASSES)), count)
      if not np.array_equal(np.sort(labels), expected):
        raise self._layout_error(
          lists[0], f'{key} does not list {count} pictures of each class'
        )
      for number, label in zip(numbers, labels, strict=True):
        yield part, f'image_{number:04d}.jpg', self.CLASSES[label]


class MitIndoor67(_ListedBuilder):
  """The pictures of TrainImages.txt and of TestImages.txt."""

  FILE = re.compile(r'(?:.*/)?(?P<file>[^/]+/[^/]+)')
  PARTS = ('train', 'test')

  def _places(self, *lists: Path) -> Iterator[tuple[str, str, str]]:
    for part, path in zip(self.PARTS, lists, strict=True):
      try:
        lines = path.read_text('utf-8-sig').splitlines()
      except (OSError, UnicodeError) as error:
        raise self._layout_error(path, f'not a list ({error})') from error
      for file in {line.strip() for line in lines} - {''}:
        yield part, file, file.partition('/')[0]


class SufrW(OriginalBuilder):
  """SUFR-W ("SUFR in the wild"), in one split (`train`).

  Line i of a list, "ID # NAME", is the person on picture i; the label is
  "ID NAME".
  """

  LIST = 'SUFR_in_the_wild_info.txt'
  LINE = re.compile(r'\s*(\d+)\s*#\s*(.*\S)\s*')
  FILE = re.compile(
    r'(?:.*/)?SUFR_in_the_wild/(?P<file>(\d+)\.jpe?g)', re.IGNORECASE
  )

  def _read_lists(self, path: Path, *lists: Path) -> None:
    self._people: list[str] = []
    for name, read in archives.members(path):
      if name.rpartition('/')[2] == self.LIST:
        self._used.add(name)
        lines = read().decode('utf-8', 'replace').splitlines()
        break
    else:
      raise self._layout_error(path, f'no {self.LIST}')
    for number, line in enumerate(lines, 1):
      match = self.LINE.fullmatch(line)
      if match is None:
        raise self._layout_error(
          path, f'line {number} of {self.LIST} is {line!r}, not "ID # NAME"'
        )
      self._people.append(f'{match[1]} {match[2]}')

  def _place(self, match: re.Match[str]) -> tuple[str, str, str]:
    number, people = int(match[2]), self._people
    if not 1 <= number <= len(people):
      raise self._layout_error(
        Path(match[0]), f'a picture, but {len(people)} lines in {self.LIST}'
      )
    return 'train', f'{number:05d}.jpg', people[number - 1]


class TimitSubphones(OriginalBuilder):
  """TIMIT (LDC93S1): features and labels of the frames of each utterance.

  The paper used TIMIT's development set: the customary 50 speakers of its test
  part (Halberstadt 1998), without the two sentences (SA) that all speakers
  read.
  """

  SPEAKERS = frozenset(
    (
      'faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 '
      'mcsh0 fadg0 fdms0 fedw0 mgjf0 mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 '
      'frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0 mrcs0 mrjm4 '
      'fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 '
      'fmml0 mrws1'
    ).split()
  )
  SENTENCES = 8  # SI and SX, of each speaker
  FILE = re.compile(
    r'(?:.*/)?test/dr\d/(?P<file>([a-z0-9]+)/(s[ix]\d+)\.(wav|phn))',
    re.IGNORECASE,
  )

  def _features(self) -> tfds.features.FeaturesDict:
    of = tfds.features
    return of.FeaturesDict(
      {
        'features': of.Tensor(shape=(None, speech.FEATURES), dtype=np.float32),
        'labels': of.Tensor(shape=(None,), dtype=np.int64),
        'file': of.Text(),
      }
    )

  def _generate_examples(
    self, path: Path, part: str
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    halves: dict[str, dict[str, bytes]] = {}
    sentences = collections.Counter[str](dict.fromkeys(self.SPEAKERS, 0))
    for match, content in self._matching(path, pictures=False):
      speaker, sentence, suffix = (match[i].lower() for i in (2, 3, 4))
      if speaker not in self.SPEAKERS:
        continue
      utterance = f'{speaker}/{sentence}'
      half = halves.setdefault(utterance, {})
      half[suffix] = content
      if len(half) == 2:
        sentences[speaker] += 1
        halves.pop(utterance)
        at = f'{path}: {utterance}'
        values, labels = speech.frames(half['wav'], half['phn'], at)
        example = {'features': values, 'labels': labels, 'file': utterance}
        yield utterance, example
    if halves:
      utterance, half = min(halves.items())
      raise self._layout_error(
        path, f'{utterance} has only a .{min(half)} file'
      )
    if odd := {who for who, n in sentences.items() if n != self.SENTENCES}:
      who = min(odd)
      raise self._layout_error(
        path,
        f'{len(odd)} of the 50 speakers of the development set do not have '
        f'their {self.SENTENCES} sentences, such as {who} with '
        f'{sentences[who]}',
      )
