"""Weights, gradients and hyperparameters that optimizers are tried on."""

import numpy as np
import optax

SETTINGS = (0, 1, 2, 3)
BATCH_MANHATTAN = (1, 2, 3)
MOMENTUM = 0.9
DECAY = 5e-4
RATE = 1e-3


def initial_weights(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'kernel': rng.standard_normal((3, 4)).astype(np.float32),
    'bias': rng.standard_normal(4).astype(np.float32),
  }


def random_gradients(steps, seed=1):
  """Random gradients with a tenth of exact zeros, the last bias always 0."""
  rng = np.random.default_rng(seed)
  like = initial_weights()
  for _ in range(steps):
    gradients = {
      name: rng.standard_normal(w.shape).astype(np.float32)
      * (rng.random(w.shape) > 0.1).astype(np.float32)
      for name, w in like.items()
    }
    gradients['bias'][-1] = 0.0
    yield gradients


def train(optimizer, gradients, weights):
  state = optimizer.init(weights)
  for g in gradients:
    updates, state = optimizer.update(g, state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights
