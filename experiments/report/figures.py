"""How every picture looks: style, axes for errors, labels, deterministic files.

Figures are made without pyplot, so no window system is ever asked for. Text in
an SVG stays text; nothing in a name is read as mathematics or markup.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Okabe and Ito's colours, told apart by colour-blind readers; no yellow, which
# is too pale for a line.
COLOURS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#333333',
)  # fmt: skip
DASHES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)))
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
OURS, PAPER, QUIET = '#0072B2', '#B34700', '#777777'

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_MANY = 60  # pictures that are worth starting processes
_LOGARITHMIC = 8.0  # ratio of errors from which an axis is logarithmic

_STYLE = {
  'axes.edgecolor': '#888888',
  'axes.grid': True,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlelocation': 'left',
  'axes.titlesize': 10,
  'font.family': ['DejaVu Sans'],
  'font.size': 9,
  'grid.color': '#e4e4e4',
  'grid.linewidth': 0.7,
  'legend.frameon': False,
  'savefig.dpi': 110,
  'svg.fonttype': 'none',
  'text.parse_math': False,
  'xtick.color': '#555555',
  'ytick.color': '#555555',
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """A plot as files' contents; `title` says what it shows.

  Only pictures worth sending around have a PNG: it takes longer than the rest.
  """

  name: str
  title: str
  svg: bytes
  png: bytes | None


@contextlib.contextmanager
def style(name: str) -> Iterator[None]:
  """The look of every figure; its name makes an SVG's ids its own."""
  with mpl.rc_context(cast(Any, {**_STYLE, 'svg.hashsalt': name})):
    yield


def picture(
  figure: Figure, name: str, title: str, png: bool = False
) -> Picture:
  """The files of a figure; the same figure gives the same bytes."""
  files = {kind: io.BytesIO() for kind in (('svg', 'png') if png else ('svg',))}
  with warnings.catch_warnings():
    # A name may have letters that the font lacks.
    warnings.filterwarnings('ignore', message='Glyph')
    for kind, file in files.items():
      empty = {'svg': ('Date', 'Creator'), 'png': ('Software',)}[kind]
      figure.savefig(file, format=kind, metadata=dict.fromkeys(empty))
  return Picture(
    name,
    title,
    files['svg'].getvalue(),
    files['png'].getvalue() if png else None,
  )


def drawn(plans: Sequence[Callable[[], Picture]]) -> list[Picture]:
  """The pictures that the plans draw, on all cores if there are many."""
  if len(plans) < _MANY:
    return [plan() for plan in plans]
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
    return list(pool.map(_draw, plans, chunksize=2))


def _draw(plan: Callable[[], Picture]) -> Picture:
  return plan()


def short(text: str, length: int = 34) -> str:
  """The text, cut if a name is too long for a picture."""
  return text if len(text) <= length else text[: length - 1] + '…'


def looks(position: int) -> dict:
  """Colour, dash and marker of the n-th line; 21 pairs before they repeat."""
  return {
    'color': COLOURS[position % len(COLOURS)],
    'linestyle': DASHES[position // len(COLOURS) % len(DASHES)],
    'marker': MARKERS[position % len(MARKERS)],
    'markersize': 3.5,
    'linewidth': 1.5,
  }


class ErrorAxis:
  """An axis of errors in percent: logarithmic if they differ much.

  Args:
    axes: its `which` axis is set up.
    errors: what will be drawn. A logarithmic axis has no 0: what is below
      `floor` must be drawn there, see `at`.
    which: 'x' or 'y'.
  """

  def __init__(self, axes: Axes, errors: Iterable[float], which: str = 'y'):
    errors = list(errors)
    positive = [error for error in errors if error > 0] or [1.0]
    low, high = min(positive), max(positive)
    self.floor = 0.0
    setting = {'x': (axes.set_xscale, axes.set_xlim, axes.xaxis),
               'y': (axes.set_yscale, axes.set_ylim, axes.yaxis)}  # fmt: skip
    set_scale, set_limits, axis = setting[which]
    if high > _LOGARITHMIC * low:
      self.floor = max(low, 0.01) / (1 if low == min(errors) else 2)
      set_scale('log')
      ends = self.floor / 1.25, min(high * 1.25, 130)
      axis.set_major_locator(
        FixedLocator([tick for tick in _TICKS if ends[0] <= tick <= ends[1]])
      )
      axis.set_minor_locator(NullLocator())
    else:
      margin = max(0.06 * (high - low), 0.02 * high)
      ends = max(min(errors) - margin, 0), high + margin
    set_limits(*ends)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))

  def at(self, error: float) -> float:
    """Where to draw an error."""
    return max(error, self.floor)


