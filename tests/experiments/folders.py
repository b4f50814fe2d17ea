"""Results folders: one made by hand, and what is compared of any."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paper.protocol import Run
from experiments.runs import checkpoints, store
from experiments.runs.store import Store
from tests.experiments import tiny

ENVIRONMENT = {'jax': '0.10.0', 'cores': '2'}
RESULT = {'paper_error': 12.5, 'diverged': False}


def line(epoch: int, error: float = 50.0) -> dict:
  return {'epoch': epoch, 'test_error': error, 'finite': True, 'seconds': 0.1}


def state(epoch: int) -> dict:
  return {
    'params': {'kernel': jnp.full((64, 8), epoch, jnp.float32)},
    'feedback': {},
    'updates': jnp.int32(epoch),
  }


def arrays(epoch: int) -> dict:
  return dict(checkpoints.by_name(state(epoch)))


def interrupted(
  folder: Path, epochs: int = 3, run: Run | None = None
) -> store.RunFolder:
  """A run with metrics and checkpoints of some epochs."""
  folder = Store(folder).open(run or tiny.run())
  for epoch in range(1, epochs + 1):
    folder.append(line(epoch))
    folder.save(epoch, arrays(epoch))
  return folder


def check(folder: store.RunFolder, epoch: int) -> list[str]:
  """Restores; the state and the metrics must be those of the epoch."""
  found, kept, problems = folder.restore()
  assert found == epoch
  assert (kept is None) == (epoch == 0)
  restored = state(0) if kept is None else checkpoints.fit(kept, state(0))
  jax.tree.map(np.testing.assert_array_equal, restored, state(epoch))
  assert [row['epoch'] for row in folder.metrics()] == [*range(1, epoch + 1)]
  return problems


def contents(folder: Path) -> dict[tuple[str, str], object]:
  """Every file of every run, but for times and what it ran on."""
  found = {}
  for path in folder.glob('[0-9a-f]*/*'):
    if path.name == 'environment.json':
      continue
    text = path.read_text()
    if path.name == 'metrics.jsonl':
      lines = [json.loads(row) for row in text.splitlines()]
      text = [row | {'seconds': None} for row in lines]
    found[path.parent.name, path.name] = text
  return found
