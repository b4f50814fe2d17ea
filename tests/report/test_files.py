"""Files: the same bytes from the same store, and nothing but text in names."""

import dataclasses
import html.parser
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.text import Text

from experiments import report
from experiments.report import comparisons, figures, plots, studies
from experiments.runs import files
from tests.report.records import cell, like_the_paper, record

OLD = {
  'processor': 'an <old> processor', 'cores': '2', 'cores of the host': '8',
}  # fmt: skip
STORY = (
  'SGD', 'uSF', 'uSF+BN', 'uSF+BN+BM', 'RndF', 'brSF+BN+BM', 'brSF-50%+BN+BM',
)  # fmt: skip
SCRIPT = '<script>alert(1)</script> "$x$" & \x1b[31m ../../etc'


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
    failed,
  ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('report')
  made = report.write_report(some_records(), path)
  assert all(file.is_file() for file in made)
  assert sorted(made) == sorted(p for p in path.rglob('*') if p.is_file())
  return path


def test_the_same_records_in_another_order_give_the_same_bytes(
  folder, tmp_path
):
  records = some_records()
  random.Random(1).shuffle(records)
  again = report.write_report(records, tmp_path)
  assert len(again) > 20
  for path in again:
    old = folder / path.relative_to(tmp_path)
    assert path.read_bytes() == old.read_bytes(), path.name


def test_another_process_gives_the_same_bytes(folder, tmp_path):
  """Another hash seed: nothing depends on the order of a set."""
  program = (
    'import sys, tests.report.test_files as t, experiments.report as r;'
    'r.write_report(t.some_records(), sys.argv[1])'
  )
  subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)],
    check=True,
    cwd=Path(__file__).parents[2],
    env={'PYTHONHASHSEED': '7', 'PATH': '/usr/bin', 'HOME': str(tmp_path)},
  )
  for path in folder.rglob('*'):
    if path.is_file():
      new = tmp_path / path.relative_to(folder)
      assert new.read_bytes() == path.read_bytes(), path.name


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
      if name in ('href', 'src', 'xlink:href'):
        self.links.append(value)

  def handle_data(self, data):
    self.words.append(data)


def test_the_page_shows_names_as_text_and_needs_nothing_else(folder):
  page = _Reader((folder / 'report.html').read_text())
  assert 'script' not in page.tags
  assert not {'b', 'i'} & set(page.tags) - {'b'}
  assert any(SCRIPT.replace('\x1b', '�') in words for words in page.words)
  assert any('<b>no memory</b>' in words for words in page.words)
  assert any('<i>lossy</i>' in words for words in page.words)
  assert len(page.links) > 50
  assert all(link.startswith('#') for link in page.links)


@pytest.mark.parametrize('field', ['rule', 'dataset', 'note'])
def test_a_name_that_is_markup_is_shown_as_text_everywhere(tmp_path, field):
  name = '<script>alert(2)</script>'
  records = [*cell('SGD', 20.0, **{field: name}), *cell('BM', 3.0)]
  for path in report.write_report(records, tmp_path):
    if path.suffix == '.html':
      page = _Reader(path.read_text())
      assert 'script' not in page.tags
      assert any(name in words for words in page.words)
    elif path.suffix == '.md':
      text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
      assert '<script' not in text
    elif path.suffix == '.svg':
      tags = [each.tag for each in ElementTree.parse(path).getroot().iter()]
      assert not [tag for tag in tags if tag.endswith('}script')]


def test_ids_of_the_page_are_unique_and_every_link_has_its_target(folder):
  page = _Reader((folder / 'report.html').read_text())
  assert len(page.ids) == len(set(page.ids))
  assert {link[1:] for link in page.links} <= set(page.ids)


def test_both_results_and_colours_with_marks_are_on_the_page(folder):
  text = (folder / 'report.html').read_text()
  assert 'class="ours worse"' in text
  assert text.count('▲') > 20
  for words in ('Best validation', 'held-out', '4/5 rates', 'diverged'):
    assert words in text


def test_every_svg_is_xml_with_names_as_text_and_no_date(folder):
  found = list((folder / 'plots').glob('*.svg'))
  assert len(found) > 10
  texts = []
  for path in found:
    root = ElementTree.parse(path).getroot()
    assert not [e for e in root.iter() if e.tag.endswith('}script')]
    assert b'dc:date' not in path.read_bytes()
    texts += [element.text or '' for element in root.iter()]
  assert any('<script>alert(1)</script> "$x$"' in text for text in texts)


def test_plot_files_stay_in_their_folder(folder):
  for path in (folder / 'plots').iterdir():
    assert path.suffix in ('.svg', '.png')
    assert set(path.stem) <= set('abcdefghijklmnopqrstuvwxyz0123456789-')


