"""The paper's conclusions as rows of data: each statement and its criterion.

An effect gets the errors of the named conditions (arrays of means in %, by
name) and the error of guessing. It works elementwise, so the same function
serves one value and a bootstrap. A criterion decides on one value.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from experiments.paper.statistics import spearman

Errors = Mapping[str, np.ndarray]
Effect = Callable[[Errors, float], np.ndarray]
Holds = Callable[[float, Mapping[str, float], float], bool]

POINTS = 3.0  # the paper's own threshold for better and worse
USEFUL = 10.0  # points below chance from which we call learning useful
RISING = 0.5  # rank correlation from which we call a trend rising


def _below(limit: float) -> Holds:
  return lambda effect, errors, chance: effect < limit


def _at_least(limit: float) -> Holds:
  return lambda effect, errors, chance: effect >= limit


def _spread(errors: Errors, chance: float) -> np.ndarray:
  """Largest minus smallest error."""
  values = list(errors.values())
  return np.max(values, axis=0) - np.min(values, axis=0)


def _minus(one: str, other: str) -> Effect:
  return lambda errors, chance: errors[one] - errors[other]


def _below_chance(name: str) -> Effect:
  return lambda errors, chance: chance - errors[name]


def _fails(name: str) -> Holds:
  """Near chance, or worse than SGD by the paper's threshold."""
  return lambda effect, errors, chance: (
    effect >= POINTS or chance - errors[name] < POINTS
  )


def _trend_in_p(errors: Errors, chance: float) -> np.ndarray:
  """Rank correlation of the error with p, over the p that are there."""
  levels = [errors[name] for name in sorted(errors, key=_flipped)]
  values = np.stack(levels, axis=-1)
  return spearman(np.broadcast_to(np.arange(len(levels)), values.shape), values)


def _flipped(name: str) -> float:
  """p in % of a name such as 'brSF-25%+BN+BM' (0 for 'brSF+BN+BM')."""
  rule = name.split('+')[0]
  return float(rule.split('-')[1].rstrip('%')) if '-' in rule else 0.0


@dataclasses.dataclass(frozen=True)
class Conclusion:
  """A statement of the paper and how a row of errors decides it.

  Attributes:
    conclusion: the paper's numeral, or the experiment.
    key: short name, unique.
    statement: what is claimed.
    how: the effect and the limit, in words.
    needs: conditions without which nothing can be said.
    effect: the quantity, from errors and chance.
    holds: the verdict, from the effect, the errors and chance.
    unit: of the effect.
    helps: conditions used where they are there, besides `needs`.
  """

  conclusion: str
  key: str
  statement: str
  how: str
  needs: tuple[str, ...]
  effect: Effect
  holds: Holds
  unit: str = 'points'
  helps: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AcrossDatasets:
  """A statement on how the gain by BM goes with the training set's size."""

  without: str
  with_bm: str
  conclusion: str = 'VI'
  unit: str = 'rank correlation'
  limit: float = -RISING

  @property
  def needs(self) -> tuple[str, ...]:
    """Conditions without which nothing can be said."""
    return self.without, self.with_bm

  @property
  def key(self) -> str:
    """Short name, unique."""
    return f'{self.with_bm} gain and size'

  @property
  def statement(self) -> str:
    """What is claimed."""
    return f'Batch Manhattan helps {self.without} more on small training sets.'

  @property
  def how(self) -> str:
    """The effect and the limit, in words."""
    return (
      f'effect: rank correlation, over datasets, of {self.without} - '
      f'{self.with_bm} with the number of training images (3 datasets or '
      'more); holds from -0.5 down'
    )


SIGNED = ('uSF+BN+BM', 'brSF+BN+BM', 'frSF+BN+BM')


def _normalized(name: str) -> Conclusion:
  failed = _fails(name)
  return Conclusion(
    'III',
    f'{name} works',
    f'{name} does not fail.',
    f'effect: {name} - SGD; holds if below 3 points and {name} is 3 points or '
    'more below chance',
    ('SGD', name),
    _minus(name, 'SGD'),
    lambda effect, errors, chance: not failed(effect, errors, chance),
  )


def _grows(rule: str, drawn: str) -> Conclusion:
  half, full, *others = (f'{rule}-{p}%+BN+BM' for p in (50, 100, 25, 75))
  return Conclusion(
    'V',
    f'{rule} p',
    f'Error grows with the probability p of a wrong sign, {drawn}.',
    f'effect: rank correlation of the error of {rule}-p+BN+BM with p (0, 25, '
    '50, 75, 100 %; 0, 50 and 100 % must be there); holds from 0.5 on',
    (f'{rule}+BN+BM', half, full),
    _trend_in_p,
    _at_least(RISING),
    'rank correlation',
    tuple(others),
  )


def _helped(conclusion: str, what: str, without: str, with_it: str):
  return Conclusion(
    conclusion,
    f'{with_it} gain',
    f'{what} helps {without}.',
    f'effect: {without} - {with_it}; holds if above 0',
    (without, with_it),
    _minus(without, with_it),
    lambda effect, errors, chance: effect > 0,
  )


def _clamped(name: str) -> Conclusion:
  return Conclusion(
    'C2',
    f'{name} Bottom',
    f'{name} learns nothing useful with its last layer clamped.',
    f'effect: chance - {name} Bottom; holds if below 10 points',
    (f'{name} Bottom',),
    _below_chance(f'{name} Bottom'),
    _below(USEFUL),
  )


