"""No weight loses its feedback without a word."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import symjax_bp as sbp
from symjax_bp.direct import with_direct_feedback
from tests.cases import normal
from tests.zoo import KEY

PARAMS = {
  'W': normal(1, (3, 3)), 'U': normal(2, (3, 3)), 'E': normal(3, (9, 3))
}  # fmt: skip
X = normal(4, (4, 3))
TRIANGLE = jnp.tri(3)
usf, rndf = sbp.usf(), sbp.rndf()


def fast(x):
  return jnp.sin(x[:3])


def written(W, x):
  array = jax.new_ref(jnp.zeros_like(W))
  array[...] = W
  return x @ array[...]


def pick(W, i):
  return W[i]


def total(W):
  return lax.scan(lambda total, row: (total + row, None), jnp.zeros(3), W)[0]


# Functions of W and x with a product that no V of W would reach, or an R of
# which it is not known what became of it.
REFUSED = {
  'a quotient of a sum': (lambda W, x: x @ ((W + fast(x)) / 2), usf),
  'a norm of the weight': (lambda W, x: x @ ((W + fast(x)) / W.sum()), usf),
  'a loop without a reverse mode': (
    lambda W, x: x @ lax.while_loop(jnp.any, lambda W: W + fast(x), W), usf
  ),
  'a call between': (lambda W, x: x @ jnp.triu(W + fast(x)), usf),
  'a product in a call': (
    lambda W, x: jax.jit(jnp.matmul)(x, W + fast(x)), usf
  ),
  'a product with constants': (
    lambda W, x: x @ (TRIANGLE @ (W + fast(x))), usf
  ),
  'added to rows': (lambda W, x: x @ W.at[0].add(x[0]), usf),
  'set into rows': (lambda W, x: x @ W.at[0].set(x[0]), usf),
  'a larger one of data': (lambda W, x: x @ jnp.maximum(W, fast(x)), usf),
  'a divisor': (lambda W, x: x @ (fast(x) / W), usf),
  'modulated for each example': (
    lambda W, x: jax.vmap(lambda x: x @ (W * jnp.sin(x)[None]))(x), usf
  ),
  'random with a derivative': (
    lambda W, x: x @ jax.random.gamma(KEY, jnp.exp(W)), usf
  ),
  'a mutable array': (written, usf),
  'no longer one number': (
    lambda W, x: x @ (jnp.full((3, 3), (W @ W)[0, 0]) * TRIANGLE * W), usf
  ),
  'a sum of halves': (
    lambda W, x: x[:, :1] @ sum(jnp.split(W[:, :2], 2, 1)).T, rndf
  ),
  'a sum over calls of one function': (
    lambda W, x: x @ (jax.jit(pick)(W, 0) + jax.jit(pick)(W, 1)), rndf
  ),
  'a sum over a loop': (lambda W, x: x @ total(W), rndf),
  'a sum with its masked self': (lambda W, x: x @ (W * TRIANGLE + W), rndf),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_a_weight_is_refused_where_it_is_lost(name):
  function, rule = REFUSED[name]
  f = sbp.with_feedback(function, rule)
  with pytest.raises(sbp.FeedbackError, match='test_silent.py'):
    f.init(KEY, PARAMS['W'], X)


NAMED = {
  'a product': lambda params, x: x @ params['W'] * (x @ params['scale']),
  'cast and transposed': lambda params, x: (
    x @ params['scale'].T.astype(jnp.bfloat16).astype(x.dtype)
  ),
  'in a scan': lambda params, x: lax.map(lambda x: x @ params['scale'], x),
  'in one branch': lambda params, x: (
    x @ lax.cond(x[0, 0] > 0, lambda W: W, jnp.ones_like, params['scale'])
  ),
}


@pytest.mark.parametrize('name', NAMED)
def test_a_kernel_that_is_called_a_scale_is_refused(name):
  params = {'scale': PARAMS['W'], 'W': PARAMS['U']}
  f = sbp.with_feedback(NAMED[name], usf)
  with pytest.raises(sbp.FeedbackError, match="'scale' .*rename.*_silent.py"):
    f(params, None, X)
  excluded = sbp.with_feedback(NAMED[name], usf, exclude='scale')
  excluded(params, None, X)


def test_a_scale_may_be_an_einsum():
  scaled = lambda p, x: jnp.einsum('bi,i->bi', x @ p['W'], p['scale'])
  params = {'scale': PARAMS['W'][0], 'W': PARAMS['U']}
  sbp.with_feedback(scaled, usf)(params, None, X)


@pytest.mark.parametrize(
  'function, paths',
  [
    (lambda p, x: jnp.tanh(p['E'][x.argmax(1)] @ p['W']) @ p['U'], 'WU'),
    (
      lambda p, x: (
        lax.cond(x[0, 0] > 0, lambda: x, lambda: p['E'][:4]) @ p['W']
      ),
      'W',
    ),
  ],
)
def test_direct_feedback_reaches_every_input_that_depends_on_a_parameter(
  function, paths
):
  feedback = with_direct_feedback(function).init(KEY, PARAMS, X)
  assert set(feedback) == set(paths)
