"""Rank correlations, and bootstrap intervals over seeds or datasets."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

Interval = tuple[float, float]

# Enough for two digits of a 95 % interval over a handful of seeds.
_RESAMPLES = 2000


@functools.cache
def mean_interval(values: tuple[float, ...]) -> Interval | None:
  """95 % bootstrap interval of the mean; None for fewer than two values.

  Of two or three values it is their range, for all draws are the same value in
  more than 2.5 % of cases.
  """
  return effect_interval((values,), lambda mean: mean)


def effect_interval(
  samples: Sequence[Sequence[float]], effect: Callable[..., np.ndarray]
) -> Interval | None:
  """95 % bootstrap interval of an effect of means.

  Args:
    samples: one sequence of values per condition, the same seeds in each; the
      seeds are drawn together.
    effect: elementwise function of the samples' means.

  Returns:
    Lower and upper end, or None for fewer than two seeds.
  """
  if len(samples[0]) < 2:
    return None
  return _bootstrap(
    samples,
    lambda *draws, axis: effect(*(np.mean(d, axis=axis) for d in draws)),
  )


def _bootstrap(samples: Sequence[Sequence[float]], statistic) -> Interval:
  """Percentiles of 2000 draws with a fixed key."""
  from scipy import stats  # takes a second, and one seed needs none of it

  found = stats.bootstrap(
    [np.asarray(values, float) for values in samples],
    statistic,
    paired=len(samples) > 1,
    vectorized=True,
    n_resamples=_RESAMPLES,
    method='percentile',
    rng=np.random.default_rng(0),
  ).confidence_interval
  return float(found.low), float(found.high)


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
  """Spearman's correlation along an axis; 0 where a side is constant."""
  from scipy import stats  # takes a second, and most tables need none of it

  x, y = (stats.rankdata(values, axis=axis) for values in (x, y))
  x, y = (ranks - ranks.mean(axis=axis, keepdims=True) for ranks in (x, y))
  spread = np.sqrt((x**2).sum(axis=axis) * (y**2).sum(axis=axis))
  rise = np.asarray((x * y).sum(axis=axis))
  return np.divide(rise, spread, out=np.zeros_like(rise), where=spread > 0)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
  """Spearman's; None for fewer than three pairs or a constant side."""
  if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
    return None
  return float(spearman(np.asarray(x, float), np.asarray(y, float)))


def rank_interval(x: Sequence[float], y: Sequence[float]) -> Interval:
  """95 % bootstrap interval of a `rank_correlation`, pairs drawn together."""
  return _bootstrap((x, y), spearman)