def _alike(prefix: str) -> Conclusion:
  names = tuple(f'{prefix}{setting}' for setting in (1, 2, 3))
  return Conclusion(
    'Table 5',
    f'{prefix} settings',
    f'The three settings of {prefix} are alike.',
    f'effect: largest - smallest error of {", ".join(names)}; holds if below '
    '3 points',
    names,
    _spread,
    _below(POINTS),
  )


CONCLUSIONS: tuple[Conclusion | AcrossDatasets, ...] = (
  Conclusion(
    'I',
    'magnitudes alike',
    'Magnitudes of feedback do not matter: uSF, brSF and frSF (with BN and BM) '
    'are alike.',
    'effect: largest - smallest error of the three; holds if below 3 points',
    SIGNED,
    _spread,
    _below(POINTS),
  ),
  Conclusion(
    'I',
    'magnitudes and SGD',
    'With any of these magnitudes the error is that of SGD or lower.',
    'effect: largest error of the three - SGD; holds if below 3 points',
    (*SIGNED, 'SGD'),
    lambda errors, chance: (
      np.max([errors[name] for name in SIGNED], axis=0) - errors['SGD']
    ),
    _below(POINTS),
  ),
  Conclusion(
    'II',
    'BM and SGD',
    'Magnitudes of updates do not matter: BM is as good as SGD.',
    'effect: BM - SGD; holds if below 3 points',
    ('BM', 'SGD'),
    _minus('BM', 'SGD'),
    _below(POINTS),
  ),
  Conclusion(
    'III',
    'uSF fails',
    'Normalization is necessary: uSF without BN and BM fails.',
    'effect: uSF - SGD; holds from 3 points on, or if uSF is less than 3 '
    'points below chance',
    ('SGD', 'uSF'),
    _minus('uSF', 'SGD'),
    _fails('uSF'),
  ),
  _normalized('uSF+BN'),
  _normalized('uSF+BM'),
  _normalized('uSF+BN+BM'),
  _grows('brSF', 'redrawn at every update'),
  _grows('frSF', 'drawn once'),
  Conclusion(
    'V',
    'RndF+BN learns',
    'Fixed random feedback with BN is far better than chance.',
    'effect: chance - RndF+BN; holds from 10 points on',
    ('RndF+BN',),
    _below_chance('RndF+BN'),
    _at_least(USEFUL),
  ),
  Conclusion(
    'V',
    'RndF+BN is worse',
    'Fixed random feedback is worse than sign-concordant feedback.',
    'effect: RndF+BN - uSF+BN; holds if above 0',
    ('RndF+BN', 'uSF+BN'),
    _minus('RndF+BN', 'uSF+BN'),
    lambda effect, errors, chance: effect > 0,
  ),
  _helped('VI', 'Batch Manhattan', 'BN', 'BN+BM'),
  _helped('VI', 'Batch Manhattan', 'uSF+BN', 'uSF+BN+BM'),
  AcrossDatasets('BN', 'BN+BM'),
  AcrossDatasets('uSF+BN', 'uSF+BN+BM'),
  _helped('C1', 'Batch normalization', 'RndF', 'RndF+BN'),
  _helped('C1', 'Batch normalization', 'RndF+BM', 'RndF+BN+BM'),
  Conclusion(
    'C2',
    'Top alike',
    'With only the last layer learning all models are alike.',
    'effect: largest - smallest error of the Top columns; holds if below 3 '
    'points',
    tuple(f'{name} Top' for name in ('SGD', 'RndF', 'RndF+BN+BM', 'uSF+BN+BM')),
    _spread,
    _below(POINTS),
  ),
  _clamped('RndF'),
  _clamped('RndF+BN+BM'),
  Conclusion(
    'C2',
    'uSF Bottom learns',
    'uSF+BN+BM learns useful features with its last layer clamped.',
    'effect: chance - uSF+BN+BM Bottom; holds from 10 points on',
    ('uSF+BN+BM Bottom',),
    _below_chance('uSF+BN+BM Bottom'),
    _at_least(USEFUL),
  ),
  Conclusion(
    'C2',
    'uSF Bottom and free',
    'uSF+BN+BM does nearly as well with its last layer clamped as with it '
    'free.',
    'effect: uSF+BN+BM Bottom - uSF+BN+BM; holds if below 3 points',
    ('uSF+BN+BM Bottom', 'uSF+BN+BM'),
    _minus('uSF+BN+BM Bottom', 'uSF+BN+BM'),
    _below(POINTS),
  ),
  _alike('BM'),
  _alike('uSF+BN+BM'),
  Conclusion(
    'Appendix',
    'BM batches',
    'Batch Manhattan degrades with small batches.',
    'effect: BM-5 - BM-100; holds from 3 points on',
    ('BM-5', 'BM-100'),
    _minus('BM-5', 'BM-100'),
    _at_least(POINTS),
  ),
  Conclusion(
    'Appendix',
    'SGD batches',
    'SGD does not degrade with small batches.',
    'effect: SGD-5 - SGD-100; holds if below 3 points',
    ('SGD-5', 'SGD-100'),
    _minus('SGD-5', 'SGD-100'),
    _below(POINTS),
  ),
)
