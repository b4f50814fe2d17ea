"""Direct feedback against its equations, on models of all kinds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from symjax_bp.direct import with_direct_feedback
from tests.cases import normal


def mlp(params, x):
  for W, b in params[:-1]:
    x = jnp.tanh(x @ W + b)
  W, b = params[-1]
  return x @ W + b


def gradients(f, feedback, params, x, target, **kwargs):
  """Of |y - target|^2 / 2 in the parameters, the feedback and the input."""

  @jax.jit
  def gradient(params, feedback, x):
    def loss(params, feedback, x):
      y = f(params, feedback, x, **kwargs)
      return ((y - target) ** 2).sum() / 2

    return jax.grad(loss, argnums=(0, 1, 2))(params, feedback, x)

  return gradient(params, feedback, x)


def assert_close(actual, expected):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10),
    actual,
    expected,
  )


def project(kind, e, target):
  return {
    'error': e, 'sign': np.sign(e), 'centered': e - e.mean(0), 'target': target
  }[kind]  # fmt: skip


OPTIONS = [
  {},
  {'error': 'sign'},
  {'error': 'centered'},
  {'error': 'target'},
  {'shared': True},
  {'density': 0.25, 'sigma': 2.0},
  {'learns': True},
  {'learns': True, 'shared': True, 'error': 'sign'},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_an_mlp_has_the_gradients_of_the_equations(options):
  sizes = (4, 6, 5, 3)
  with jax.enable_x64(True):
    random = lambda seed, *shape: normal(seed, shape, jnp.float64)
    params = [
      (random(i, m, n), random(i + 5, 1, n))
      for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]
    x, target = random(10, 7, 4), random(11, 7, 3)
    f = with_direct_feedback(mlp, **options)
    feedback = f.init(jax.random.key(0), params, x)
    kind = options.get('error', 'error')
    targets = {'targets': target} if kind == 'target' else {}
    found = gradients(f, feedback, params, x, target, **targets)
    np.testing.assert_array_equal(
      f(params, feedback, x, **targets), mlp(params, x)
    )
  params, feedback, x, target = jax.tree.map(
    np.asarray, (params, feedback, x, target)
  )
  (W1, b1), (W2, b2), (W3, b3) = params
  if options.get('shared'):
    assert list(feedback) == ['shared']
    B2, B3 = feedback['shared'], feedback['shared'][:5]
  else:
    assert list(feedback) == ['1/0', '2/0']
    B2, B3 = feedback['1/0'], feedback['2/0']
  assert B2.shape == (6, 3) and B3.shape == (5, 3)
  h1 = np.tanh(x @ W1 + b1)
  h2 = np.tanh(h1 @ W2 + b2)
  e = h2 @ W3 + b3 - target
  E = project(kind, e, target)
  d1, d2 = E @ B2.T * (1 - h1**2), E @ B3.T * (1 - h2**2)
  dB = [options.get('learns', False) * h.T @ E for h in (h1, h2)]
  if options.get('shared'):
    dB = {'shared': dB[0] + np.pad(dB[1], ((0, 1), (0, 0)))}
  else:
    dB = {'1/0': dB[0], '2/0': dB[1]}
  layers = ((x, d1), (h1, d2), (h2, e))  # The last one learns by the error.
  dparams = [(h.T @ d, d.sum(0, keepdims=True)) for h, d in layers]
  assert_close(found, (dparams, dB, d1 @ W1.T))


def test_matrices_are_normal_sparse_and_apart():
  params = [(normal(i, (300, 300)), jnp.zeros((1, 300))) for i in range(3)]
  x = normal(9, (1, 300))
  for density, sigma in ((1.0, None), (0.25, 2.0)):
    f = with_direct_feedback(mlp, density=density, sigma=sigma)
    B = [*f.init(jax.random.key(0), params, x).values()]
    for each in B:
      values = np.asarray(each, np.float64)
      error = 4 / np.sqrt(values.size)
      kept = (values != 0).mean()
      assert abs(kept - density) <= error * np.sqrt(density * (1 - density))
      # The variance of all entries does not depend on the density.
      scaled = values / (sigma or 1 / np.sqrt(300))
      assert abs((scaled**2).mean() - 1) < error * np.sqrt(3 / density - 1)
    assert abs(np.corrcoef(*map(np.ravel, B))[0, 1]) < 4 / 300


def unrolled(params, x, key):
  for W in params['W']:
    x = jnp.tanh(x @ W)
  kept = jax.random.bernoulli(key, shape=x.shape).astype(x.dtype)
  return (x * kept) @ params['head']


def scanned(params, x, key, wrap=lambda layer: layer):
  layer = wrap(lambda x, W: (jnp.tanh(x @ W), None))
  x, _ = lax.scan(layer, x, params['W'])
  kept = jax.random.bernoulli(key, shape=x.shape).astype(x.dtype)
  return (x * kept) @ params['head']


def test_scan_and_checkpoint_are_the_unrolled_network():
  """The layers of one parameter share its B; a key is no data."""
  with jax.enable_x64(True):
    x, target, W, head = (
      normal(seed, shape, jnp.float64)
      for seed, shape in enumerate([(7, 4), (7, 2), (3, 4, 4), (4, 2)])
    )
    params, key = {'W': W, 'head': head}, jax.random.key(5)
    f = with_direct_feedback(unrolled, learns=True)
    feedback = f.init(jax.random.key(0), params, x, key)
    assert jax.tree.map(jnp.shape, feedback) == {'W': (4, 2), 'head': (4, 2)}
    expected = gradients(f, feedback, params, x, target, key=key)
    for wrap in (lambda layer: layer, jax.checkpoint):
      f = with_direct_feedback(
        lambda *args, wrap=wrap, **kwargs: scanned(*args, wrap=wrap, **kwargs),
        learns=True,
      )
      found = gradients(f, feedback, params, x, target, key=key)
      assert_close(found[0], expected[0])


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
    x = nn.relu(nn.Dense(5)(x.reshape(len(x), -1)))
    return nn.Dense(2)(x)


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs)
    self.first = nnx.Linear(27, 5, rngs=rngs)
    self.last = nnx.Linear(5, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv(x))
    return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


def linen_function():
  model = Linen()
  params = model.init(jax.random.key(0), jnp.ones((1, 6, 6, 2)))['params']
  return lambda params, x: model.apply({'params': params}, x), params


def nnx_function():
  graph, params = nnx.split(NNX(nnx.Rngs(0)))
  return lambda params, x: nnx.merge(graph, params)(x), nnx.to_pure_dict(params)


def conv(x, p):
  y = lax.conv_general_dilated(
    x, p['kernel'], (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return nn.relu(y + p['bias'].reshape(1, 1, 1, -1)).reshape(len(x), -1)


def linear(x, p):
  return x @ p['kernel'] + p['bias'].reshape(1, -1)


LAYERS = (conv, lambda x, p: nn.relu(linear(x, p)), linear)


@pytest.mark.parametrize('make', [linen_function, nnx_function])
def test_an_unmodified_model_of_flax(make):
  """Each layer's own gradient, by JAX, from the projected error."""
  function, params = make()
  x, target = normal(1, (4, 6, 6, 2)), normal(2, (4, 2))
  f = with_direct_feedback(function)
  feedback = f.init(jax.random.key(1), params, x)
  found, _, _ = gradients(f, feedback, params, x, target)
  error, h = function(params, x) - target, x
  names = list(params)
  errors = [error @ feedback[f'{name}/kernel'].T for name in names[1:]]
  for name, layer, d in zip(names, LAYERS, [*errors, error], strict=True):
    y, pullback = jax.vjp(layer, h, params[name])
    for key, expected in pullback(d)[1].items():
      # Sums of fewer than 100 products of float32, which are not above 100.
      np.testing.assert_allclose(found[name][key], expected, atol=1e4 * 2**-24)
    h = y


