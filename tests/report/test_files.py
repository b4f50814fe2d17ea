"""Files: the same bytes from the same runs, and nothing but text in names."""

import base64
import hashlib
import html.parser
import os
import re
from xml.etree import ElementTree

import pytest

from experiments import report
from experiments.report import frame, plots
from experiments.report.frame import printable
from experiments.runs import files
from tests.experiments.command_line import python
from tests.report.records import cell, everything, markup, record


def contents(folder):
  return {path.relative_to(folder): path.read_bytes()
          for path in folder.rglob('*') if path.is_file()}  # fmt: skip


def test_order_and_hash_seed_change_no_byte(folder, tmp_path):
  program = (
    'import random, sys, experiments.report, tests.report.records;'
    'records = tests.report.records.everything();'
    'random.Random(1).shuffle(records);'
    'experiments.report.write_report(records, sys.argv[1])'
  )
  python(program, tmp_path, env=os.environ | {'PYTHONHASHSEED': '7'})
  assert len(contents(folder)) > 12
  assert contents(tmp_path) == contents(folder)


def test_markdown_alone_is_that_of_the_whole_report(folder, tmp_path):
  report.write_report(everything(), tmp_path, markdown_only=True)
  text = (tmp_path / 'RESULTS.md').read_text()
  shown = set(re.findall(r'\]\((plots/[^)]*)\)', text))
  assert shown == {
    'plots/overview.png', 'plots/error-against-p.svg', 'plots/settings.svg',
  }  # fmt: skip
  made = contents(tmp_path)
  assert {str(name) for name in made} == {'RESULTS.md'} | shown
  assert made.items() <= contents(folder).items()


class _Reader(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.words, self.ids, self.links = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      assert not name.startswith('on'), (tag, name)
      if name == 'id':
        self.ids.append(value)
      if name in ('href', 'src'):
        self.links.append(value)

  def handle_data(self, data):
    self.words.append(data)


def test_the_page_has_names_as_text_and_needs_nothing_else(page):
  read = _Reader(page)
  for name in ('dataset', 'rule', 'note', 'failure'):
    assert any(printable(markup(name)) in words for words in read.words), name
  # One script, which the page's policy names by its digest.
  assert read.tags.count('script') == 1
  (script,) = re.findall('<script>(.*?)</script>', page, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert "default-src 'none'; style-src 'unsafe-inline'; " in page
  assert f"script-src 'sha256-{digest}'\"" in page
  assert len(read.links) > 20
  assert len(read.ids) == len(set(read.ids))
  assert set(read.links) <= {f'#{name}' for name in read.ids}


def test_the_page_shows_what_runs_are(page):
  assert 'class="worse"' in page
  for words in ('▲', 'held-out', '4/5 rates', '<b>diverged</b>', 'failed: '):
    assert words in page


def test_results_md_has_names_as_text_and_says_how_many_runs_failed(folder):
  """The committed RESULTS.md, which is compared whole, has all else."""
  text = (folder / 'RESULTS.md').read_text()
  assert '<script>' not in re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  assert '| 5 runs | 2 | 8 | an &lt;old&gt; processor |' in text
  assert 'Failed runs, not in the tables: 1.' in text
  assert 'differs from' not in text  # no cell does


def test_a_record_that_is_left_out_is_named_in_every_file(folder):
  *_, bad = everything()
  for name in ('report.html', 'RESULTS.md', 'tables.txt', 'claims.txt'):
    assert f'run {bad.run_id} is left out' in (folder / name).read_text(), name
  # A list of Markdown ends with an empty line.
  assert '\n\nBest test errors in' in (folder / 'RESULTS.md').read_text()


def test_every_svg_is_xml_with_names_as_text_and_no_date(folder):
  found = list((folder / 'plots').glob('*.svg'))
  assert len(found) > 8
  texts = []
  for path in found:
    root = ElementTree.parse(path).getroot()
    assert not [e for e in root.iter() if e.tag.endswith('}script')]
    assert b'dc:date' not in path.read_bytes()
    texts += [element.text or '' for element in root.iter()]
    assert set(path.stem) <= set('abcdefghijklmnopqrstuvwxyz0123456789-')
  for name in ('dataset', 'rule'):
    assert any(f'<script>{name}</script> "$x$"' in text for text in texts)


def test_rows_that_look_alike_get_plots_of_their_own():
  names = ['zoo', 'Zoo', 'z o o', 'z/oo', 'z.oo', '日本']
  rows = frame.read([record(dataset=name) for name in names]).rows.values()
  assert len({plots.file_name(row, 'curves').lower() for row in rows}) == 6


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
  report.write_report(cell('SGD', 2.0), tmp_path, markdown_only=True)
  before = contents(tmp_path)

  def broken(*_):
    raise OSError('no space left')

  monkeypatch.setattr(files.os, 'replace', broken)
  with pytest.raises(OSError, match='no space'):
    report.write_report(cell('SGD', 3.0), tmp_path, markdown_only=True)
  assert contents(tmp_path) == before


def test_text_reports_load_neither_jax_nor_plots():
  program = (
    'import sys; from experiments import report, studies;'
    'loaded = lambda *names: [name for name in names if name in sys.modules];'
    'print(loaded("jax", "pandas", "scipy", "jinja2", "matplotlib"));'
    'from tests.report.records import cell;'
    "report.text_tables(cell('SGD', 5.0)); report.claims_text(cell('SGD', 5));"
    'print(loaded("jax", "flax", "matplotlib"))'
  )
  assert python(program).split() == ['[]', '[]']
