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

# name: (rule, BM setting, BN, batch plans, frozen), written from the paper's
# sections 2, 3 and 5 and its appendix A.
_EXPECTED = {
  # Experiment A
  'SGD': ('BP', 0, 'none', _ONE_HUNDRED, 'nothing'),
  'BM': ('BP', 1, 'none', _ONE_HUNDRED, 'nothing'),
  'BN': ('BP', 0, 'affine', _ONE_HUNDRED, 'nothing'),
  'BN+BM': ('BP', 1, 'affine', _ONE_HUNDRED, 'nothing'),
  'uSF': ('uSF', 0, 'none', _ONE_HUNDRED, 'nothing'),
  'NuSF': ('NuSF', 0, 'none', _ONE_HUNDRED, 'nothing'),
  'uSF+BM': (
    'uSF', 1, 'none', [[(None, 100)], [(3, 100), (None, 500)]], 'nothing',
  ),
  'uSF+BN': ('uSF', 0, 'plain', _ONE_HUNDRED, 'nothing'),
  'uSF+BN+BM': ('uSF', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'brSF+BN+BM': ('brSF', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'frSF+BN+BM': ('frSF', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  # Experiment B
  'brSF-100%+BN+BM': ('brSF-100%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'brSF-75%+BN+BM': ('brSF-75%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'brSF-50%+BN+BM': ('brSF-50%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'brSF-25%+BN+BM': ('brSF-25%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'frSF-100%+BN+BM': ('frSF-100%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'frSF-75%+BN+BM': ('frSF-75%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'frSF-50%+BN+BM': ('frSF-50%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'frSF-25%+BN+BM': ('frSF-25%', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  # Experiment C1
  'RndF': ('RndF', 0, 'none', _ONE_HUNDRED, 'nothing'),
  'RndF+BN': ('RndF', 0, 'plain', _ONE_HUNDRED, 'nothing'),
  'RndF+BM': ('RndF', 1, 'none', _ONE_HUNDRED, 'nothing'),
  'RndF+BN+BM': ('RndF', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  # Experiment C2
  'SGD Bottom': ('BP', 0, 'none', _ONE_HUNDRED, _BOTTOM),
  'SGD Top': ('BP', 0, 'none', _ONE_HUNDRED, _TOP),
  'RndF Bottom': ('RndF', 0, 'none', _ONE_HUNDRED, _BOTTOM),
  'RndF Top': ('RndF', 0, 'none', _ONE_HUNDRED, _TOP),
  'RndF+BN+BM Bottom': ('RndF', 1, 'plain', _ONE_HUNDRED, _BOTTOM),
  'RndF+BN+BM Top': ('RndF', 1, 'plain', _ONE_HUNDRED, _TOP),
  'uSF+BN+BM Bottom': ('uSF', 1, 'plain', _ONE_HUNDRED, _BOTTOM),
  'uSF+BN+BM Top': ('uSF', 1, 'plain', _ONE_HUNDRED, _TOP),
  # settings of Batch Manhattan
  'BM1': ('BP', 1, 'none', _ONE_HUNDRED, 'nothing'),
  'BM2': ('BP', 2, 'none', _ONE_HUNDRED, 'nothing'),
  'BM3': ('BP', 3, 'none', _ONE_HUNDRED, 'nothing'),
  'uSF+BN+BM1': ('uSF', 1, 'plain', _ONE_HUNDRED, 'nothing'),
  'uSF+BN+BM2': ('uSF', 2, 'plain', _ONE_HUNDRED, 'nothing'),
  'uSF+BN+BM3': ('uSF', 3, 'plain', _ONE_HUNDRED, 'nothing'),
  # batch sizes
  'SGD-100': ('BP', 0, 'none', _ONE_HUNDRED, 'nothing'),
  'SGD-30': ('BP', 0, 'none', [[(None, 30)]], 'nothing'),
  'SGD-10': ('BP', 0, 'none', [[(None, 10)]], 'nothing'),
  'SGD-5': ('BP', 0, 'none', [[(None, 5)]], 'nothing'),
  'BM-100': ('BP', 1, 'none', _ONE_HUNDRED, 'nothing'),
  'BM-30': ('BP', 1, 'none', [[(None, 30)]], 'nothing'),
  'BM-10': ('BP', 1, 'none', [[(None, 10)]], 'nothing'),
  'BM-5': ('BP', 1, 'none', [[(None, 5)]], 'nothing'),
}  # fmt: skip


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
    ('usf+bn', 'uSF+BN', _EXPECTED['uSF+BN']),
    ('BP', 'SGD', _EXPECTED['SGD']),
    ('sgd bottom', 'SGD Bottom', _EXPECTED['SGD Bottom']),
    (
      'frsf-10%+bn',
      'frSF-10%+BN',
      ('frSF-10%', 0, 'plain', _ONE_HUNDRED, 'nothing'),
    ),
    ('brSF-25.0%+BN+BM', 'brSF-25%+BN+BM', _EXPECTED['brSF-25%+BN+BM']),
    ('brSF-0%+BN+BM', 'brSF+BN+BM', _EXPECTED['brSF+BN+BM']),
    (
      'frSF-12.5%',
      'frSF-12.5%',
      ('frSF-12.5%', 0, 'none', _ONE_HUNDRED, 'nothing'),
    ),
    ('SGD+BN', 'SGD+BN', ('BP', 0, 'plain', _ONE_HUNDRED, 'nothing')),
    ('fa+bn', 'RndF+BN', _EXPECTED['RndF+BN']),
    ('adam', 'Adam', ('BP', 0, 'none', _ONE_HUNDRED, 'nothing')),
    ('signdfa', 'SignDFA', ('SignDFA', 0, 'none', _ONE_HUNDRED, 'nothing')),
    (
      'lowrank16+bm',
      'LowRank16+BM',
      ('LowRank16', 1, 'none', _ONE_HUNDRED, 'nothing'),
    ),
    ('bn+bm2', 'BN+BM2', ('BP', 2, 'affine', _ONE_HUNDRED, 'nothing')),
    ('NuSF+BM3', 'NuSF+BM3', ('NuSF', 3, 'none', _ONE_HUNDRED, 'nothing')),
    (
      'uSF+BN-30 top',
      'uSF+BN-30 Top',
      ('uSF', 0, 'plain', [[(None, 30)]], _TOP),
    ),
    (  # not both procedures: the size is stated
      'uSF+BM-100',
      'uSF+BM-100',
      ('uSF', 1, 'none', _ONE_HUNDRED, 'nothing'),
    ),
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


def test_names_of_a_condition_are_all_columns_with_its_content():
  (bm,) = find('BM').conditions
  assert set(conditions.names_of(bm)) == {'BM', 'BM1', 'BM-100'}
  for name, column in COLUMNS.items():
    for condition in column.conditions:
      assert name in conditions.names_of(condition)


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
