"""Training: the update, what it depends on, and what is recorded."""

import copy

import jax
import numpy as np
import pytest

from experiments.paper.results import result
from experiments.training import data as device
from experiments.training import loop as train
from experiments.training.step import Setup, program
from symjax_bp.metrics import Alignment
from tests.experiments import tiny


# Rounding decides the sign, which Batch Manhattan takes, of a gradient that is
# nearly 0. At a rate of 1e-5 no other weight has another gradient for it.
@pytest.mark.parametrize(
  ('condition', 'rate', 'share'),
  [('uSF', 1.0, 1.0), ('brSF-50%+BN+BM', 1e-5, 0.999)],
)
def test_the_compiled_loop_gives_the_same_numbers(condition, rate, share):
  run = tiny.run(condition, rate=rate)
  (*_, looped), lines = tiny.train(run, scan=False)
  (*_, scanned), scanned_lines = tiny.train(run, scan=True)
  for a, b in zip(*map(jax.tree.leaves, (looped, scanned)), strict=True):
    # An array is rounded to 6e-8 of its largest number; four updates have
    # made 5e-6 of that.
    close = np.isclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    assert close.mean() >= share
  for a, b in zip(lines, scanned_lines, strict=True):
    assert a['train_error'] == b['train_error']
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-4)


def _numpy_logits(x, variables):
  """The network for TIMIT with batch normalization, in float64."""
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), variables)
  for layer in (0, 1):
    x = x @ params['params'][f'Dense_{layer}']['kernel']
    stats = params['batch_stats'][f'BatchNorm_{layer}']
    x = np.maximum((x - stats['mean']) / stats['std'], 0)
  output = params['params']['output']
  return x @ output['kernel'] + output['bias']


def test_evaluation_uses_averaged_statistics_of_training_batches(monkeypatch):
  run = tiny.run('uSF+BN', epochs=1, base_rate=0.05)
  data = tiny.dataset()
  placed = tiny.placed(run, data)
  (state,), (line,) = tiny.train(run, placed)
  functions = program(Setup.of(run, placed))
  batches = device.calibration_batches(run, 1, placed.trained)
  variables = functions.statistics(state['params'], placed.arrays, batches)
  mean = data.x_train[placed.trained].mean(0, dtype=np.float64)
  W = np.asarray(state['params']['Dense_0']['kernel'], np.float64)
  first, second = ((data.x_train[rows] - mean) @ W for rows in batches)

  def averaged(of):
    """A moving average (alpha 0.05) that starts from nothing, normalized."""
    return (0.95 * of(first) + of(second)) / 1.95

  stats = variables['batch_stats']['BatchNorm_0']
  wanted = averaged(lambda y: y.mean(0))
  np.testing.assert_allclose(stats['mean'], wanted, atol=1e-4)
  wanted = averaged(lambda y: np.sqrt(y.var(0) + 1e-4))
  np.testing.assert_allclose(stats['std'], wanted, rtol=1e-4)
  # Which the line of the epoch was computed with.
  for name, x, y in (
    ('test', data.x_test, data.y_test),
    ('holdout', data.x_train[placed.held_out], data.y_train[placed.held_out]),
  ):
    logits = _numpy_logits(x - mean, variables)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    assert line[f'{name}_loss'] == pytest.approx(losses.mean(), rel=1e-3)
    errors = 100 * np.mean(logits.argmax(1) != y)
    assert line[f'{name}_error'] == pytest.approx(errors, abs=1e-9)
  # However the images are divided: the last batch is padded.
  monkeypatch.setattr(train, 'EVALUATION_BATCH', 7)
  _, (divided,) = tiny.train(run, placed)
  assert divided['test_error'] == line['test_error']
  assert divided['test_loss'] == pytest.approx(line['test_loss'], rel=1e-5)


def test_training_scores_are_of_the_images_as_they_were_met():
  run = tiny.run(epochs=1, base_rate=1e-30)
  data = tiny.dataset()
  placed = tiny.placed(run, data)
  (state,), (line,) = tiny.train(run, placed)
  met = device.mini_batches(run, 1, placed.trained).ravel()
  x = data.x_train[met] - data.x_train[placed.trained].mean(0)
  params = state['params']
  for layer in ('Dense_0', 'Dense_1'):
    x = np.maximum(x @ params[layer]['kernel'] + params[layer]['bias'], 0)
  logits = x @ params['output']['kernel'] + params['output']['bias']
  wrong = 100 * np.mean(logits.argmax(1) != data.y_train[met])
  assert line['train_error'] == pytest.approx(wrong, abs=1e-4)
  assert len(met) == 200


def test_layer_metrics_do_not_change_training():
  kept = 'frSF-50%+BN'
  (*_, measured), (line, _) = tiny.train(tiny.run(kept, layer_metrics=True))
  (*_, state), _ = tiny.train(tiny.run(kept))
  assert tiny.equal(measured, state)
  assert set(line['layers']) == {'Dense_0', 'Dense_1', 'output'}
  for row in line['layers'].values():
    assert set(row) == set(Alignment._fields)
    assert row['concordance'] == pytest.approx(0.5, abs=0.05)
    assert row['angle'] == pytest.approx(90, abs=5)
    assert row['norm_ratio'] > 1
    assert row['effective_rank'] >= 1
  assert line['layers']['Dense_0']['update_angle'] > 0
  assert line['layers']['Dense_0']['error_angle'] > 0
  assert line['layers']['output']['error_angle'] == 0.0
  _, (line, _) = tiny.train(tiny.run('SGD', layer_metrics=True))
  for row in line['layers'].values():
    assert row['concordance'] == row['norm_ratio'] == 1.0
    assert row['angle'] == row['update_angle'] == row['error_angle'] == 0.0


@pytest.mark.parametrize('scan', [False, True])
def test_stopping(scan):
  run = tiny.run()
  placed = tiny.placed(run)

  def epochs(answers):
    return train.epochs(
      run,
      placed,
      train.start(run, placed),
      scan=scan,
      stopping=lambda: next(answers, True),
    )

  steps, evaluations = (1 if scan else 2), 2
  goes_on = steps + evaluations
  for asked in range(goes_on):
    with pytest.raises(train.Stopped):
      next(epochs(iter([False] * asked)))
  trained = epochs(iter([False] * goes_on))
  next(trained)
  with pytest.raises(train.Stopped):
    next(trained)


def test_both_results():
  lines = [
    {'epoch': i, 'test_error': test, 'holdout_error': held, 'finite': True}
    for i, test, held in (
      (1, 9.0, 8.0), (2, 5.0, 7.0), (3, 6.0, 4.0), (4, 5.0, 4.0),
    )
  ]  # fmt: skip
  counts = {'classes': 4, 'train_images': 36}
  assert result(lines, **counts) == {
    'best_test_error': 5.0,
    'best_epoch': 2,
    'holdout_error': 4.0,
    'held_out_epoch': 3,
    'held_out_test_error': 6.0,
    'epochs_run': 4,
    'diverged': False,
    'chance_error': 75.0,
    'train_images': 36,
  }
  diverged = copy.deepcopy(lines[:3])
  diverged[2] |= {'finite': False, 'test_error': 90.0, 'holdout_error': 90.0}
  found = result(diverged, **counts)
  assert found['diverged'] is True
  assert (found['best_test_error'], found['held_out_test_error']) == (5.0, 5.0)
  for line in lines:
    del line['holdout_error']
  found = result(lines, **counts)
  assert found['best_test_error'] == 5.0
  assert found['held_out_test_error'] is found['held_out_epoch'] is None
