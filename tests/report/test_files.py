"""Files: the same bytes from the same runs, and nothing but text in names."""

import base64
import dataclasses
import hashlib
import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from experiments import report
from experiments.report import frame, pages, plots, tables
from experiments.runs import files
from experiments.terminal import as_typed
from tests.report.records import cell, like_the_paper, record

OLD = {
  'processor': 'an <old> processor', 'cores': '2', 'cores of the host': '8',
}  # fmt: skip
STORY = (
  'SGD', 'uSF', 'uSF+BN', 'uSF+BN+BM', 'RndF', 'brSF+BN+BM', 'brSF-50%+BN+BM',
)  # fmt: skip
SCRIPT = '<script>alert(1)</script> "$x$" & \x1b[31m ../../etc'
ROOT = Path(__file__).parents[2]


def some_records():
  failed = dataclasses.replace(
    record('BN', 3.0), result=None, metrics=[], error='<b>no memory</b>'
  )
  return [
    *like_the_paper(('MNIST',), seeds=2, only=STORY),
    *cell('uSF', 80.0, dataset='CIFAR', diverged=True, note='lossy copy'),
    *cell('SGD', 20.0, dataset=SCRIPT)[:4],
    *(
      dataclasses.replace(made, environment=OLD)
      for made in cell(
        'SGD', 20.0, dataset='CIFAR', epochs=9, note='<i>lossy</i>'
      )
    ),
    *cell('SGD', 3.0, weight_decay=0.0),
    failed,
  ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('report')
  made = report.write_report(some_records(), path)
  assert sorted(made) == sorted(p for p in path.rglob('*') if p.is_file())
  return path


def test_order_and_hash_seed_change_no_byte(folder, tmp_path):
  program = (
    'import random, sys, tests.report.test_files as t, experiments.report as r;'
    'records = t.some_records(); random.Random(1).shuffle(records);'
    'r.write_report(records, sys.argv[1])'
  )
  subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    check=True,
    cwd=ROOT,
    env={
      'PYTHONHASHSEED': '7',
      'PATH': os.environ['PATH'],
      'HOME': str(tmp_path),
    },  # fmt: skip
  )
  old = {p.relative_to(folder): p.read_bytes()
         for p in folder.rglob('*') if p.is_file()}  # fmt: skip
  assert len(old) > 12
  for name, body in old.items():
    assert (tmp_path / name).read_bytes() == body, name


def test_markdown_alone_is_that_of_the_whole_report(folder, tmp_path):
  made = report.write_report(some_records(), tmp_path, markdown_only=True)
  names = {str(path.relative_to(tmp_path)) for path in made}
  shown = set(re.findall(r'\]\((plots/[^)]*)\)',
                         (tmp_path / 'RESULTS.md').read_text()))  # fmt: skip
  assert names == {'RESULTS.md'} | shown
  assert shown == {
    'plots/overview.png', 'plots/error-against-p.svg', 'plots/settings.svg',
  }  # fmt: skip
  for name in names:
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


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


