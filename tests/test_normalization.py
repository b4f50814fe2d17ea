"""Batch norm is its closed form, and its averages are of deviations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from symjax_bp.normalization import BatchNorm, NNXBatchNorm
from tests.batch_norms import (
  FORMS,
  linen_form,
  numpy_average,
  numpy_statistics,
  random_array,
  statistics_of,
)

SHAPES = [
  ((8, 5), -1),
  ((6, 5), 0),
  ((4, 6, 6, 3), -1),
  ((4, 3, 6, 6), 1),
  ((2, 3, 4, 5, 2), -1),
]


@FORMS
@pytest.mark.parametrize(('shape', 'axis'), SHAPES)
def test_training_is_the_closed_form(form, shape, axis):
  x = random_array(shape)
  mean, std = numpy_statistics(x, axis)
  y, statistics = form(x, axis=axis)
  np.testing.assert_allclose(y, (x - mean) / std, rtol=0, atol=1e-5)
  assert statistics['count'] == 1
  # The first mini-batch counts in full.
  np.testing.assert_allclose(statistics['mean'], mean.ravel(), rtol=1e-5)
  np.testing.assert_allclose(statistics['std'], std.ravel(), rtol=1e-5)


@pytest.mark.parametrize(('shape', 'axis'), SHAPES)
def test_gradient_is_the_closed_form(shape, axis):
  x, g = random_array(shape), random_array(shape, seed=1)
  mean, std = numpy_statistics(x, axis)
  y = (x - mean) / std
  axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
  projection = y * (g * y).mean(axes, keepdims=True)
  expected = (g - g.mean(axes, keepdims=True) - projection) / std
  layer = BatchNorm(use_running_average=False, axis=axis)
  _, vjp = jax.vjp(functools.partial(layer.apply, {}), x)
  np.testing.assert_allclose(vjp(g)[0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('alpha', [0.05, 0.5, 1.0, 1e-6])
def test_averages_are_bias_corrected_and_of_deviations(alpha):
  batches = [
    random_array((10, 3), seed, scale=1.0 + seed, offset=seed)
    for seed in range(25)
  ]
  linen, variables = BatchNorm(use_running_average=False, alpha=alpha), {}
  layer = NNXBatchNorm(3, alpha=alpha)
  for x in batches:
    _, variables = linen.apply(variables, x, mutable=['batch_stats'])
    layer(x)
  statistics = variables['batch_stats']
  means, stds = zip(*map(numpy_statistics, batches), strict=True)
  mean, std = numpy_average(means, alpha), numpy_average(stds, alpha)
  np.testing.assert_allclose(statistics['mean'], mean[0], rtol=2e-5)
  np.testing.assert_allclose(statistics['std'], std[0], rtol=2e-5)
  assert statistics['count'] == 25
  if alpha < 1.0:  # The average of variances is another number.
    variance = numpy_average([np.square(s) for s in stds], alpha)
    assert (np.sqrt(variance[0]) > 1.001 * np.asarray(statistics['std'])).all()
  chex.assert_trees_all_equal(statistics_of(layer), dict(statistics))
  # Evaluation adds no second epsilon.
  x = random_array((4, 3))
  evaluated = BatchNorm(use_running_average=True).apply(variables, x)
  np.testing.assert_allclose(evaluated, (x - mean) / std, rtol=1e-4, atol=1e-5)
  layer.eval()
  chex.assert_trees_all_equal(layer(x), evaluated)
  assert layer.count[...] == 25


@pytest.mark.parametrize('use_scale', [False, True])
@pytest.mark.parametrize('use_bias', [False, True])
def test_parameters_only_when_asked(use_scale, use_bias):
  x = random_array((8, 5))
  scale = {'scale': random_array(5, seed=1)} if use_scale else {}
  params = scale | ({'bias': random_array(5, seed=2)} if use_bias else {})
  linen = BatchNorm(
    use_running_average=False, use_scale=use_scale, use_bias=use_bias
  )
  layer = NNXBatchNorm(
    5, use_scale=use_scale, use_bias=use_bias, rngs=nnx.Rngs(0)
  )
  initial = linen.init(jax.random.key(0), x).get('params', {})
  expected = {'scale': np.ones(5), 'bias': np.zeros(5)}
  chex.assert_trees_all_equal(
    dict(initial), {k: np.float32(expected[k]) for k in params}
  )
  assert nnx.to_pure_dict(nnx.state(layer, nnx.Param)).keys() == params.keys()
  for name, value in params.items():
    getattr(layer, name)[...] = jnp.asarray(value)
  mean, std = numpy_statistics(x)
  y = (x - mean) / std * params.get('scale', 1.0) + params.get('bias', 0.0)
  actual = linen.apply({'params': params}, x)
  np.testing.assert_allclose(actual, y, rtol=0, atol=2e-5)
  chex.assert_trees_all_equal(layer(x), actual)


def test_nothing_moves_during_initialization():
  variables = BatchNorm().init(
    jax.random.key(0), random_array((8, 5)), use_running_average=False
  )
  chex.assert_trees_all_equal(
    variables,
    {
      'batch_stats': {
        'mean': np.zeros(5, np.float32),
        'std': np.ones(5, np.float32),
        'count': np.int32(0),
      }
    },
  )


def test_evaluation_before_any_mini_batch_returns_the_input():
  x = random_array((8, 5))
  layer = BatchNorm(use_running_average=True)
  variables = layer.init(jax.random.key(0), x)
  np.testing.assert_array_equal(layer.apply(variables, x), x)
  np.testing.assert_array_equal(NNXBatchNorm(5)(x, True), x)


def test_training_is_pure_unless_statistics_are_mutable():
  x = random_array((8, 5))
  layer = BatchNorm(use_running_average=False)
  variables = layer.init(jax.random.key(0), x)
  pure = layer.apply(variables, x)
  chex.assert_trees_all_equal(pure, layer.apply({}, x))
  y, updated = layer.apply(variables, x, mutable=['batch_stats'])
  chex.assert_trees_all_equal(pure, y)
  assert updated['batch_stats']['count'] == 1
  assert variables['batch_stats']['count'] == 0


def test_nnx_modes():
  x = random_array((8, 5))
  layer = NNXBatchNorm(5)
  trained = layer(x)
  layer.eval()
  evaluated = layer(x + 1.0)
  assert layer.count[...] == 1
  chex.assert_trees_all_equal(layer(x + 1.0), evaluated)
  # The call's argument, nnx.view and train() each choose training again.
  chex.assert_trees_all_equal(layer(x, use_running_average=False), trained)
  chex.assert_trees_all_equal(
    nnx.view(layer, use_running_average=False)(x), trained
  )
  layer.train()
  chex.assert_trees_all_equal(layer(x), trained)
  assert layer.count[...] == 4


def test_nnx_gradient_and_jit():
  x, g = random_array((8, 5)), random_array((8, 5), seed=1)

  @nnx.jit
  def step(layer, x):
    loss = lambda layer: jnp.sum(layer(x) * g)
    return nnx.grad(loss)(layer)

  layer = NNXBatchNorm(5, use_scale=True, use_bias=True, rngs=nnx.Rngs(0))
  grads = nnx.to_pure_dict(step(layer, x))
  mean, std = numpy_statistics(x)
  np.testing.assert_allclose(grads['bias'], g.sum(0), rtol=1e-5)
  np.testing.assert_allclose(
    grads['scale'], (g * (x - mean) / std).sum(0), rtol=1e-4
  )
  assert layer.count[...] == 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'alpha': 0.0}, r'alpha is 0\.0, but must be in \(0, 1\]'),
    ({'alpha': 1.5}, r'alpha is 1\.5'),
    ({'alpha': float('nan')}, 'alpha is nan'),
    ({'epsilon': 0.0}, r'epsilon is 0\.0, but must be above 0'),
    ({'epsilon': -1e-4}, r'epsilon is -0\.0001'),
  ],
)
def test_option_errors(options, message):
  with pytest.raises(ValueError, match=message):
    BatchNorm(**options)
  with pytest.raises(ValueError, match=message):
    NNXBatchNorm(5, **options)


@FORMS
def test_input_errors(form):
  empty = np.zeros((0, 5), np.float32)
  with pytest.raises(ValueError, match=r'x has shape \(0, 5\)'):
    form(empty)
  assert NNXBatchNorm(5)(empty, use_running_average=True).shape == (0, 5)
  with pytest.raises(ValueError, match='x is complex'):
    form(np.zeros((2, 5), np.complex64))


@pytest.mark.parametrize('axis', [2, -3])
def test_axis_errors(axis):
  x = random_array((8, 5))
  message = rf'axis is {axis}, but x has shape \(8, 5\): .* \[-2, 2\)'
  with pytest.raises(ValueError, match=message):
    linen_form(x, axis=axis)
  with pytest.raises(ValueError, match=message):
    NNXBatchNorm(5, axis=axis)(x)


@pytest.mark.parametrize('use_running_average', [False, True])
def test_number_of_features_errors(use_running_average):
  layer = BatchNorm()
  _, statistics = linen_form(random_array((8, 5)))
  message = 'x has 4 features .* statistics are of 5'
  with pytest.raises(ValueError, match=message):
    layer.apply(
      {'batch_stats': statistics},
      random_array((8, 4)),
      use_running_average=use_running_average,
      mutable=['batch_stats'],
    )
  with pytest.raises(ValueError, match=message):
    NNXBatchNorm(5)(random_array((8, 4)), use_running_average)


def test_mode_and_rngs_errors():
  x = random_array((8, 5))
  with pytest.raises(ValueError, match='use_running_average is None'):
    NNXBatchNorm(5, use_running_average=None)(x)
  with pytest.raises(ValueError, match='use_scale.*rngs=nnx.Rngs'):
    NNXBatchNorm(5, use_scale=True)
