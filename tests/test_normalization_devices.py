"""Batch norm over an axis of devices is that of the whole batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from symjax_bp.normalization import BatchNorm, NNXBatchNorm
from tests.batch_norms import (
  DEVICES,
  linen_form,
  nnx_form,
  random_array,
  statistics_of,
)


def _weighted(layer, x, g):
  y, updated = layer.apply({}, x, mutable=['batch_stats'])
  return jnp.sum(y * g), (y, updated['batch_stats'])


def _whole_batch(x, g):
  layer = BatchNorm(use_running_average=False)
  (_, aux), dx = jax.value_and_grad(
    functools.partial(_weighted, layer), has_aux=True
  )(x, g)
  return aux, dx


SYNCHRONISED = BatchNorm(use_running_average=False, axis_name='batch')


def _synchronised(x, g):
  (_, aux), dx = jax.value_and_grad(
    functools.partial(_weighted, SYNCHRONISED), has_aux=True
  )(x, g)
  return aux, dx


@pytest.mark.parametrize('shape', [(8, 5), (8, 4, 4, 3)])
def test_pmap_is_the_whole_batch(shape):
  x, g = random_array(shape), random_array(shape, seed=1)
  split = lambda a: a.reshape(DEVICES, -1, *a.shape[1:])
  (y, statistics), dx = jax.pmap(
    _synchronised, axis_name='batch', devices=jax.devices()[:DEVICES]
  )(split(x), split(g))
  (y_whole, statistics_whole), dx_whole = _whole_batch(x, g)
  np.testing.assert_allclose(y, split(y_whole), rtol=0, atol=1e-6)
  np.testing.assert_allclose(dx, split(dx_whole), rtol=0, atol=1e-6)
  for device in range(DEVICES):
    chex.assert_trees_all_close(
      jax.tree.map(lambda a, d=device: a[d], statistics),
      statistics_whole,
      rtol=1e-6,
    )


@pytest.mark.parametrize('shape', [(8, 5), (8, 4, 4, 3)])
def test_shard_map_is_the_whole_batch(shape):
  x, g = random_array(shape), random_array(shape, seed=1)
  split, replicated = PartitionSpec('batch'), PartitionSpec()
  synchronised = jax.shard_map(
    _synchronised,
    mesh=Mesh(jax.devices()[:DEVICES], ('batch',)),
    in_specs=split,
    out_specs=((split, replicated), split),
  )
  actual = jax.jit(synchronised)(x, g)
  chex.assert_trees_all_close(actual, _whole_batch(x, g), rtol=1e-6, atol=1e-6)


def test_vmap_with_axis_name_is_the_whole_batch():
  x, g = random_array((8, 5)), random_array((8, 5), seed=1)
  (y, _), dx = jax.vmap(_synchronised, axis_name='batch')(x, g)
  (y_whole, _), dx_whole = _whole_batch(x, g)
  np.testing.assert_allclose(y, y_whole, rtol=0, atol=1e-6)
  np.testing.assert_allclose(dx, dx_whole, rtol=0, atol=1e-6)


def test_nnx_pmap_is_the_whole_batch():
  x = random_array((8, 5))
  graphdef, state = nnx.split(NNXBatchNorm(5, axis_name='batch'))

  def forward(state, x):
    layer = nnx.merge(graphdef, state)
    return layer(x), statistics_of(layer)

  y, statistics = jax.pmap(
    forward,
    axis_name='batch',
    in_axes=(None, 0),
    devices=jax.devices()[:DEVICES],
  )(state, x.reshape(DEVICES, 2, 5))
  whole, expected = nnx_form(x)
  np.testing.assert_allclose(y.reshape(8, 5), whole, rtol=0, atol=1e-6)
  chex.assert_trees_all_close(
    jax.tree.map(lambda a: a[0], statistics), expected, rtol=1e-6
  )


def test_axis_index_groups():
  x = random_array((8, 5))
  layer = BatchNorm(
    use_running_average=False,
    axis_name='batch',
    axis_index_groups=[[0, 1], [2, 3]],
  )
  y = jax.pmap(
    functools.partial(layer.apply, {}),
    axis_name='batch',
    devices=jax.devices()[:DEVICES],
  )(x.reshape(DEVICES, 2, 5))
  expected = np.concatenate([linen_form(x[:4])[0], linen_form(x[4:])[0]])
  np.testing.assert_allclose(y.reshape(8, 5), expected, rtol=0, atol=1e-6)


def test_initialization_needs_no_axis():
  SYNCHRONISED.init(jax.random.key(0), random_array((8, 5)))
