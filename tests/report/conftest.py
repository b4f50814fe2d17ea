"""The report of runs of every kind, written once."""

import pytest

from experiments import report
from tests.report.records import everything


@pytest.fixture(name='folder', scope='session')
def _folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('report')
  made = report.write_report(everything(), path)
  assert sorted(made) == sorted(p for p in path.rglob('*') if p.is_file())
  return path


@pytest.fixture(name='page', scope='session')
def _page(folder):
  return (folder / 'report.html').read_text()
