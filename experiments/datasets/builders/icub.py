"""iCubWorld 1.0, its categorization test set, from iCubWorld.zip.

The names of the categories and of the test set's folder are those of the
authors' own tools.
"""

import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets import archives
from experiments.datasets.builders.base import (
  Examples,
  OriginalBuilder,
  picture,
)
from experiments.datasets.folder import PICTURES

CATEGORIES = (
  'bananas bottles boxes bread cans lemons pears peppers potatos yogurt'
).split()

_FILE = re.compile(
  r'(?:.*/)?(?:(train)|(test)/categorization)'
  rf'/(({"|".join(CATEGORIES)})/(?:[^/]+/)*[^/]+)',
  re.IGNORECASE,
)


class IcubWorld(OriginalBuilder):
  """Training folders and the test folder `categorization`."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = archives.instructions(
    'icub_world', 'downloads/manual'
  )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    (path,) = self._originals(dl_manager)
    return {
      part: self._generate_examples(path, part) for part in ('train', 'test')
    }

  def _generate_examples(self, path: Path, part: str) -> Examples:
    seen = set()
    for name, read in archives.members(path):
      match = _FILE.fullmatch(name)
      if match is None or not name.lower().endswith(PICTURES):
        continue
      if part == ('train' if match[1] else 'test'):
        label = match[4].lower()
        seen.add(label)
        yield match[3], picture(label, match[3], read())
    if missing := sorted(set(CATEGORIES) - seen):
      raise self._layout_error(path, f'no {part} pictures of {missing[0]}')
