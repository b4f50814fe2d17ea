"""Direct feedback against its equations, on models of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from symjax_bp import FeedbackError
from symjax_bp.direct import with_direct_feedback
from tests.cases import assert_close, normal, numpy_angle
from tests.nnx_models import CNN

KEY = jax.random.key(0)


def gradients(f, feedback, params, x, target, **kwargs):
  """Of |y - target|^2 / 2 in the parameters, the feedback and the input."""

  def loss(params, feedback, x):
    return ((f(params, feedback, x, **kwargs) - target) ** 2).sum() / 2

  argnums = (0, 1, 2) if f.learns else (0, 2)
  gradient = jax.jit(jax.grad(loss, argnums=argnums))
  return gradient(params, feedback, x)


def mlp(params, x):
  *layers, (W, b) = params
  for V, c in layers:
    x = jnp.tanh(x @ V + c)
  return x @ W + b


ERRORS = {
  'error': lambda e, target: e,
  'sign': lambda e, target: np.sign(e),
  'centered': lambda e, target: e - e.mean(0),
  'target': lambda e, target: target,
}
OPTIONS = [
  {},
  {'error': 'centered'},
  {'error': 'target'},
  {'learns': True},
  {'learns': True, 'shared': True, 'error': 'sign'},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_an_mlp_has_the_gradients_of_the_equations(float64, options):
  params = [
    (normal(i, (n, m)), normal(i, (1, m)))
    for i, (n, m) in enumerate([(4, 6), (6, 5), (5, 3)])
  ]
  x, target = normal(10, (7, 4)), normal(11, (7, 3))
  f = with_direct_feedback(mlp, **options)
  feedback = f.init(KEY, params, x)
  error = options.get('error', 'error')
  targets = {'targets': target} if error == 'target' else {}
  found = gradients(f, feedback, params, x, target, **targets)
  assert (f(params, feedback, x, **targets) == mlp(params, x)).all()

  numpy = jax.tree.map(np.asarray, (params, feedback, x, target))
  ((W1, b1), (W2, b2), (W3, b3)), feedback, x, target = numpy
  shared, learns = options.get('shared'), options.get('learns')
  assert list(feedback) == (['shared'] if shared else ['1/0', '2/0'])
  B2, B3 = (feedback['shared'],) * 2 if shared else feedback.values()
  B3 = B3[:5]
  assert B2.shape == (6, 3) and B3.shape == (5, 3)
  h1 = np.tanh(x @ W1 + b1)
  h2 = np.tanh(h1 @ W2 + b2)
  e = h2 @ W3 + b3 - target
  E = ERRORS[error](e, target)
  d1, d2 = E @ B2.T * (1 - h1**2), E @ B3.T * (1 - h2**2)
  dB2, dB3 = (h.T @ E for h in (h1, h2))
  dB = {'1/0': dB2, '2/0': dB3}
  if shared:
    dB = {'shared': dB2 + np.pad(dB3, ((0, 1), (0, 0)))}
  # The last layer learns by the error itself.
  layers = ((x, d1), (h1, d2), (h2, e))
  dparams = [(h.T @ d, d.sum(0, keepdims=True)) for h, d in layers]
  assert_close(found, (dparams, *[dB][: bool(learns)], d1 @ W1.T))
  if not learns:
    with pytest.raises(FeedbackError, match='matrix B is differentiated'):
      jax.grad(lambda B: f(params, B, x, **targets).sum())(feedback)


@pytest.mark.parametrize('density, sigma', [(1.0, None), (0.25, 2.0)])
def test_matrices_are_normal_sparse_and_apart(density, sigma):
  params = [(normal(i, (300, 300)), jnp.zeros((1, 300))) for i in range(3)]
  f = with_direct_feedback(mlp, density=density, sigma=sigma)
  B = [*f.init(KEY, params, normal(9, (1, 300))).values()]
  error = 4 / 300  # Four standard errors of 90,000 numbers.
  for values in (np.asarray(each, np.float64) for each in B):
    kept = (values != 0).mean()
    assert abs(kept - density) <= error * np.sqrt(density * (1 - density))
    # The variance of all entries does not depend on the density.
    scaled = values / (sigma or 1 / np.sqrt(300))
    assert abs((scaled**2).mean() - 1) < error * np.sqrt(3 / density - 1)
  assert abs(np.corrcoef(*map(np.ravel, B))[0, 1]) < error


def network(loop):
  def function(params, x, key):
    x = loop(lambda x, W: (jnp.tanh(x @ W), None), x, params['W'])
    kept = jax.random.bernoulli(key, shape=x.shape)
    return jnp.where(kept, x, 0.0) @ params['head']

  return function


def unrolled(layer, x, Ws):
  for W in Ws:
    x, _ = layer(x, W)
  return x


def scanned(layer, x, Ws):
  return lax.scan(jax.checkpoint(layer), x, Ws)[0]


def test_scan_and_checkpoint_are_the_unrolled_network(float64):
  """The layers of one parameter share its B; a key is no data."""
  params = {'W': normal(0, (3, 4, 4)), 'head': normal(1, (4, 2))}
  x, target, key = normal(2, (7, 4)), normal(3, (7, 2)), jax.random.key(5)
  f, g = (with_direct_feedback(network(each)) for each in (unrolled, scanned))
  feedback = f.init(KEY, params, x, key)
  assert jax.tree.map(jnp.shape, feedback) == {'W': (4, 2), 'head': (4, 2)}
  assert_close(g.init(KEY, params, x, key), feedback)
  expected, found = (
    gradients(each, feedback, params, x, target, key=key)[0] for each in (f, g)
  )
  assert_close(found, expected)


def test_vmap_over_examples_is_a_batch(float64):
  """As in Equinox. JAX then has the batch behind the features."""
  W = [normal(0, (3, 5)), normal(1, (5, 2))]
  x, target = normal(2, (5, 3)), normal(3, (5, 2))
  batched = lambda W, x: jnp.tanh(x @ W[0]) @ W[1]
  one = lambda W, x: W[1].T @ jnp.tanh(W[0].T @ x)
  mapped = lambda W, x: jax.vmap(lambda x: one(W, x))(x)
  fs = [with_direct_feedback(function) for function in (batched, mapped)]
  feedback = fs[0].init(KEY, W, x)
  assert_close(*(gradients(f, feedback, W, x, target) for f in fs))


# --- An unmodified model of Flax --------------------------------------------


# The layers of nnx_models.CNN.
LAYERS = (
  lambda model, x: nnx.max_pool(nnx.relu(model.conv(x)), (2, 2), (2, 2)),
  lambda model, h: nnx.relu(model.layers[0](h.reshape(len(h), -1))),
  lambda model, h: model.layers[1](h),
)


def test_an_unmodified_model_of_flax():
  """Each layer's own gradient, by JAX, from the projected error."""
  graph, params = nnx.split(CNN(nnx.Rngs(0)))
  function = lambda params, x: nnx.merge(graph, params)(x)
  params = nnx.to_pure_dict(params)
  x, target = normal(1, (4, 6, 6, 2)), normal(2, (4, 3))
  f = with_direct_feedback(function)
  feedback = f.init(jax.random.key(1), params, x)
  found, _ = gradients(f, feedback, params, x, target)
  error = function(params, x) - target
  B = [feedback[f'layers/{i}/kernel'] for i in range(2)]
  # The first one's has the shape of the pooled image.
  errors = (error @ B[0].T).reshape(4, 3, 3, 4), error @ B[1].T, error

  @jax.jit
  @jax.grad
  def expected(params):
    model, h, total = nnx.merge(graph, params), x, 0.0
    for layer, d in zip(LAYERS, errors, strict=True):
      h = layer(model, lax.stop_gradient(h))
      total += (h * d).sum()
    return total

  # Sums of fewer than 100 products of float32, which are not above 100.
  assert_close(found, expected(params), atol=1e4 * 2**-24)