def assert_only_our_script(text, page):
  """One script, which the page's policy names by its digest."""
  assert page.tags.count('script') == 1
  (script,) = re.findall('<script>(.*?)</script>', text, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert "default-src 'none'; style-src 'unsafe-inline'; " in (text)
  assert f"script-src 'sha256-{digest}'\"" in text


def test_the_page_has_names_as_text_and_every_run_and_needs_nothing_else(
  folder,
):
  text = (folder / 'report.html').read_text()
  page = _Reader(text)
  assert_only_our_script(text, page)
  for name in (SCRIPT.replace('\x1b', '�'), '<b>no memory</b>', '<i>lossy</i>'):
    assert any(name in words for words in page.words), name
  assert len(page.links) > 20
  assert len(page.ids) == len(set(page.ids))
  inside = {link[1:] for link in page.links if link.startswith('#')}
  assert inside <= set(page.ids)
  assert all(link.startswith('#') for link in page.links)
  assert 'class="worse"' in text
  for words in ('▲', 'held-out', '4/5 rates', '<b>diverged</b>', 'failed: '):
    assert words in text
  command = 'python -m experiments run --dataset MNIST --condition uSF+BN'
  command = as_typed(command)
  for seed in ('', ' --seed 1'):
    assert f'<pre>{command} --rate 0.1{seed} --epochs 4</pre>' in text


@pytest.mark.parametrize('field', ['rule', 'dataset', 'note'])
def test_a_name_that_is_markup_is_shown_as_text_everywhere(tmp_path, field):
  name = '<script>alert(2)</script>'
  records = [*cell('SGD', 20.0, **{field: name}), *cell('BM', 3.0)]
  for path in report.write_report(records, tmp_path):
    if path.suffix == '.html':
      page = _Reader(path.read_text())
      assert_only_our_script(path.read_text(), page)
      assert any(name in words for words in page.words)
    elif path.suffix == '.md':
      text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
      assert '<script' not in text
    elif path.suffix == '.svg':
      tags = [each.tag for each in ElementTree.parse(path).getroot().iter()]
      assert not [tag for tag in tags if tag.endswith('}script')]


def test_results_md_has_protocols_claims_machine_and_commands(folder):
  text = (folder / 'RESULTS.md').read_text()
  assert re.search(r'\| 4 epochs \| .*MNIST.* \| 79 \| 0.1 \| 8 \|', text)
  assert '| 5 runs | 2 | 8 | an &lt;old&gt; processor |' in text
  assert '--epochs 9 --executor processes --workers 4\n' in text
  assert '--dataset MNIST --condition SGD uSF uSF+BN' in text
  assert '--dataset MNIST --condition BN --rate 1 --epochs 4\n' in text
  assert '--seed 0 1' in text
  assert 'Failed runs, not in the tables: 1.' in text
  assert '| 4 epochs, weight decay 0 | 3.00 |' in text
  row = next(line for line in text.splitlines() if 'BM is as good' not in line
             and 'uSF without BN and BM fails' in line)  # fmt: skip
  assert row.count('**holds** (MNIST)') == 3
  assert '<script>' not in re.sub(r'```.*?```', '', text, flags=re.DOTALL)


def test_cells_that_differ_from_the_paper_are_listed(tmp_path):
  records = [*cell('SGD', 2.0), *cell('uSF', 3.0), *cell('BM', 9.0)]
  report.write_report(records, tmp_path, markdown_only=True)
  text = (tmp_path / 'RESULTS.md').read_text().split('differs from')[-1]
  assert '| uSF | 3.00 alike | 3.00 alike | 88.65 worse |' in text
  assert '| BM | 9.00 worse | 9.00 worse | 0.99 alike |' in text
  report.write_report(cell('SGD', 2.0), tmp_path, markdown_only=True)
  assert 'differs from' not in (tmp_path / 'RESULTS.md').read_text()


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
  assert any('<script>alert(1)</script> "$x$"' in text for text in texts)


def test_rows_that_look_alike_get_plots_of_their_own(tmp_path):
  names = ['zoo', 'Zoo', 'z o o', 'z/oo', 'z.oo', '日本']
  records = [made for name in names for made in cell('SGD', 5.0, dataset=name)]
  made = report.write_report(records, tmp_path)
  curves = [p for p in made if p.name.endswith('-curves.svg')]
  assert len({str(p).lower() for p in curves}) == len(names)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
  report.write_report(cell('SGD', 2.0), tmp_path, markdown_only=True)
  before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}

  def broken(*_):
    raise OSError('no space left')

  monkeypatch.setattr(files.os, 'replace', broken)
  with pytest.raises(OSError, match='no space'):
    report.write_report(cell('SGD', 3.0), tmp_path)
  after = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  assert after == before


def drawn(monkeypatch, records):
  """The figures of all results, by name."""
  found = {}

  def seen(figure, name, *_, **__):
    figure.draw_without_rendering()
    found[name] = figure

  monkeypatch.setattr(plots, 'picture', seen)
  results = frame.read(records)
  plots.overview(results)
  plots.against_p(results)
  return found


