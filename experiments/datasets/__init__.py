"""The 15 datasets of the paper, and an embedded one.

`SPECS` is the table, `load` gives a dataset as arrays.
"""

from experiments.datasets.errors import DatasetError
from experiments.datasets.loader import Dataset, load
from experiments.datasets.names import find
from experiments.datasets.spec import SHAPES, Draw, Spec
from experiments.datasets.specs import SPECS

__all__ = [
  'SHAPES',
  'SPECS',
  'Dataset',
  'DatasetError',
  'Draw',
  'Spec',
  'find',
  'load',
]