# --- Errors -----------------------------------------------------------------

PARAMS = {'W1': normal(0, (4, 4)), 'W2': normal(1, (4, 4))}
X = normal(2, (3, 4))


def two(params, x):
  return jnp.tanh(x @ params['W1']) @ params['W2']


REFUSED = {
  r'one array .* not PyTreeDef\(\(\*, \*\)\)': lambda p, x: (two(p, x),) * 2,
  r"'W2' has shape \(3, 4\) .*\(4, 3\).* Exclude": lambda p, x: two(p, x).T,
  r"'W2' has shape \(4,\) without a batch": lambda p, x: two(p, x[0]),
  r"'W1'.*Exclude": lambda p, x: x @ jnp.linalg.inv(p['W1']),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_have_direct_feedback_is_named(message):
  f = with_direct_feedback(REFUSED[message])
  with pytest.raises(ValueError, match=f'(?s){message}'):
    f.init(KEY, PARAMS, X)


def test_options_and_arguments_that_do_not_fit_are_named():
  for options, message in (
    ({'error': 'noise'}, "error must be one of .*'target'.* not 'noise'"),
    ({'density': 0}, r'density must be in \(0, 1\], not 0'),
    ({'sigma': -1}, 'sigma must be positive and finite, not -1'),
  ):
    with pytest.raises(ValueError, match=message):
      with_direct_feedback(two, **options)
  f, by_target = (
    with_direct_feedback(two, error=e) for e in ('sign', 'target')
  )
  with pytest.raises(ValueError, match="'sign' and targets are given"):
    f(PARAMS, {}, X, targets=X)
  with pytest.raises(ValueError, match="'target' and targets are not given"):
    by_target(PARAMS, {}, X)
  with pytest.raises(ValueError, match="no B for the input of 'W2', 4 numbers"):
    jax.grad(lambda p: f(p, {}, X).sum())(PARAMS)
  with pytest.raises(ValueError, match="'W2', 4 numbers .* an output of 4"):
    jax.grad(lambda p: f(p, {'W2': jnp.ones((4, 3))}, X).sum())(PARAMS)
  with pytest.raises(ValueError, match=r'targets must .* \(3, 4\), .*\(3,\)'):
    labels = jnp.zeros(3, int)
    jax.grad(lambda p: by_target(p, {}, X, targets=labels).sum())(PARAMS)


def test_an_excluded_weight_gets_the_error_of_the_layer_above(float64):
  W = [normal(i, (4, 4)) for i in range(3)]
  three = lambda W, x: jnp.tanh(jnp.tanh(x @ W[0]) @ W[1]) @ W[2]
  x, target = normal(4, (3, 4)), normal(5, (3, 4))
  f = with_direct_feedback(three, '1')
  feedback = f.init(KEY, W, x)
  assert list(feedback) == ['2']
  found, _ = gradients(f, feedback, W, x, target)
  upper = jnp.tanh(jnp.tanh(x @ W[0]) @ W[1])
  d = (upper @ W[2] - target) @ feedback['2'].T
  lower = lambda W: jnp.tanh(jnp.tanh(x @ W[0]) @ W[1])
  assert_close(found[:2], jax.vjp(lower, W[:2])[1](d)[0])


def test_alignment_is_that_of_errors_and_updates(float64):
  def tied(params, x):  # one weight, two uses with outputs of two shapes
    h = jnp.tanh(x @ params['W'])
    return jnp.tanh(h @ params['U']) @ params['W'][:3].T

  W, x, target = normal(0, (4, 5)), normal(2, (6, 4)), normal(3, (6, 3))
  params = {'W': W, 'U': normal(1, (5, 5))}
  f = with_direct_feedback(tied)
  feedback = f.init(KEY, params, x)

  def loss(y):
    return ((y - target) ** 2).sum() / 2

  align = lambda params: f.layer_alignment(loss, params, feedback, x)
  rows = jax.jit(align)(params)
  h1 = jnp.tanh(x @ W)
  h2 = jnp.tanh(h1 @ params['U'])
  e = h2 @ W[:3].T - target
  # Errors at the outputs of the first and the second product; the third is e.
  true2 = (e @ W[:3]) * (1 - h2**2)
  true1 = (true2 @ params['U'].T) * (1 - h1**2)
  own2 = (e @ feedback['W'].T) * (1 - h2**2)
  own1 = (e @ feedback['U'].T) * (1 - h1**2)

  # The second use of W adds to its update.
  last = jnp.zeros_like(W).at[:3].set(e.T @ h2)
  wanted = {
    'W': (
      numpy_angle([own1, e], [true1, e]),
      numpy_angle(x.T @ own1 + last, x.T @ true1 + last),
    ),
    'U': (numpy_angle(own2, true2), numpy_angle(h1.T @ own2, h1.T @ true2)),
  }
  assert set(rows) == set(wanted)
  for path, angles in wanted.items():
    row = rows[path]
    np.testing.assert_allclose(
      (row.error_angle, row.update_angle), angles, 1e-6
    )
    assert np.isnan([row.angle, row.concordance, row.norm_ratio]).all()
    assert 1 <= row.effective_rank <= 5
