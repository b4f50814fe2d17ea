"""Effects and limits that the paper's conclusions are made of.

An effect gets the errors of the named conditions (arrays of means in %, by
name) and the error of guessing, and works elementwise, so that the same
function serves one value and a bootstrap. A limit decides on one value.
"""

from collections.abc import Callable, Mapping

import numpy as np

from experiments.report.statistics import trend

Errors = Mapping[str, np.ndarray]
Effect = Callable[[Errors, float], np.ndarray]
Holds = Callable[[float, Mapping[str, float], float], bool]

POINTS = 3.0  # the paper's own limit for better and worse
USEFUL = 10.0  # points below chance from which we call learning useful
RISING = 0.5  # rank correlation from which we call a trend rising


def below(limit: float) -> Holds:
  """Holds while the effect is below the limit."""
  return lambda effect, errors, chance: effect < limit


def at_least(limit: float) -> Holds:
  """Holds from the limit on."""
  return lambda effect, errors, chance: effect >= limit


def spread(errors: Errors, chance: float) -> np.ndarray:
  """Largest minus smallest error."""
  values = list(errors.values())
  return np.max(values, axis=0) - np.min(values, axis=0)


def minus(one: str, other: str) -> Effect:
  """Error of one condition minus that of another."""
  return lambda errors, chance: errors[one] - errors[other]


def below_chance(name: str) -> Effect:
  """How far a condition is below the error of guessing."""
  return lambda errors, chance: chance - errors[name]


def worst_minus(names: tuple[str, ...], other: str) -> Effect:
  """Largest of some errors minus that of another condition."""
  return lambda errors, chance: (
    np.max([errors[name] for name in names], axis=0) - errors[other]
  )


def fails(name: str) -> Holds:
  """Near chance, or worse than SGD by the paper's limit."""
  return lambda effect, errors, chance: (
    effect >= POINTS or chance - errors[name] < POINTS
  )


def works(name: str) -> Holds:
  """Does not fail."""
  failed = fails(name)
  return lambda effect, errors, chance: not failed(effect, errors, chance)


def trend_in_p(errors: Errors, chance: float) -> np.ndarray:
  """Rank correlation of the error with p, over the p that are there."""
  return trend(*(errors[name] for name in sorted(errors, key=flipped)))


def flipped(name: str) -> float:
  """p in % of a name such as 'brSF-25%+BN+BM' (0 for 'brSF+BN+BM')."""
  rule = name.split('+')[0]
  return float(rule.split('-')[1].rstrip('%')) if '-' in rule else 0.0
