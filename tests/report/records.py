"""Hand-made store records, as experiments/store.py would give them."""

import dataclasses
import hashlib
import json
import random
from typing import Any

from experiments.datasets.specs import SPECS
from experiments.paper import published as paper
from experiments.paper.conditions import CONDITIONS

RATES = (100.0, 10.0, 1.0, 0.1, 0.01)
PROTOCOL = {
  'epochs': 4,
  'train_size': None,
  'holdout': 0.1,
  'base_rate': 5e-4,
  'momentum': 0.9,
  'weight_decay': 5e-4,
  'initial_std': 0.01,
  'inputs': '0-255 minus mean image',
  'reduction': 'mean',
}


@dataclasses.dataclass(frozen=True)
class Record:
  run_id: str
  config: dict[str, Any]
  metrics: list[dict[str, Any]]
  result: dict[str, Any] | None
  environment: Any = None
  error: str | None = None
  problem: str | None = None


def of_guessing(dataset: str) -> float:
  """Error in %; of 10 classes where the dataset is not known."""
  classes = SPECS[dataset].classes if dataset in SPECS else 10
  return 100 * (1 - 1 / classes)


def record(
  condition: str = 'SGD',
  error: float = 10.0,
  *,
  dataset: str = 'MNIST',
  rate: float = 1.0,
  seed: int = 0,
  honest: float | None = None,
  holdout: float | None = None,
  chance: float | None = None,
  diverged: bool = False,
  plan: int = 0,
  digest: str = 'd1',
  note: str = '',
  rule: str | None = None,
  train_images: int = 900,
  **protocol: Any,
) -> Record:
  """A finished run of a condition with the given best test error."""
  row = CONDITIONS[condition]
  chance = of_guessing(dataset) if chance is None else chance
  fields = {**PROTOCOL, **protocol}
  config = {
    'version': 1,
    'dataset': dataset,
    'digest': digest,
    'source': f'{dataset}.npz',
    'note': note,
    'rule': rule or row.rule,
    'batch_manhattan': row.batch_manhattan,
    'batch_norm': row.batch_norm,
    'batch_plan': [list(step) for step in row.batch_plans[plan]],
    'frozen': row.frozen,
    'rate': rate,
    'seed': seed,
    **fields,
  }
  epochs = 1 if diverged else fields['epochs']
  errors = [
    min(chance, error * (1 + (epochs - epoch) / 2))
    for epoch in range(1, epochs + 1)
  ]
  honest = error if honest is None else honest
  return Record(
    hashlib.sha256(json.dumps(config).encode()).hexdigest()[:20],
    config,
    [
      {
        'epoch': epoch,
        'train_loss': 0.5,
        'train_error': value,
        'test_loss': None,
        'test_error': value,
        'holdout_loss': 0.6,
        'holdout_error': value,
        'seconds': 1.0,
      }
      for epoch, value in enumerate(errors, start=1)
    ],
    {
      'paper_error': error,
      'paper_epoch': epochs,
      'holdout_error': error if holdout is None else holdout,
      'honest_epoch': epochs,
      'honest_error': honest,
      'epochs_run': epochs,
      'diverged': diverged,
      'chance_error': chance,
      'train_images': train_images,
    },
  )


def cell(condition: str, error: float, **changes: Any) -> list[Record]:
  """All five rates (and plans) of a cell, the best at rate 1."""
  worst = changes.get('chance', of_guessing(changes.get('dataset', 'MNIST')))
  return [
    record(
      condition, min(error * (1 + i), worst), rate=rate, plan=plan, **changes
    )
    for plan in range(len(CONDITIONS[condition].batch_plans))
    for i, rate in enumerate((1.0, 10.0, 0.1, 100.0, 0.01))
  ]


def like_the_paper(
  datasets: tuple[str, ...] = ('MNIST', 'Cal101'),
  *,
  seeds: int = 1,
  noise: float = 0.05,
  only: tuple[str, ...] | None = None,
  **changes: Any,
) -> list[Record]:
  """The paper's own numbers as runs, perturbed; contents once each."""
  random_ = random.Random(0)
  records = {}
  for (dataset, name), error in paper.by_condition().items():
    if dataset not in datasets or (only is not None and name not in only):
      continue
    for seed in range(seeds):
      value = error * (1 + random_.uniform(-noise, noise))
      chance = of_guessing(dataset)
      for made in cell(
        name,
        min(value, chance),
        dataset=dataset,
        seed=seed,
        honest=min(value * 1.05, chance),
        train_images=SPECS[dataset].train,
        **changes,
      ):
        records.setdefault(made.run_id, made)
  return list(records.values())
