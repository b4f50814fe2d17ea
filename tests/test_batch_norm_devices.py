"""Batch norm over an axis of devices is that of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from symjax_bp.linen import BatchNorm
from tests.batch_norms import (
  ROUNDING,
  linen_form,
  nnx_form,
  random_array,
  with_gradient,
)

DEVICES, SHAPE = 4, (8, 3, 3, 5)
DEVICE = {'axis_name': 'batch', 'devices': jax.devices()[:DEVICES]}


def _shard_map(function, x, g):
  split, whole = PartitionSpec('batch'), PartitionSpec()
  mesh = Mesh(DEVICE['devices'], ('batch',))
  specs = {'in_specs': split, 'out_specs': (split, split, whole)}
  return jax.jit(
    jax.shard_map(lambda x, g: function(x[0], g[0]), mesh=mesh, **specs)
  )(x, g)


TRANSFORMATIONS = {
  'vmap': lambda function, *xs: jax.vmap(function, axis_name='batch')(*xs),
  'pmap': lambda function, *xs: jax.pmap(function, **DEVICE)(*xs),
  'shard_map': _shard_map,
}


@pytest.mark.parametrize(
  ('name', 'form'),
  [
    *((name, linen_form) for name in TRANSFORMATIONS),
    ('pmap', nnx_form),
  ],
)
def test_devices_are_the_whole_batch(name, form):
  with jax.enable_x64(True):
    x, g = (jnp.asarray(random_array(SHAPE, k), jnp.float64) for k in (0, 1))
    y, dx, statistics = TRANSFORMATIONS[name](
      functools.partial(with_gradient, form, axis_name='batch'),
      *(a.reshape(DEVICES, -1, *SHAPE[1:]) for a in (x, g)),
    )
    expected, gradient, whole = with_gradient(form, x, g)
  # 72 additions of numbers up to 100, each rounded by 1e-16.
  np.testing.assert_allclose(y.reshape(SHAPE), expected, rtol=0, atol=1e-11)
  np.testing.assert_allclose(dx.reshape(SHAPE), gradient, rtol=0, atol=1e-11)
  for name, value in whole.items():
    for device in statistics[name].reshape(-1, *value.shape):
      np.testing.assert_allclose(device, value, rtol=ROUNDING)


def test_axis_index_groups():
  x = random_array((DEVICES, 2, 5))
  layer = BatchNorm(False, axis_name='batch')
  layer.init(jax.random.key(0), x)  # Initialization needs no axis.
  layer = layer.clone(axis_index_groups=[[0, 1], [2, 3]])
  y = jax.pmap(functools.partial(layer.apply, {}), **DEVICE)(x)
  expected = [linen_form(half.reshape(4, 5))[0] for half in np.split(x, 2)]
  # 4 additions of deviations up to 5, and the rounding of x up to 0.5.
  atol = (4 * 5 + 0.5 / 0.05) * ROUNDING
  np.testing.assert_allclose(y.reshape(2, 4, 5), expected, rtol=0, atol=atol)
