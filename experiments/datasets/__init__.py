"""The 15 datasets of the paper, and an embedded one.

`SPECS` is the table, `load` gives a dataset as arrays, `status`, `prepare`,
`check` and `show_split` are what `python -m experiments data` shows.
"""

from experiments.datasets.checks import Report, check, show_split
from experiments.datasets.errors import DatasetError
from experiments.datasets.loader import Dataset, load
from experiments.datasets.names import find
from experiments.datasets.prepare import Status, prepare, status
from experiments.datasets.spec import SHAPES, Draw, Spec
from experiments.datasets.specs import SPECS

__all__ = [
  'SHAPES',
  'SPECS',
  'Dataset',
  'DatasetError',
  'Draw',
  'Report',
  'Spec',
  'Status',
  'check',
  'find',
  'load',
  'prepare',
  'show_split',
  'status',
]
