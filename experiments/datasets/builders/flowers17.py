"""17 category flowers from 17flowers.tgz and datasplits.mat."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import archives
from experiments.datasets.builders.base import (
  Examples,
  OriginalBuilder,
  picture,
)

# In the order of the pictures, 80 of each.
CLASSES = (
  'daffodil',
  'snowdrop',
  'lily of the valley',
  'bluebell',
  'crocus',
  'iris',
  'tiger lily',
  'tulip',
  'fritillary',
  'sunflower',
  'daisy',
  "colt's foot",
  'dandelion',
  'cowslip',
  'buttercup',
  'windflower',
  'pansy',
)
_EACH = 80
_FILE = re.compile(r'(?:.*/)?(image_(\d{4})\.jpg)')
# The first of three official splits, and the pictures of each class in it.
_LISTS = {
  'train': ('trn1', 40),
  'validation': ('val1', 20),
  'test': ('tst1', 20),
}


class OxfordFlowers17(OriginalBuilder):
  """The first official split: 40 / 20 / 20 pictures per class."""

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    pictures, splits = self._originals(dl_manager)
    return {
      part: self._generate_examples(pictures, numbers)
      for part, numbers in self._numbers(splits).items()
    }

  def _generate_examples(self, path: Path, numbers: set[int]) -> Examples:
    missing = set(numbers)
    for name, read in archives.members(path):
      match = _FILE.fullmatch(name)
      if match is not None and (number := int(match[2])) in missing:
        missing.remove(number)
        label = CLASSES[(number - 1) // _EACH]
        yield match[1], picture(label, match[1], read())
    if missing:
      raise self._layout_error(
        path, f'image_{min(missing):04d}.jpg is not there ({len(missing)} such)'
      )

  def _numbers(self, path: Path) -> dict[str, set[int]]:
    import scipy.io

    try:
      stored = scipy.io.loadmat(path)
      lists = {
        part: np.ravel(stored[key]).astype(int)
        for part, (key, _) in _LISTS.items()
      }
    # scipy reports damage in many ways.
    except Exception as error:
      raise self._layout_error(
        path, f'not a list of splits with trn1, val1 and tst1 ({error!r})'
      ) from error
    for part, (key, count) in _LISTS.items():
      per_class = np.bincount(
        (lists[part] - 1) // _EACH, minlength=len(CLASSES)
      )
      if (per_class != count).any() or len(per_class) != len(CLASSES):
        raise self._layout_error(
          path, f'{key} does not list {count} pictures of each class'
        )
    numbers = np.concatenate(list(lists.values()))
    if len(np.unique(numbers)) != len(numbers):
      raise self._layout_error(path, 'a picture is in two lists')
    return {part: set(values.tolist()) for part, values in lists.items()}
