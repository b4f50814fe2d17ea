"""Calibration of NNX models, in place, which changes statistics alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from symjax_bp.normalization import NNXBatchNorm, calibrate, calibrate_nnx
from tests.batch_norms import (
  Network,
  mini_batches,
  random_array,
  statistics_of,
  variables_of,
)


class NNXNetwork(nnx.Module):
  """The NNX twin of Network."""

  def __init__(self, rngs, dropout=0.0):
    self.dense = nnx.Linear(5, 4, use_bias=False, rngs=rngs)
    self.first = NNXBatchNorm(4)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)
    self.second = NNXBatchNorm(3)

  def __call__(self, x):
    x = self.dropout(nnx.relu(self.first(self.dense(x))))
    return self.second(self.head(x))


def test_calibrate_nnx_is_calibrate():
  variables = variables_of()
  model = NNXNetwork(nnx.Rngs(0))
  model.dense.kernel[...] = variables['params']['Dense_0']['kernel']
  model.head.kernel[...] = variables['params']['Dense_1']['kernel']
  expected = calibrate(Network(), variables, mini_batches(20), train=True)
  for _ in range(2):  # The second time from other statistics.
    calibrate_nnx(model, mini_batches(20))
    chex.assert_trees_all_close(
      statistics_of(model),
      dict(expected['batch_stats']),
      rtol=1e-6,
    )


def _without_statistics(model):
  """Weights and random streams, as arrays that can be compared."""
  return jax.tree.map(
    lambda a: (
      jax.random.key_data(a)
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
      else a
    ),
    nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.BatchStat))),
  )


@pytest.mark.parametrize('mode', ['train', 'eval', 'mixed'])
def test_calibrate_nnx_leaves_the_rest_alone(mode):
  model = NNXNetwork(nnx.Rngs(0), dropout=0.5)
  if mode != 'mixed':
    getattr(model, mode)()
  else:
    model.first.eval()
  modes = [
    model.first.use_running_average,
    model.second.use_running_average,
    model.dropout.deterministic,
  ]
  before = _without_statistics(model)
  calibrate_nnx(model, mini_batches(2), num_batches=2)
  chex.assert_trees_all_equal(_without_statistics(model), before)
  assert model.second.count[...] == 2
  assert modes == [
    model.first.use_running_average,
    model.second.use_running_average,
    model.dropout.deterministic,
  ]


def test_inputs_that_are_no_arrays_steer_the_call():
  class Steered(nnx.Module):
    def __init__(self):
      self.norm = NNXBatchNorm(5)

    def __call__(self, x, squared):
      return self.norm(x**2 if squared else x)

  model, plain = Steered(), NNXBatchNorm(5)
  calibrate_nnx(model, [(x, False) for x in mini_batches(3)], 3)
  calibrate_nnx(plain, mini_batches(3), 3)
  chex.assert_trees_all_equal(model.norm.mean[...], plain.mean[...])


def test_calibrate_nnx_compiles_once():
  traces = []

  class Counted(nnx.Module):
    def __init__(self):
      self.norm = NNXBatchNorm(5)

    def __call__(self, x):
      traces.append(x.shape)
      return self.norm(x)

  model = Counted()
  for _ in range(3):
    calibrate_nnx(model, mini_batches(4), num_batches=4)
  assert traces == [(8, 5)]


def test_calibrate_nnx_fails_without_a_trace():
  model = NNXNetwork(nnx.Rngs(0))
  model(random_array((8, 5)))
  before = jax.tree.map(np.array, statistics_of(model))
  with pytest.raises(ValueError, match='batches holds 2'):
    calibrate_nnx(model, mini_batches(2))
  chex.assert_trees_all_equal(statistics_of(model), before)


def test_calibrate_nnx_errors():
  with pytest.raises(ValueError, match='no batch_stats'):
    calibrate_nnx(nnx.Linear(5, 2, rngs=nnx.Rngs(0)), mini_batches(20))
  model = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='batch_stats holds var'):
    calibrate_nnx(model, mini_batches(20))
