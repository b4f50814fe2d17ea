"""Every primitive of JAX is decided, or refused where a weight meets data."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import symjax_bp as sbp
from symjax_bp import kinds
from tests.cases import normal

# Operands of the functions of jax.lax, and further arguments to try.
OPERANDS = ('W', 'WW', 'xW', 'Wx', 'Wxx', 'xWx')
EXTRA = ((), (0,), ((0,),), ((1, 0),), (3,), (jnp.int32,))


def as_matrix(y):
  """Nine entries of any result, as numbers to differentiate."""
  y = jnp.abs(y) if jnp.iscomplexobj(y) else y.astype(jnp.float32)
  return jnp.resize(y, (3, 3))


def function_of(name, operands, extra):
  """Calls ``jax.lax.name`` with W and x."""
  call = getattr(lax if hasattr(lax, name) else lax.linalg, name)

  def function(W, x):
    each = {'W': W, 'x': x}
    results = call(*(each[name] for name in operands), *extra)
    y = sum(map(as_matrix, jax.tree.leaves(results)))
    return jnp.sum(y if 'x' in operands else jnp.sin(x @ y))

  return function


def primitives_in(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for inner in jax.tree.leaves(list(eqn.params.values())):
      if hasattr(inner, 'eqns'):
        yield from primitives_in(inner)


def gradient(function):
  return jax.grad(function, (0, 1))


@functools.cache
def functions():
  """Those that take matrices and have a derivative, with their primitives."""
  W, x = jnp.ones((3, 3)), jnp.ones((3, 3))
  found = {}
  names = [name for name in (*dir(lax), *dir(lax.linalg)) if name.islower()]
  for name in names:
    for operands in () if name.endswith('_p') else OPERANDS:
      for extra in EXTRA if operands == 'W' else EXTRA[:1]:
        function = function_of(name, operands, extra)
        try:
          jaxpr = jax.make_jaxpr(function)(W, x)
          jax.eval_shape(gradient(function), W, x)
        except Exception:  # Not to be called like this.
          continue
        found[name, operands] = function, set(primitives_in(jaxpr))
        break
  return found


def asymmetric(function):
  f = sbp.with_feedback(function, sbp.symmetric())
  return lambda W, x: f(W, None, x)


def test_a_primitive_has_the_bits_of_plain_jax_or_is_refused():
  W, x = (jax.nn.sigmoid(normal(i, (3, 3))) for i in range(2))
  known = {'optimization_barrier'}.union(
    kinds.BILINEAR, kinds.MOVES, kinds.JOINS, kinds.PICKS, kinds.ENTRYWISE,
    kinds.REDUCTIONS, kinds.ADDITIONS, kinds.CONTROL,
  )  # fmt: skip
  accepted, added = {}, set()
  for (name, operands), (function, primitives) in functions().items():
    label = f'{name}({operands})'
    try:
      jax.eval_shape(asymmetric(function), W, x)
    except sbp.FeedbackError as error:
      assert ' at ' in str(error) and 'exclude=' in str(error), label
      continue
    assert 'x' not in operands or primitives <= known, label
    accepted[label] = function
    rows = sbp.with_feedback(function, sbp.usf()).rows(W, x)
    if [row.use for row in rows] == ['added']:
      added.add(label)
  assert len(accepted) > 80 and len(functions()) - len(accepted) > 50
  # One program, in which what is the same is compiled once.
  run = jax.jit(
    lambda W, x: [
      (gradient(f)(W, x), gradient(asymmetric(f))(W, x))
      for f in accepted.values()
    ]
  )
  for label, (expected, actual) in zip(accepted, run(W, x), strict=True):
    for e, a in zip(expected, actual, strict=True):
      np.testing.assert_array_equal(a, e, label)
    # A weight that is added is not in the derivative by the data.
    dx = np.asarray(expected[1])
    assert label not in added or (dx == dx.round()).all(), label
  assert len(added) > 20


FUTURE = jax.extend.core.Primitive('future')
FUTURE.def_abstract_eval(lambda x, *_: x)
ONES = np.ones((3, 3), np.float32)


@pytest.mark.parametrize(
  'function',
  [
    lambda W, x: FUTURE.bind(W, x),
    lambda W, x: FUTURE.bind(x, W),
    lambda W, x: x @ FUTURE.bind(W),
    lambda W, x: FUTURE.bind(x) @ FUTURE.bind(W),
    lambda W, x: FUTURE.bind(x @ W, W),
    lambda W, x: lax.map(lambda row: FUTURE.bind(row, W), x),
  ],
)
def test_a_primitive_of_a_future_jax_is_refused(function):
  f = sbp.with_feedback(function, sbp.usf())
  with pytest.raises(
    sbp.FeedbackError, match='future|no longer known'
  ) as error:
    jax.eval_shape(lambda W, x: f(W, None, x), ONES, ONES)
  assert 'test_kinds.py' in str(error.value)


def test_a_primitive_of_a_future_jax_may_take_data():
  f = sbp.with_feedback(lambda W, x: FUTURE.bind(FUTURE.bind(x) @ W), sbp.usf())
  y = jax.eval_shape(lambda W, x: f(W, None, x), ONES, ONES)
  assert y.shape == (3, 3)
