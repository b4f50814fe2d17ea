"""Studies: finished runs, one JSONL file per study, and what each is about.

``studies.toml`` says of each study in ``experiments/results`` what it is, why
it was made, with which commands, and what came out.
"""

import dataclasses
import functools
import tomllib
from pathlib import Path

from experiments.studies.files import fold, load

__all__ = ['Study', 'fold', 'load', 'studies']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What a study is about.

  Attributes:
    name: of its file, without `.jsonl`.
    what: datasets, conditions, seeds.
    why: the question.
    found: the answer.
    commands: they make its runs again.
  """

  name: str
  what: str
  why: str
  found: str
  commands: tuple[str, ...]


@functools.cache
def studies() -> tuple[Study, ...]:
  """The studies in ``experiments/results``."""
  text = Path(__file__).with_name('studies.toml').read_text(encoding='utf-8')
  return tuple(
    Study(
      name=name,
      what=row['what'],
      why=row['why'],
      found=row['found'],
      commands=tuple(row['commands'].splitlines()),
    )
    for name, row in tomllib.loads(text).items()
  )
