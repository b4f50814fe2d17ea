"""The committed studies are whole, and RESULTS.md is what they give."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest

import experiments
from experiments import report, studies
from experiments.report import commands, frame
from tests.report.records import write_live

FOLDER = Path(experiments.__file__).parent
FILES = sorted((FOLDER / 'results').glob('*.jsonl'))

# Of names, results, epochs, configurations and environments of all runs. The
# numbers are those of the program that trained them; the keys are today's.
COUNT = 2388
DIGEST = 'e1fe5d8dce27ed07fb623ab4ec1e08bcec6f36031a88a73e5d2e66a464f26ab5'


@pytest.fixture(name='records', scope='module')
def _records():
  """The runs of each file."""
  return {file: studies.load(file) for file in FILES}


def test_every_run_is_there_with_its_name_its_result_and_every_number(records):
  rows = [
    json.dumps(
      [made.run_id, made.result, made.metrics, made.config, made.environment],
      sort_keys=True,
    )
    for of in records.values()
    for made in of
  ]
  assert len(rows) == COUNT
  assert hashlib.sha256('\n'.join(sorted(rows)).encode()).hexdigest() == DIGEST


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_folding_the_runs_again_gives_the_bytes_of_the_file(
  records, file, tmp_path
):
  again = tmp_path / file.name
  studies.fold(write_live(tmp_path / 'live', records[file][::-1]), again)
  assert again.read_bytes() == file.read_bytes()


def test_every_file_has_a_study_whose_commands_make_its_runs(records):
  found = tomllib.loads((FOLDER / 'studies' / 'studies.toml').read_text())
  assert set(found) == {file.stem for file in FILES}
  assert all({'what', 'why', 'found'} <= set(of) for of in found.values())
  for file, of in records.items():
    results = frame.read(of)
    made = [
      command
      for protocol in results.protocols
      for command in commands.of_protocol(results, protocol)
    ]
    assert found[file.stem]['commands'].splitlines() == made


def test_the_report_is_that_of_the_committed_runs(tmp_path):
  records = studies.load(FOLDER / 'results')
  made = report.write_report(records, tmp_path, markdown_only=True)
  text = (tmp_path / 'RESULTS.md').read_bytes()
  assert text == (FOLDER / 'RESULTS.md').read_bytes()
  assert len(text.splitlines()) <= 250
  plots = {path.name for path in made if path.parent.name == 'plots'}
  assert plots == {path.name for path in (FOLDER / 'plots').iterdir()}


def test_the_guide_has_the_committed_numbers_of_other_settings():
  """Its tables have the numbers of RESULTS.md."""
  guide = (FOLDER / 'docs' / 'choices.md').read_text()
  results = (FOLDER / 'RESULTS.md').read_text().split('## Other settings')[1]
  rows = [
    line.split(' | ', 1)[1]
    for line in results.split('## ')[0].splitlines()
    if line.startswith('| ') and '---' not in line
  ]
  assert len(rows) == 15
  assert all(row in guide for row in rows)
