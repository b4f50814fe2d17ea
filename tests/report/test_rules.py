"""Rules compared by error and angle."""

import pytest

from experiments import report
from experiments.report import frame, rules
from tests.report.records import cell, record, with_layers

_LAYERS = ('Conv_0', 'Dense_0', 'output')


def _angles(angle):
  """Angles of every layer: 1, 2 and 0 times the number."""
  return {
    layer: {'angle': None, 'update_angle': 0.0, 'error_angle': angle * n}
    for layer, n in zip(_LAYERS, (1, 2, 0), strict=True)
  }


@pytest.fixture(name='records', scope='module')
def _records():
  """Four rules with BN, two seeds of all but one; DFA's rates are mixed."""
  options = {'layer_metrics': True}
  made = []
  for at, name in enumerate(('SGD+BN', 'uSF+BN', 'DFA+BN', 'KP+BN')):
    for seed in (0, 1)[: 1 if name == 'KP+BN' else 2]:
      cells = cell(name, 2.0 + at + seed * at, seed=seed, **options)
      made += with_layers(cells, _angles(20.0 * at))
  made += cell('RndF+BN', 9.0, **options)  # recorded no layers
  return made


def test_differences_are_paired_and_angles_are_of_hidden_layers(records):
  (comparison,) = rules.compare(frame.read(records))
  assert comparison.settings == ['BN']
  of = {rule.name: rule for rule in comparison.rules}
  assert list(of) == ['SGD+BN', 'uSF+BN', 'DFA+BN', 'KP+BN']  # by mean error
  assert of['SGD+BN'].difference is None
  found = {
    name: (rule.difference, rule.interval)
    for name, rule in of.items()
    if name != 'SGD+BN'
  }
  assert found == {
    'uSF+BN': (1.5, (1.0, 2.0)),
    'DFA+BN': (3.0, (2.0, 4.0)),
    'KP+BN': (3.0, None),
  }
  assert of['DFA+BN'].mean_angle('error_angle') == 60.0  # of 40 and 80
  table = rules.table(comparison)
  row = table.loc['DFA+BN']
  assert row['minus backpropagation'] == '+3.00 [+2.00, +4.00]'
  assert (row['V and W (°)'], row['error signals (°)']) == ('', '60.00')
  short = rules.summary(comparison)
  (column,) = short.items()
  assert column[0] == 'BN'
  assert column[1].to_dict() == {
    'BP': '2.00, held-out 2.00\n0°',
    'uSF': '3.50, held-out 3.50\n+1.50 [+1.00, +2.00]\n30°',
    'DFA': '5.00, held-out 5.00\n+3.00 [+2.00, +4.00]\n60°',
    'KP': '5.00, held-out 5.00\n+3.00\n90°',
    'rank correlation of error and angle': '0.95 (4 rules)',
  }


def test_the_report_shows_them(records, tmp_path):
  report.write_report(records, tmp_path)
  for name, shown in (('RESULTS.md', '| DFA |'), ('report.html', 'DFA+BN')):
    text = (tmp_path / name).read_text()
    assert shown in text.split('Feedback rules compared</h2>')[-1]
  (picture,) = (tmp_path / 'plots').glob('*-angles.svg')
  drawn = picture.read_text()
  for rule in ('BP', 'uSF', 'DFA', 'KP', 'Conv_0', 'Dense_0'):
    assert f'>{rule}<' in drawn
  assert '>RndF<' not in drawn


def test_few_rules_are_no_comparison(records):
  few = [r for r in records if r.config['rule'] in ('BP', 'uSF', 'RndF')]
  assert not rules.compare(frame.read([*few, record('BM', 2.0)]))
