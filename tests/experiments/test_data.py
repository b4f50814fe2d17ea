"""The held-out part, the mean image and the mini-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.training import data as device
from experiments.training import loop as train
from experiments.training.data import (
  calibration_batches,
  held_out_rows,
  mini_batches,
)
from tests.experiments import tiny


def test_the_held_out_tenth_is_balanced_disjoint_and_seeded():
  data, run = tiny.dataset(), tiny.run()
  placed = tiny.placed(run, data)
  assert len(placed.held_out) == 24
  counts = np.bincount(data.y_train[placed.held_out], minlength=tiny.CLASSES)
  assert counts.max() - counts.min() <= 1
  both = np.concatenate([placed.held_out, placed.trained])
  np.testing.assert_array_equal(np.sort(both), np.arange(240))
  again = tiny.placed(dataclasses.replace(run, rate=100.0), data)
  np.testing.assert_array_equal(again.held_out, placed.held_out)
  other = tiny.placed(dataclasses.replace(run, seed=1), data)
  assert set(other.held_out) != set(placed.held_out)


def test_nothing_is_held_out_at_0():
  placed = tiny.placed(tiny.run(holdout=0.0))
  assert len(placed.held_out) == 0
  np.testing.assert_array_equal(placed.trained, np.arange(240))


def test_a_small_class_is_left_to_train_on():
  labels = np.repeat(np.arange(4, dtype=np.int32), [40, 40, 5, 1])
  held_out = held_out_rows(labels, 0, round(0.4 * 86))
  counts = np.bincount(labels[held_out], minlength=4)
  np.testing.assert_array_equal(counts, [15, 15, 4, 0])


def test_the_mean_is_of_the_images_trained_on(monkeypatch):
  monkeypatch.setattr(device, '_ROWS_AT_ONCE', 100)
  data = tiny.dataset()
  placed = tiny.placed(tiny.run(), data)
  wanted = data.x_train[placed.trained].astype(np.float64).mean(0)
  np.testing.assert_allclose(placed.arrays.mean, wanted, rtol=1e-6, atol=1e-7)
  everything = data.x_train.mean(0)
  assert np.abs(np.asarray(placed.arrays.mean) - everything).max() > 0.01


def test_what_is_held_out_is_never_trained_on():
  run = tiny.run('brSF-50%+BN+BM')
  placed = tiny.placed(run)
  x, y = map(np.array, placed.arrays.train)
  x[placed.held_out] = np.nan
  y[placed.held_out] = (y[placed.held_out] + 1) % tiny.CLASSES
  images = device.Images(jnp.asarray(x), jnp.asarray(y))
  poisoned = dataclasses.replace(
    placed, arrays=placed.arrays._replace(train=images)
  )
  clean, dirty = (
    [*train.epochs(run, p, train.start(run, p))][-1] for p in (placed, poisoned)
  )
  jax.tree.map(np.testing.assert_array_equal, clean[0], dirty[0])
  assert clean[1]['test_error'] == dirty[1]['test_error']
  assert clean[1]['train_loss'] == dirty[1]['train_loss']
  # They are looked at, though.
  assert clean[1]['holdout_loss'] != dirty[1]['holdout_loss']


def test_mini_batches():
  rows = np.arange(1000, 1216, dtype=np.int32)
  run = tiny.run('BM-30', calibration_batches=20)
  order = mini_batches(run, 1, rows)
  assert order.shape == (7, 30)
  assert order.dtype == np.int32
  assert len(set(order.ravel())) == 210
  assert set(order.ravel()) <= set(rows)
  np.testing.assert_array_equal(order, mini_batches(run, 1, rows))
  orders = [
    order,
    mini_batches(run, 2, rows),
    mini_batches(dataclasses.replace(run, seed=1), 1, rows),
    calibration_batches(run, 1, rows)[:7],
  ]
  assert len({o.tobytes() for o in orders}) == 4
  # What is left over in one epoch is not always the same.
  used = [set(mini_batches(run, epoch, rows).ravel()) for epoch in range(1, 9)]
  assert set.union(*used) == set(rows)


def test_calibration_batches_go_round():
  rows = np.arange(216, dtype=np.int32)
  batches = calibration_batches(tiny.run(calibration_batches=20), 1, rows)
  assert batches.shape == (20, 100)
  for first in range(0, 20, 2):  # two mini-batches a round, without repeats
    assert len(set(batches[first : first + 2].ravel())) == 200
  grouped = tiny.run(calibration_batches=20, batch_norm_groups=4)
  assert calibration_batches(grouped, 1, rows).shape == (20, 25)


def test_a_dataset_is_uploaded_once_and_then_let_go():
  small, large = (260, 60), (300, 60)
  for size in (small, large):
    data, load = tiny.dataset(*size), tiny.loader(*size)
    of_seeds = [
      device.device_data(tiny.run('uSF', data, seed=seed), load)
      for seed in (0, 1)
    ]
    first, second = (each.arrays.train.x for each in of_seeds)
    assert first is second
    del of_seeds, first, second
  # The images of the first dataset are gone.
  assert not any(x.shape == (260, 1845) for x in jax.live_arrays())