def test_names_that_look_alike_get_files_of_their_own():
  names = ['MNIST', 'mnist', 'M N I S T', 'm/n', 'm.n', '', '日本']
  assert len({plots.slug(name) for name in names}) == len(names) - 1
  assert plots.slug('MNIST') == 'mnist'


def test_results_names_protocol_machine_commands_and_disagreement(folder):
  text = (folder / 'RESULTS.md').read_text()
  assert '![How much weight symmetry' in text
  assert '| processor |  | an &lt;old&gt; processor |' in text
  assert '--epochs 9 --executor processes --workers 4\n' in text
  assert '--epochs 4 --executor' not in text
  assert '--dataset MNIST --condition SGD uSF uSF+BN' in text
  assert '--dataset MNIST --condition BN --rate 1 --epochs 4\n' in text
  assert '--seed 0 1' in text
  assert '--epochs 4' in text
  assert 'What does not agree with the paper' in text
  assert '<script>' not in re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  for plot in (folder / 'plots').glob('*.svg'):
    assert f'(plots/{plot.name})' in text


def test_results_can_point_to_plots_elsewhere():
  text = report.results_markdown(some_records(), plots='results/plots')
  assert '](results/plots/story.svg)' in text


def test_names_in_raw_html_are_text():
  name = 'my_<b>_[set]'
  text = report.results_markdown(cell('SGD', 2.0, dataset=name))
  assert (
    '<summary>Learning curves and rates: my_&lt;b&gt;_[set], Table 2</summary>'
  ) in text


def test_markdown_alone_is_that_of_the_whole_report(folder, tmp_path):
  made = report.write_report(some_records(), tmp_path, markdown_only=True)
  assert {path.parent.name for path in made} == {tmp_path.name, 'plots'}
  for path in made:
    assert (
      path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    )
  assert (tmp_path / 'RESULTS.md') in made


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
  target = tmp_path / 'file'
  target.write_text('old')

  def broken(*_):
    raise OSError('no space left')

  monkeypatch.setattr(files.os, 'replace', broken)
  with pytest.raises(OSError, match='no space'):
    files.write_whole(target, b'new')
  assert target.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
  'datasets', [('MNIST',), ('MNIST', 'CIFAR'), ('MNIST', 'CIFAR', 'Cal101')]
)
def test_legends_are_whole_and_above_the_panels(datasets, monkeypatch):
  seen = []

  def looked_at(figure, name, *_, **__):
    (legend,) = figure.legends
    box = legend.get_window_extent()
    page = figure.bbox
    assert 0 <= box.x0 < box.x1 <= page.x1, name
    assert box.y1 <= page.y1, name
    for axes in figure.axes:
      for part in axes.get_children():
        if isinstance(part, Text) and part.get_text():
          assert part.get_window_extent().y1 <= box.y0, (name, part)
    seen.append(name)

  monkeypatch.setattr(comparisons, 'picture', looked_at)
  store = studies.gather(like_the_paper(datasets))
  comparisons.story(store)
  comparisons.against_p(store.studies[0])
  assert len(seen) == 2


def test_the_story_shows_a_dataset_once_as_it_was_trained_most(monkeypatch):
  seen = []

  def looked_at(figure, *_, **__):
    seen.extend(
      (axes.get_title('left'), axes.texts[0].get_text()) for axes in figure.axes
    )

  monkeypatch.setattr(comparisons, 'picture', looked_at)
  records = [
    *like_the_paper(('MNIST', 'CIFAR'), train_size=500),
    *like_the_paper(('MNIST',), epochs=3),
    *like_the_paper(('MNIST',), epochs=5, only=('SGD', 'uSF')),
  ]
  comparisons.story(studies.gather(records))
  assert seen == [
    ('MNIST', '3 epochs, all training images'),
    ('CIFAR', '4 epochs, 500 training images'),
  ]


@pytest.mark.parametrize(
  'positions',
  [[0.5] * 5, [0.0, 0.01, 0.02], [1.0, 0.99, 0.2], [0.3], [0.5] * 40],
)
def test_labels_keep_apart_in_order_and_inside(positions):
  placed = figures.spread(positions, 0.1)
  gap = min(0.1, 1 / max(len(positions) - 1, 1))
  ordered = sorted(placed)
  assert all(b - a > gap - 1e-9 for a, b in itertools.pairwise(ordered))
  assert min(placed) > -1e-9
  assert max(placed) < 1 + 1e-9
  assert [placed.index(p) for p in ordered] == sorted(
    range(len(positions)), key=lambda at: (positions[at], at)
  )


def test_text_reports_start_without_jax_or_plotting():
  program = (
    'import sys; from experiments import report;'
    'from tests.report.records import cell;'
    "report.text_tables(cell('SGD', 5.0)); report.claims_text(cell('SGD', 5));"
    "print([m for m in ('jax', 'flax', 'pandas', 'matplotlib', 'jinja2')"
    ' if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    check=True,
    cwd=Path(__file__).parents[2],
  )
  assert done.stdout.strip() == '[]'
