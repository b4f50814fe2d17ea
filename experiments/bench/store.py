"""How long a results folder takes to read and report, by its number of runs.

``python -m experiments.bench.store``
"""

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

from experiments import report
from experiments.datasets import SPECS
from experiments.paper.conditions import CONDITIONS
from experiments.paper.protocol import Protocol, Run, runs_of, unique
from experiments.runs import store
from experiments.training import loop as train

_PROTOCOL = Protocol()


def measure(sizes: tuple[int, ...] = (1000, 3000, 10_000)) -> None:
  """Prints seconds for made-up runs of 65 epochs.

  Args:
    sizes: numbers of runs.
  """
  print('  runs     load   tables   report')
  for size in sizes:
    with tempfile.TemporaryDirectory() as folder:
      root = Path(folder)
      for run in itertools.islice(_runs(), size):
        _write(root / run.run_id, run)
      records, loading = _timed(lambda: store.load(root))  # noqa: B023
      _, tables = _timed(lambda: report.text_tables(records))  # noqa: B023
      _, writing = _timed(
        lambda: report.write_report(records, root / 'report')  # noqa: B023
      )
    print(
      f'{size:>6} {loading:>6.2f} s {tables:>6.2f} s {writing:>6.2f} s',
      flush=True,
    )


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
  began = time.perf_counter()
  return act(), time.perf_counter() - began


def _runs() -> Iterator[Run]:
  """All runs of all datasets, seed by seed."""
  for seed in itertools.count():
    yield from unique(
      run
      for dataset, condition in itertools.product(SPECS, CONDITIONS.values())
      for run in runs_of(
        condition,
        seeds=(seed,),
        dataset=dataset,
        digest=f'digest of {dataset}',
        protocol=_PROTOCOL,
      )
    )


def _write(path: Path, run: Run) -> None:
  chance = random.Random(run.run_id)
  best = chance.uniform(1, 80)
  lines = [
    {'epoch': epoch, 'finite': True, 'seconds': 1.5}
    | {
      f'{part}_{what}': (best + 20 * chance.random() / epoch) * chance.random()
      for part in ('train', 'test', 'holdout')
      for what in ('loss', 'error')
    }
    for epoch in range(1, _PROTOCOL.epochs + 1)
  ]
  data = SPECS[run.dataset]
  result = train.result(lines, classes=data.classes, train_images=data.train)
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(run.config()))
  (path / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  (path / 'result.json').write_text(json.dumps(result))


if __name__ == '__main__':
  tyro.cli(measure)
