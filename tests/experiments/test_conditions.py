"""Every column of the paper is a condition, with the content its text gives."""

import csv
import dataclasses
from pathlib import Path

import pytest

import experiments
from experiments.paper import conditions
from experiments.paper.conditions import COLUMNS, TABLES, find

_ONE_HUNDRED = [[(None, 100)]]
_BOTTOM, _TOP = 'last layer', 'before last layer'


def _row(rule, setting=0, norm='none', plans=_ONE_HUNDRED, frozen='nothing'):
  return rule, setting, norm, plans, frozen


# Written from the paper's sections 2, 3 and 5 and its appendix A.
_EXPECTED = {
  # Experiment A
  'SGD': _row('BP'),
  'BM': _row('BP', 1),
  'BN': _row('BP', 0, 'affine'),
  'BN+BM': _row('BP', 1, 'affine'),
  'uSF': _row('uSF'),
  'NuSF': _row('NuSF'),
  'uSF+BM': _row('uSF', 1, 'none', [[(None, 100)], [(3, 100), (None, 500)]]),
  'uSF+BN': _row('uSF', 0, 'plain'),
  'uSF+BN+BM': _row('uSF', 1, 'plain'),
  'brSF+BN+BM': _row('brSF', 1, 'plain'),
  'frSF+BN+BM': _row('frSF', 1, 'plain'),
  # Experiment B
  'brSF-100%+BN+BM': _row('brSF-100%', 1, 'plain'),
  'brSF-75%+BN+BM': _row('brSF-75%', 1, 'plain'),
  'brSF-50%+BN+BM': _row('brSF-50%', 1, 'plain'),
  'brSF-25%+BN+BM': _row('brSF-25%', 1, 'plain'),
  'frSF-100%+BN+BM': _row('frSF-100%', 1, 'plain'),
  'frSF-75%+BN+BM': _row('frSF-75%', 1, 'plain'),
  'frSF-50%+BN+BM': _row('frSF-50%', 1, 'plain'),
  'frSF-25%+BN+BM': _row('frSF-25%', 1, 'plain'),
  # Experiment C1
  'RndF': _row('RndF'),
  'RndF+BN': _row('RndF', 0, 'plain'),
  'RndF+BM': _row('RndF', 1),
  'RndF+BN+BM': _row('RndF', 1, 'plain'),
  # Experiment C2
  'SGD Bottom': _row('BP', frozen=_BOTTOM),
  'SGD Top': _row('BP', frozen=_TOP),
  'RndF Bottom': _row('RndF', frozen=_BOTTOM),
  'RndF Top': _row('RndF', frozen=_TOP),
  'RndF+BN+BM Bottom': _row('RndF', 1, 'plain', frozen=_BOTTOM),
  'RndF+BN+BM Top': _row('RndF', 1, 'plain', frozen=_TOP),
  'uSF+BN+BM Bottom': _row('uSF', 1, 'plain', frozen=_BOTTOM),
  'uSF+BN+BM Top': _row('uSF', 1, 'plain', frozen=_TOP),
  # settings of Batch Manhattan
  'BM1': _row('BP', 1),
  'BM2': _row('BP', 2),
  'BM3': _row('BP', 3),
  'uSF+BN+BM1': _row('uSF', 1, 'plain'),
  'uSF+BN+BM2': _row('uSF', 2, 'plain'),
  'uSF+BN+BM3': _row('uSF', 3, 'plain'),
  # batch sizes
  'SGD-100': _row('BP'),
  'SGD-30': _row('BP', 0, 'none', [[(None, 30)]]),
  'SGD-10': _row('BP', 0, 'none', [[(None, 10)]]),
  'SGD-5': _row('BP', 0, 'none', [[(None, 5)]]),
  'BM-100': _row('BP', 1),
  'BM-30': _row('BP', 1, 'none', [[(None, 30)]]),
  'BM-10': _row('BP', 1, 'none', [[(None, 10)]]),
  'BM-5': _row('BP', 1, 'none', [[(None, 5)]]),
}


def _content(column: conditions.Column) -> tuple:
  first, *others = column.conditions
  for other in others:
    assert dataclasses.replace(other, batch_plan=first.batch_plan) == first
  return (
    first.rule,
    first.batch_manhattan,
    first.batch_norm,
    [[*condition.batch_plan] for condition in column.conditions],
    first.frozen,
  )


def test_content_of_all_45_columns():
  assert {name: _content(row) for name, row in COLUMNS.items()} == _EXPECTED
  assert all(name == row.name for name, row in COLUMNS.items())


