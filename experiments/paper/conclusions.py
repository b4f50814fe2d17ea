"""The paper's conclusions as rows of data: what is said, how it is judged."""

import dataclasses

from experiments.report.effects import (
  POINTS,
  RISING,
  USEFUL,
  Effect,
  Holds,
  at_least,
  below,
  below_chance,
  fails,
  minus,
  spread,
  trend_in_p,
  works,
  worst_minus,
)


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


def _normalised(name: str) -> Conclusion:
  return Conclusion(
    'III',
    f'{name} works',
    f'{name} does not fail.',
    f'effect: {name} - SGD; holds if below 3 points and {name} is 3 points or '
    'more below chance',
    ('SGD', name),
    minus(name, 'SGD'),
    works(name),
  )


def _grows(rule: str, drawn: str) -> Conclusion:
  same, *others = (
    f'{rule}+BN+BM',
    *(f'{rule}-{p}%+BN+BM' for p in (50, 100, 25, 75)),
  )
  return Conclusion(
    'V',
    f'{rule} p',
    f'Error grows with the probability p of a wrong sign, {drawn}.',
    f'effect: rank correlation of the error of {rule}-p+BN+BM with p (0, 25, '
    '50, 75, 100 %; 0, 50 and 100 % must be there); holds from 0.5 on',
    (same, *others[:2]),
    trend_in_p,
    at_least(RISING),
    'rank correlation',
    tuple(others[2:]),
  )


def _helped(conclusion: str, what: str, without: str, with_it: str):
  return Conclusion(
    conclusion,
    f'{with_it} gain',
    f'{what} helps {without}.',
    f'effect: {without} - {with_it}; holds if above 0',
    (without, with_it),
    minus(without, with_it),
    lambda effect, errors, chance: effect > 0,
  )


def _clamped(name: str) -> Conclusion:
  return Conclusion(
    'C2',
    f'{name} Bottom',
    f'{name} learns nothing useful with its last layer clamped.',
    f'effect: chance - {name} Bottom; holds if below 10 points',
    (f'{name} Bottom',),
    below_chance(f'{name} Bottom'),
    below(USEFUL),
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
    spread,
    below(POINTS),
  )


CONCLUSIONS: tuple[Conclusion | AcrossDatasets, ...] = (
  Conclusion(
    'I',
    'magnitudes alike',
    'Magnitudes of feedback do not matter: uSF, brSF and frSF (with BN and BM) '
    'are alike.',
    'effect: largest - smallest error of the three; holds if below 3 points',
    SIGNED,
    spread,
    below(POINTS),
  ),
  Conclusion(
    'I',
    'magnitudes and SGD',
    'With any of these magnitudes the error is that of SGD or lower.',
    'effect: largest error of the three - SGD; holds if below 3 points',
    (*SIGNED, 'SGD'),
    worst_minus(SIGNED, 'SGD'),
    below(POINTS),
  ),
  Conclusion(
    'II',
    'BM and SGD',
    'Magnitudes of updates do not matter: BM is as good as SGD.',
    'effect: BM - SGD; holds if below 3 points',
    ('BM', 'SGD'),
    minus('BM', 'SGD'),
    below(POINTS),
  ),
  Conclusion(
    'III',
    'uSF fails',
    'Normalisation is necessary: uSF without BN and BM fails.',
    'effect: uSF - SGD; holds from 3 points on, or if uSF is less than 3 '
    'points below chance',
    ('SGD', 'uSF'),
    minus('uSF', 'SGD'),
    fails('uSF'),
  ),
  _normalised('uSF+BN'),
  _normalised('uSF+BM'),
  _normalised('uSF+BN+BM'),
  _grows('brSF', 'redrawn at every update'),
  _grows('frSF', 'drawn once'),
  Conclusion(
    'V',
    'RndF+BN learns',
    'Fixed random feedback with BN is far better than chance.',
    'effect: chance - RndF+BN; holds from 10 points on',
    ('RndF+BN',),
    below_chance('RndF+BN'),
    at_least(USEFUL),
  ),
  Conclusion(
    'V',
    'RndF+BN is worse',
    'Fixed random feedback is worse than sign-concordant feedback.',
    'effect: RndF+BN - uSF+BN; holds if above 0',
    ('RndF+BN', 'uSF+BN'),
    minus('RndF+BN', 'uSF+BN'),
    lambda effect, errors, chance: effect > 0,
  ),
  _helped('VI', 'Batch Manhattan', 'BN', 'BN+BM'),
  _helped('VI', 'Batch Manhattan', 'uSF+BN', 'uSF+BN+BM'),
  AcrossDatasets('BN', 'BN+BM'),
  AcrossDatasets('uSF+BN', 'uSF+BN+BM'),
  _helped('C1', 'Batch normalisation', 'RndF', 'RndF+BN'),
  _helped('C1', 'Batch normalisation', 'RndF+BM', 'RndF+BN+BM'),
  Conclusion(
    'C2',
    'Top alike',
    'With only the last layer learning all models are alike.',
    'effect: largest - smallest error of the Top columns; holds if below 3 '
    'points',
    tuple(f'{name} Top' for name in ('SGD', 'RndF', 'RndF+BN+BM', 'uSF+BN+BM')),
    spread,
    below(POINTS),
  ),
  _clamped('RndF'),
  _clamped('RndF+BN+BM'),
  Conclusion(
    'C2',
    'uSF Bottom learns',
    'uSF+BN+BM learns useful features with its last layer clamped.',
    'effect: chance - uSF+BN+BM Bottom; holds from 10 points on',
    ('uSF+BN+BM Bottom',),
    below_chance('uSF+BN+BM Bottom'),
    at_least(USEFUL),
  ),
  Conclusion(
    'C2',
    'uSF Bottom and free',
    'uSF+BN+BM does nearly as well with its last layer clamped as with it '
    'free.',
    'effect: uSF+BN+BM Bottom - uSF+BN+BM; holds if below 3 points',
    ('uSF+BN+BM Bottom', 'uSF+BN+BM'),
    minus('uSF+BN+BM Bottom', 'uSF+BN+BM'),
    below(POINTS),
  ),
  _alike('BM'),
  _alike('uSF+BN+BM'),
  Conclusion(
    'Appendix',
    'BM batches',
    'Batch Manhattan degrades with small batches.',
    'effect: BM-5 - BM-100; holds from 3 points on',
    ('BM-5', 'BM-100'),
    minus('BM-5', 'BM-100'),
    at_least(POINTS),
  ),
  Conclusion(
    'Appendix',
    'SGD batches',
    'SGD does not degrade with small batches.',
    'effect: SGD-5 - SGD-100; holds if below 3 points',
    ('SGD-5', 'SGD-100'),
    minus('SGD-5', 'SGD-100'),
    below(POINTS),
  ),
)  # fmt: skip
