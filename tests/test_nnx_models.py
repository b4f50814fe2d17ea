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
from symjax_bp.transform import by_path
from tests.cases import assert_same_bits, differ
from tests.nnx_models import (
  CNN,
  IMAGES,
  MLP,
  MODELS,
  SEQUENCES,
  Autoencoder,
  Methods,
  Net,
  Noisy,
  Stack,
  X,
  gradient,
  gradient_and_output,
  params,
  plain_arrays,
  state,
)


def convert(model, rules=None, exclude=(), seed=1):
  rngs = nnx.Rngs(feedback=seed)
  rules = rules or sbp.usf()
  return asymmetric.with_feedback(model, rules, exclude, rngs=rngs)


@pytest.mark.parametrize('make, x', MODELS.values(), ids=MODELS)
def test_all_but_the_backward_pass_is_plain_flax(make, x):
  plain = make(nnx.Rngs(0))
  symmetric, random = (convert(plain, r()) for r in (sbp.symmetric, sbp.rndf))
  models = plain, asymmetric.without_feedback(random), symmetric, random
  graphs, states = zip(*map(nnx.split, models), strict=True)

  def run(states):
    for graph, each in zip(graphs, states, strict=True):
      model = nnx.merge(graph, each, copy=True)
      dW, y = gradient_and_output(model, x)
      yield dW, y, state(model)

  plainly, *same, randomly = jax.jit(lambda *a: list(run(*a)))(states)
  assert_same_bits(same, [plainly] * 2)
  assert_same_bits(randomly[1:], plainly[1:])
  assert differ(randomly[0], plainly[0])
  assert isinstance(random, type(plain))
  assert_same_bits(state(random), state(plain))
  rows = asymmetric.layer_rules(random, x)
  # In newer versions of Flax, the scales of WeightNorm are parameters.
  rows = [row for row in rows if row.use != 'scale']
  assert all(row.rule == sbp.rndf() and 'product' in row.use for row in rows)
  V = feedback_weights(random, x)
  assert {row.path: row.shape for row in rows} == jax.tree.map(jnp.shape, V)
  firsts = [each.ravel()[:4] for each in V.values()]
  assert len(np.unique(firsts, axis=0)) == len(V), 'each has its own draw'


CALLS = {
  'module': lambda model, x: model(x),
  'by hand': lambda model, x: model.by_hand(x),
  'from outside': lambda model, x: model.dec(nnx.tanh(model.enc(x))),
}


@pytest.mark.parametrize(
  'call, tied', [('module', False), *((name, True) for name in CALLS)]
)
def test_feedback_follows_a_shared_weight(call, tied):
  """Gradients of sum(y^2), y = tanh(x W) U^T, with V of U; U = W if tied."""
  model = convert(Autoencoder(nnx.Rngs(0), tied), sbp.brsf())
  W, U = model.enc.kernel[...], model.dec.kernel[...]
  V = feedback_weights(model)
  assert list(V) == (['dec/kernel'] if tied else ['dec/kernel', 'enc/kernel'])
  kept = jax.tree.leaves(state(model, Feedback))  # One, to learn or to redraw.
  assert len(kept) == len(V)
  h = jnp.tanh(X @ W)
  g = 2 * h @ U.T
  dW, dU = X.T @ (g @ V['dec/kernel'] * (1 - h**2)), g.T @ h
  actual = jax.tree.leaves(gradient(model, X, call=CALLS[call]))
  for a, b in zip(actual, [dW + dU] if tied else [dU, dW], strict=True):
    # Sums of at most 5 products of float32.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def second(stream):
  next(stream)
  return next(stream)


METHODS = {
  'private': lambda model, x: model._private(x),
  'partialmethod': lambda model, x: -model.negative(x),
  'generator': lambda model, x: second(model.stream(x)),
  'operator': lambda model, x: model @ x,
  'reflected': lambda model, x: x * model,
  'rematted': lambda model, x: model.rematted(x),
  'cond': lambda model, x: model.branched(x),
}


