"""Results folders: one made by hand, and the contents of any."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paper.protocol import Run
from experiments.runs import checkpoints
from experiments.runs.store import RunFolder
from tests.experiments import tiny

RESULT = {'best_test_error': 50.0, 'diverged': False}


def line(epoch: int, error: float = 50.0) -> dict:
  return {'epoch': epoch, 'test_error': error, 'finite': True, 'seconds': 0.1}


def state(epoch: int) -> dict:
  return {
    'params': {'kernel': jnp.full((64, 8), epoch, jnp.float32)},
    'feedback': {'kernel:frsf(p_flip=0.5)': jnp.ones(3, jnp.uint32)},
    'updates': jnp.int32(epoch),
  }


def interrupted(
  folder: Path, epochs: int = 3, run: Run | None = None
) -> RunFolder:
  """A run with metrics and checkpoints of some epochs."""
  run = run or tiny.run()
  made = RunFolder(folder, run.run_id)
  with made.claimed() as mine:
    assert mine
    made.begin(run.config())
    for epoch in range(1, epochs + 1):
      made.append(line(epoch))
      checkpoints.save(made.checkpoints, epoch, state(epoch))
  return made


def check(folder: RunFolder, epoch: int) -> list[str]:
  """Restores; the state and the metrics must be those of the epoch."""
  found, restored, problems = checkpoints.restore(
    folder.checkpoints, len(folder.metrics()), state(0)
  )
  folder.cut(found)
  assert found == epoch
  assert (restored is None) == (epoch == 0)
  if restored is not None:
    jax.tree.map(np.testing.assert_array_equal, restored, state(epoch))
  assert [row['epoch'] for row in folder.metrics()] == [*range(1, epoch + 1)]
  return problems


def contents(folder: Path) -> dict[tuple[str, str], object]:
  """Every file of every run, but for times and the environment."""
  found = {}
  for path in folder.rglob('*'):
    if path.name == 'environment.json' or path.is_dir():
      continue
    text = path.read_text()
    if path.name == 'metrics.jsonl':
      lines = [json.loads(row) for row in text.splitlines()]
      text = [row | {'seconds': None} for row in lines]
    found[path.parent.name, path.name] = text
  return found
