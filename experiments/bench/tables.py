"""What ``bench`` prints, and its tables for a README."""

from collections.abc import Callable, Sequence

from experiments.bench.results import (
  FLAX,
  OPERATIONS,
  TORCH,
  Result,
  Row,
  rival,
)


def details(result: Result) -> str:
  """Every program on one network, as text."""
  workload = result.workload
  lines = [
    f'{title(result)}, batch {workload.batch}: {result.flops / 1e9:.2f} GFLOP '
    f'a step, matrix product {result.product_rate / 1e9:.0f} GFLOP/s, '
    f'{len(result.rows[0].seconds)} rounds',
    f'{"program":<40} {"ms [quartiles]":>24} {"/Flax":>6} {"/torch":>6} '
    f'{"/biotorch":>9} {"peak":>5} {"compile s":>9} {"MB":>6} {"/Flax":>6}',
  ]
  for row in result.rows:
    lines.append(
      f'{row.name:<25} {row.variant:<14} {_milliseconds(row):>24} '
      f'{_ratio(row, FLAX):>6} {_ratio(row, TORCH):>6} '
      f'{_ratio(row, rival(row.name)):>9} {row.peak_share:5.2f} '
      f'{_number(row.compile_seconds, 1):>9} {_megabytes(row.bytes):>6} '
      f'{_number(row.memory_to_flax, 2):>6}'.rstrip()
    )
  return '\n'.join(lines)


def title(result: Result) -> str:
  """A network in a word or two."""
  norm = '' if result.workload.batch_norm == 'none' else ' + BN'
  return result.workload.architecture + norm


def markdown(results: Sequence[Result]) -> str:
  """All networks in a few tables."""
  tables = {
    'Plain backpropagation: milliseconds a step, median [quartiles]; ratio '
    'within rounds; share of the rate of a matrix product; the operations of '
    "JAX's layers alone.": _plain(results),
    'A rule / plain Flax: time, and memory without stored draws.': _ratios(
      results,
      lambda row: f'{_ratio(row, FLAX)}, {_number(row.memory_to_flax, 2)}',
    ),
    "A rule / torch's plain backpropagation.": _ratios(
      results, lambda row: _ratio(row, TORCH)
    ),
    "A rule / biotorch's mode of it.": _ratios(
      results, lambda row: _ratio(row, rival(row.name))
    ),
  }
  return '\n\n'.join(
    '\n'.join([heading, '', *lines]) for heading, lines in tables.items()
  )


def _plain(results: Sequence[Result]) -> list[str]:
  """Flax beside torch, a line for each network."""
  lines = []
  for result in results:
    plain, torch = result.row(FLAX), result.row(TORCH)
    alone = result.row(OPERATIONS)
    assert plain is not None and alone is not None
    line = [title(result), f'{result.flops / 1e9:.1f}', _milliseconds(plain)]
    if torch is None:
      line += ['', '', f'{plain.peak_share:.2f}', '']
    else:
      line += [
        f'{_milliseconds(torch)} {torch.variant}',
        _ratio(plain, TORCH),
        f'{plain.peak_share:.2f}',
        f'{torch.peak_share:.2f}',
      ]
    lines.append([
      *line, f'{1e3 * alone.median:.1f}', _ratio(alone, TORCH),
      _number(plain.compile_seconds, 1), _megabytes(plain.bytes),
    ])  # fmt: skip
  header = (
    'network', 'GFLOP', 'Flax', 'torch', 'Flax / torch', 'share, Flax',
    'share, torch', 'operations alone', 'alone / torch', 'compile s',
    'memory MB',
  )  # fmt: skip
  return table(header, lines)


def _ratios(results: Sequence[Result], cell: Callable[[Row], str]) -> list[str]:
  """A column for each rule, a line for each network."""
  rules = [row.name for row in results[0].rows if row.is_rule]
  lines = [
    [title(result), *(cell(row) for row in result.rows if row.is_rule)]
    for result in results
  ]
  return table(('network', *rules), lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """The lines of a Markdown table."""
  lines = [header, ['---'] * len(header), *rows]
  return ['| ' + ' | '.join(line) + ' |' for line in lines]


def _ratio(row: Row, to: str) -> str:
  return f'{row.to[to]:.2f}' if to in row.to else ''


def _milliseconds(row: Row) -> str:
  median, lower, upper = (1e3 * x for x in (row.median, *row.quartiles))
  return f'{median:.1f} [{lower:.1f}, {upper:.1f}]'


def _number(value: float | None, digits: int) -> str:
  return '' if value is None else f'{value:.{digits}f}'


def _megabytes(count: int | None) -> str:
  return _number(None if count is None else count / 1e6, 1)
