"""Unmodified NNX models: all but the backward pass is plain Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from symjax_bp.nnx import Feedback, feedback_weights
from tests import nnx_models
from tests.cases import assert_same_bits, normal
from tests.nnx_models import (
  MLP,
  MODELS,
  SEQUENCES,
  Autoencoder,
  Changing,
  Methods,
  X,
  differ,
  fast_jit,
  gradient,
  params,
  plain_arrays,
  state,
)


def convert(model, rules=None, exclude=(), **kwargs):
  rngs = nnx.Rngs(feedback=1)
  rules = rules or sbp.usf()
  return asymmetric.with_feedback(model, rules, exclude, rngs=rngs, **kwargs)


@pytest.mark.parametrize('make, x', MODELS.values(), ids=MODELS)
def test_all_but_the_backward_pass_is_plain_flax(make, x):
  plain = make(nnx.Rngs(0))
  random = convert(plain, sbp.rndf())
  models = {
    'plain': plain,
    'twin': asymmetric.plain_twin(random),
    'symmetric': convert(plain, sbp.symmetric()),
    'random': random,
  }
  graphs, states = {}, {}
  for name, model in models.items():
    graphs[name], states[name] = nnx.split(model)

  def run(states):
    results = {}
    for name, graph in graphs.items():
      model = nnx.merge(graph, states[name], copy=True)
      before, dW = state(model), gradient(model, x)
      results[name] = before, model(x), state(model), dW
    return results

  results = fast_jit(run)(states)
  expected = results['plain']
  assert_same_bits(results['twin'], expected)
  assert_same_bits(results['symmetric'], expected)
  assert_same_bits(results['random'][:3], expected[:3])
  assert differ(results['random'][3], expected[3])
  assert isinstance(random, type(plain))
  rows = asymmetric.layer_rules(random, x)
  assert all(row.rule == sbp.rndf() and 'product' in row.use for row in rows)
  V = feedback_weights(random)
  assert {row.path: row.shape for row in rows} == jax.tree.map(jnp.shape, V)
  firsts = [each.ravel()[:4] for each in V.values()]
  assert len(np.unique(firsts, axis=0)) == len(V), 'each has its own draw'


def closed_form(W, U, V_dec, x):
  """Gradients of sum(y^2) in W and U, y = tanh(x W) U^T, by V of U."""
  h = jnp.tanh(x @ W)
  g = 2 * h @ U.T
  return x.T @ (g @ V_dec * (1 - h**2)), g.T @ h


CALLS = {
  'module': lambda model, x: model(x),
  'by hand': lambda model, x: model.by_hand(x),
  'from outside': lambda model, x: model.dec(nnx.tanh(model.enc(x))),
}


@pytest.mark.parametrize('rule', [sbp.usf(), sbp.rndf()], ids=str)
@pytest.mark.parametrize(
  'call, tied',
  [('module', True), ('module', False), ('by hand', True)]
  + [('from outside', True)],
)
def test_feedback_follows_a_shared_weight(call, tied, rule):
  model = convert(Autoencoder(nnx.Rngs(0), tied), rule)
  W, U = model.enc.kernel[...], model.dec.kernel[...]
  V = feedback_weights(model)
  assert list(V) == (['dec/kernel'] if tied else ['dec/kernel', 'enc/kernel'])
  dW, dU = closed_form(W, U, V['dec/kernel'], X)
  expected = [dW + dU] if tied else [dU, dW]
  actual = jax.tree.leaves(gradient(model, X, call=CALLS[call]))
  for a, b in zip(actual, expected, strict=True):
    # Sums of at most 5 products of float32.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


METHODS = {
  'private': lambda model, x: model._private(x),
  'partialmethod': lambda model, x: -model.negative(x),
  'generator': lambda model, x: list(model.stream(x))[-1],
  'operator': lambda model, x: model @ x,
  'rematted': lambda model, x: model.rematted(x),
  'cond': lambda model, x: model.branched(x),
  'jitted from outside': nnx.jit(lambda model, x: model(x)),
  'rematted from outside': nnx.remat(lambda model, x: model._private(x)),
}


@pytest.mark.parametrize('call', METHODS.values(), ids=METHODS)
def test_every_kind_of_method_is_asymmetric(call):
  """The products by hand too: usf is a model whose head is sign(W) in dx."""
  model = convert(Methods(nnx.Rngs(0)))
  model.body.bias[...] = jnp.zeros(5)
  W, head = model.body.kernel[...], model.head.kernel[...]
  h = jnp.tanh(X @ W)
  g = 2 * h @ head
  dW = X.T @ (g @ jnp.sign(head).T * (1 - h**2))
  actual = gradient(model, X, call=call)['body']['kernel']
  np.testing.assert_allclose(actual, dW, rtol=1e-5, atol=1e-5)


def described(model):
  """All that a model is: {path: attribute}, without feedback."""
  found = {}
  for path, node in nnx.iter_graph(model):
    if 'feedback' in path or '_pytree__' in str(path):
      continue
    if isinstance(node, nnx.Variable):
      node = plain_arrays(node.get_value())
    if not isinstance(node, (nnx.Pytree, list)):
      found[path] = node
  return found


@pytest.mark.parametrize('transform', [lambda f: f, nnx.jit], ids=['eager', ''])
def test_a_call_changes_what_it_changes_in_plain_flax(transform):
  plain = Changing(nnx.Rngs(0))
  model = convert(plain)
  call = transform(lambda model, x: model(x))
  for _ in range(2):
    expected, actual = call(plain, X), call(model, X)
    # Compiled programs of two models may round in other places.
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = described(model), described(plain)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
      if isinstance(value, (jax.Array, dict, tuple)):
        pairs = map(jax.tree.leaves, (ours[path], value))
        for a, b in zip(*pairs, strict=True):
          np.testing.assert_allclose(a, b, 1e-5, 1e-6, err_msg=str(path))
      else:
        assert ours[path] == value, path
  assert model.calls == 2 and model.items[0] is model.body
  assert model.late.layers[1] is model.head and model.count == 2


def test_modules_come_back_as_themselves():
  class Registry(MLP):
    def __getitem__(self, name):
      return getattr(self, name)

    def both(self, layer):
      return {'head': nnx.Sequential(self.head), 'layer': layer}

  model = convert(Registry(nnx.Rngs(0)))
  assert model['head'] is model.head
  made = model.both(model.body)
  assert made['head'].layers[0] is model.head and made['layer'] is model.body
  made['head'].note = 'can be changed'
  assert made['head'](normal(0, (1, 5))).shape == (1, 2)


def test_arguments_may_be_modules():
  class Student(MLP):
    def imitate(self, x, teacher, rngs):
      noise = rngs.noise.normal((4, 2))
      return self(x) - teacher(x) + noise

  plain = Student(nnx.Rngs(0))
  model, teacher = convert(plain), convert(MLP(nnx.Rngs(1)), sbp.nusf())

  def loss(model, teacher, rngs):
    return (model.imitate(X, teacher, rngs) ** 2).sum()

  def apart(model, teacher, rngs):
    noise = rngs.noise.normal((4, 2))
    return ((model(X) - teacher(X) + noise) ** 2).sum()

  rngs = [nnx.Rngs(noise=0) for _ in range(2)]
  actual, expected = (
    nnx.grad(f, argnums=(0, 1))(model, teacher, each)
    for f, each in zip((loss, apart), rngs, strict=True)
  )
  for a, b in zip(actual, expected, strict=True):
    assert_same_bits(nnx.to_pure_dict(a), nnx.to_pure_dict(b))
  assert rngs[0].noise.count[...] == rngs[1].noise.count[...] == 1
  # Plain arguments stay plain.
  plain = MLP(nnx.Rngs(1))
  _, dW = nnx.grad(loss, argnums=(0, 1))(model, plain, nnx.Rngs(noise=0))
  _, same = nnx.grad(apart, argnums=(0, 1))(model, plain, nnx.Rngs(noise=0))
  assert_same_bits(nnx.to_pure_dict(dW), nnx.to_pure_dict(same))


def test_a_function_jitted_once_serves_inside_and_outside():
  """What JAX keeps of a plain call inside is not used for one from outside."""
  apply = nnx.jit(lambda layer, x: layer(x))

  class Jitted(MLP):
    def __call__(self, x):
      return apply(self.head, self.encode(x))

  model = convert(Jitted(nnx.Rngs(0)))
  h, V = model.encode(X), jnp.sign(model.head.kernel[...])
  for _ in range(2):
    model(X)
    dx = nnx.grad(lambda layer, h: apply(layer, h).sum(), argnums=1)
    np.testing.assert_allclose(dx(model.head, h), jnp.ones((4, 2)) @ V.T)


def test_modes_views_and_caches():
  plain = nnx.MultiHeadAttention(2, 6, 6, decode=True, rngs=nnx.Rngs(0))
  both = plain, convert(plain)
  for model in both:
    model.init_cache(SEQUENCES.shape)
  for i in range(3):
    y, same = (model(SEQUENCES[:, i : i + 1]) for model in both)
    assert_same_bits(same, y)
  assert_same_bits(*map(state, both))
  assert both[1].cache_index[...] == 3
  views = [nnx.view(model, decode=False) for model in both]
  assert_same_bits(views[1](SEQUENCES), views[0](SEQUENCES))
  assert both[1].decode and not views[1].decode
  model = convert(nnx_models.CNN(nnx.Rngs(0)))
  model.eval()
  before = state(model)
  model(nnx_models.IMAGES)
  assert_same_bits(state(model), before)
  model.train()
  assert not model.dropout.deterministic


def test_intermediates_are_those_of_plain_flax():
  class Sowing(MLP):
    def __call__(self, x):
      return self.head(self.encode(x))

    def encode(self, x):
      h = self.perturb('dh', super().encode(x))
      self.sow(nnx.Intermediate, 'h', h)
      return h

  plain = Sowing(nnx.Rngs(0))
  kinds = nnx.Perturbation, nnx.Intermediate
  results = []
  for model in (plain, convert(plain, sbp.symmetric())):
    outputs = nnx.capture(model, *kinds, method_outputs=nnx.Intermediate)
    y, perturbed, captured = outputs(X)

    def loss(model, perturbed):
      return (nnx.capture(model, init=perturbed)(X) ** 2).sum()

    wrt = nnx.DiffState(1, nnx.Perturbation)
    dh = nnx.grad(loss, argnums=wrt)(model, perturbed)
    results.append([y, *map(nnx.to_pure_dict, (captured, dh))])
  assert_same_bits(results[1], results[0])
  assert results[1][2]['dh'].any()
  assert results[1][1].keys() == {'__call__', 'encode', 'h', 'body', 'head'}


def test_state_axes_need_not_name_feedback():
  axes = nnx.StateAxes({nnx.Param: 0, ...: None})
  make = lambda rngs: nnx.Linear(3, 3, rngs=rngs)
  for rule in (sbp.usf(), sbp.rndf(), sbp.brsf()):
    models = [convert(nnx_models.Stack(make, each), rule) for each in (axes, 0)]
    a, b = (gradient(model, X) for model in models)
    assert_same_bits(a, b)


def test_linen_wraps_asymmetric_nnx():
  for make in (
    lambda rngs: asymmetric.Linear(3, 2, feedback=sbp.rndf(), rngs=rngs),
    lambda rngs: asymmetric.with_feedback(
      nnx.Linear(3, 2, rngs=rngs), sbp.rndf(), rngs=rngs
    ),
  ):
    model = nnx.bridge.to_linen(make)
    variables = model.init(jax.random.key(0), X)
    (V,) = jax.tree.leaves(variables['Feedback'])
    for seed in (0, 1):
      rngs = {'params': jax.random.key(seed)}
      dx = jax.grad(lambda x, rngs=rngs: model.apply(variables, x, rngs=rngs).sum())
      np.testing.assert_allclose(dx(X), jnp.ones((4, 2)) @ V.T, rtol=1e-6)


def test_a_linen_model_with_feedback_goes_through_ToNNX():
  model = sbp.with_feedback(nn.Sequential([nn.Dense(4), nn.Dense(2)]), sbp.frsf())
  rngs = nnx.Rngs(params=0, feedback=1)
  model = nnx.bridge.ToNNX(model, rngs=rngs).lazy_init(X)
  assert_same_bits(gradient(model, X), gradient(model, X))


class Lazy(MLP):
  def __init__(self, rngs):
    super().__init__(rngs)
    self.late = nnx.data(None)

  def __call__(self, x):
    if self.late is None:
      self.late = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    return self.late(super().__call__(x))


class Inner(MLP):
  def __call__(self, x):
    return nnx.grad(lambda model: (MLP.__call__(model, x) ** 2).sum())(self)


class Array(MLP):
  def __call__(self, x):
    self.total = getattr(self, 'total', jnp.zeros(())) + x.sum()
    return super().__call__(x)


def called_twice(model):
  model(X)
  model(X)


def with_a_new_head(model):
  model.head = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
  model(X)


@pytest.mark.parametrize(
  'kind, call, message',
  [
    (Lazy, called_twice, "'late/kernel' .* matches none of the rules"),
    (MLP, with_a_new_head, "'head/kernel' .* matches none of the rules"),
    (Inner, called_twice, 'plain backpropagation inside the function'),
    (Array, called_twice, "'total' counts as a constant.*nnx.Variable"),
  ],
)
def test_nothing_falls_back_to_backpropagation_silently(kind, call, message):
  model = convert(kind(nnx.Rngs(0)))
  with pytest.raises(ValueError, match=message):
    call(model)


def test_rules_by_path_twins_and_tables():
  plain = nnx_models.CNN(nnx.Rngs(0))
  rules = {'conv': sbp.usf(), r'layers/\d': sbp.rndf()}
  model = convert(plain, rules, exclude='layers/1')
  assert asymmetric.feedback_table(model).splitlines() == [
    'weight           shape         feedback               use',
    'conv/kernel      (3, 3, 2, 4)  usf()',
    'layers/0/kernel  (36, 8)       rndf()',
    'layers/1/kernel  (8, 3)        plain backpropagation  not followed',
    '2 of 3 weights with feedback: 360 of 384 parameters',
  ]
  table = asymmetric.feedback_table(model, nnx_models.IMAGES).splitlines()
  uses = [line.split('  ')[-1].strip() for line in table[1:-1]]
  assert uses == ['product', 'product', 'excluded']
  for other in (asymmetric.plain_twin(model), plain):
    table = asymmetric.feedback_table(other, nnx_models.IMAGES)
    assert table.splitlines()[-1].startswith('0 of 3 weights with feedback')
  again = asymmetric.with_feedback(model, sbp.symmetric())
  rows = asymmetric.layer_rules(again)
  assert [row.rule for row in rows] == [sbp.symmetric()] * 3
  assert_same_bits(params(again), params(plain))


class Partly(nnx.Module):
  """A plain model, some of whose layers are asymmetric."""

  def __init__(self):
    rngs = nnx.Rngs(0, feedback=1)
    ours = asymmetric.Linear(3, 4, feedback=sbp.usf(), rngs=rngs)
    mlp = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), ours)
    self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs), mlp])
    self.head = convert(nnx.Linear(4, 2, rngs=rngs), sbp.rndf())

  @nnx.jit
  def __call__(self, x):
    for block in self.blocks:
      x = nnx.tanh(block(x))
    return self.head(x)


def test_alignment_measures_the_V_that_was_used():
  model = Partly()
  before = state(model)
  paths = ['blocks/1/layers/1/kernel', 'head/kernel']
  for _ in range(2):  # Also when JAX has traced the model before.
    rows = asymmetric.layer_rules(model, X)
    assert [row.path for row in rows if row.rule] == paths
    measure = nnx.jit(
      lambda model: asymmetric.layer_alignment(
        model, lambda y: (y**2).sum(), X
      )
    )
    aligned = measure(model)
    assert list(aligned) == paths
    model(X)
  V, W = feedback_weights(model), params(model)
  pairs = {
    paths[0]: W['blocks'][1]['layers'][1]['kernel'],
    paths[1]: W['head']['kernel'],
  }
  for path, W in pairs.items():
    row = aligned[path]
    ratio = np.linalg.norm(V[path]) / np.linalg.norm(W)
    np.testing.assert_allclose(row.norm_ratio, ratio, rtol=1e-5)
    same = np.mean(np.sign(W) == np.sign(V[path]))
    np.testing.assert_allclose(row.concordance, same, rtol=1e-6)
  # Nothing is between the last layer and the loss.
  assert aligned[paths[1]].update_angle == 0 < aligned[paths[0]].update_angle
  assert_same_bits(state(model), before)


def named_feedback(rngs):
  model = MLP(rngs)
  model.body.feedback = 'taken'
  return model


@pytest.mark.parametrize(
  'call, error, message',
  [
    (lambda m: asymmetric.with_feedback(m, 'uSF'), TypeError, "not 'uSF'"),
    (lambda m: asymmetric.with_feedback(m, sbp.rndf()), ValueError,
     r'rngs must be given for rndf\(\)'),
    (lambda m: asymmetric.with_feedback(m, sbp.rndf(), rngs=nnx.Rngs(other=0)),
     ValueError, r'rngs must be given for rndf\(\)'),
    (lambda m: asymmetric.with_feedback(m, sbp.usf(), rngs=0), TypeError,
     r'rngs must be an nnx.Rngs, for instance .*, or None, not 0\.'),
    (lambda m: asymmetric.with_feedback(m, sbp.usf(), rngs=nnx.Rngs(0).params),
     TypeError, 'rngs must be an nnx.Rngs'),
    (lambda m: convert(m, {'body': sbp.usf()})(X), ValueError,
     "'head/kernel' .* matches none of the rules"),
    (lambda m: convert(m, {'x': sbp.usf(), '': sbp.usf()}), ValueError,
     "'x' matches no parameter; their paths are .*'body/kernel'"),
    (lambda m: convert(m, exclude='decoder'), ValueError,
     "'decoder' matches no parameter"),
    (lambda m: convert(nnx.bridge.ToNNX(nn.Dense(2))), ValueError,
     'matches no parameter'),
    (lambda m: asymmetric.with_feedback(jnp.sum, sbp.usf()), TypeError,
     'model must be an nnx.Module'),
    (lambda m: asymmetric.Linear(2, 3, feedback=1, rngs=nnx.Rngs(0)),
     TypeError, 'not 1'),
    (lambda m: convert(named_feedback(nnx.Rngs(0))), ValueError,
     'Linear has an attribute called feedback'),
    (lambda m: asymmetric.layer_alignment(m, jnp.sum, X), ValueError,
     'no weight with feedback'),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
  with pytest.raises(error, match=message):
    call(MLP(nnx.Rngs(0)))
