"""One HTML page that needs nothing else: no network, no scripts, no files."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import markupsafe

from experiments.report import naming, protocols, rerun, text
from experiments.report.cells import Cell
from experiments.report.contents import Contents
from experiments.report.figures import Picture
from experiments.report.runs import Run
from experiments.report.studies import Study
from experiments.report.tables import LEGEND, MARKS, notes, shown_cells

_SVG = 'http://www.w3.org/2000/svg'
_XLINK = 'http://www.w3.org/1999/xlink'
_LINK = f'{{{_XLINK}}}href'
_REFERENCE = re.compile(r'url\(#([^)]*)\)')


def html(report: Contents) -> str:
  """The page. Every text from the store is escaped by the template."""
  environment = jinja2.Environment(
    autoescape=True,
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template('page.html.jinja').render(
    report=report,
    legend=LEGEND,
    marks=MARKS,
    notes=notes,
    side_by_side=protocols.HOW,
    inline=inline,
    number=text.number,
    interval=text.interval,
    held_out=text.HELD_OUT,
    intervals=text.INTERVALS,
    agreement=text.agreement,
    details=details,
    anchor=_anchor,
    rerun=rerun.study_commands,
  )


def inline(picture: Picture) -> markupsafe.Markup:
  """A picture's SVG as an element of the page, its ids made unique."""
  # HTML knows these two prefixes only.
  ElementTree.register_namespace('', _SVG)
  ElementTree.register_namespace('xlink', _XLINK)
  root = ElementTree.fromstring(picture.svg)
  prefix = f'{picture.name}-'
  for parent in root.iter():
    for child in list(parent):
      if child.tag in (f'{{{_SVG}}}metadata', f'{{{_SVG}}}style'):
        parent.remove(child)
  for element in root.iter():
    for key, value in element.attrib.items():
      if key == 'id':
        element.set(key, prefix + value)
      elif key == _LINK and value.startswith('#'):
        element.set(key, f'#{prefix}{value[1:]}')
      elif 'url(#' in value:
        element.set(key, _REFERENCE.sub(rf'url(#{prefix}\1)', value))
  # What matplotlib's style element says, for this picture only.
  for key, value in {
    'stroke-linejoin': 'round',
    'stroke-linecap': 'butt',
    'role': 'img',
    'aria-label': picture.title,
  }.items():
    root.set(key, value)
  return markupsafe.Markup(ElementTree.tostring(root, encoding='unicode'))


@dataclasses.dataclass(frozen=True)
class Spark:
  """A learning curve as points of a small drawing, and in words."""

  points: str
  words: str


@dataclasses.dataclass(frozen=True)
class Detail:
  """A cell with all of its runs."""

  anchor: str
  cell: Cell
  names: Sequence[str]
  runs: Sequence[tuple[Run, Spark, str, str]]


def details(study: Study) -> list[Detail]:
  """Every cell once, though a condition may have several names."""
  by_cell: dict[tuple[str, str], list[str]] = {}
  for label, name in shown_cells(study):
    key = label, naming.first_name(name)
    by_cell.setdefault(key, []).append(name)
  return [
    _detail(study, label, first, names)
    for (label, first), names in by_cell.items()
  ]


def _detail(
  study: Study, label: str, first: str, names: Sequence[str]
) -> Detail:
  cell = study.cells[label, first if first in names else names[0]]
  order = sorted(cell.runs, key=lambda r: (r.seed, str(r.batch_plan), -r.rate))
  return Detail(
    _anchor(study, label, first),
    cell,
    names,
    [
      (run, _spark(run), _plan(run), rerun.run_command(study, names[0], run))
      for run in order
    ],
  )


def _anchor(study: Study, label: str, condition: str) -> str:
  """The id of a cell's details: letters, digits and hyphens only."""
  place = list(study.rows).index(label) if label in study.rows else 0
  first = naming.first_name(condition)
  safe = ''.join(c if c.isalnum() and c.isascii() else f'-{ord(c):x}-'
                 for c in first)  # fmt: skip
  return f'cell-{study.number}-{place}-{safe}'


def _spark(run: Run) -> Spark:
  known = [
    (epoch, error)
    for epoch, error in zip(run.epochs, run.test_errors, strict=True)
    if error is not None
  ]
  if not known:
    return Spark('', 'no epochs')
  first, last = known[0][0], known[-1][0]
  width = max(last - first, 1)
  points = ' '.join(
    f'{110 * (epoch - first) / width:.1f},{24 - 0.22 * min(error, 100):.1f}'
    for epoch, error in known
  )
  return Spark(points, ' '.join(f'{error:.2f}' for _, error in known))


def _plan(run: Run) -> str:
  return ', then '.join(
    f'{size}' + (f' for {epochs} epochs' if epochs else '')
    for epochs, size in run.batch_plan
  )
