"""The table of datasets is the paper's, and consistent."""

import math

import pytest

from experiments.datasets import SPECS, find
from experiments.datasets.specs import plain

_PAPER = (
  'MNIST CIFAR CIFAR100 SVHN STL10 Cal101 Cal256-101 iCub Flowers17 Flowers102 '
  'PubFig83-ID SUFR-W-ID LFW-ID Scene67 TIMIT80'
).split()

# Error rates printed in Table 2 (SGD) and others of the same row.
_ERRORS = {
  'Cal101': (74.08, 66.70, 66.07, 61.75, 70.50),
  'Cal256-101': (87.06, 83.43, 82.94, 85.98),
  'Flowers17': (35.29, 31.76, 36.76, 29.41),
  'Flowers102': (77.30, 77.57, 75.78, 74.92, 99.67),
  'PubFig83-ID': (63.25, 51.08, 78.58, 95.42),
  'SUFR-W-ID': (80.00, 75.00, 83.50, 94.75),
  'LFW-ID': (79.25, 74.25, 55.75, 98.75),
  'Scene67': (87.16, 95.75, 88.21, 81.87),
}


def test_the_fifteen_names_in_the_papers_order():
  assert list(SPECS) == [*_PAPER, 'digits']


@pytest.mark.parametrize('spec', SPECS.values(), ids=lambda spec: spec.name)
def test_counts_agree_with_each_other(spec):
  draw = spec.draw
  if draw is not None:
    assert draw.classes == spec.classes
    assert draw.train is None or draw.train * spec.classes == spec.train
    assert spec.test <= draw.test * spec.classes
    assert draw.short_test or spec.test == draw.test * spec.classes
  assert math.prod(spec.shape) in (784, 3072, 42483, 1845)


@pytest.mark.parametrize('name', _ERRORS)
def test_printed_error_rates_are_multiples_of_one_test_sample(name):
  size = SPECS[name].test
  for error in _ERRORS[name]:
    nearest = round(error * size / 100) * 100 / size
    assert abs(nearest - error) <= 0.0051


def test_names_and_aliases_in_any_case():
  for name in ('mnist', 'MNIST', 'M-nist'):
    assert find(name) is SPECS['MNIST']
  assert find('cal256_101') is find('CALTECH256') is SPECS['Cal256-101']


def test_no_two_datasets_share_an_alias():
  keys = [
    key
    for spec in SPECS.values()
    for key in {plain(name) for name in (spec.name, *spec.aliases)}
  ]
  assert len(keys) == len(set(keys))