@pytest.mark.parametrize('call', METHODS.values(), ids=METHODS)
def test_products_by_hand_are_asymmetric_in_every_kind_of_method(call):
  model = convert(Methods(nnx.Rngs(0)))
  model.body.bias[...] = jnp.zeros(5)
  W, head = model.body.kernel[...], model.head.kernel[...]
  h = jnp.tanh(X @ W)
  dW = X.T @ (2 * h @ head @ jnp.sign(head).T * (1 - h**2))
  actual = gradient(model, X, call=call)['body']['kernel']
  np.testing.assert_allclose(actual, dW, rtol=1e-5, atol=1e-5)


class Changing(MLP):
  """Changes itself in all ways."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.twin = nnx.Linear(3, 5, rngs=rngs)
    self.seen = nnx.Variable({'sum': jnp.zeros(3)})
    self.items, self.head.extra = nnx.data([self.body]), 'gone'
    self.count, self.late = jnp.array(0), nnx.data(None)

  def __call__(self, x):
    y = super().__call__(x)
    self.calls = getattr(self, 'calls', 0) + 1
    self.count = self.count + 1
    self.body.bias[...] += 1
    self.seen['sum'] = self.seen['sum'] + x.sum(0)
    self.body, self.twin = self.twin, self.body
    self.items.append(self.body)
    if hasattr(self.head, 'extra'):
      del self.head.extra
    self.hidden = nnx.Intermediate((x, y))
    if self.late is None:
      self.late = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), self.head)
    return y


def described(model):
  """All that a model is: {path: attribute}, without feedback."""
  found = {}
  for path, node in nnx.iter_graph(model):
    if isinstance(node, nnx.Variable):
      node = plain_arrays(node.get_value())
    hidden = 'feedback' in path or '_pytree__' in str(path)
    if not hidden and not isinstance(node, (nnx.Pytree, list)):
      found[path] = node
  return found


@pytest.mark.parametrize('transform', [lambda f: f, nnx.jit], ids=['eager', ''])
def test_a_call_changes_what_it_changes_in_plain_flax(transform):
  plain = Changing(nnx.Rngs(0))
  model = convert(plain)
  call = transform(lambda model, x: model(x))
  for _ in range(2):
    # Compiled programs of two models may round in other places.
    np.testing.assert_allclose(call(model, X), call(plain, X), 1e-5, 1e-6)
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
  assert made['head'](jnp.ones((1, 5))).shape == (1, 2)


def test_a_copy_that_a_method_makes_has_the_feedback_of_the_original():
  class Target(MLP):
    def copied(self):
      return nnx.clone(self)

    def sync(self):
      self.twin = nnx.clone(self.head)

  model = convert(Target(nnx.Rngs(0)), sbp.brsf())
  for copied in (model.copied(), nnx.jit(Target.copied)(model)):
    assert_same_bits(feedback_weights(copied), feedback_weights(model))
    assert_same_bits(gradient(copied, X), gradient(model, X))
  model.sync()
  V = feedback_weights(model)
  assert_same_bits(V['twin/kernel'], V['head/kernel'])


@pytest.mark.parametrize('teacher', [convert, nnx.clone], ids=['', 'plain'])
def test_arguments_may_be_modules(teacher):
  class Student(MLP):
    def imitate(self, x, teacher, rngs):
      return self(x) - teacher(x) + rngs.noise.normal((4, 2))

  models = convert(Student(nnx.Rngs(0))), teacher(MLP(nnx.Rngs(1)))
  results = []
  for call in (Student.imitate, lambda model, *args: model.imitate(*args)):
    rngs = nnx.Rngs(noise=0)

    def loss(model, teacher, rngs, call=call):
      return (call(model, X, teacher, rngs) ** 2).sum()

    dW = nnx.grad(loss, argnums=(0, 1))(*models, rngs)
    assert rngs.noise.count[...] == 1
    results.append(list(map(nnx.to_pure_dict, dW)))
  # Called of its class it is as it is written: its parts are asymmetric.
  assert_same_bits(*results)


def test_a_function_jitted_once_serves_inside_and_outside():
  """What JAX keeps of a plain call inside is not used for one from outside."""
  apply = nnx.jit(lambda layer, x: layer(x))
  model = convert(
    Net(
      lambda m, x: apply(m.head, nnx.tanh(m.body(x))),
      body=nnx.Linear(3, 5, rngs=nnx.Rngs(0)),
      head=nnx.Linear(5, 2, rngs=nnx.Rngs(1)),
    )
  )
  h, V = jnp.ones((4, 5)), jnp.sign(model.head.kernel[...])
  for _ in range(2):
    model(X)
    dx = nnx.grad(lambda layer, h: apply(layer, h).sum(), argnums=1)
    np.testing.assert_allclose(dx(model.head, h), jnp.ones((4, 2)) @ V.T)


def test_modes_views_and_caches():
  plain = nnx.MultiHeadAttention(2, 6, 6, decode=True, rngs=nnx.Rngs(0))
  both = plain, convert(plain)
  for model in both:
    model.init_cache(SEQUENCES.shape)
  call = nnx.jit(lambda model, x: model(x))
  for i in range(3):
    assert_same_bits(*(call(model, SEQUENCES[:, i : i + 1]) for model in both))
  assert_same_bits(*map(state, both))
  assert both[1].cache_index[...] == 3
  views = [nnx.view(model, decode=False) for model in both]
  assert_same_bits(*(call(model, SEQUENCES) for model in views))
  assert both[1].decode and not views[1].decode
  model = convert(Noisy(nnx.Rngs(0)))
  model.eval()
  before = state(model)
  model(X)
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
  kinds, results = (nnx.Perturbation, nnx.Intermediate), []
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
  make = lambda rngs: nnx.Linear(3, 3, rngs=rngs)
  axes = nnx.StateAxes({nnx.Param: 0, ...: None})
  models = (convert(Stack(make, axes=a), sbp.brsf()) for a in (axes, 0))
  assert_same_bits(*(gradient(model, X) for model in models))


WRAPPED = {
  'layer': lambda rngs: asymmetric.Linear(3, 2, feedback=sbp.rndf(), rngs=rngs),
  'model': lambda rngs: asymmetric.with_feedback(
    nnx.Linear(3, 2, rngs=rngs), sbp.rndf(), rngs=rngs
  ),
}


@pytest.mark.parametrize('make', WRAPPED.values(), ids=WRAPPED)
def test_linen_wraps_asymmetric_nnx(make):
  model = nnx.bridge.to_linen(make)
  variables = model.init(jax.random.key(0), X)
  (V,) = jax.tree.leaves(variables['Feedback'])

  def loss(x, key):
    return model.apply(variables, x, rngs={'params': key}).sum()

  for seed in (0, 1):  # V is the stored one, whatever keys are given.
    dx = jax.grad(loss)(X, jax.random.key(seed))
    np.testing.assert_allclose(dx, jnp.ones((4, 2)) @ V.T, rtol=1e-6)


class Lazy(MLP):
  def __call__(self, x):
    if not hasattr(self, 'late'):
      self.late = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    return self.late(super().__call__(x))


class Inner(MLP):
  def __call__(self, x):
    return nnx.grad(lambda model: (MLP.__call__(model, x) ** 2).sum())(self)


class Array(MLP):
  def __call__(self, x):
    self.total = getattr(self, 'total', jnp.zeros(())) + x.sum()
    return super().__call__(x)


def with_a_new_head(model):
  model.head = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
  model(X)


@pytest.mark.parametrize(
  'kind, call, message',
  [
    (
      Lazy,
      lambda m: (m(X), m(X)),
      "'late/kernel' .* matches none of the rules",
    ),
    (MLP, with_a_new_head, "'head/kernel' .* matches none of the rules"),
    (Inner, lambda m: m(X), 'plain backpropagation inside the function'),
    (Array, lambda m: (m(X), m(X)), "'total' counts as a constant.*Variable"),
  ],
)
def test_nothing_falls_back_to_backpropagation_silently(kind, call, message):
  model = convert(kind(nnx.Rngs(0)))
  with pytest.raises(ValueError, match=message):
    call(model)


def test_rules_by_path_twins_and_tables():
  plain = CNN(nnx.Rngs(0))
  rules = {'conv': sbp.usf(), r'layers/\d': sbp.rndf()}
  model = convert(plain, rules, exclude='layers/1')
  assert asymmetric.feedback_table(model).splitlines() == [
    'weight           shape         feedback               use',
    'conv/kernel      (3, 3, 2, 4)  usf()',
    'layers/0/kernel  (36, 8)       rndf()',
    'layers/1/kernel  (8, 3)        plain backpropagation  not followed',
    '2 of 3 weights with a rule: 360 of 384 parameters',
  ]
  table = asymmetric.feedback_table(model, IMAGES)
  assert '2 of 3 weights with feedback: 360 of 384 parameters' in table
  rows = asymmetric.layer_rules(model, IMAGES)
  assert [row.use for row in rows] == ['product', 'product', 'excluded']
  for other in (asymmetric.without_feedback(model), plain):
    table = asymmetric.feedback_table(other, IMAGES).splitlines()
    assert table[-1].startswith('0 of 3 weights with feedback')
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
  model, loss = Partly(), lambda y: (y**2).sum()
  before, paths = state(model), ['blocks/1/layers/1/kernel', 'head/kernel']
  for _ in range(2):  # What JAX has traced before does not matter.
    model(X)
    rows = asymmetric.layer_rules(model, X)
    assert [row.path for row in rows if row.rule] == paths
  measure = lambda model: asymmetric.layer_alignment(model, loss, X)
  aligned = nnx.jit(measure)(model)
  assert list(aligned) == paths
  V, W = feedback_weights(model), by_path(params(model))
  for path, row in aligned.items():
    angle = sbp.metrics.alignment_angle(W[path], V[path])
    np.testing.assert_allclose(row.angle, angle, rtol=1e-5)
  # Nothing is between the last layer and the loss.
  assert aligned[paths[1]].update_angle == 0 < aligned[paths[0]].update_angle
  assert_same_bits(state(model), before)


def restored(model):
  model = convert(model, sbp.frsf())
  nnx.update(model, nnx.state(convert(model, sbp.rndf())))
  return model


def with_attribute(model):
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
    (lambda m: convert(m, {'x': sbp.usf(), '': sbp.usf()}), ValueError,
     "'x' matches no parameter; their paths are .*'body/kernel'"),
    (lambda m: convert(nnx.bridge.ToNNX(nn.Dense(2))), ValueError,
     'matches no parameter'),
    (lambda m: asymmetric.with_feedback(jnp.sum, sbp.usf()), TypeError,
     'model must be an nnx.Module'),
    (lambda m: asymmetric.Linear(2, 3, feedback=1, rngs=nnx.Rngs(0)),
     TypeError, 'not 1'),
    (lambda m: restored(m)(X), ValueError,
     r"'body/kernel' has feedback of frsf\(\) and rndf\(\)"),
    (lambda m: convert(with_attribute(m)), ValueError,
     'Linear has an attribute called feedback'),
    (lambda m: convert(nnx.Dict({'a/kernel': m.body.kernel,
                                 'a': nnx.Dict(kernel=m.head.kernel)})),
     ValueError, "two parameters have the path 'a/kernel': rename one"),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
  with pytest.raises(error, match=message):
    call(MLP(nnx.Rngs(0)))