def test_tables_are_those_of_the_published_numbers():
  path = Path(experiments.__file__).parent / 'paper' / 'results.csv'
  columns: dict[str, dict[str, None]] = {}
  with path.open(encoding='utf-8') as file:
    for row in csv.DictReader(file):
      columns.setdefault(row['table'], {})[row['condition']] = None
  assert {name: set(t.columns) for name, t in TABLES.items()} == {
    name: set(found) for name, found in columns.items()
  }
  for name in ('2', '4-C1', '4-C2', '5', '6'):  # 3 is printed in two parts
    assert TABLES[name].columns == tuple(columns[name])
  for table in TABLES.values():
    assert table.baseline == ('SGD-100' if table.name == '6' else 'SGD')


@pytest.mark.parametrize(
  ('name', 'canonical', 'content'),
  [
    ('usf+bn', 'uSF+BN', _row('uSF', norm='plain')),
    ('BP', 'SGD', _row('BP')),
    ('sgd bottom', 'SGD Bottom', _row('BP', frozen=_BOTTOM)),
    ('frsf-10%+bn', 'frSF-10%+BN', _row('frSF-10%', norm='plain')),
    ('brSF-25.0%+BN+BM', 'brSF-25%+BN+BM', _row('brSF-25%', 1, 'plain')),
    ('brSF-0%+BN+BM', 'brSF+BN+BM', _row('brSF', 1, 'plain')),
    ('frSF-12.5%', 'frSF-12.5%', _row('frSF-12.5%')),
    ('SGD+BN', 'SGD+BN', _row('BP', norm='plain')),
    ('fa+bn', 'RndF+BN', _row('RndF', norm='plain')),
    ('adam', 'Adam', _row('BP')),
    ('signdfa', 'SignDFA', _row('SignDFA')),
    ('lowrank16+bm', 'LowRank16+BM', _row('LowRank16', 1)),
    ('bn+bm2', 'BN+BM2', _row('BP', 2, 'affine')),
    ('NuSF+BM3', 'NuSF+BM3', _row('NuSF', 3)),
    (
      'uSF+BN-30 top',
      'uSF+BN-30 Top',
      _row('uSF', 0, 'plain', [[(None, 30)]], _TOP),
    ),
    # not both procedures: the size is stated
    ('uSF+BM-100', 'uSF+BM-100', _row('uSF', 1)),
  ],
)
def test_free_names(name, canonical, content):
  assert find(name).name == canonical
  assert _content(find(name)) == content


@pytest.mark.parametrize(
  ('name', 'nearest'),
  [
    ('usf+bnn', "'uSF+BN'"),
    ('brSF-50', "'brSF-50%"),  # a percentage, or a batch size?
    ('brSF-150%', "'brSF-50%"),
    ('uSFBN', "'uSF+BN'"),
    ('uSF+BM4', "'uSF+BM'"),
    ('uSF-0', "'uSF'"),
    ('+BN', "'BN'"),
    ('RndF+', "'RndF'"),
    (' Top', "'SGD Top'"),
  ],
)
def test_unknown_names_get_the_nearest(name, nearest):
  with pytest.raises(ValueError, match='unknown condition') as error:
    find(name)
  assert nearest in str(error.value)
  assert repr(name) in str(error.value)


def test_far_and_empty_names_get_no_hint():
  for name in ('', 'xyzzy-quux'):
    with pytest.raises(ValueError, match='shows all 45') as error:
      find(name)
    assert 'did you mean' not in str(error.value)


def test_tables_by_name():
  assert [t.name for t in conditions.find_tables('4')] == ['4-C1', '4-C2']
  assert [t.name for t in conditions.find_tables('4-c2')] == ['4-C2']
  assert [t.name for t in conditions.find_tables('2')] == ['2']
  with pytest.raises(ValueError, match="unknown table '4-C3'.*'4-C2'"):
    conditions.find_tables('4-C3')


@pytest.mark.parametrize(
  'name',
  [
    'SGD+BN', 'BN+BM2', 'frSF-10%+BN', 'uSF+BN+BM-30 Top', 'NuSF-5',
    'BN+Adam', 'SGD+BN+Adam', 'LowRank16+BN', 'KP+BN+Adam-30 Bottom',
    *conditions.FAMILY,
  ],
)  # fmt: skip
def test_the_name_of_a_condition_that_is_no_column_can_be_found(name):
  (condition,) = find(name).conditions
  assert conditions.names_of(condition) == (name,)


def test_a_condition_without_a_name_is_described():
  condition = conditions.Condition(
    rule='uSF', batch_norm='affine', batch_plan=conditions.THEN_500
  )
  assert conditions.names_of(condition) == ('uSF+BN(affine)-100x3,500',)