def error_colours(errors: Iterable[float]) -> Callable[[float], tuple]:
  """From an error to its colour, dark for large, and one to write on it."""
  from matplotlib import colors

  errors = list(errors)
  positive = [error for error in errors if error > 0] or [1.0]
  low, high = min(positive), max(positive)
  many = high > _LOGARITHMIC * low
  norm = (colors.LogNorm if many else colors.Normalize)(
    low, high if high > low else low * 1.01, clip=True
  )
  scale = mpl.colormaps['Blues']

  def colour(error: float) -> tuple:
    face = scale(0.05 + 0.85 * float(norm(max(error, low))))
    luminance = 0.21 * face[0] + 0.72 * face[1] + 0.07 * face[2]
    return face, 'black' if luminance > 0.45 else 'white'

  return colour


def spread(positions: Sequence[float], gap: float) -> list[float]:
  """Moves positions in [0, 1] apart, in their order, as little as needed."""
  from scipy import optimize

  count = len(positions)
  gap = min(gap, 1 / max(count - 1, 1))
  order = sorted(range(count), key=lambda at: (positions[at], at))
  steps = [gap * place for place in range(count)]
  # Least squares with a gap between neighbours is an isotonic regression.
  close = [positions[at] - step for at, step in zip(order, steps, strict=True)]
  fitted = optimize.isotonic_regression(close).x
  placed = [0.0] * count
  for at, step, start in zip(order, steps, fitted, strict=True):
    placed[at] = min(max(float(start), 0.0), 1 - steps[-1]) + step
  return placed


def label_ends(
  axes: Axes, ends: Sequence[tuple[float, float, str, str]]
) -> None:
  """Names lines at the right of the axes: (x, y, text, colour) of each end."""
  if not ends:
    return
  to_axes = axes.transData + axes.transAxes.inverted()
  heights = [float(to_axes.transform((x, y))[1]) for x, y, *_ in ends]
  figure = axes.get_figure(root=True)
  assert figure
  inches = axes.get_window_extent().height / figure.dpi
  places = spread(heights, 0.165 / inches)
  for (x, y, text, colour), place in zip(ends, places, strict=True):
    axes.annotate(
      short(text),
      (x, y),
      (1.04, place),
      textcoords='axes fraction',
      va='center',
      color=colour,
      fontsize=8.5,
      annotation_clip=False,
      arrowprops={
        'arrowstyle': '-', 'color': colour, 'linewidth': 0.6, 'alpha': 0.6,
        'relpos': (0, 0.5), 'shrinkA': 1, 'shrinkB': 3,
      },
    )  # fmt: skip


def panels(
  count: int,
  size: tuple[float, float],
  *,
  across: int,
  left: float,
  top: float,
  between: float,
) -> tuple[Figure, list[Axes]]:
  """Panels of equal size, row by row; all measures in inches.

  Args:
    count: how many panels.
    size: width and height of a panel's axes.
    across: panels in a row, at most.
    left: room for labels at the left of each panel.
    top: room above the first row.
    between: room below each panel, for its labels and the next title.
  """
  width, height = size
  across = min(count, across)
  down = -(-count // across)
  bottom = min(between, 0.62)
  whole = (
    across * (width + left) + 0.2,
    top + down * height + (down - 1) * between + bottom,
  )
  figure = Figure(figsize=whole)
  axes = []
  for at in range(count):
    row, column = divmod(at, across)
    x = left + column * (width + left)
    y = whole[1] - top - row * (height + between) - height
    box = x / whole[0], y / whole[1], width / whole[0], height / whole[1]
    axes.append(figure.add_axes(box))
  return figure, axes


def top_left(figure: Figure, down: float) -> tuple[float, float]:
  """The figure's coordinates of a point, in inches from its left top."""
  return 0.1 / figure.get_figwidth(), 1 - down / figure.get_figheight()


def labelled_axes(title: str, labels: Sequence[str]) -> tuple[Figure, Axes]:
  """A figure with room at its right for the names of its lines."""
  room = 0.35 + 0.075 * max(len(short(label)) for label in labels)
  height = max(3.6, 0.17 * len(labels) + 1.0)
  width = 5.6 + room
  figure = Figure(figsize=(width, height))
  axes = figure.add_axes((
    0.62 / width, 0.5 / height, 4.8 / width, 1 - 0.95 / height,
  ))  # fmt: skip
  axes.set_title(title)
  return figure, axes
