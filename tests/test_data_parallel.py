"""A whole training step over 1 to 8 devices is that of one device.

In float64, which rounds far below what any mistake changes.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import symjax_bp as sbp
from symjax_bp.linen import BatchNorm
from tests.cases import assert_close, assert_same_bits, normal

RULES = {  # of a layer each
  'Conv_0': sbp.usf(),
  'Dense_0': sbp.brsf(0.5),
  'Dense_1': sbp.nusf(),
  'Dense_2': sbp.frsf(0.5),
  'Dense_3': sbp.rndf(),
  'Dense_4': sbp.kolen_pollack(),
}
OPTIMIZER = sbp.optim.batch_manhattan(0.01, 0.5, 0.01)
BATCH, CLASSES, STEPS = 16, 3, 2
pytestmark = [pytest.mark.usefixtures('float64'), pytest.mark.optimized]
WHOLE, SPLIT = PartitionSpec(), PartitionSpec('data')
SPECS = (WHOLE, WHOLE, WHOLE, SPLIT, SPLIT)

# Float64 rounds each of up to 1e3 terms of a sum by 1e-16, and batch norm
# divides by 1e-2 at least.
ROUNDING = 1e-11


class Network(nn.Module):
  """Plain Flax with batch norm over the named axis."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(nn.Dense, param_dtype=jnp.float64)
    x = nn.Conv(3, (3, 3), 2, param_dtype=jnp.float64)(x)
    x = dense(8)(jnp.tanh(x).reshape(x.shape[0], -1))
    x = BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
    for _ in range(3):
      x = dense(8)(jnp.tanh(x))
    return dense(CLASSES)(jnp.tanh(x))


@functools.cache
def start():
  """What is trained, what is not, and a mini-batch."""
  x = normal(0, (BATCH, 6, 6, 2))
  y = jnp.arange(BATCH) % CLASSES
  model = sbp.with_feedback(Network(), RULES)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  fixed = variables['feedback']
  learned = {'Dense_4': fixed.pop('Dense_4')}
  return {'params': variables['params'], 'feedback': learned}, fixed, x, y


def loss_of(axis_name=None):
  """The mean loss of a part of the mini-batch, and V as it was used."""
  model = sbp.with_feedback(Network(axis_name), RULES)

  def loss(trained, fixed, x, y):
    feedback = fixed | trained['feedback']
    logits, used = model.apply(
      trained | {'feedback': feedback}, x, mutable=['feedback_weights']
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), used['feedback_weights']

  return loss


def divided(array, parts):
  return array.reshape(parts, -1, *array.shape[1:])


@functools.cache
def on_one_device(parts):
  """The gradient and V, with batch statistics of so many parts."""

  def loss(trained, fixed, x, y):
    each = jax.vmap(loss_of(), (None, None, 0, 0), (0, None))
    losses, V = each(trained, fixed, divided(x, parts), divided(y, parts))
    return losses.mean(), V

  loss = loss if parts > 1 else loss_of()
  return jax.jit(jax.grad(loss, has_aux=True))


def step_of(loss, total=lambda g: g):
  def step(trained, state, fixed, x, y):
    g, V = jax.grad(loss, has_aux=True)(trained, fixed, x, y)
    g = total(g)
    return update(trained, state, g), g, V

  return step


@jax.jit
def update(trained, state, g):
  change, state = OPTIMIZER.update(g, state, trained)
  return optax.apply_updates(trained, change), state


def mesh_of(devices):
  return Mesh(jax.devices()[:devices], ('data',), axis_types=(AxisType.Auto,))


def jit_step(devices, axis_name):
  """The arrays are divided, the function knows nothing of it."""
  assert axis_name  # Statistics are always of the whole mini-batch.
  shard = functools.partial(NamedSharding, mesh_of(devices))
  given, made = tuple(map(shard, SPECS)), shard(WHOLE)
  return jax.jit(step_of(loss_of()), in_shardings=given, out_shardings=made)


def pmap_step(devices, axis_name):
  step = step_of(loss_of(axis_name), lambda g: jax.lax.pmean(g, 'data'))
  axes, devices_used = (None, None, None, 0, 0), jax.devices()[:devices]
  step = jax.pmap(step, 'data', in_axes=axes, devices=devices_used)
  split = functools.partial(divided, parts=devices)
  return lambda *args: step(*args[:3], *map(split, args[3:]))


def shard_map_step(devices, axis_name):
  loss = loss_of(axis_name)

  def mean_loss(*given):
    # JAX itself sums the gradient of what is whole on every device.
    value, V = loss(*given)
    return jax.lax.pmean(value, 'data'), V

  step, mesh = step_of(mean_loss), mesh_of(devices)
  step = jax.shard_map(step, mesh=mesh, in_specs=SPECS, out_specs=WHOLE)
  return jax.jit(step)


def same_everywhere(array, expected, devices):
  """What all devices have, the same bits."""
  parts = [np.asarray(part.data) for part in array.addressable_shards]
  assert len(parts) == devices
  for part in parts[1:]:
    np.testing.assert_array_equal(part, parts[0])
  return parts[0].reshape(expected.shape)


@pytest.mark.parametrize(
  'form, devices, axis_name',
  [(jit_step, 8, 'data'), (pmap_step, 8, None), (pmap_step, 8, 'data'),
   (shard_map_step, 2, 'data'), (shard_map_step, 8, None)],
)  # fmt: skip
def test_a_step_is_that_of_one_device(form, devices, axis_name):
  step = form(devices, axis_name)
  on_one = on_one_device(1 if axis_name else devices)
  trained, fixed, *batch = start()
  state = OPTIMIZER.init(trained)
  for _ in range(STEPS):
    g, V = on_one(trained, fixed, *batch)
    done, gradient, used = jax.tree.map(
      functools.partial(same_everywhere, devices=devices),
      step(trained, state, fixed, *batch),
      (update(trained, state, g), g, V),
    )
    assert_same_bits(used, V)
    assert_close(gradient, g, ROUNDING)
    # Made of the summed gradient, and of nothing else.
    assert_close(done, update(trained, state, gradient), ROUNDING)
    learned = gradient['feedback']['Dense_4']['kernel:kolen_pollack()']
    dW = gradient['params']['Dense_4']['kernel']
    assert_close(learned['learned'], dW, ROUNDING)
    trained, state = done


def test_mistakes_change_a_step():
  trained, fixed, *batch = start()
  whole, own = (on_one_device(n)(trained, fixed, *batch)[0] for n in (1, 8))
  for g in (whole, own):
    del g['params']['Dense_0']['bias']  # Batch norm removes it.
  changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, own)
  assert min(jax.tree.leaves(changes)) > 1e6 * ROUNDING
