"""PubFig83 from pubfig83.v1.tgz: one folder per person."""

import re

from experiments.datasets import archives
from experiments.datasets.builders.base import OriginalBuilder


class Pubfig83(OriginalBuilder):
  """All people, in one split (`train`)."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = archives.instructions(
    'pubfig83', 'downloads/manual'
  )
  FILE = re.compile(
    r'(?:.*/)?pubfig83/(?P<file>(?P<label>[^/]+)/[^/]+\.jpe?g)', re.IGNORECASE
  )
