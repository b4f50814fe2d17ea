"""Batch Manhattan is the paper's equations, to the bit and in every dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from symjax_bp import optim

pytestmark = pytest.mark.optimized
SETTINGS = (0, 1, 2, 3)
# Learning rate, momentum and weight decay; powers of two keep sums exact.
NUMBERS, EXACT = (1e-3, 0.9, 5e-4), (0.125, 0.5, 0.25)
RNG = np.random.default_rng(0)
WEIGHTS = {
  'kernel': RNG.standard_normal((3, 4)).astype(np.float32),
  'bias': RNG.standard_normal(4).astype(np.float32),
}


def _gradients(steps):
  """Random gradients with a tenth of exact zeros, the last bias always 0."""
  rng = np.random.default_rng(1)
  for _ in range(steps):
    gradients = jax.tree.map(
      lambda w: np.float32(rng.standard_normal(w.shape)),
      WEIGHTS,
    )
    gradients['kernel'] *= rng.random((3, 4)) > 0.1
    gradients['bias'][-1] = 0.0
    yield gradients


def _numpy_tau(setting, gradient, memory, weights, momentum, decay):
  """The paper's tau(t) and the array that the momentum keeps.

  In float32 and in optax's order of operations, so that bits can be compared;
  a change of all signs does not change rounding.
  """
  momentum, decay = np.float32(momentum), np.float32(decay)
  drive = gradient if setting == 0 else np.sign(gradient)
  tau = (-drive - decay * weights) + momentum * memory
  if setting == 2:
    tau = np.sign(tau)
  return (np.sign(tau) if setting == 3 else tau), tau


def _drop(before, after):
  """A schedule that changes after 100 steps."""
  return lambda step: jnp.where(step < 100, *map(jnp.float32, (before, after)))


@pytest.mark.parametrize('scheduled', [False, True])
@pytest.mark.parametrize('setting', SETTINGS)
def test_steps_are_the_equations_to_the_bit(setting, scheduled):
  later = (2e-4, 0.5, 1e-2) if scheduled else NUMBERS
  arguments = map(_drop, NUMBERS, later) if scheduled else NUMBERS
  optimizer = optim.batch_manhattan(*arguments, setting)
  weights = dict(WEIGHTS)
  memory = {name: np.zeros_like(w) for name, w in weights.items()}
  actual = jax.tree.map(jnp.asarray, weights)
  state = optimizer.init(actual)
  # Not jitted: XLA would contract a * b + c to one rounding.
  for step, g in enumerate(_gradients(150)):
    updates, state = optimizer.update(
      jax.tree.map(jnp.asarray, g), state, actual
    )
    actual = optax.apply_updates(actual, updates)
    rate, *others = NUMBERS if step < 100 else later
    for name, w in weights.items():
      tau, memory[name] = _numpy_tau(setting, g[name], memory[name], w, *others)
      weights[name] = w + np.float32(rate) * tau
  chex.assert_trees_all_equal(actual, weights)
  assert np.isfinite(weights['kernel']).all()


@pytest.mark.accelerator
@pytest.mark.parametrize('setting', SETTINGS)
def test_compiled_steps_have_the_same_bits_and_another_rate(setting):
  traces, plain = [], optim.batch_manhattan(*EXACT, setting)
  make = optax.inject_hyperparams(optim.batch_manhattan, 'setting')
  injected = make(*EXACT, setting)

  @jax.jit
  def update(*arguments):
    traces.append(setting)
    return injected.update(*arguments)

  weights = jnp.array([1.0, -2.0, 0.5])
  state, plain_state = injected.init(weights), plain.init(weights)
  for factor in (1.0, -2.0, 0.5):
    state.hyperparams['learning_rate'] = jnp.float32(factor * EXACT[0])
    updates, state = update(weights - factor, state, weights)
    expected, plain_state = plain.update(weights - factor, plain_state, weights)
    chex.assert_trees_all_equal(updates, factor * expected)
  assert len(traces) == 1


@pytest.mark.parametrize(
  'mask',
  [
    {'kernel': True, 'bias': False},
    {'kernel': np.bool_(True), 'bias': np.bool_(False)},
    lambda weights: jax.tree.map(lambda a: a.ndim > 1, weights),
  ],
)
@pytest.mark.parametrize(
  'make',
  [
    optim.sgd,
    optim.batch_manhattan,
    optax.inject_hyperparams(optim.sgd, 'weight_decay_mask'),
  ],
)
def test_weight_decay_mask(make, mask):
  zeros = jax.tree.map(np.zeros_like, WEIGHTS)
  optimizer = make(1.0, 0.5, 0.25, weight_decay_mask=mask)
  updates, _ = optimizer.update(zeros, optimizer.init(WEIGHTS), WEIGHTS)
  expected = {'kernel': -0.25 * WEIGHTS['kernel'], 'bias': zeros['bias']}
  chex.assert_trees_all_equal(updates, expected)


@pytest.mark.accelerator
def test_multi_steps_takes_the_sign_of_the_mean_gradient():
  optimizer = optax.MultiSteps(optim.batch_manhattan(0.125), 2)
  weights = jnp.zeros(2)
  state = optimizer.init(weights)
  # The mean of the signs would be (0, -1).
  for gradients, expected in (([4.0, -1.0], 0.0), ([-2.0, -3.0], 0.125)):
    # MultiSteps divides a float by its integer count.
    with jax.numpy_dtype_promotion('standard'):
      updates, state = optimizer.update(jnp.array(gradients), state, weights)
    np.testing.assert_array_equal(updates, np.float32([-expected, expected]))


NAMES = ('learning_rate', 'momentum', 'weight_decay')
MASK = 'weight_decay_mask'
ALLOWED = r'must be a number in \[0, (inf|1\.0)\), a scalar array or a schedule'
MASKS = (1, 'kernel', {'a': 1}, {'a': 'kernel'}, {'a': np.ones(2, bool)})


@pytest.mark.parametrize(
  ('error', 'names', 'values', 'message'),
  [
    (ValueError, NAMES, (-0.1, np.nan, np.inf, np.float32(-1)), ALLOWED),
    (ValueError, ('momentum',), (1.0, 2), ALLOWED),
    (TypeError, NAMES, (None, 'fast', True, 1j, [0.1], np.True_), ALLOWED),
    (TypeError, NAMES, (np.ones(1), jnp.ones(1)), ALLOWED),
    (ValueError, ('setting',), (4, -1, True, 1.0, '1', None, [1]), r'0 \(SGD'),
    (TypeError, ('setting',), (jnp.array(1),), "static_args='setting'"),
    (TypeError, (MASK,), (*MASKS, False, np.True_), 'static_args'),
    (TypeError, (MASK,), [lambda _, m=m: m for m in MASKS], 'True'),
  ],
)
def test_errors(error, names, values, message):
  for name in names:
    for value in values:
      with pytest.raises(error, match=f'{name} is .*{message}'):
        arguments = {'learning_rate': 0.1, name: value}
        optim.batch_manhattan(**arguments).init({'a': jnp.ones(2)})


def test_other_errors():
  make = optax.inject_hyperparams(optim.batch_manhattan, 'setting')
  with pytest.raises(TypeError, match='weight_decay_mask is .* static_args'):
    make(0.1, weight_decay_mask=lambda weights: weights.ndim > 1).init(
      jnp.ones(2)
    )
  with pytest.raises(TypeError, match='decay is <function .* a scalar array;'):
    optim.signed_trace(lambda step: 0.5)
  optimizer = optim.batch_manhattan(0.1)
  with pytest.raises(ValueError, match='params'):
    optimizer.update(WEIGHTS, optimizer.init(WEIGHTS))


# --- Dtypes -------------------------------------------------------------------


MIXED = {
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
  state = initial = optimizer.init(MIXED)
  updates = []
  for _ in range(2):
    update, state = optimizer.update(MIXED, state, MIXED)
    updates.append(update)
    chex.assert_trees_all_equal_dtypes(update, MIXED)
    chex.assert_trees_all_equal_dtypes(state, initial)
  chex.assert_trees_all_equal_dtypes(optax.tree.get(state, 'trace'), MIXED)
  return updates


def _scan(optimizer):
  def step(carry, _):
    weights, state = carry
    updates, state = optimizer.update(weights, state, weights)
    return (optax.apply_updates(weights, updates), state), None

  # Types are checked without compiling.
  start = (MIXED, optimizer.init(MIXED))
  jax.eval_shape(lambda: jax.lax.scan(step, start, length=2))


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('injected', [False, True])
def test_any_kind_of_number_is_a_python_float(kind, injected):
  make = optim.batch_manhattan
  if injected:
    make = optax.inject_hyperparams(make, 'setting', jnp.float32)
  optimizer = make(*map(kind, EXACT), np.int64(0))
  # optax's schedules need promotion; inject_hyperparams does not set it.
  with jax.numpy_dtype_promotion('standard' if injected else 'strict'):
    found = _two_updates(optimizer)
    _scan(optimizer)
  expected = _two_updates(optim.batch_manhattan(*EXACT, 0))
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
  gradients = {name: jnp.array([1e-9, -1e-9, 0.0]) for name in MIXED}
  optimizer = optim.batch_manhattan(0.125, setting=setting)
  updates, state = optimizer.update(gradients, optimizer.init(MIXED), MIXED)
  chex.assert_trees_all_equal_dtypes(updates, MIXED)
  chex.assert_trees_all_equal_dtypes(optax.tree.get(state, 'trace'), MIXED)
  if setting:
    for update in updates.values():
      np.testing.assert_array_equal(
        update, np.array([-0.125, 0.125, 0.0], update.dtype)
      )


def test_signed_trace_without_parameters():
  transform = optim.signed_trace(jnp.float32(0.5))
  state = transform.init(MIXED)
  updates, state = transform.update(MIXED, state)
  chex.assert_trees_all_equal_dtypes(updates, state.trace, MIXED)


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
