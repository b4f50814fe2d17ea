"""The page in a real browser: it sorts, filters, opens cells and fits."""

import re
import shutil

import pytest

from tests.report.records import LONG

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(
  CHROMIUM is None,
  reason='no chromium here: `apt-get install chromium` runs this test',
)


@pytest.fixture(name='browser', scope='module')
def _browser():
  sync_api = pytest.importorskip('playwright.sync_api')
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=['--no-sandbox']
    )
    yield browser
    browser.close()


@pytest.fixture(name='open_page')
def _open_page(browser, folder):
  """Opens the page; fails if it asks for anything or its script does."""
  contexts, problems = [], []
  address = (folder / 'report.html').as_uri()

  def open_page(width=1400, **options):
    viewport = {'width': width, 'height': 900}
    contexts.append(browser.new_context(viewport=viewport, **options))
    page = contexts[-1].new_page()
    page.on('request', lambda request: problems.append(request.url))
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.on('console', lambda message: problems.append(message.text))
    page.goto(address)
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert set(problems) == {address}


def test_a_click_on_a_cell_shows_its_runs(open_page):
  page = open_page()
  row = page.locator('tr', has_text='zoo')
  link = row.locator('a[title^="uSF+BN: 5/5 runs"]').first
  link.click()
  box = page.locator(f'details{link.get_attribute("href")}')
  assert box.evaluate('box => box.open && box.matches(":target")')
  page.wait_for_function('document.querySelector(":target polyline")')
  points = box.locator('polyline').evaluate_all(
    'lines => lines.map(line => line.points.length)'
  )
  assert points == 5 * [4]  # runs, epochs
  assert page.evaluate('scrollY') > 1000


def test_a_click_on_a_head_sorts(open_page):
  page = open_page()
  table = page.locator('table.sortable').first
  head = table.locator('th', has_text=re.compile('^SGD$'))
  column = head.evaluate('head => head.cellIndex')

  def shown():
    cells = table.locator(f'tbody tr > :nth-child({column + 1}) a .value')
    return [float(text) for text in cells.all_inner_texts()]

  for turn in ('ascending', 'descending'):
    head.click()
    assert head.get_attribute('aria-sort') == turn
    wanted = sorted(shown(), reverse=turn == 'descending')
    assert shown() == wanted and len({*wanted}) > 2


def test_the_filter_leaves_cells_with_every_word(open_page):
  page = open_page()
  before = page.locator('details.cell > summary:visible').count()
  page.fill('#filter', 'zoo usf+')
  titles = page.locator('details.cell > summary:visible').all_inner_texts()
  assert len(titles) == 1 and 'zoo' in titles[0] and 'uSF+BN' in titles[0]
  page.fill('#filter', '')
  after = page.locator('details.cell > summary:visible').count()
  assert after == before > 10


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_and_plots_can_be_read(open_page, scheme):
  page = open_page(color_scheme=scheme)
  ink, paper = page.evaluate(
    """['color', 'backgroundColor'].map(name =>
      getComputedStyle(document.body)[name].match(/[0-9]+/g)
        .reduce((sum, part) => sum + Number(part) / 765, 0))"""
  )
  assert (ink < 0.2 and paper > 0.9) if scheme == 'light' else (
    ink > 0.8 and paper < 0.2
  )  # fmt: skip
  for plot in page.locator('figure svg').all():
    turned = plot.evaluate('plot => getComputedStyle(plot).filter')
    assert ('invert' in turned) == (scheme == 'dark')
    assert '#ffffff' not in plot.inner_html()  # the page shows through


@pytest.mark.parametrize('width', [320, 1400])
def test_only_tables_and_plots_scroll_sideways(open_page, width):
  page = open_page(width)
  page.evaluate("""document.querySelectorAll('details')
    .forEach(box => { box.open = true })""")
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  wide = page.evaluate("""[...document.querySelectorAll('table, figure svg')]
    .filter(each => each.closest('.scroll') === null).length""")
  assert wide == 0


def test_names_of_conditions_are_never_broken(open_page):
  page = open_page(390)
  names = page.locator('table.grid :is(thead th, .name):visible')
  shown = names.evaluate_all(
    'names => names.map(name => [name.innerText, name.offsetHeight])'
  )
  texts = {text for text, _ in shown}
  assert {'brSF-50%+BN+BM', f"{LONG} (not the paper's)"} <= texts
  assert max(height for _, height in shown) < 40  # one line