@pytest.mark.parametrize(
  'datasets', [('MNIST',), ('MNIST', 'CIFAR'), ('MNIST', 'CIFAR', 'Cal101')]
)
def test_legends_are_whole_and_cover_nothing(datasets, monkeypatch):
  figures = drawn(monkeypatch, like_the_paper(datasets))
  assert set(figures) == {'overview', 'error-against-p'}
  for name, figure in figures.items():
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1, name
    assert page.y0 <= box.y0, name
    for axes in figure.axes:
      for part in axes.get_children():
        if isinstance(part, Text) and part.get_text():
          assert part.get_window_extent().y0 >= box.y1, (name, part)


def test_the_overview_shows_a_dataset_once_as_it_was_trained_most(monkeypatch):
  figures = drawn(monkeypatch, [
    *like_the_paper(('MNIST', 'CIFAR'), train_size=500),
    *like_the_paper(('MNIST',), epochs=3),
    *like_the_paper(('MNIST',), epochs=5, only=('SGD', 'uSF')),
    *like_the_paper(('MNIST',), epochs=9, weight_decay=0.0),
  ])  # fmt: skip
  assert [axes.get_title('left') for axes in figures['overview'].axes] == [
    'MNIST\n3 epochs',
    'CIFAR\n4 epochs, 500 images',
  ]


def test_curves_and_rates_are_means_over_seeds(monkeypatch):
  found = {}
  monkeypatch.setattr(
    plots, 'picture', lambda figure, name, _: found.update({name: figure})
  )
  records = [r for s in (0, 1) for r in cell('SGD', 2.0 + s, seed=s)]
  results = frame.read(records)
  grid, *_ = report.tables.grids(results)
  plots.curves(results, grid, grid.lines[0])
  (line,) = found['mnist-4-epochs-table-2-curves'].axes[0].lines
  assert list(line.get_xdata()) == [1, 2, 3, 4]
  assert list(line.get_ydata()) == [6.25, 5.0, 3.75, 2.5]
  (rates,) = pages.rates(results, grid.lines[0], ['SGD']).to_numpy()
  assert [cell.error for cell in rates] == [12.5, 7.5, 2.5, 5.0, 10.0]
  assert [cell.is_best for cell in rates] == [False, False, True, False, False]
  assert [cell.shade for cell in rates][::2] == [60, 0, 52]


def test_many_conditions_have_a_panel_for_each_norm_and_update(monkeypatch):
  found = {}
  monkeypatch.setattr(plots, 'picture', lambda figure, *_: found.update(
    {axes.get_title('left'): axes for axes in figure.axes}
  ))  # fmt: skip
  for most, titles in ((10, ['']), (11, ['SGD', 'BN', 'Adam'])):
    results = frame.read([
      record('Adam', 2.0),
      *(record(f'LowRank{rank}{norm}', 2.0 + rank)
      for rank in range(1, most + 1)
      for norm in ('', '+BN')),
    ])  # fmt: skip
    (grid,) = tables.grids(results)
    found.clear()
    plots.curves(results, grid, grid.lines[0])
    assert sorted(found, reverse=True) == sorted(titles, reverse=True)
    labels = [line.get_label() for of in found.values() for line in of.lines]
    assert len(set(labels)) == 2 * most + 1
    assert all(len(of.lines) <= 21 for of in found.values())


def test_text_reports_load_neither_jax_nor_plots():
  program = (
    'import sys; from experiments import report, studies;'
    'loaded = lambda *names: [name for name in names if name in sys.modules];'
    'print(loaded("jax", "pandas", "scipy", "jinja2", "matplotlib"));'
    'from tests.report.records import cell;'
    "report.text_tables(cell('SGD', 5.0)); report.claims_text(cell('SGD', 5));"
    'print(loaded("jax", "flax", "matplotlib"))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  assert done.stdout.split() == ['[]', '[]']
