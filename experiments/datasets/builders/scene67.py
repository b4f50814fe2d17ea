"""MIT indoor scenes (67 categories) with the official lists."""

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

_FILE = re.compile(r'(?:.*/)?Images/([^/]+/[^/]+)')


class MitIndoor67(OriginalBuilder):
  """The pictures of TrainImages.txt and of TestImages.txt."""

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    pictures, *lists = self._originals(dl_manager)
    return {
      part: self._generate_examples(pictures, path)
      for part, path in zip(('train', 'test'), lists, strict=True)
    }

  def _generate_examples(self, pictures: Path, listed: Path) -> Examples:
    wanted = {line.strip() for line in listed.read_text().splitlines()} - {''}
    for name, read in archives.members(pictures):
      match = _FILE.fullmatch(name)
      if match is not None and match[1] in wanted:
        wanted.remove(match[1])
        yield match[1], picture(match[1].split('/')[0], match[1], read())
    if wanted:
      raise self._layout_error(
        pictures,
        f'{len(wanted)} pictures of {listed.name} are not there, such as '
        f'{min(wanted)}',
      )
