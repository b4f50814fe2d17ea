"""Calibration is the paper's protocol and touches nothing else."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from symjax_bp.normalization import BatchNorm, calibrate
from tests.batch_norms import (
  DEVICES,
  Network,
  mini_batches,
  numpy_average,
  numpy_statistics,
  random_array,
  variables_of,
)


def test_calibrate_is_the_papers_protocol():
  batches, variables = mini_batches(20), variables_of()
  calibrated = calibrate(Network(), variables, batches, train=True)
  kernel = np.asarray(variables['params']['Dense_0']['kernel'], np.float64)
  means, stds = zip(
    *(numpy_statistics(x @ kernel) for x in batches), strict=True
  )
  statistics = calibrated['batch_stats']['first']
  assert statistics['count'] == 20
  for name, values in (('mean', means), ('std', stds)):
    np.testing.assert_allclose(
      statistics[name], numpy_average(values, 0.05)[0], rtol=1e-4, atol=1e-5
    )


def test_calibrate_changes_nothing_else():
  variables = variables_of()
  before = jax.tree.map(np.array, variables)
  calibrated = calibrate(
    Network(), variables, mini_batches(3), num_batches=3, train=True
  )
  assert calibrated.keys() == variables.keys()
  assert calibrated['params'] is variables['params']
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal_shapes_and_dtypes(calibrated, variables)


def test_calibrate_depends_on_weights_and_batches_only():
  run = functools.partial(calibrate, Network(), num_batches=3, train=True)
  variables = variables_of()
  expected = run(variables, mini_batches(3))
  history = dict(variables)
  history['batch_stats'] = jax.tree.map(
    lambda a: jnp.full_like(a, 9 if a.dtype == jnp.int32 else jnp.nan),
    variables['batch_stats'],
  )
  chex.assert_trees_all_equal(run(history, mini_batches(3)), expected)
  for other in (
    run(variables, mini_batches(3, seed=7)),
    run(variables_of(seed=1), mini_batches(3)),
  ):
    a, b = (jax.tree.leaves(v['batch_stats']) for v in (other, expected))
    assert not np.allclose(np.hstack(a), np.hstack(b), rtol=1e-3)


def test_calibrate_takes_no_more_than_it_needs():
  endless = (random_array((8, 5), seed) for seed in itertools.count())
  calibrated = calibrate(Network(), variables_of(), endless, 2, train=True)
  assert calibrated['batch_stats']['second']['count'] == 2
  np.testing.assert_array_equal(next(endless), random_array((8, 5), 2))


@pytest.mark.parametrize('container', [tuple, list])
def test_calibrate_passes_several_inputs(container):
  batches = [container((x, jnp.ones((8, 4)))) for x in mini_batches(2)]
  variables = variables_of()
  several = calibrate(Network(), variables, batches, 2, train=True)
  keyword = calibrate(
    Network(), variables, mini_batches(2), 2, train=True, shift=jnp.ones((8, 4))
  )
  chex.assert_trees_all_equal(several, keyword)
  plain = calibrate(Network(), variables, mini_batches(2), 2, train=True)
  first, second = (
    several['batch_stats'][k]['mean'] - plain['batch_stats'][k]['mean']
    for k in ('first', 'second')
  )
  assert not first.any() and second.all()


def test_inputs_that_are_no_arrays_steer_the_call():
  class Positional(nn.Module):
    @nn.compact
    def __call__(self, x, train, shift=0.0):
      return BatchNorm(use_running_average=not train)(x) + shift

  variables = Positional().init(jax.random.key(0), mini_batches(1)[0], True)
  batches = [(x, True, jnp.ones(())) for x in mini_batches(3)]
  found = calibrate(Positional(), variables, batches, 3)['batch_stats']
  wanted = calibrate(
    BatchNorm(use_running_average=False),
    {'batch_stats': variables['batch_stats']['BatchNorm_0']},
    mini_batches(3),
    3,
  )['batch_stats']
  chex.assert_trees_all_equal(found['BatchNorm_0'], wanted)


def test_a_model_that_can_not_be_compiled_is_told():
  class Masked(nn.Module):
    mask: jax.Array

    @nn.compact
    def __call__(self, x):
      return BatchNorm(use_running_average=False)(x * self.mask)

  model = Masked(jnp.ones((1, 5)))
  variables = model.init(jax.random.key(0), mini_batches(1)[0])
  with pytest.raises(ValueError, match='model is a Masked .* not hashable'):
    calibrate(model, variables, mini_batches(20))


def test_calibrate_compiles_once():
  traces = []

  class Counted(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      traces.append(x.shape)
      return BatchNorm(use_running_average=not train)(x)

  variables = variables_of(Counted())
  traces.clear()
  for _ in range(3):
    variables = calibrate(Counted(), variables, mini_batches(4), 4, train=True)
  assert traces == [(8, 5)]


def test_calibrate_draws_other_dropout_for_every_batch():
  model = Network(dropout=0.5)
  x = random_array((8, 5))
  run = functools.partial(calibrate, model, variables_of(), train=True)
  key = {'dropout': jax.random.key(3)}
  once = run([x], 1, rngs=key)['batch_stats']
  twice = run([x, x], 2, rngs=key)['batch_stats']
  again = run([x, x], 2, rngs=key)['batch_stats']
  chex.assert_trees_all_equal(twice, again)
  # The same inputs before dropout, others behind it.
  chex.assert_trees_all_close(
    once['first']['std'], twice['first']['std'], rtol=1e-6
  )
  assert not np.allclose(once['second']['std'], twice['second']['std'], 1e-3)


def test_calibrate_under_vmap_over_weights():
  run = functools.partial(
    calibrate, Network(), batches=mini_batches(3), num_batches=3, train=True
  )
  several = [variables_of(seed=seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
  together = jax.vmap(lambda v: run(v)['batch_stats'])(stacked)
  for k, variables in enumerate(several):
    chex.assert_trees_all_close(
      jax.tree.map(lambda a, k=k: a[k], together),
      run(variables)['batch_stats'],
      rtol=1e-5,
      atol=1e-6,
    )


def test_calibrate_inside_pmap_is_the_whole_batch():
  variables, batches = variables_of(), np.stack(mini_batches(3))
  model = Network(axis_name='batch')
  statistics = jax.pmap(
    lambda xs: calibrate(model, variables, xs, 3, train=True)['batch_stats'],
    axis_name='batch',
    in_axes=1,
    devices=jax.devices()[:DEVICES],
  )(batches.reshape(3, DEVICES, 2, 5))
  expected = calibrate(Network(), variables, batches, 3, train=True)
  chex.assert_trees_all_close(
    jax.tree.map(lambda a: a[0], statistics),
    expected['batch_stats'],
    rtol=1e-5,
    atol=1e-6,
  )


def test_network_in_jit_and_vmap():
  model, variables, x = Network(), variables_of(), random_array((6, 8, 5))

  @jax.jit
  def forward(variables, x):
    return model.apply(variables, x, train=True, mutable=['batch_stats'])

  y, updated = jax.vmap(forward, in_axes=(None, 0))(variables, x)
  for k in range(6):
    expected, statistics = forward(variables, x[k])
    np.testing.assert_allclose(y[k], expected, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(
      jax.tree.map(lambda a, k=k: a[k], updated), statistics, rtol=1e-5
    )


class Foreign(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    x = BatchNorm(use_running_average=not train)(x)
    return nn.BatchNorm(use_running_average=not train, name='theirs')(x)


class Bare(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    del train
    return nn.Dense(2)(x)


@pytest.mark.parametrize(
  ('model', 'batches', 'arguments', 'message'),
  [
    (Network(), [], {}, 'batches holds 0 mini-batches, but num_batches is 20'),
    (Network(), 3, {}, 'batches holds 3 .* smaller num_batches'),
    (Network(), 3, {'num_batches': 0}, 'num_batches is 0'),
    (
      Network(),
      3,
      {'num_batches': 3, 'train': False},
      'first/count is 0: .* train=True',
    ),
    (Foreign(), 20, {}, 'batch_stats holds theirs/mean|theirs/var'),
    (Bare(), 20, {}, 'no batch_stats'),
  ],
)
def test_calibrate_errors(model, batches, arguments, message):
  variables = variables_of(model)
  batches = mini_batches(batches) if isinstance(batches, int) else batches
  with pytest.raises(ValueError, match=message):
    calibrate(model, variables, batches, **{'train': True, **arguments})
