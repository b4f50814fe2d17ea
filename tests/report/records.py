"""Hand-made records of runs, as `studies.load` gives them."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from experiments.datasets.specs import SPECS
from experiments.paper import published as paper
from experiments.paper.conditions import find
from experiments.paper.protocol import Data, Protocol, Run
from experiments.paper.results import result
from experiments.runs.store import Record

LONG = 'a dataset with quite a long name of its own'
STORY = (
  'SGD', 'uSF', 'uSF+BN', 'uSF+BN+BM', 'RndF', 'brSF+BN+BM', 'brSF-50%+BN+BM',
)  # fmt: skip
OLD = {
  'processor': 'an <old> processor', 'cores': '2', 'cores of the host': '8',
}  # fmt: skip
LAYERS = {
  'conv': {'concordance': 0.75, 'angle': 40.0, 'update_angle': None},
  'output': {'concordance': 1.0, 'angle': 30.0, 'error_angle': 0.0},
}


def of_guessing(dataset: str) -> float:
  """Error in %; of 10 classes where the dataset is not known."""
  return 100 * (1 - 1 / (SPECS[dataset].classes if dataset in SPECS else 10))


def record(
  condition: str = 'SGD',
  error: float = 10.0,
  *,
  dataset: str = 'MNIST',
  rate: float = 1.0,
  seed: int = 0,
  held_out: float | None = None,
  holdout: float | None = None,
  chance: float | None = None,
  diverged: bool = False,
  plan: int = 0,
  digest: str = 'd1',
  note: str = '',
  rule: str | None = None,
  train_images: int = 900,
  network: str = '',
  plugin: str = '',
  **protocol: Any,
) -> Record:
  """A finished run of a condition with the given best test error."""
  row = find(condition).conditions[plan]
  chance = of_guessing(dataset) if chance is None else chance
  run = Run(
    condition=dataclasses.replace(row, rule=rule or row.rule),
    dataset=Data(dataset, digest, f'{dataset}.npz', note),
    protocol=Protocol(**{'epochs': 4} | protocol),
    rate=rate,
    seed=seed,
    network=network,
    plugin=plugin,
  )
  epochs = 1 if diverged else run.protocol.epochs
  metrics = [
    {
      'epoch': epoch,
      'train_loss': 0.5,
      'test_loss': None,
      'test_error': min(chance, error * (1 + (epochs - epoch) / 2)),
      'holdout_error': 5.0 + epochs - epoch,
      'finite': not diverged or epoch < epochs,
      'seconds': 1.0,
    }
    for epoch in range(1, epochs + 1)
  ]
  found = result(
    metrics, classes=round(100 / (100 - chance)), train_images=train_images
  )
  given = {'held_out_test_error': held_out, 'holdout_error': holdout}
  found |= {key: value for key, value in given.items() if value is not None}
  found['best_test_error'], found['chance_error'] = error, chance
  return Record(run.run_id, run.config(), metrics, found)


def cell(condition: str, error: float, **changes: Any) -> list[Record]:
  """All five rates (and plans) of a cell, the best at rate 1."""
  worst = changes.get('chance', of_guessing(changes.get('dataset', 'MNIST')))
  return [
    record(
      condition, min(error * (1 + i), worst), rate=rate, plan=plan,
      **{'holdout': 5.0 + i, **changes},
    )
    for plan in range(len(find(condition).conditions))
    for i, rate in enumerate((1.0, 10.0, 0.1, 100.0, 0.01))
  ]  # fmt: skip


def like_the_paper(
  datasets: tuple[str, ...] = ('MNIST', 'Cal101'),
  *,
  seeds: int = 1,
  noise: float = 0.05,
  only: tuple[str, ...] | None = None,
  **changes: Any,
) -> list[Record]:
  """The paper's own numbers as runs, perturbed; each content once."""
  random_ = random.Random(0)
  records = {}
  for (dataset, name), error in paper.by_condition().items():
    if dataset not in datasets or (only is not None and name not in only):
      continue
    for seed in range(seeds):
      value = error * (1 + random_.uniform(-noise, noise))
      value = min(value, of_guessing(dataset))
      for made in cell(
        name, value, dataset=dataset, seed=seed,
        train_images=SPECS[dataset].train, **changes,
      ):  # fmt: skip
        records.setdefault(made.run_id, made)
  return list(records.values())


def with_layers(
  records: list[Record], layers: dict[str, dict[str, Any]] | None = None
) -> list[Record]:
  """The records with these metrics by layer at every epoch."""
  for made in records:
    for line in made.metrics:
      line['layers'] = layers or LAYERS
  return records


def markup(what: str) -> str:
  """A name that is dangerous in a page, a plot, a terminal and a path."""
  return f'<script>{what}</script> "$x$" & \x1b[31m ../../etc'


def everything() -> list[Record]:
  """Runs of every kind that a report shows."""
  bad = record('BM', 5.0)
  bad.result['best_test_error'] = markup('result')
  failed = dataclasses.replace(
    record('BN', 3.0), result=None, metrics=[], error=markup('failure')
  )
  old = cell('SGD', 20.0, dataset='CIFAR', epochs=9, note=markup('note'))
  return [
    *like_the_paper(('MNIST',), seeds=2, only=STORY, noise=0.0),
    *cell('uSF', 80.0, dataset='CIFAR', diverged=True, note='lossy copy'),
    *(dataclasses.replace(made, environment=OLD) for made in old),
    *cell('SGD', 20.0, dataset=markup('dataset'))[:4],
    *cell('SGD', 50.0, dataset='zoo'),
    *with_layers(cell('uSF+BN', 2.0, dataset='zoo')),
    *cell('SGD', 30.0, dataset='zoo', rule=markup('rule')),
    *cell('SGD', 3.0, dataset=LONG, note=LONG.replace(' ', '_') * 4),
    *cell('SGD', 3.0, weight_decay=0.0),
    failed,
    bad,
  ]


def write_live(folder: Path, records: list[Record]) -> Path:
  """A live results folder of the records."""
  for made in records:
    path = folder / made.run_id
    path.mkdir(parents=True)
    (path / 'config.json').write_text(json.dumps(made.config))
    lines = ''.join(json.dumps(line) + '\n' for line in made.metrics)
    (path / 'metrics.jsonl').write_text(lines)
    if made.environment is not None:
      (path / 'environment.json').write_text(json.dumps(made.environment))
    if made.result is not None:
      (path / 'result.json').write_text(json.dumps(made.result))
  return folder
