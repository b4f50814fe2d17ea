"""What measurements say: ratios within rounds, tables, plots and files."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from experiments.bench import contenders as programs
from experiments.bench.in_torch import BIOTORCH, TORCH
from experiments.runs.files import write_whole
from experiments.training import machine

Result = Mapping[str, Any]

LEGEND = """\
ms: of a step, median [quartiles], in the faster memory layout. Ratios are
medians over steps of one round: to plain Flax, to torch's plain
backpropagation, and to biotorch's mode of the rule. Peak: share of the rate of
a matrix product. Memory / Flax leaves stored draws out."""
_STYLE: Any = {'axes.grid': True, 'font.size': 9, 'grid.color': '#e4e4e4',
               'svg.fonttype': 'none', 'svg.hashsalt': 'bench'}  # fmt: skip


def summarize(
  workload: programs.Workload,
  contenders: Sequence[programs.Contender],
  times: np.ndarray,
) -> dict[str, Any]:
  """The entry of a network in ``bench.json``; of each name the fastest variant.

  ``times`` are those of ``take_turns``; a product and plain Flax take part.
  """
  medians, fastest = np.median(times, 0), {}
  for at, contender in enumerate(contenders):
    before = fastest.get(contender.name, at)
    fastest[contender.name] = min(before, at, key=medians.__getitem__)
  seconds = {name: times[:, at] for name, at in fastest.items()}
  product = contenders[fastest[programs.PRODUCT]].flops / seconds.pop(
    programs.PRODUCT
  )
  plain_bytes = contenders[fastest[programs.FLAX]].bytes
  flops, rows = workload.flops, []
  for name, own in seconds.items():
    contender, memory = contenders[fastest[name]], None
    if contender.bytes is not None and plain_bytes:
      memory = (contender.bytes - contender.draw_bytes) / plain_bytes
    rows.append({
      'name': name,
      'variant': contender.variant,
      'seconds': own.tolist(),
      'median': float(np.median(own)),
      'quartiles': np.percentile(own, (25, 75)).tolist(),
      'to': {
        other: float(np.median(own / seconds[other]))
        for other in (programs.FLAX, TORCH, _rival(name))
        if other in seconds
      },
      'peak_share': float(np.median(flops / own / product)),
      'compile_seconds': contender.compile_seconds,
      'bytes': contender.bytes,
      'memory_to_flax': memory,
    })  # fmt: skip
  return described(workload) | {
    'flops': flops,
    'product_rate': float(np.median(product)),
    'rows': rows,
  }


def described(workload: programs.Workload) -> dict[str, Any]:
  """The fields that identify the measurements of a network."""
  return {
    'architecture': workload.setup.network,
    'batch_norm': workload.setup.condition.batch_norm,
    'batch': workload.batch,
    'precision': workload.precision,
    'repeat': workload.repeat,
    'device': device(),
  }


def device() -> str:
  """The kind of device that JAX computes on."""
  return jax.devices()[0].device_kind


def _rival(rule: str) -> str:
  """The name of biotorch's program for a rule."""
  return f'biotorch {BIOTORCH.get(rule, "")}'


def details(result: Result) -> str:
  """A line about a network, and a table of every program on it."""
  return f'{_heading(result)}\n{table(_cells(result))}'


def steps_markdown(results: Sequence[Result]) -> str:
  """A line about each network, and a table of each quantity on all of them."""
  cells = {
    _network(result): {row['program']: row for row in _cells(result)}
    for result in results
  }
  parts = [LEGEND, '\n'.join(f'- {_heading(result)}' for result in results)]
  names = dict.fromkeys(name for rows in cells.values() for name in rows)
  _, *quantities = _cells(results[0])[0]
  for quantity in quantities:
    rows = [
      {quantity: network}
      | {name: own[name][quantity] if name in own else '' for name in names}
      for network, own in cells.items()
    ]
    if any(any([*row.values()][1:]) for row in rows):
      parts.append(table(rows))
  return '\n\n'.join(parts)


def _network(result: Result) -> str:
  norm = ' + BN' * (result['batch_norm'] != 'none')
  return f'{result["architecture"]}{norm}, {_mode(result)}'


def _mode(result: Result) -> str:
  return f'batch {result["batch"]}, {result["precision"]}'


def _heading(result: Result) -> str:
  return (
    f'{_network(result)}: '
    f'{result["flops"] / 1e9:.2f} GFLOP a step, matrix product '
    f'{result["product_rate"] / 1e9:.0f} GFLOP/s, '
    f'{len(result["rows"][0]["seconds"])} rounds'
  )


def _cells(result: Result) -> list[dict[str, str]]:
  """The cells of every program in the tables."""

  def number(value: float | None, digits: int = 2) -> str:
    return '' if value is None else f'{value:.{digits}f}'

  rows = []
  for row in result['rows']:
    low, high = (f'{1e3 * end:.1f}' for end in row['quartiles'])
    ms = f'{1e3 * row["median"]:.1f} [{low}, {high}] {row["variant"]}'
    rows.append({
      'program': row['name'],
      'ms': ms.rstrip(),
      '/ Flax': number(row['to'].get(programs.FLAX)),
      '/ torch': number(row['to'].get(TORCH)),
      '/ biotorch': number(row['to'].get(_rival(row['name']))),
      'peak': number(row['peak_share']),
      'compile s': number(row['compile_seconds'], 1),
      'MB': number(row['bytes'] and row['bytes'] / 1e6, 1),
      'memory / Flax': number(row['memory_to_flax']),
    })  # fmt: skip
  return rows


