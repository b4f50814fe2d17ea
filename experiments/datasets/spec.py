"""What describes a dataset: `Spec`, and how a split is drawn: `Draw`."""

import dataclasses
from collections.abc import Mapping

# Input of each architecture of Table 1: (height, width, channels) of uint8
# images, or (features,) of float32.
SHAPES: Mapping[str, tuple[int, ...]] = {
  'mnist': (28, 28, 1),
  'cifar': (32, 32, 3),
  'svhn': (32, 32, 3),
  'general': (119, 119, 3),
  'timit': (1845,),
}

# Layers of weights of each; here, as options are checked before JAX is there.
WEIGHT_LAYERS: dict[str, int] = {
  'general': 5, 'mnist': 4, 'cifar': 5, 'svhn': 4, 'timit': 3,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """A seeded split: draw classes, then samples of each class.

  Attributes:
    classes: classes to draw, of those with enough samples.
    train: training samples per class; None takes all that are not tested on.
    test: test samples per class.
    short_test: accept classes with fewer than `train + test` samples; they
      give `train` for training and the rest, at least one, for testing.
    exclude: names of classes that are never drawn.
  """

  classes: int
  train: int | None
  test: int
  short_test: bool = False
  exclude: tuple[str, ...] = ()

  @property
  def least(self) -> int:
    """Samples that a class must have to be drawn."""
    if self.train is None:
      return self.test + 1
    return self.train + (1 if self.short_test else self.test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """One dataset as the paper uses it.

  Attributes:
    name: the paper's name, as in its tables.
    classes: number of classes.
    architecture: column of Table 1, a key of `SHAPES`.
    train: training samples in all.
    test: test samples in all.
    train_per_class: training samples per class, None if they differ.
    test_per_class: test samples per class, None if they differ.
    protocol: the split in words.
    source: 'embedded', 'download' or 'manual' (a person must get it).
    builder: tensorflow-datasets builder that prepares it; '' if embedded.
    draw: how the split is drawn; None where the source has a split.
    lossless: the original pictures are stored without loss.
    licence: what is known of the terms. No grant of rights.
    homepage: where the set is described.
    citation: the publication.
    aliases: names of its files and folders in a data folder, first match wins.
    in_paper: False for the embedded set.
  """

  name: str
  classes: int
  architecture: str
  train: int
  test: int
  train_per_class: int | None = None
  test_per_class: int | None = None
  protocol: str
  source: str = 'download'
  builder: str = ''
  draw: Draw | None = None
  lossless: bool = False
  licence: str = 'not stated by the authors; research use'
  homepage: str
  citation: str
  aliases: tuple[str, ...]
  in_paper: bool = True

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of one sample, as the architecture takes it."""
    return SHAPES[self.architecture]