@pytest.mark.parametrize('width', [5, 7])
def test_vmap_over_examples_is_a_batch(width):
  """As in Equinox. JAX then has the batch behind the features."""
  with jax.enable_x64(True):
    W1, W2, x, target = (
      normal(seed, shape, jnp.float64)
      for seed, shape in enumerate([(3, width), (width, 2), (5, 3), (5, 2)])
    )

    def batched(params, x):
      return jnp.tanh(x @ params['W1']) @ params['W2']

    def mapped(params, x):
      one = lambda x: params['W2'].T @ jnp.tanh(params['W1'].T @ x)
      return jax.vmap(one)(x)

    params = {'W1': W1, 'W2': W2}
    fs = [with_direct_feedback(function) for function in (batched, mapped)]
    feedback = fs[0].init(jax.random.key(0), params, x)
    assert_close(*(gradients(f, feedback, params, x, target) for f in fs))


PARAMS = {'W1': normal(0, (4, 4)), 'W2': normal(1, (4, 4))}
X = normal(2, (3, 4))


def two(params, x):
  return jnp.tanh(x @ params['W1']) @ params['W2']


ERRORS = {
  r'one array .* not PyTreeDef\(\(\*, \*\)\)': lambda p, x: (two(p, x),) * 2,
  r"'W2' has shape \(3, 4\) .*\(4, 3\).* Exclude": lambda p, x: two(p, x).T,
  r"'W2' has shape \(4,\) without a batch": lambda p, x: two(p, x[0]),
  "'W1'.*Exclude": lambda p, x: x @ jnp.linalg.inv(p['W1']),
}


@pytest.mark.parametrize('message', ERRORS)
def test_what_cannot_have_direct_feedback_is_named(message):
  f = with_direct_feedback(ERRORS[message])
  with pytest.raises(ValueError, match=f'(?s){message}'):
    f.init(jax.random.key(0), PARAMS, X)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'error': 'noise'}, "error must be one of .*'target'.* not 'noise'"),
    ({'density': 0}, r'density must be in \(0, 1\], not 0'),
    ({'sigma': -1}, 'sigma must be positive and finite, not -1'),
  ],
)
def test_options_out_of_range_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    with_direct_feedback(two, **options)


def test_errors_of_a_call():
  f = with_direct_feedback(two)
  feedback = f.init(jax.random.key(0), PARAMS, X)
  with pytest.raises(
    ValueError, match='if and only if error is "target".* \'error\''
  ):
    f(PARAMS, feedback, X, targets=X)
  with pytest.raises(ValueError, match='targets are not given'):
    with_direct_feedback(two, error='target')(PARAMS, feedback, X)
  with pytest.raises(ValueError, match="no B for the input of 'W2', 4 numbers"):
    jax.grad(lambda p: f(p, {}, X).sum())(PARAMS)


def test_excluded_weights_pass_the_error_of_the_layer_above():
  params = PARAMS | {'W3': normal(5, (4, 2))}
  three = lambda p, x: jnp.tanh(two(p, x)) @ p['W3']
  f = with_direct_feedback(three, 'W2')
  feedback = f.init(jax.random.key(0), params, X)
  assert list(feedback) == ['W3']
  found = gradients(f, feedback, params, X, 0.0)[0]
  h2 = two(params, X)
  d2 = three(params, X) @ feedback['W3'].T * (1 - jnp.tanh(h2) ** 2)
  expected = jax.vjp(two, PARAMS, X)[1](d2)[0]
  for name, dW in expected.items():
    np.testing.assert_allclose(found[name], dW, rtol=1e-5, atol=1e-5)
