"""A whole training step over 1 to 8 devices is that of one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import symjax_bp as sbp
from symjax_bp import linen, optim
from symjax_bp.normalization import BatchNorm
from tests.cases import normal

RULES = {  # of a layer each
  'Conv_0': sbp.brsf(0.5),
  'Dense_0': sbp.usf(),
  'Dense_1': sbp.nusf(),
  'Dense_2': sbp.frsf(0.5),
  'Dense_3': sbp.rndf(),
  'Dense_4': sbp.symmetric(),
}
OPTIMIZERS = (optim.batch_manhattan(0.01, 0.5, 0.01), optim.sgd(0.1, 0.5, 0.01))
BATCH, CLASSES, STEPS = 16, 3, 2
X = normal(0, (BATCH, 6, 6, 2))
Y = jnp.arange(BATCH) % CLASSES
KEY = jax.random.key(0)
WHOLE, SPLIT = PartitionSpec(), PartitionSpec('data')
SPECS = (WHOLE, WHOLE, WHOLE, SPLIT, SPLIT, WHOLE)


class Network(nn.Module):
  """Plain Flax; batch norm 'whole', each device its 'own', or 'none'."""

  norm: str
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(3, (3, 3), 2)(x).reshape(x.shape[0], -1)
    for _ in range(4):
      x = nn.Dense(8)(jnp.tanh(x))
      if self.norm != 'none':
        x = BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
    return nn.Dense(CLASSES)(jnp.tanh(x))


def network(norm, named):
  axis_name = 'data' if named and norm == 'whole' else None
  return linen.with_feedback(Network(norm, axis_name), RULES)


def loss_of(norm, named=False):
  """The mean loss of a part of the mini-batch, and V as it was used."""
  model = network(norm, named)

  def loss(params, feedback, x, y, key):
    logits, used = model.apply(
      {'params': params, 'feedback': feedback},
      x,
      rngs={'feedback': key},
      mutable=['feedback_weights'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), used['feedback_weights']

  return loss


def divided(array, parts):
  return array.reshape(parts, -1, *array.shape[1:])


def loss_without_axis(norm, devices):
  """The mean loss of the whole mini-batch, in parts for own statistics."""
  loss = loss_of(norm)
  if norm != 'own':
    return loss
  each = jax.vmap(loss, (None, None, 0, 0, None), (0, None))

  def in_parts(params, feedback, x, y, key):
    x, y = divided(x, devices), divided(y, devices)
    losses, V = each(params, feedback, x, y, key)
    return losses.mean(), V

  return in_parts


def step_of(loss, total=lambda g: g):
  """One step by each optimizer, the gradient and V."""

  def step(params, states, feedback, x, y, key):
    g, V = jax.grad(loss, has_aux=True)(params, feedback, x, y, key)
    g = total(g)
    return updates(params, states, g), g, V

  return step


@jax.jit
def updates(params, states, g):
  """Parameters and state after an update, for each optimizer."""
  done = []
  for optimizer, state in zip(OPTIMIZERS, states, strict=True):
    change, state = optimizer.update(g, state, params)
    done.append((optax.apply_updates(params, change), state))
  return done


def mesh_of(devices):
  return Mesh(jax.devices()[:devices], ('data',), axis_types=(AxisType.Auto,))


def jit_step(norm, devices):
  """The arrays are divided, the function knows nothing of it."""
  mesh = mesh_of(devices)
  return jax.jit(
    step_of(loss_without_axis(norm, devices)),
    in_shardings=tuple(NamedSharding(mesh, spec) for spec in SPECS),
    out_shardings=NamedSharding(mesh, WHOLE),
  )


def pmap_step(norm, devices):
  mean = functools.partial(jax.lax.pmean, axis_name='data')
  step = jax.pmap(
    step_of(loss_of(norm, named=True), mean),
    'data',
    in_axes=(None, None, None, 0, 0, None),
    devices=jax.devices()[:devices],
  )

  def stepped(params, states, feedback, x, y, key):
    x, y = divided(x, devices), divided(y, devices)
    return step(params, states, feedback, x, y, key)

  return stepped


def shard_map_step(norm, devices):
  loss = loss_of(norm, named=True)

  def mean_loss(*given):
    # JAX itself sums the gradient of what is whole on every device.
    value, V = loss(*given)
    return jax.lax.pmean(value, 'data'), V

  step = jax.shard_map(
    step_of(mean_loss),
    mesh=mesh_of(devices),
    in_specs=SPECS,
    out_specs=WHOLE,
  )
  return jax.jit(step)


@functools.cache
def start(norm):
  variables = jax.jit(network(norm, False).init)(KEY, X)
  return variables['params'], variables['feedback']


@functools.cache
def reference(norm, devices):
  """The gradient and V on one device."""
  loss = loss_without_axis(norm, devices)
  return jax.jit(jax.grad(loss, has_aux=True))


def same_everywhere(array, expected, devices):
  """What all devices have, the same bits."""
  parts = [np.asarray(part.data) for part in array.addressable_shards]
  assert len(parts) == devices
  for part in parts[1:]:
    np.testing.assert_array_equal(part, parts[0])
  return parts[0].reshape(expected.shape)


@pytest.mark.parametrize('norm', ['none', 'whole', 'own'])
@pytest.mark.parametrize('devices', [1, 2, 4, 8])
@pytest.mark.parametrize('form', [jit_step, pmap_step, shard_map_step])
def test_a_step_is_that_of_one_device(form, devices, norm):
  step, expected = form(norm, devices), reference(norm, devices)
  params, feedback = start(norm)
  states = [optimizer.init(params) for optimizer in OPTIMIZERS]
  for number in range(STEPS):
    key = jax.random.fold_in(KEY, number)
    g, V = expected(params, feedback, X, Y, key)
    wanted = updates(params, states, g), g, V
    actual = jax.tree.map(
      functools.partial(same_everywhere, devices=devices),
      step(params, states, feedback, X, Y, key),
      wanted,
    )
    done, gradient, used = actual
    jax.tree.map(np.testing.assert_array_equal, used, V)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
      gradient,
      g,
    )
    # The update is of the summed gradient, and of nothing else.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
      done,
      updates(params, states, gradient),
    )
    params, states = done[0][0], [state for _, state in done]


def test_own_statistics_are_not_those_of_the_whole_mini_batch():
  params, feedback = start('whole')
  one, _ = reference('whole', 1)(params, feedback, X, Y, KEY)
  same, _ = reference('own', 1)(params, feedback, X, Y, KEY)
  other, _ = reference('own', 4)(params, feedback, X, Y, KEY)
  for layer in RULES:
    a, b, c = (each[layer]['kernel'] for each in (one, same, other))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.abs(a - c).max() > 1e-3
