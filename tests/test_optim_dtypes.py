"""State and updates have the parameters' dtypes, whatever the numbers are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from symjax_bp import optim

SETTINGS = (0, 1, 2, 3)
# Learning rate, momentum and weight decay; powers of two keep sums exact.
EXACT = (0.125, 0.5, 0.25)
WEIGHTS = {
  name: jnp.array([1.0, -2.0, 0.0], name)
  for name in ('bfloat16', 'float16', 'float32')
}
KINDS = {
  'NumPy float64': np.float64,
  'NumPy float32': np.float32,
  'NumPy array': np.array,
  'JAX float32': jnp.float32,
  'JAX bfloat16': jnp.bfloat16,
  'JAX weakly typed': jnp.asarray,
  'schedule': lambda value: lambda step: jnp.float32(value),
  'NumPy schedule': lambda value: lambda step: np.float64(value),
  'optax schedule': lambda value: optax.piecewise_constant_schedule(
    value, {9: 1.0}
  ),
}


def _two_updates(optimizer):
  state = initial = optimizer.init(WEIGHTS)
  updates = []
  for _ in range(2):
    update, state = optimizer.update(WEIGHTS, state, WEIGHTS)
    updates.append(update)
    chex.assert_trees_all_equal_dtypes(update, WEIGHTS)
    chex.assert_trees_all_equal_dtypes(state, initial)
  chex.assert_trees_all_equal_dtypes(optax.tree.get(state, 'trace'), WEIGHTS)
  return updates


def _scan(optimizer):
  def step(carry, _):
    weights, state = carry
    updates, state = optimizer.update(weights, state, weights)
    return (optax.apply_updates(weights, updates), state), None

  # Types are checked without compiling.
  start = (WEIGHTS, optimizer.init(WEIGHTS))
  jax.eval_shape(lambda: jax.lax.scan(step, start, length=2))


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('injected', [False, True])
def test_any_kind_of_number_is_a_python_float(kind, setting, injected):
  make = optim.batch_manhattan
  if injected:
    make = optax.inject_hyperparams(make, 'setting', jnp.float32)
  optimizer = make(*map(kind, EXACT), np.int64(setting))
  # optax's schedules need promotion; inject_hyperparams does not set it.
  with jax.numpy_dtype_promotion('standard' if injected else 'strict'):
    found = _two_updates(optimizer)
    _scan(optimizer)
  expected = _two_updates(optim.batch_manhattan(*EXACT, setting))
  chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize('kind', [np.float64, np.float32, np.array])
def test_numpy_numbers_take_the_dtype_of_the_parameters(kind):
  numbers = (0.1, 0.9, 0.3)  # float32 arithmetic would give other bits.
  chex.assert_trees_all_equal(
    _two_updates(optim.sgd(*map(kind, numbers))),
    _two_updates(optim.sgd(*numbers)),
  )


@pytest.mark.parametrize('setting', SETTINGS)
def test_gradients_of_a_wider_dtype(setting):
  # Rounded to float16 before the sign, these gradients would be 0.
  gradients = {name: jnp.array([1e-9, -1e-9, 0.0]) for name in WEIGHTS}
  optimizer = optim.batch_manhattan(0.125, setting=setting)
  updates, state = optimizer.update(gradients, optimizer.init(WEIGHTS), WEIGHTS)
  chex.assert_trees_all_equal_dtypes(updates, WEIGHTS)
  chex.assert_trees_all_equal_dtypes(optax.tree.get(state, 'trace'), WEIGHTS)
  if setting:
    for update in updates.values():
      np.testing.assert_array_equal(
        update, np.array([-0.125, 0.125, 0.0], update.dtype)
      )


def test_signed_trace_without_parameters():
  transform = optim.signed_trace(jnp.float32(0.5))
  state = transform.init(WEIGHTS)
  updates, state = transform.update(WEIGHTS, state)
  chex.assert_trees_all_equal_dtypes(updates, state.trace, WEIGHTS)


def test_parameters_without_a_gradient():
  # Equinox's filters put None in place of what is not differentiated.
  weights = {'a': jnp.ones(2), 'b': jnp.arange(2)}
  optimizer = optim.batch_manhattan(0.125, 0.5)
  state = optimizer.init(weights)
  for expected in (-0.125, -0.1875):
    updates, state = optimizer.update(
      {'a': weights['a'], 'b': None}, state, weights
    )
    assert updates['b'] is None
    np.testing.assert_array_equal(updates['a'], np.float32([expected] * 2))
