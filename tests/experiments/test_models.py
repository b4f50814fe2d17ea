"""The five architectures: counted by hand, pooling against a loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets import SPECS, WEIGHT_LAYERS
from experiments.paper.conditions import find
from experiments.paper.protocol import Protocol
from experiments.training.models import (
  NETWORKS,
  Conv,
  Full,
  Network,
  Pool,
  pool,
  rectified_once,
)
from experiments.training.step import Setup, program

# Weights of an output and outputs of the layers up to the last, by hand from
# Table 1.
_LAYERS = {
  # 28 -5+1-> 24 /2-> 12 -5+1-> 8 /2-> 4
  'mnist': [(5 * 5 * 1, 20), (5 * 5 * 20, 50), (4 * 4 * 50, 500)],
  # 32 (same) 32 /2-> 16 /2-> 8 /2-> 4; padding on one side keeps the halves
  'cifar': [
    (5 * 5 * 3, 32), (5 * 5 * 32, 64), (5 * 5 * 64, 64), (4 * 4 * 64, 128),
  ],
  # 32 -5+1-> 28 /2-> 14 -7+1-> 8 /2-> 4
  'svhn': [(5 * 5 * 3, 20), (7 * 7 * 20, 512), (4 * 4 * 512, 40)],
  'timit': [(1845, 512), (512, 256)],
  # 119 (-9)//2+1-> 56 /2-> 28 -5+1-> 24 /2-> 12
  'general': [(9 * 9 * 3, 48), (5 * 5 * 48, 128)],
}  # fmt: skip
# max(256, 3 K) and 2 K of the first fully connected layers
_GENERAL = {
  10: (256, 20), 17: (256, 34), 67: (256, 134), 80: (256, 160), 102: (306, 204),
}  # fmt: skip


def _by_hand(spec):
  layers = list(_LAYERS[spec.architecture])
  if spec.architecture == 'general':
    wide, narrow = _GENERAL[spec.classes]
    layers += [(12 * 12 * 128, wide), (wide, narrow)]
  return [*layers, (layers[-1][1], spec.classes)]


# One for each architecture and number of classes.
_NETWORKS = {(s.architecture, s.classes): name for name, s in SPECS.items()}


@pytest.mark.parametrize(
  ('name', 'batch_norm'),
  [
    *((name, 'none') for name in _NETWORKS.values()),
    ('CIFAR', 'plain'),
    ('CIFAR', 'affine'),
  ],
)
def test_shapes_and_parameter_counts(name, batch_norm):
  spec = SPECS[name]
  architecture = NETWORKS[spec.architecture]
  model = Network(architecture, spec.classes, batch_norm=batch_norm)
  x = jax.ShapeDtypeStruct((3, *spec.shape), jnp.float32)
  logits, variables = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x, True), x
  )
  assert logits.shape == (3, spec.classes)
  wanted = _by_hand(spec)
  layers = sorted(variables['params'].items())
  kernels = [
    leaves['kernel'].shape for _, leaves in layers if 'kernel' in leaves
  ]
  assert [(math.prod(W[:-1]), W[-1]) for W in kernels] == wanted
  # In front of batch normalization there is no bias; affine ones have two.
  others = sum(
    math.prod(leaf.shape)
    for _, leaves in layers
    for key, leaf in leaves.items()
    if key != 'kernel'
  )
  hidden = sum(features for _, features in wanted[:-1])
  each = {'none': 1, 'plain': 0, 'affine': 2}[batch_norm]
  assert others == each * hidden + spec.classes
  assert len(wanted) == WEIGHT_LAYERS[spec.architecture]


def test_initial_weights_by_layer():
  stds = {'Conv_0': 1e-4, 'Dense_0': 0.02, 'Dense_1': 0.3, 'output': 0.3}
  width = Full(lambda classes: classes)
  layers = (Conv(3, 100), Pool('max', 2, 2), width, width, width)
  model = Network(layers, 100, initial_stds=(1e-4, 0.02, 0.3))
  x = jnp.zeros((1, 4, 4, 3))
  params = jax.jit(model.init, static_argnums=2)(jax.random.key(0), x, True)
  found = {
    name: float(leaves['kernel'].std())
    for name, leaves in params['params'].items()
  }
  assert found == pytest.approx(stds, rel=0.05)
  for leaves in params['params'].values():
    assert not np.any(leaves['bias'])


def _pool_loop(x: np.ndarray, layer: Pool, g: np.ndarray | None = None):
  """Pooling as MatConvNet documents it: output, and gradient of x for g."""
  count, height, width, channels = x.shape
  rows = (height + layer.padding - layer.size) // layer.stride + 1
  columns = (width + layer.padding - layer.size) // layer.stride + 1
  y = np.zeros((count, rows, columns, channels), x.dtype)
  dx = np.zeros_like(x)
  for n, i, j, c in np.ndindex(*y.shape):
    top, left = i * layer.stride, j * layer.stride
    window = [
      (a, b)
      for a in range(top, min(top + layer.size, height))
      for b in range(left, min(left + layer.size, width))
    ]
    values = [x[n, a, b, c] for a, b in window]
    if layer.kind == 'max':
      y[n, i, j, c] = max(values)
      share = {window[values.index(max(values))]: 1.0}  # the first one
    else:
      y[n, i, j, c] = sum(values) / len(values)
      share = dict.fromkeys(window, 1 / len(values))
    if g is not None:
      for (a, b), weight in share.items():
        dx[n, a, b, c] += weight * g[n, i, j, c]
  return y, dx


@pytest.mark.parametrize(
  'layer',
  sorted(
    {
      layer
      for layers in NETWORKS.values()
      for layer in layers
      if isinstance(layer, Pool)
    },
    key=repr,
  ),
  ids=repr,
)
def test_pooling_and_its_gradient(layer):
  random = np.random.default_rng(0)
  # Few different values, all negative: many ties, and padding would show.
  x = random.integers(-5, -1, (2, 8, 9, 3)).astype(np.float32)
  y, _ = _pool_loop(x, layer)
  g = random.normal(size=y.shape).astype(np.float32)
  y, dx = _pool_loop(x, layer, g)
  found, transpose = jax.vjp(lambda x: pool(x, layer), jnp.asarray(x))
  np.testing.assert_allclose(found, y, rtol=1e-6)
  np.testing.assert_allclose(transpose(g)[0], dx, rtol=1e-5, atol=1e-6)


def test_the_pools_of_table_1():
  assert {
    name: [
      (p.kind, p.size, p.stride, p.padding)
      for p in layers
      if isinstance(p, Pool)
    ]
    for name, layers in NETWORKS.items()
  } == {
    'general': [('max', 2, 2, 0)] * 2,
    'mnist': [('max', 2, 2, 0)] * 2,
    'cifar': [('max', 3, 2, 1), *[('average', 3, 2, 1)] * 2],
    'svhn': [('max', 2, 2, 0)] * 2,
    'timit': [],
  }


def test_rectified_once_is_relu_where_a_run_diverges_too():
  x = jnp.array([-jnp.inf, -1.0, -0.0, 0.0, 2.0, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(rectified_once(x), jax.nn.relu(x))
  gradient = jax.grad(lambda x: rectified_once(x).sum())
  expected = jax.grad(lambda x: jax.nn.relu(x).sum())
  np.testing.assert_array_equal(gradient(x[:-1]), expected(x[:-1]))


_MODULE = """
import flax.linen as nn


class Module(nn.Module):

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense({width}, name='{name}')(x)
    return nn.BatchNorm(not train)(x) if {norm} else x


NETWORKS = {{'own': lambda classes, batch_norm: Module()}}
"""


@pytest.mark.parametrize(
  ('condition', 'changes', 'message'),
  [
    ('SGD', {'width': 2}, r'shape \(1, 2\) for one image, .* return \(1, 3\)'),
    ('SGD Top', {'name': 'last'}, "last layer 'output', but has last"),
    ('SGD', {'norm': True}, "has batch .*, but .* batch_norm is 'none'"),
    ('BN', {}, "has no batch norm.*, but .* batch_norm is 'affine'"),
  ],
)
def test_a_module_that_is_not_what_its_condition_says(
  condition, changes, message
):
  parts = {'width': 3, 'name': 'output', 'norm': False} | changes
  setup = Setup(
    condition=find(condition).conditions[0],
    protocol=Protocol(),
    network='own',
    plugin=_MODULE.format(**parts),
    shape=(4,),
    classes=3,
  )
  with pytest.raises(ValueError, match=f"network 'own' of .* {message}"):
    program(setup).statistics({}, {}, [])
