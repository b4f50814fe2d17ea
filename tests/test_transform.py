"""with_feedback for functions: transformations, arguments and V."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import symjax_bp as sbp
from tests import zoo
from tests.cases import assert_close, assert_same_bits, normal
from tests.zoo import KEY

WHOLE, SPLIT = PartitionSpec(), PartitionSpec('data')


pytestmark = pytest.mark.usefixtures('float64')


# --- Transformations ---------------------------------------------------------


def network(product, params, V, x):
  """A tied weight, which R follows, and a second rule."""
  h = jnp.tanh(product(x, params['W'], V['W']))
  y = product(h, params['W'].T, V['W'].T)
  return y + product(x, params['U'], V['U'])


def plain(params, x):
  return network(lambda x, W, _: x @ W, params, params, x)


def reference(params, V, x):
  product = lambda *xWV: zoo.through(jnp.matmul, *xWV)
  return network(product, params, V, x)


RULES = {'W': sbp.rndf(1.0), 'U': sbp.brsf(0.5)}


def setup():
  """A function with feedback, arguments, and V."""
  f = sbp.with_feedback(plain, RULES)
  params = {'W': normal(1, (3, 4)), 'U': normal(2, (3, 3))}
  feedback = f.init(KEY, params)
  x = normal(3, (8, 3))
  return f, (params, feedback, x), f.weights(params, feedback)


def gradient_of(function):
  """The gradient in the parameters and in x."""

  def gradient(params, feedback, x):
    loss = lambda params, x: (function(params, feedback, x) ** 2).sum()
    return jax.grad(loss, (0, 1))(params, x)

  return gradient


def mesh_of(kind=AxisType.Auto):
  return jax.make_mesh((8,), ('data',), axis_types=(kind,))


def over_examples(mapped):
  """The gradient of a batch from gradients of examples."""

  def transform(g):
    def batch(params, feedback, x):
      dparams, dx = mapped(g)(params, feedback, x[:, None])
      return jax.tree.map(lambda a: a.sum(0), dparams), dx[:, 0]

    return batch

  return transform


def exported(g):
  def call(params, feedback, x):
    shape = jax.export.symbolic_shape('batch, 3')
    spec = jax.ShapeDtypeStruct(shape, x.dtype)
    exporting = jax.export.export(jax.jit(g))
    return exporting(params, feedback, spec).call(params, feedback, x)

  return call


def ahead_of_time(g):
  """With donated arguments."""

  def call(*args):
    args = jax.tree.map(jnp.copy, args)
    compiled = jax.jit(g, donate_argnums=(0, 2)).lower(*args).compile()
    return compiled(*args)

  return call


def sharded(kind):
  def transform(g):
    def call(params, feedback, x):
      mesh = mesh_of(kind)
      place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
      args = *place((params, feedback), WHOLE), place(x, SPLIT)
      with jax.set_mesh(mesh):
        return jax.jit(g)(*args)

    return call

  return transform


def shard_map(g):
  return jax.jit(
    jax.shard_map(
      g,
      mesh=mesh_of(),
      in_specs=(WHOLE, WHOLE, SPLIT),
      out_specs=(WHOLE, SPLIT),
    )
  )


TRANSFORMATIONS = {
  'eager': lambda g: g,
  'disable_jit': lambda g: jax.disable_jit()(g),
  'checkpoint': lambda g: jax.jit(jax.checkpoint(g)),
  'ahead of time': ahead_of_time,
  'export': exported,
  'vmap': over_examples(lambda g: jax.jit(jax.vmap(g, (None, None, 0)))),
  'scan': over_examples(
    lambda g: (
      lambda params, feedback, x: lax.map(lambda x: g(params, feedback, x), x)
    )
  ),
  'pmap': over_examples(lambda g: jax.pmap(g, in_axes=(None, None, 0))),
  'shard_map': shard_map,
  'sharded jit': sharded(AxisType.Auto),
  'sharded jit, explicit': sharded(AxisType.Explicit),
}


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_the_gradient_can_be_transformed(name):
  """Transformations inside of the function are in the zoo."""
  f, args, V = setup()
  expected = gradient_of(lambda params, _, x: reference(params, V, x))(*args)
  assert_close(TRANSFORMATIONS[name](gradient_of(f))(*args), expected)


@pytest.mark.accelerator
def test_vmap_over_models_is_each_model():
  f, (params, _, x), _ = setup()
  stacked = jax.tree.map(lambda W: jnp.stack([W, 2 * W, W - 1]), params)
  feedback = jax.vmap(f.init)(jax.random.split(KEY, 3), stacked)
  g = jax.jit(gradient_of(f))
  actual = jax.vmap(g, (0, 0, None))(stacked, feedback, x)
  for i in range(3):
    pick = lambda tree, i=i: jax.tree.map(lambda a: a[i], tree)
    alone = g(pick(stacked), pick(feedback), x)
    assert_close(pick(actual), alone)


def test_reverse_over_reverse_is_that_of_plain_jax():
  f = sbp.with_feedback(plain, sbp.symmetric())
  _, (params, _, x), _ = setup()
  x = x[:2]

  def second(function):
    loss = lambda params, x: jnp.sum(function(params, x) ** 3)
    return jax.jit(jax.jacrev(jax.jacrev(loss, (0, 1)), (0, 1)))(params, x)

  actual = second(lambda params, x: f(params, None, x))
  assert_close(actual, second(plain))


def test_a_tracer_that_the_function_closes_over_gets_its_gradient():
  _, (params, feedback, x), V = setup()

  @jax.jit
  def gradient(params, x, factor):
    def loss(factor):
      f = sbp.with_feedback(lambda params, x: plain(params, factor * x), RULES)
      return (f(params, feedback, x) ** 2).sum()

    return jax.grad(loss)(factor)

  factor = jnp.asarray(0.5)
  expected = jax.grad(lambda c: (reference(params, V, c * x) ** 2).sum())
  assert_close(gradient(params, x, factor), expected(factor))


def test_arguments_and_results_of_every_type():
  """Static arguments, keys, and results that are no arrays."""

  def function(params, x, train, *, mode, key, nothing=None):
    y = x['data'] @ params
    if train:
      y = jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0)
    if mode == 'tanh':
      y = jnp.tanh(y)
    return {'y': y, 'mode': mode, 'train': train, 'none': nothing}, [3]

  f = sbp.with_feedback(function, sbp.usf())
  W, x = normal(1, (3, 2)), {'data': normal(2, (4, 3))}
  args, kwargs = (x, True), {'mode': 'tanh', 'key': KEY}
  actual, expected = f(W, None, *args, **kwargs), function(W, *args, **kwargs)
  assert actual[0].pop('y').tolist() == expected[0].pop('y').tolist()
  assert actual == expected
  jitted = jax.jit(
    lambda W, x, key: f(W, None, x, False, mode='no', key=key)[0]['y']
  )
  assert_close(jitted(W, x, KEY), x['data'] @ W)


def test_arguments_may_have_any_name():
  def function(W, x, *, key, params, feedback, self):
    return x @ W + key + params + feedback + self

  f = sbp.with_feedback(function, sbp.rndf())
  W, x = normal(1, (3, 2)), normal(2, (4, 3))
  names = dict.fromkeys(('key', 'params', 'feedback', 'self'), 0.5)
  R = f.init(KEY, W, x, **names)
  assert_same_bits(f.weights(W, R, x, **names), f.weights(W, R))
  assert_close(f(W, R, x, **names), x @ W + 2)
  assert 'product' in f.table(W, x, **names)


def test_shapes_are_enough_for_a_table():
  f, (params, _, x), _ = setup()
  assert f.table(*jax.eval_shape(lambda: (params, x))) == f.table(params, x)


def dots_and_convolutions(function, args):
  loss = lambda *args: zoo.squares(function(*args))
  gradient = jax.jit(jax.grad(loss, range(len(args)), allow_int=True))
  text = str(gradient.lower(*args).compile().as_text())
  return len(re.findall(r'\b(?:dot|convolution|custom-call)\(', text))


@pytest.mark.parametrize('name', ['OptimizedLSTM', 'experts, dispatched'])
def test_the_program_has_no_more_products_than_plain_jax(name):
  model = zoo.model(name)
  args = model.params, *model.args
  f = sbp.with_feedback(model.function, sbp.usf())
  asymmetric = lambda params, *args: f(params, None, *args)
  products = dots_and_convolutions(model.function, args)
  assert 0 < dots_and_convolutions(asymmetric, args) <= products


# --- Refusals ----------------------------------------------------------------


@jax.custom_vjp
def fused(x, W):
  return x @ W


fused.defvjp(
  lambda x, W: (x @ W, (x, W)), lambda xW, g: (g @ xW[1].T, xW[0].T @ g)
)


def gradient_step(W, x):
  return W - 0.1 * jax.grad(lambda W: jnp.sum((x @ W) ** 2))(W)


TWO_RULES = {'W': sbp.usf(), 'U': sbp.nusf()}
COMPLEX = jnp.complex128

# Function of W, U and x; the rules; the offenders; and the primitive that
# meets data, or that lost the weight before.
REFUSED = {
  'custom_vjp of data': (
    lambda W, U, x: fused(x @ U, W), sbp.usf(), 'W', 'custom_vjp_call'
  ),
  'qr': (
    lambda W, U, x: x @ jnp.linalg.qr(W)[0], sbp.usf(), 'W', 'dot_general'
  ),
  'sort': (lambda W, U, x: x @ jnp.sort(W), sbp.usf(), 'W', 'sort'),
  'Fourier transform': (
    lambda W, U, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(W[:1])),
    sbp.usf(), 'W', 'mul',
  ),
  'two at once': (
    lambda W, U, x: x @ jnp.sort(W) @ jnp.cumsum(U, 0),
    sbp.usf(), 'WU', 'dot_general',
  ),
  'MAML': (
    lambda W, U, x: x @ gradient_step(W, x), sbp.usf(), 'W', 'dot_general'
  ),
  'LoRA, merged': (
    lambda W, U, x: x @ (W + U[:, :1] @ U[:1]), sbp.usf(), 'WU', 'dot_general'
  ),
  'product of weights': (
    lambda W, U, x: x @ (W @ U), sbp.usf(), 'WU', 'dot_general'
  ),
  'hypernetwork': (
    lambda W, U, x: x @ (W * (x[:1] @ U)), sbp.usf(), 'W', 'dot_general'
  ),
  'cond of a weight or data': (
    lambda W, U, x: x @ lax.cond(x[0, 0] > 0, lambda: W, lambda: x[:3]),
    sbp.usf(), 'W', 'dot_general',
  ),
  'joined, two rules': (
    lambda W, U, x: x @ jnp.concatenate([W, U], 1), TWO_RULES, 'WU', 'concaten'
  ),
  'added, two rules': (
    lambda W, U, x: x @ (W + U), TWO_RULES, 'WU', 'add'
  ),
  'W + W.T with R': (
    lambda W, U, x: x @ (W + W.T), sbp.rndf(), 'W', 'add'
  ),
  'W + U with R': (lambda W, U, x: x @ (W + U), sbp.frsf(), 'WU', 'dot_gen'),
  'solve': (
    lambda W, U, x: jnp.linalg.solve(W, x.T), sbp.usf(), 'W', 'linear_solve'
  ),
  'complex': (
    lambda W, U, x: jnp.abs(x.astype(COMPLEX) @ W.astype(COMPLEX)),
    sbp.usf(), 'W', 'dot_general',
  ),
  'power': (
    lambda W, U, x: jnp.abs(x) ** jnp.abs(W[:1]), sbp.usf(), 'W', 'pow'
  ),
  'outer product without a fan-in': (
    lambda W, U, x: (x[:, :, None] * W[None]).sum(1), sbp.nusf(), 'W', 'mul'
  ),
  'no rule': (lambda W, U, x: x @ W @ U, {'U': sbp.usf()}, 'W', 'dot_general'),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_have_feedback_is_refused_and_can_be_excluded(name):
  function, rules, offenders, primitive = REFUSED[name]
  call = lambda params, x: function(params['W'], params['U'], x)
  f = sbp.with_feedback(call, rules)
  params = {name: normal(i, (3, 3)) for i, name in enumerate('WU')}
  feedback, x = f.init(KEY, params), normal(2, (4, 3))
  for refused in (
    f,
    jax.jit(f),
    lambda params, _, x: f.init(KEY, params, x),
    lambda params, _, x: f.table(params, x),
  ):
    with pytest.raises(sbp.FeedbackError) as error:
      refused(params, feedback, x)
    message = str(error.value)
    assert set(re.findall(r"'([WU])'", message)) == set(offenders)
    assert 'exclude=' in message
    line = function.__code__.co_firstlineno
    found = re.findall(
      rf'{primitive}\w* at \S*test_transform.py:(\d+)', message
    )
    assert found and all(0 <= int(each) - line < 4 for each in found), message
  rest = {'W': sbp.symmetric(), 'U': sbp.symmetric()}
  excluded = sbp.with_feedback(call, rest, exclude=tuple(offenders))

  @jax.jit
  def gradients(params, x):
    each = call, lambda params, x: excluded(params, None, x)
    squares = [lambda *args, f=f: jnp.sum(f(*args) ** 2) for f in each]
    return [jax.grad(square, (0, 1))(params, x) for square in squares]

  assert_same_bits(*gradients(params, x))


@pytest.mark.parametrize(
  'rules, exclude',
  [({'V': sbp.usf(), '': sbp.usf()}, ()), ({'^U$': sbp.usf()}, 'w')],
  ids=['rules', 'exclude'],
)
def test_an_expression_that_matches_nothing_is_refused(rules, exclude):
  f = sbp.with_feedback(plain, rules, exclude)
  _, (params, _, x), _ = setup()
  for call in (f.init, lambda _, params, *args: f(params, None, *args)):
    with pytest.raises(ValueError, match=r"'[Vw]' matches no .*'U', 'W'"):
      call(KEY, params, x)


def test_what_is_no_expression_is_refused():
  with pytest.raises(ValueError, match='None is not a regular expression'):
    sbp.with_feedback(plain, sbp.usf(), exclude=None)  # type: ignore


def test_a_state_that_is_missing_foreign_or_of_another_shape_is_refused():
  f, (params, feedback, x), _ = setup()
  other = sbp.with_feedback(plain, sbp.rndf(0.1)).init(KEY, params)
  larger = f.init(KEY, {**params, 'W': normal(1, (3, 5))})
  # One of the three numbers of a seed.
  scalar = {**feedback, 'U': jax.tree.map(lambda seed: seed[0], feedback['U'])}
  for state, message in (
    (None, "feedback of 'W', 'U' is missing"),
    ({**feedback, 'U': None}, "feedback of 'U' is missing"),
    ({**feedback, 'W': other['W']}, r"'W' was made by rndf\(sigma=0.1\)"),
    ([1], 'must be the tree that init returned .* Expected dict'),
    (params, "feedback of 'U' must be what init returned, not"),
    (scalar, r"'U' has shape \(\), but the weight has \(3, 3\)"),
    (larger, r"'W' has shape \(3, 5\), but the weight has \(3, 4\)"),
  ):
    for call in (f, jax.jit(f)):
      with pytest.raises(sbp.FeedbackError, match=message):
        call(params, state, x)


# --- V -----------------------------------------------------------------------


def used(functions, params, states, x):
  """V of functions that are linear in one row: the transposed Jacobians."""

  @jax.jit
  def run(params, states, x):
    pairs = zip(functions, states, strict=True)
    return [jax.jacrev(f, 2)(params, state, x).T for f, state in pairs]

  return run(params, states, x)


def asymmetric(function, rules):
  return [sbp.with_feedback(function, rule) for rule in rules]


def through_stack(W, x):
  return lax.scan(lambda x, W: (x @ W, None), x, W)[0]


KEPT = (sbp.frsf(0.3), sbp.rndf())  # V follows W and R, or R alone.
DRAWN = (sbp.brsf(0.3), *KEPT)


@pytest.mark.accelerator
def test_V_as_reported_is_V_as_used():
  """Also in a scan, where each layer has a V of its own (case F6)."""
  fs = asymmetric(through_stack, DRAWN)
  W, x = normal(1, (3, 4, 4)), normal(2, (4,))
  with jax.default_prng_impl('unsafe_rbg'):
    states = [f.init(jax.random.key(1), W) for f in fs]
    every = [f.weights(W, state) for f, state in zip(fs, states, strict=True)]
    actual = used(fs, W, states, x)
  for V, product in zip(every, actual, strict=True):
    assert_close(product, V[0] @ V[1] @ V[2])
    assert len(np.unique(np.abs(V))) == V.size


MASK = np.tri(4, 3, dtype=np.float64)
MASKS = {
  'where': lambda W: jnp.where(MASK > 0, W, 0),
  'set': lambda W: W.at[np.nonzero(MASK == 0)].set(0),
}


@pytest.mark.parametrize('mask', MASKS)
def test_V_is_0_where_the_weight_is_masked(mask):
  fs = asymmetric(lambda W, x: x @ MASKS[mask](W), KEPT)
  W = normal(1, (4, 3))
  states = [f.init(KEY, W) for f in fs]
  found = used(fs, W, states, normal(2, (4,)))
  for f, state, V in zip(fs, states, found, strict=True):
    assert_same_bits(V, MASK * f.weights(W, state))


SCALED = {
  'a row times W': lambda W, g: g * W,
  'W times a column': lambda W, g: W * g[:, None],
  'W over a row': lambda W, g: W / (1 + g**2),
  'W times a number': lambda W, g: W * g[0, 0],
  'weight normalization': lambda W, g: (
    g * W / jnp.sqrt((W**2).sum(0, keepdims=True))
  ),
}


@pytest.mark.parametrize('name', SCALED)
def test_a_scale_of_a_weight_gives_no_R(name):
  fs = asymmetric(lambda p, x: x @ SCALED[name](p['W'], p['g']), KEPT)
  params = {'W': normal(1, (3, 3)), 'g': normal(2, (1, 3)) + 9}
  params['g'] = params['g'].reshape(-1) if 'column' in name else params['g']
  x = normal(3, (3,))
  states = [f.init(KEY, params, x) for f in fs]  # Without an R of g.
  found = used(fs, params, states, x)
  for f, rule, state, V in zip(fs, KEPT, states, found, strict=True):
    rows = {row.path: row for row in f.rows(params, x)}
    assert rows['g'].rule is None and rows['g'].use == 'scale'
    assert rows['W'].use == 'product'
    assert_same_bits(state, {'W': f.init(KEY, params)['W'], 'g': None})
    expected = rule.weights(
      SCALED[name](params['W'], params['g']),
      rule.expand(params['W'], state['W'][rule.state_name]),
    )
    assert_close(V, expected)


@pytest.mark.parametrize('meet', [jnp.add, jnp.multiply])
def test_noise_per_example_meets_one_R(meet):
  """vmap leaves the weight an axis of size 1, which the noise has not."""

  def function(W, keys, x):
    def one(key, x):
      noise = jax.random.bernoulli(key, 0.5, W.shape).astype(W.dtype)
      return x @ meet(W, noise)

    return jax.vmap(one)(keys, x)

  f = sbp.with_feedback(function, sbp.rndf())
  W, x, keys = normal(1, (4, 3)), normal(2, (5, 4)), jax.random.split(KEY, 5)
  R = f.init(KEY, W, keys, x)
  V, g = f.weights(W, R), normal(3, (5, 3))
  dx = jax.grad(lambda x: (f(W, R, keys, x) * g).sum())(x)
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, W.shape))(keys)
  V = V[None] * kept.astype(V.dtype) if meet is jnp.multiply else V[None]
  assert_close(dx, (g[:, None] * V).sum(-1))


# Kernels that contract other axes than those before the last.
FANS = {
  'ConvTranspose, transposed kernel': 27,
  'nn.vmap': 3,
  'nnx Einsum': 3,
  'eqx Conv2d': 27,
  'ragged_dot': 3 * 3,
  'tied and transposed': 3 * 3,
}


@pytest.mark.parametrize('name', FANS)
def test_the_fan_in_of_nusf_is_that_of_the_product(name):
  """dx of nuSF is dx of uSF over the fan-in of each layer on the way."""
  with jax.numpy_dtype_promotion('standard'):
    model = zoo.model(name)

    def dx(rule):
      f = sbp.with_feedback(model.function, rule)

      def total(params, *args):
        y = jax.tree.leaves(f(params, None, *args))[0]
        return jnp.sum(y * normal(9, y.shape))

      return jax.grad(total, len(model.args))(model.params, *model.args)

    both = jax.jit(lambda: (dx(sbp.usf()), dx(sbp.nusf())))()
  assert_close(FANS[name] * both[1], both[0])


def test_what_meets_constants_alone_is_in_the_table():
  """A generator: its first input is noise. And a penalty beside the output."""

  def function(params, key):
    h = jnp.tanh(jax.random.normal(key, (4, 3)) @ params['W'])
    return h @ params['U'], ((params['P'].T @ params['P']) ** 2).sum()

  f = sbp.with_feedback(function, sbp.usf())
  params = {name: normal(i, (3, 3)) for i, name in enumerate('WUP')}
  uses = {row.path: row.use for row in f.rows(params, KEY)}
  assert uses == {'W': 'input', 'U': 'product', 'P': 'returned'}
  total = lambda f: jax.grad(lambda params: sum(map(jnp.sum, f(params))))
  signs = {**params, 'U': jnp.sign(params['U'])}
  actual = total(lambda params: f(params, None, KEY))(params)
  expected = total(lambda params: function({**params, 'U': signs['U']}, KEY))
  assert_close(actual['W'], expected(params)['W'])
  assert_close(actual['P'], expected(params)['P'])


def test_paths_that_read_alike_have_draws_of_their_own():
  """Case F7."""
  W = normal(1, (4, 4))
  params = {'layer1': {'10': W}, 'layer11': {'0': W}, 'layer': {'110': W}}
  f = sbp.with_feedback(lambda params, x: x, sbp.rndf())
  V = jax.tree.leaves(f.weights(params, f.init(KEY, params)))
  assert len({np.asarray(each).tobytes() for each in V}) == 3
