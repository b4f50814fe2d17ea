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
from tests.zoo import normal

# Operands of a function of jax.lax, and further arguments to try.
OPERANDS = ('W', 'WW', 'xW', 'Wx', 'Wxx', 'xWx')
EXTRA = ((), (0,), ((0,),), ((1, 0),), (3,), (jnp.int32,))


def as_matrix(y):
  """Nine entries of any result, as numbers to differentiate."""
  y = jnp.abs(y) if jnp.iscomplexobj(y) else y.astype(jnp.float32)
  return jnp.resize(y, (3, 3))


def function_of(name, operands, extra):
  """A function of W and x that calls ``jax.lax.name`` on some of them."""
  module = lax if hasattr(lax, name) else lax.linalg

  def function(W, x):
    each = {'W': W, 'x': x}
    results = getattr(module, name)(*(each[o] for o in operands), *extra)
    y = sum(map(as_matrix, jax.tree.leaves(results)))
    return jnp.sum(jnp.sin(y if 'x' in operands else x @ y))

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
  for name in (*dir(lax), *dir(lax.linalg)):
    for operands in OPERANDS if name.islower() else ():
      for extra in EXTRA:
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
  W, x = (jax.nn.sigmoid(normal(i, 3, 3)) for i in range(2))
  accepted, silent = {}, []
  for (name, operands), (function, primitives) in functions().items():
    try:
      jax.eval_shape(asymmetric(function), W, x)
    except sbp.FeedbackError as error:
      assert ' at ' in str(error) and 'exclude=' in str(error), name
      continue
    accepted[f'{name}({operands})'] = function
    if 'x' in operands and not primitives <= kinds.known():
      silent.append((name, operands, primitives - kinds.known()))
  assert not silent
  assert len(accepted) > 80 and len(functions()) - len(accepted) > 50
  plain, actual = (
    jax.jit(lambda W, x, w=w: [gradient(w(f))(W, x) for f in accepted.values()])
    for w in (lambda f: f, asymmetric)
  )
  results = zip(accepted, plain(W, x), actual(W, x), strict=True)
  for name, expected, each in results:
    jax.tree.map(
      functools.partial(np.testing.assert_array_equal, err_msg=name),
      each,
      expected,
    )


FUTURE = jax.extend.core.Primitive('future')
FUTURE.def_abstract_eval(lambda x, *_: x)


@pytest.mark.parametrize(
  'function',
  [
    lambda W, x: FUTURE.bind(W, x),
    lambda W, x: FUTURE.bind(x, W),
    lambda W, x: x @ FUTURE.bind(W),
    lambda W, x: FUTURE.bind(x) @ FUTURE.bind(W),
    lambda W, x: FUTURE.bind(x @ W, W),
    lambda W, x: jax.lax.scan(lambda x, _: (FUTURE.bind(x, W), 0), x, length=2),
  ],
)
def test_a_primitive_of_a_future_jax_is_refused_by_name(function):
  f = sbp.with_feedback(function, sbp.usf())
  W, x = jnp.ones((3, 3)), jnp.ones((3, 3))
  with pytest.raises(
    sbp.FeedbackError, match='future|no longer known'
  ) as error:
    jax.eval_shape(lambda W, x: f(W, None, x), W, x)
  assert 'test_kinds.py' in str(error.value)


def test_a_primitive_of_a_future_jax_may_take_data():
  function = lambda W, x: FUTURE.bind(FUTURE.bind(x) @ W)
  f = sbp.with_feedback(function, sbp.usf())
  W, x = jnp.ones((3, 3)), jnp.ones((3, 3))
  assert jax.eval_shape(lambda W, x: f(W, None, x), W, x).shape == (3, 3)
