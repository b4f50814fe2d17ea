"""Pictures of measurements."""

from collections.abc import Sequence

from experiments.bench.results import Result
from experiments.report.figures import (
  COLOURS,
  Picture,
  panels,
  picture,
  style,
  top_left,
)


def steps(results: Sequence[Result]) -> Picture:
  """Time of a step, a panel for each architecture, a line for each program."""
  title = 'Time of a training step: median and quartiles'
  by_architecture: dict[str, list[Result]] = {}
  for result in results:
    by_architecture.setdefault(result.workload.architecture, []).append(result)
  names = list(dict.fromkeys(row.name for r in results for row in r.rows))
  norms = list(dict.fromkeys(r.workload.batch_norm for r in results))
  size = 2.6, 0.2 * len(names) + 0.1
  with style('bench'):
    figure, axes = panels(
      len(by_architecture), size, across=3, left=1.75, top=0.85, between=0.95
    )
    for panel, (architecture, members) in zip(
      axes, by_architecture.items(), strict=True
    ):
      for result in members:
        norm = norms.index(result.workload.batch_norm)
        for row in result.rows:
          low, high = row.quartiles
          panel.errorbar(
            1e3 * row.median,
            names.index(row.name) + 0.3 * (norm - (len(norms) - 1) / 2),
            xerr=[[1e3 * (row.median - low)], [1e3 * (high - row.median)]],
            color=COLOURS[norm],
            marker='os'[norm % 2],
            markersize=4,
            linewidth=1.2,
          )
      panel.set_yticks(range(len(names)), names)
      panel.set_ylim(len(names) - 0.5, -0.5)
      panel.set_xlim(0, None)
      panel.set_xlabel('ms')
      panel.set_title(f'{architecture}, batch {members[0].workload.batch}')
    figure.text(*top_left(figure, 0.1), title, va='top', fontsize=11)
    for at, norm in enumerate(norms):
      text = 'without batch norm' if norm == 'none' else 'with batch norm'
      figure.text(
        *top_left(figure, 0.32 + 0.17 * at),
        f'{"●■"[at % 2]} {text}',
        va='top',
        color=COLOURS[at],
      )
    return picture(figure, 'bench', title)
