"""The 15 datasets of the paper, an embedded one, and one's own.

`SPECS` is the table, `load` gives a dataset as arrays, `status`, `prepare`,
`check` and `show_split` are what `python -m experiments data` shows.
"""

from experiments.datasets.commands import (
  Status,
  check,
  prepare,
  show_split,
  status,
)
from experiments.datasets.loader import Dataset, Loader, find, load
from experiments.datasets.specs import (
  SHAPES,
  SPECS,
  WEIGHT_LAYERS,
  DatasetError,
  Draw,
  Spec,
)

__all__ = [
  'SHAPES',
  'SPECS',
  'WEIGHT_LAYERS',
  'Dataset',
  'DatasetError',
  'Draw',
  'Loader',
  'Spec',
  'Status',
  'check',
  'find',
  'load',
  'prepare',
  'show_split',
  'status',
]
