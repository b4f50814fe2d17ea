"""The two results of a run, computed from its epochs."""

from collections.abc import Mapping, Sequence
from typing import Any


def result(
  lines: Sequence[Mapping[str, Any]], *, classes: int, train_images: int
) -> dict[str, Any]:
  """Both results of a run from its lines of metrics.

  The best test error, which the paper reports, is the lowest of all epochs. The
  held-out test error is the test error of the epoch with the lowest error on
  the held-out part of the training set. The keys are those of `result.json`.

  Args:
    lines: one per epoch, in order; at least one.
    classes: of the dataset.
    train_images: how many images the run was trained on.
  """
  best = min(lines, key=lambda line: line['test_error'])
  summary = {
    'best_test_error': best['test_error'],
    'best_epoch': best['epoch'],
    'holdout_error': None,
    'held_out_epoch': None,
    'held_out_test_error': None,
    'epochs_run': len(lines),
    'diverged': not lines[-1]['finite'],
    'chance_error': 100 * (1 - 1 / classes),
    'train_images': train_images,
  }
  if 'holdout_error' in lines[0]:
    chosen = min(lines, key=lambda line: line['holdout_error'])
    summary |= {
      'holdout_error': chosen['holdout_error'],
      'held_out_epoch': chosen['epoch'],
      'held_out_test_error': chosen['test_error'],
    }
  return summary
