"""Runs that are rare but allowed: reported like all others."""

import dataclasses

import pytest

from experiments import cli, report
from experiments.paper.protocol import Protocol
from experiments.report import frame
from experiments.runs.selection import Selection
from tests.report.records import cell, record, with_layers, write_live


@pytest.mark.parametrize(
  'absent',
  [('holdout_error', 'held_out_test_error', 'held_out_epoch'), ('best_epoch',)],
)
def test_a_report_of_runs_that_all_lack_a_result(tmp_path, absent):
  """Such as those of `--holdout 0`."""
  records = cell('SGD', 5.0)
  for made in records:
    made.result.update(dict.fromkeys(absent))
  report.write_report(records, tmp_path)
  assert 'best test error 5.00' in (tmp_path / 'report.html').read_text()


def test_networks_with_names_alike_have_protocols_of_their_own():
  records = [record(network=name, plugin='x') for name in ('v1', 'v1.0')]
  assert len(frame.read(records).protocols) == 2


def test_rules_of_a_network_of_one_layer_are_compared_without_angles(tmp_path):
  records = []
  for name in ('SGD+BN', 'uSF+BN', 'DFA+BN', 'KP+BN'):
    records += cell(name, 5.0, layer_metrics=True)
  layers = {'output': {'angle': 1.0, 'error_angle': 0.0}}
  report.write_report(with_layers(records, layers), tmp_path)
  assert '| DFA |' in (tmp_path / 'RESULTS.md').read_text()


def test_a_metric_may_have_any_name(tmp_path):
  layers = {'conv': {'angle': 3.0, 'layer': 1.0, 'epoch': 9.0}}
  report.write_report(with_layers([record('RndF', 5.0)], layers), tmp_path)
  assert '>conv<' in (tmp_path / 'report.html').read_text()


def test_run_shows_conditions_that_are_in_none_of_its_tables(tmp_path, capsys):
  selection = Selection(table=('6',), condition=('DFA',), rate=(1.0,))
  protocol = Protocol(epochs=4)
  like = record(error=5.0)
  for made in selection.runs(protocol):
    write_live(tmp_path, [
      dataclasses.replace(like, run_id=made.run_id, config=made.config())
    ])  # fmt: skip
  cli.run(selection, protocol, results=tmp_path)
  shown = capsys.readouterr().out
  assert 'Table 6' in shown
  assert 'DFA' in shown
