"""The datasets: the paper's 15 and an embedded one, as a literal table.

Counts are those of the paper's technical report (section 5.1). Where its text
leaves the test set open, the printed error rates decide: each number of a row
must be a multiple of 1 / (test samples). That gives 6149 for Flowers102 (the
official test set) and 949 for Cal101 (15 classes have fewer than 40 images).
The error rates of iCub fit 2001 instead of the 2000 in the text, those of
TIMIT80 multiples of 1 / 2500 instead of 1 / 8000; there the text is followed.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any


class DatasetError(ValueError):
  """Data that is missing, broken or not as expected.

  The message names the file or argument, what was expected there, and what
  to do about it.
  """


class UnknownDataset(DatasetError):
  """A name of the paper's datasets was misspelled, or nothing has this name."""


# Input of each architecture of Table 1: (height, width, channels) of uint8
# images, or (features,) of float32.
SHAPES: Mapping[str, tuple[int, ...]] = {
  'mnist': (28, 28, 1),
  'cifar': (32, 32, 3),
  'svhn': (32, 32, 3),
  'general': (119, 119, 3),
  'timit': (1845,),
}

# Layers of weights of each; here because options are checked before JAX starts.
WEIGHT_LAYERS: dict[str, int] = {
  'general': 5, 'mnist': 4, 'cifar': 5, 'svhn': 4, 'timit': 3,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """A seeded split: draw classes, then samples of each class.

  Attributes:
    classes: classes to draw, of those with enough samples; None takes all.
    train: training samples per class; None takes all that are not tested on.
    test: test samples per class, or, below 1, their share.
    short_test: accept classes with fewer than `train + test` samples; they
      give `train` for training and the rest, at least one, for testing.
    exclude: names of classes that are never drawn.
  """

  classes: int | None = None
  train: int | None
  test: float
  short_test: bool = False
  exclude: tuple[str, ...] = ()

  @property
  def least(self) -> int:
    """Samples that a class must have to be drawn."""
    test = 1 if self.short_test or self.test < 1 else int(self.test)
    return test + (1 if self.train is None else self.train)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """One dataset as the paper uses it.

  Attributes:
    name: the paper's name, as in its tables.
    classes: number of classes; 0, like the samples, where it is not known.
    architecture: column of Table 1, a key of `SHAPES`.
    train: training samples in all.
    test: test samples in all.
    protocol: the split in words.
    source: of the paper's sets 'download' or 'manual' (a person must get it);
      of others 'embedded' or 'own'.
    builder: tensorflow-datasets builder that prepares it; '' without one.
    draw: how the split is drawn; None where the source has a split.
    lossless: the original pictures are stored without loss.
    license: what is known of the terms. No grant of rights.
    homepage: where the set is described.
    citation: the publication.
    aliases: names of its files and folders in a data folder, first match wins.
  """

  name: str
  classes: int
  architecture: str
  train: int
  test: int
  protocol: str
  source: str = 'download'
  builder: str = ''
  draw: Draw | None = None
  lossless: bool = False
  license: str = 'not stated by the authors; research use'
  homepage: str = ''
  citation: str = ''
  aliases: tuple[str, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one sample, as the architecture takes it."""
    return SHAPES[self.architecture]


# fmt: off
_ROWS = (
  Spec(
    name='MNIST', classes=10, architecture='mnist', train=60000, test=10000,
    protocol='official train and test sets', builder='mnist', lossless=True,
    license='CC BY-SA 3.0', homepage='http://yann.lecun.com/exdb/mnist/',
    citation='LeCun, Cortes, Burges, The MNIST database (1998)',
    aliases=('mnist',),
  ),
  Spec(
    name='CIFAR', classes=10, architecture='cifar', train=50000, test=10000,
    protocol=(
      'official train and test sets (the report prints 100 test images per '
      'class, a misprint of 1000: its error rates need more)'
    ),
    builder='cifar10', lossless=True,
    homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
    citation='Krizhevsky, Learning multiple layers of features (2009)',
    aliases=('cifar10', 'cifar'),
  ),
  Spec(
    name='CIFAR100', classes=100, architecture='cifar', train=50000, test=10000,
    protocol='official train and test sets, fine labels', builder='cifar100',
    lossless=True, homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
    citation='Krizhevsky, Learning multiple layers of features (2009)',
    aliases=('cifar100', 'cifar100_clean10k'),
  ),
  Spec(
    name='SVHN', classes=10, architecture='svhn', train=73257, test=26032,
    protocol='cropped digits, official train and test sets, no extra images',
    builder='svhn_cropped', lossless=True, license='non-commercial use',
    homepage='http://ufldl.stanford.edu/housenumbers/',
    citation='Netzer et al., Reading digits in natural images (2011)',
    aliases=('svhn', 'svhn_cropped'),
  ),
  Spec(
    name='STL10', classes=10, architecture='general', train=5000, test=8000,
    protocol='official train and test sets, no unlabeled images',
    builder='stl10', lossless=True,
    license='images from ImageNet, whose terms apply',
    homepage='https://cs.stanford.edu/~acoates/stl10/',
    citation='Coates, Lee, Ng, Analysis of single-layer networks (2011)',
    aliases=('stl10',),
  ),
  Spec(
    name='Cal101', classes=102, architecture='general', train=3060, test=949,
    protocol=(
      'all 102 classes (101 objects and the background); 30 training images '
      'drawn per class, 10 test images of the others, or what is left (1 to 9) '
      'in the 15 classes with fewer than 40'
    ),
    builder='caltech101',
    draw=Draw(classes=102, train=30, test=10, short_test=True),
    license='CC BY 4.0', homepage='https://doi.org/10.22002/D1.20086',
    citation='Fei-Fei, Fergus, Perona, CVIU 106 (2007)',
    aliases=('caltech101', 'cal101'),
  ),
  Spec(
    name='Cal256-101', classes=102, architecture='general', train=3060,
    test=1020,
    protocol=(
      '102 of the 256 object categories drawn (clutter left out), then 30 '
      'training and 10 test images per class'
    ),
    builder='caltech256',
    draw=Draw(classes=102, train=30, test=10, exclude=('257.clutter',)),
    license='CC BY 4.0', homepage='https://doi.org/10.22002/D1.20087',
    citation='Griffin, Holub, Perona, Caltech-256 (2007)',
    aliases=('caltech256_101', 'cal256-101', 'caltech256', 'caltech256_10'),
  ),
  Spec(
    name='iCub', classes=10, architecture='general', train=6000, test=2000,
    protocol=(
      'iCubWorld 1.0: its training set (3 objects per category, 200 images '
      'each) and its test set "categorization" (one other object)'
    ),
    source='manual', builder='icub_world',
    homepage='https://robotology.github.io/iCubWorld/',
    citation='Fanello et al., iCub World, CVPR workshops (2013)',
    aliases=('icub', 'icubworld'),
  ),
  Spec(
    name='Flowers17', classes=17, architecture='general', train=1020, test=340,
    protocol=(
      'first official split: its training and validation lists for training '
      '(40 + 20 per class), its test list for testing (20)'
    ),
    builder='oxford_flowers17',
    homepage='https://www.robots.ox.ac.uk/~vgg/data/flowers/17/',
    citation='Nilsback, Zisserman, CVPR (2006)',
    aliases=('flowers17', 'oxford_flowers17'),
  ),
  Spec(
    name='Flowers102', classes=102, architecture='general', train=2040,
    test=6149,
    protocol=(
      'official split: training and validation lists for training (10 + 10 '
      "per class), test list (6149 images, as the paper's error rates show) "
      'for testing'
    ),
    builder='oxford_flowers102',
    homepage='https://www.robots.ox.ac.uk/~vgg/data/flowers/102/',
    citation='Nilsback, Zisserman, ICVGIP (2008)',
    aliases=('flowers102', 'oxford_flowers102'),
  ),
  Spec(
    name='PubFig83-ID', classes=80, architecture='general', train=6800,
    test=1200,
    protocol=(
      '80 of the people with at least 100 images drawn (83 in the set), then '
      '85 training and 15 test images of each'
    ),
    source='manual', builder='pubfig83',
    draw=Draw(classes=80, train=85, test=15),
    license='pictures belong to their owners; non-commercial research only',
    homepage='http://vision.seas.harvard.edu/pubfig83/',
    citation='Pinto, Stone, Zickler, Cox, CVPR workshops (2011)',
    aliases=('pubfig83-id', 'pubfig83'),
  ),
  Spec(
    name='SUFR-W-ID', classes=80, architecture='general', train=800, test=400,
    protocol=(
      '80 of the people with at least 15 images drawn (400 in the set), then '
      '10 training and 5 test images of each'
    ),
    source='manual', builder='sufr_w', draw=Draw(classes=80, train=10, test=5),
    license='pictures belong to their owners; research only',
    homepage='https://cbmm.mit.edu/knowledge-transfer/sufr',
    citation='Leibo, Liao, Poggio, VISIGRAPP (2014)',
    aliases=('sufr-w-id', 'sufr_w', 'sufrw'),
  ),
  Spec(
    name='LFW-ID', classes=80, architecture='general', train=800, test=400,
    protocol=(
      '80 of the people with at least 15 images drawn, then 10 training and 5 '
      'test images of each'
    ),
    builder='lfw', draw=Draw(classes=80, train=10, test=5),
    license='pictures belong to their owners; research only',
    homepage='http://vis-www.cs.umass.edu/lfw/',
    citation='Huang et al., Labeled faces in the wild (2008)',
    aliases=('lfw-id', 'lfw'),
  ),
  Spec(
    name='Scene67', classes=67, architecture='general', train=5360, test=1340,
    protocol='official lists TrainImages.txt and TestImages.txt',
    builder='mit_indoor67', license='research only',
    homepage='https://web.mit.edu/torralba/www/indoor.html',
    citation='Quattoni, Torralba, CVPR (2009)',
    aliases=('scene67', 'mit_indoor67', 'indoor67'),
  ),
  Spec(
    name='TIMIT80', classes=80, architecture='timit', train=32000, test=8000,
    protocol=(
      'development set (50 speakers, no SA sentences); 80 of the sub-phonetic '
      'classes (61 phones in thirds) with at least 500 frames drawn, then 400 '
      'training and 100 test frames of each; 40 log mel filter banks and log '
      'energy with first and second differences (123), normalized over the '
      'training frames, with 7 frames of context on each side (15 x 123)'
    ),
    source='manual', builder='timit_subphones',
    draw=Draw(classes=80, train=400, test=100), lossless=True,
    license='LDC user agreement (LDC93S1)',
    homepage='https://catalog.ldc.upenn.edu/LDC93S1',
    citation='Garofolo et al., TIMIT (1993)', aliases=('timit80', 'timit'),
  ),
  Spec(
    name='digits', classes=10, architecture='mnist', train=1437, test=360,
    protocol="not the paper's: 36 test images drawn per class, the rest train",
    source='embedded', draw=Draw(classes=10, train=None, test=36),
    lossless=True, license='CC BY 4.0',
    homepage='https://doi.org/10.24432/C50P49',
    citation='Alpaydin, Kaynak, Optical recognition of digits (1998)',
    aliases=('digits',),
  ),
)
# fmt: on

SPECS: Mapping[str, Spec] = {spec.name: spec for spec in _ROWS}


def plain(name: str) -> str:
  """A name without case, hyphens and underscores, for comparison."""
  return name.lower().replace('-', '').replace('_', '')


def _known() -> dict[str, Spec]:
  return {
    plain(key): spec
    for spec in SPECS.values()
    for key in (spec.name, *spec.aliases)
  }


def find_known(name: str) -> Spec | None:
  """The spec of the table with this name or alias, in any case."""
  return _known().get(plain(name))


def nearest(name: str) -> str:
  """', did you mean X?' for the known name nearest to `name`, or nothing."""
  matches = difflib.get_close_matches(plain(name), list(_known()), n=1)
  return f', did you mean {matches[0]!r}?' if matches else ''


def require(module: str, purpose: str, extra: str = 'experiments') -> Any:
  """Imports a library; if it is missing, the error says how to install it."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise DatasetError(
      f'{purpose} needs {error.name or module}; install it with '
      f"`pip install -e '.[{extra}]'`"
    ) from error
