"""tensorflow-datasets builders for the sets it lacks.

Importing this package registers them; `experiments.datasets.prepare` runs them.
"""

from experiments.datasets.builders.caltech256 import Caltech256
from experiments.datasets.builders.flowers17 import OxfordFlowers17
from experiments.datasets.builders.icub import IcubWorld
from experiments.datasets.builders.pubfig83 import Pubfig83
from experiments.datasets.builders.scene67 import MitIndoor67
from experiments.datasets.builders.sufrw import SufrW
from experiments.datasets.builders.timit import TimitSubphones

__all__ = [
  'Caltech256',
  'IcubWorld',
  'MitIndoor67',
  'OxfordFlowers17',
  'Pubfig83',
  'SufrW',
  'TimitSubphones',
]
