"""What our builders share: finding originals, and an image with its label."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.datasets import archives
from experiments.datasets.errors import DatasetError
from experiments.datasets.specs import SPECS

Examples = Iterator[tuple[str, dict[str, Any]]]


class OriginalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder over the original archives listed in `archives.ORIGINALS`.

  A file that a person has put into the manual folder is used; otherwise it is
  downloaded, where it can be. Pictures are stored byte for byte.
  """

  VERSION = tfds.core.Version('1.0.0')

  # Which members of the archive are pictures: groups `label` and `file`.
  FILE: re.Pattern[str]

  def _info(self) -> tfds.core.DatasetInfo:
    (spec,) = (spec for spec in SPECS.values() if spec.builder == self.name)
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'{spec.name}: {archives.ORIGINALS[self.name].layout}.',
      features=self._features(),
      homepage=spec.homepage,
      citation=spec.citation,
      license=spec.licence,
    )

  def _features(self) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(shape=(None, None, 3)),
        'label': tfds.features.Text(),
        'file': tfds.features.Text(),
      }
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    return {'train': self._generate_examples(*self._originals(dl_manager))}

  def _generate_examples(self, path: Path) -> Examples:
    found = False
    for name, read in archives.members(path):
      if match := self.FILE.fullmatch(name):
        found = True
        yield match['file'], picture(match['label'], match['file'], read())
    if not found:
      raise self._layout_error(path, 'no picture of that form')

  def _originals(self, dl_manager: tfds.download.DownloadManager) -> list[Path]:
    """Paths of the original files, checked, in the order of the table.

    Raises:
      DatasetError: one is missing and cannot be downloaded, or its checksum
        is wrong.
    """
    manual_dir = Path(dl_manager.download_dir) / 'manual'
    if self.MANUAL_DOWNLOAD_INSTRUCTIONS:
      # TFDS refuses a folder that is empty; the error below says more.
      with contextlib.suppress(AssertionError):
        manual_dir = Path(dl_manager.manual_dir)
    paths, urls = {}, {}
    for archive in archives.ORIGINALS[self.name].archives:
      path = archives.place(self.name, archive, manual_dir)
      if path.exists():
        paths[archive] = path
      elif archive.url is not None:
        urls[archive.name] = archive.url
      else:
        raise DatasetError(
          f'{path}: not there; ' + archives.instructions(self.name, manual_dir)
        )
    downloaded = dl_manager.download(urls) if urls else {}
    for archive in archives.ORIGINALS[self.name].archives:
      if archive not in paths:
        paths[archive] = Path(downloaded[archive.name])
      archives.verify(paths[archive], archive)
    return [paths[a] for a in archives.ORIGINALS[self.name].archives]

  def _layout_error(self, path: Path, found: str) -> DatasetError:
    return DatasetError(
      f'{path}: {found}; expected {archives.ORIGINALS[self.name].layout}. '
      + archives.instructions(self.name, path.parent)
    )


def picture(label: str, file: str, encoded: bytes) -> dict[str, Any]:
  """An example: a picture as it is stored, its class and its file name."""
  return {'image': io.BytesIO(encoded), 'label': label, 'file': file}
