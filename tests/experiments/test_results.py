"""The committed runs are what the program of today would make and read."""

import dataclasses
import re
from pathlib import Path

import experiments
from experiments import datasets, report
from experiments.paper.protocol import Protocol, Run
from experiments.runs import store
from experiments.training import loop as train

_FOLDER = Path(experiments.__file__).parent
_RESULTS, _CHOICES = (
  store.load(_FOLDER / name) for name in ('results', 'choices')
)
_RECORDS = [*_RESULTS, *_CHOICES]


def _run(config):
  """The run of a configuration as JSON has it."""
  of_protocol = {field.name for field in dataclasses.fields(Protocol)}
  of_run = {field.name for field in dataclasses.fields(Run)} - {'protocol'}
  values = {name: _tuples(value) for name, value in config.items()}
  protocol = Protocol(**{name: values[name] for name in of_protocol})
  return Run(**{name: values[name] for name in of_run}, protocol=protocol)


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def test_names_are_those_of_the_configurations():
  assert _RECORDS
  for record in _RECORDS:
    assert _run(record.config).run_id == record.run_id
    assert _run(record.config).config() == record.config


def test_results_are_those_of_the_metrics():
  for record in _RECORDS:
    last, run = record.metrics[-1], _run(record.config)
    assert last['epoch'] == record.config['epochs'] or not last['finite']
    found = record.result
    classes = round(100 / (100 - found['chance_error']))
    spec = datasets.find(run.dataset)
    assert classes == spec.classes or f'{classes} of the paper' in run.note
    there = re.search(r'(\d+) / \d+ train', run.note)
    there = int(there[1]) if there else spec.train
    trained = (run.protocol.train_size or there) * (1 - run.protocol.holdout)
    assert found['train_images'] == round(trained)
    counts = {'classes': classes, 'train_images': found['train_images']}
    assert train.result(record.metrics, **counts) == found
    assert record.environment['cores']


def test_the_report_is_that_of_the_committed_runs(tmp_path):
  made = report.write_report(_RESULTS, tmp_path, markdown_only=True)
  text = (tmp_path / 'RESULTS.md').read_bytes()
  assert text == (_FOLDER / 'RESULTS.md').read_bytes()
  plots = {path.name for path in made if path.parent.name == 'plots'}
  assert plots == {path.name for path in (_FOLDER / 'plots').iterdir()}


def test_what_was_tried_is_told_as_it_was_found():
  text = report.results_markdown(_CHOICES)
  part = text.split('side by side')[1].split('\n## ')[0]
  tables = re.findall(r'(?:^\|.*\n)+', part, re.MULTILINE)
  assert [table.split(' | ')[0] for table in tables] == ['| MNIST', '| CIFAR']
  readme = (_FOLDER / 'README.md').read_text()
  for table in tables:
    assert table in readme