def table(rows: Sequence[Mapping[str, str]]) -> str:
  """A Markdown table, aligned so that it reads as text; no empty columns."""
  lines = [list(rows[0]), *(list(row.values()) for row in rows)]
  columns = [each for each in zip(*lines, strict=True) if any(each[1:])]
  widths = [max(3, *map(len, column)) for column in columns]
  lines = [*zip(*columns, strict=True)]
  lines.insert(1, tuple('-' * width for width in widths))
  return '\n'.join(
    f'| {" | ".join(map(str.ljust, line, widths))} |' for line in lines
  )


def scaling_markdown(points: Sequence[Result], grid: Result) -> str:
  """Step times as a table, and the fixed cost of a run."""
  rows = [
    {'milliseconds a step': f'{point["axis"]} {point[point["axis"]]}'}
    | {name: f'{1e3 * time:.2f}' for name, time in point['seconds'].items()}
    for point in points
  ]
  run, typical = grid['seconds_per_run'], 30
  return (
    f'{table(rows)}\n\nA grid takes {grid["seconds_per_start"]:.1f} s to start '
    f'and, in addition to training, {run:.2f} s a run: '
    f'{100 * run / typical:.1f} % of a run of {typical} s.'
  )


@mpl.rc_context(_STYLE)
def steps_figure(results: Sequence[Result]) -> Figure:
  """Time of a step: a panel for each architecture, a line per program."""
  frame = pd.DataFrame([result | row for result in results
                        for row in result['rows']])  # fmt: skip
  columns = [*frame['architecture'].unique()]
  modes = frame.groupby(['batch', 'precision'], sort=False)
  lines = len({*frame['name']}) * len({*frame['batch_norm']})
  size = 2.4 * len(columns) + 1.8, (0.18 * lines + 1) * len(modes)
  figure = Figure(size, layout='constrained')
  figure.suptitle('Time of a training step: median and quartiles')
  axes = figure.subplots(len(modes), len(columns), squeeze=False, sharey=True)
  for row, (_, of_mode) in zip(axes, modes, strict=True):
    for name, rows in of_mode.groupby('architecture', sort=False):
      panel = row[columns.index(name)]
      for norm, group in rows.groupby('batch_norm', sort=False):
        ms = 1e3 * group['median']
        low, high = 1e3 * np.array([*group['quartiles']]).T
        names = group['name'] + ' + BN' * (norm != 'none')
        panel.errorbar(ms, names, xerr=[ms - low, high - ms], fmt='o')
      title = f'{name}, {_mode(rows.iloc[0])}'
      panel.set(title=title, xlabel='ms', xlim=(0, None))
  axes[0, 0].invert_yaxis()
  return figure


@mpl.rc_context(_STYLE)
def scaling_figure(points: Sequence[Result], grid: Result) -> Figure:
  """Step time by batch, width and depth; time of a grid by number of runs."""
  panels = pd.DataFrame(points).groupby('axis', sort=False)
  figure = Figure((4 * len(panels) + 4, 3.3), layout='constrained')
  figure.suptitle('How cost grows')
  *axes, last = figure.subplots(1, len(panels) + 1)
  for panel, (axis, rows) in zip(axes, panels, strict=True):
    times = 1e3 * pd.DataFrame([*rows['seconds']])
    panel.loglog(rows[axis], times, 'o-', label=times.columns)
    panel.set_xticks(rows[axis], rows[axis].astype(str))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    panel.minorticks_off()
    panel.set(xlabel=axis, ylabel='ms a step')
    panel.legend()
  times = pd.DataFrame(grid['points']).set_index('runs')
  last.plot(times, 'o-', label=['whole grid', 'overhead'])
  last.set(xlabel='runs', ylabel='seconds', xlim=(0, None), ylim=(0, None))
  last.legend()
  return figure


def read(out: Path, name: str) -> list[Result]:
  """The results in NAME.json that are of this kind of device."""
  path = out / f'{name}.json'
  results = json.loads(path.read_text())['results'] if path.exists() else []
  return [result for result in results if result['device'] == device()]


@mpl.rc_context(_STYLE)
def write(
  out: Path,
  name: str,
  measured: Result,
  markdown: str,
  figure: Figure | None = None,
) -> str:
  """Writes NAME.json, .md, .svg and .png; returns their paths, one a line.

  The first two, which need no figure, also have the command and the machine.
  """
  command = ['python', '-m', 'experiments.bench', *sys.argv[1:]]
  about = {
    'command': shlex.join(command),
    **machine.environment(('torch', 'biotorch')),
    'device': device(),
  }
  lines = '\n'.join(f'{key}: {value}' for key, value in about.items())
  paths = [out / f'{name}.{kind}' for kind in ('json', 'md', 'svg', 'png')]
  document = json.dumps({'machine': about, **measured}, indent=1)
  write_whole(paths[0], document.encode())
  write_whole(paths[1], f'```\n{lines}\n```\n\n{markdown}\n'.encode())
  if figure is None:
    return '\n'.join(map(str, paths[:2]))
  figure.savefig(paths[2], metadata={'Date': None})
  figure.savefig(paths[3])
  return '\n'.join(map(str, paths))
