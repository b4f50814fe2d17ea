"""SUFR-W ("SUFR in the wild"): numbered pictures and a list of people.

Line i of SUFR_in_the_wild_info.txt, "ID # NAME", is the person on picture i.
"""

import re
from pathlib import Path

from experiments.datasets import archives
from experiments.datasets.builders.base import (
  Examples,
  OriginalBuilder,
  picture,
)

_LIST = 'SUFR_in_the_wild_info.txt'
_FILE = re.compile(r'(?:.*/)?SUFR_in_the_wild/(\d+)\.jpe?g', re.IGNORECASE)
_LINE = re.compile(r'\s*(\d+)\s*#\s*(.*\S)\s*')


class SufrW(OriginalBuilder):
  """All people, in one split (`train`); the label is "ID NAME"."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = archives.instructions(
    'sufr_w', 'downloads/manual'
  )

  def _generate_examples(self, path: Path) -> Examples:
    people = self._people(path)
    found = False
    for name, read in archives.members(path):
      match = _FILE.fullmatch(name)
      if match is None:
        continue
      found, number = True, int(match[1])
      if not 1 <= number <= len(people):
        raise self._layout_error(
          path, f'picture {name} but {len(people)} lines in {_LIST}'
        )
      file = f'{number:05d}.jpg'
      yield file, picture(people[number - 1], file, read())
    if not found:
      raise self._layout_error(path, 'no numbered pictures')

  def _people(self, path: Path) -> list[str]:
    for name, read in archives.members(path):
      if name.rpartition('/')[2] == _LIST:
        lines = read().decode('utf-8', 'replace').splitlines()
        break
    else:
      raise self._layout_error(path, f'no {_LIST}')
    people = []
    for number, line in enumerate(lines, 1):
      match = _LINE.fullmatch(line)
      if match is None:
        raise self._layout_error(
          path, f'line {number} of {_LIST} is {line!r}, not "ID # NAME"'
        )
      people.append(f'{match[1]} {match[2]}')
    return people
