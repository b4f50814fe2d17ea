"""Caltech-256 from 256_ObjectCategories.tar."""

import re

from experiments.datasets.builders.base import OriginalBuilder


class Caltech256(OriginalBuilder):
  """All 257 folders (256 categories and clutter), in one split (`train`)."""

  # The archive also holds stray files, such as 056.dog/greg and
  # 198.spider/RENAME2.
  FILE = re.compile(
    r'(?:.*/)?(?P<label>(\d{3})\.[^/]+)/(?P<file>\2_\d{4}\.jpg)'
  )
