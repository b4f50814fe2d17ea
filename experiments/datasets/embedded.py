"""The embedded set: scikit-learn's 1,797 digits of 8x8 pixels."""

from collections.abc import Mapping
from typing import cast

import numpy as np

from experiments.datasets.raw import Part, Raw, Source
from experiments.datasets.spec import Spec
from experiments.datasets.splits import draw_split


def source(spec: Spec, seed: int) -> Source:
  """The digits, split by `spec.draw` under `seed`."""
  return Source(
    text='scikit-learn, sklearn.datasets.load_digits()',
    key=f'load_digits, seed {seed}',
    read=lambda: _read(spec, seed),
  )


def _read(spec: Spec, seed: int) -> Raw:
  from sklearn.datasets import load_digits

  assert spec.draw is not None
  digits = cast(Mapping[str, np.ndarray], load_digits())
  # Pixels count from 0 to 16.
  pixels = np.round(digits['images'] * (255 / 16)).astype(np.uint8)
  pixels = pixels[..., np.newaxis]
  classes = tuple(str(name) for name in digits['target_names'])
  names = [f'row {i:04d}' for i in range(len(pixels))]
  split = draw_split(names, digits['target'], classes, spec.draw, seed)
  whole = Part(pixels.__getitem__, digits['target'], names)
  return Raw(
    train=whole.take(split.train, split.train_labels),
    test=whole.take(split.test, split.test_labels),
    classes=split.classes,
    jpeg=False,
  )
