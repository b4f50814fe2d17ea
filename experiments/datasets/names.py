"""Datasets by name: case, hyphens and underscores do not matter."""

import difflib
from collections.abc import Iterable

from experiments.datasets.errors import DatasetError
from experiments.datasets.spec import Spec
from experiments.datasets.specs import SPECS


def plain(name: str) -> str:
  """A name without case, hyphens and underscores, for comparison."""
  return name.lower().replace('-', '').replace('_', '')


def find(name: str) -> Spec:
  """The spec of a dataset by its name or one of its aliases, in any case.

  Raises:
    DatasetError: no such dataset; the message has the nearest name.
  """
  known = {
    plain(key): spec
    for spec in SPECS.values()
    for key in (spec.name, *spec.aliases)
  }
  spec = known.get(plain(name))
  if spec is None:
    raise DatasetError(
      f'unknown dataset {name!r}{nearest(plain(name), known)}; the datasets '
      f'are {", ".join(SPECS)}'
    )
  return spec


def nearest(name: str, known: Iterable[str]) -> str:
  """', did you mean X?' for the known name nearest to `name`, or nothing."""
  matches = difflib.get_close_matches(name, list(known), n=1)
  return f', did you mean {matches[0]!r}?' if matches else ''
