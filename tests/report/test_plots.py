"""Plots: what they show, and that it can be read."""

import pytest

from experiments.report import frame, pages, plots, tables
from tests.report.records import cell, like_the_paper, record, with_layers


@pytest.fixture(name='figures')
def _figures(monkeypatch):
  """The figures that a test draws, by name."""
  found = {}
  monkeypatch.setattr(
    plots,
    'picture',
    lambda figure, name, *_, **__: found.update({name: figure}),
  )
  return found


@pytest.mark.parametrize('datasets', [['MNIST'], ['MNIST', 'CIFAR', 'Cal101']])
def test_legends_are_whole_and_cover_nothing(datasets, figures):
  results = frame.read(like_the_paper(datasets))
  plots.overview(results)
  plots.against_p(results)
  assert set(figures) == {'overview', 'error-against-p'}
  for name, figure in figures.items():
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1, name
    assert page.y0 <= box.y0, name
    for axes in figure.axes:
      assert axes.get_tightbbox().y0 >= box.y1, name


def test_the_overview_shows_a_dataset_once_with_most_conditions(figures):
  plots.overview(frame.read([
    *like_the_paper(('MNIST', 'CIFAR'), train_size=500),
    *like_the_paper(('MNIST',), epochs=3),
    *like_the_paper(('MNIST',), epochs=5, only=('SGD', 'uSF', 'NuSF')),
    *like_the_paper(('MNIST',), epochs=9, weight_decay=0.0),
  ]))  # fmt: skip
  assert [axes.get_title('left') for axes in figures['overview'].axes] == [
    'MNIST\n3 epochs',
    'CIFAR\n4 epochs, 500 images',
  ]


def test_curves_and_rates_are_means_over_seeds(figures):
  records = [r for s in (0, 1) for r in cell('SGD', 2.0 + s, seed=s)]
  results = frame.read(records)
  grid, *_ = tables.grids(results)
  plots.curves(results, grid, grid.lines[0])
  (line,) = figures['mnist-4-epochs-table-2-curves'].axes[0].lines
  assert list(line.get_xdata()) == [1, 2, 3, 4]
  assert list(line.get_ydata()) == [6.25, 5.0, 3.75, 2.5]
  (rates,) = pages.rates(results, grid.lines[0], ['SGD']).to_numpy()
  assert [cell.error for cell in rates] == [12.5, 7.5, 2.5, 5.0, 10.0]
  assert [cell.is_best for cell in rates] == [False, False, True, False, False]
  assert [cell.shade for cell in rates][::2] == [60, 0, 52]


def test_many_conditions_have_a_panel_for_each_norm_and_update(figures):
  for most, titles in ((10, {''}), (11, {'SGD', 'BN', 'Adam'})):
    results = frame.read([
      record('Adam', 2.0),
      *(record(f'LowRank{rank}{norm}', 2.0 + rank)
      for rank in range(1, most + 1)
      for norm in ('', '+BN')),
    ])  # fmt: skip
    (grid,) = tables.grids(results)
    plots.curves(results, grid, grid.lines[0])
    panels = figures['mnist-4-epochs-table-other-curves'].axes
    assert {axes.get_title('left') for axes in panels} == titles
    labels = [line.get_label() for axes in panels for line in axes.lines]
    assert len(set(labels)) == 2 * most + 1
    assert all(len(axes.lines) <= 21 for axes in panels)


def test_alignment_is_drawn_by_layer_and_epoch(figures):
  same = {'conv': {'concordance': 1.0, 'angle': 0.0, 'norm_ratio': 1.0}}
  other = {'conv': {'concordance': 0.25, 'angle': 60.0, 'norm_ratio': 20.0}}
  results = frame.read([
    *with_layers(cell('SGD', 1.0), same),
    *with_layers(cell('RndF', 5.0)),
    *with_layers(cell('RndF', 6.0, seed=1), other),
    *cell('BM', 2.0),
  ])  # fmt: skip
  (row,) = results.main_rows
  plots.alignment(results, row)
  (figure,) = figures.values()
  assert [axes.get_ylabel() for axes in figure.axes] == ['RndF', *[''] * 4]
  norms, signs, angles, updates, _ = figure.axes
  assert list(norms.lines[0].get_ydata()) == [20.0] * 4
  assert norms.get_yscale() == 'log'
  lines = [list(line.get_ydata()) for line in signs.lines]
  assert lines == [[0.5] * 4, [1.0] * 4, [0.5, 0.5]]  # the last: unrelated
  assert list(angles.lines[0].get_ydata()) == [50.0] * 4
  assert list(signs.lines[0].get_xdata()) == [1, 2, 3, 4]
  assert all(value != value for value in updates.lines[0].get_ydata())
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names[:2] == ['conv', 'output']
  assert plots.alignment(frame.read(cell('RndF', 5.0)), row) is None
