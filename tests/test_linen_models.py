"""Unmodified Linen models: what stays Flax's, and what uses V."""

import copy
import functools
import pickle
from collections.abc import Callable

import cloudpickle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import symjax_bp as sbp
from symjax_bp import linen
from tests.cases import assert_same_bits, differ, normal
from tests.linen_models import (
  KEY,
  MODELS,
  RNGS,
  Autoencoder,
  Outer,
  X,
  gradient,
  without_feedback,
)
from tests.nnx_models import MLP


@pytest.mark.parametrize('name', MODELS)
def test_all_but_the_backward_pass_is_plain_flax(name):
  model, x = MODELS[name]
  random = sbp.with_feedback(model, sbp.rndf())
  symmetric = sbp.with_feedback(model, sbp.symmetric())

  @jax.jit
  def run():
    results = []
    for each in (model, linen.without_feedback(random), symmetric, random):
      variables = each.init(KEY, x)
      y = each.apply(variables, x)
      results.append((variables, y, gradient(each, variables, x)))
    return results

  plain, twin, symmetric, asymmetric = run()
  assert_same_bits(twin, plain)
  assert_same_bits(symmetric, plain)
  assert_same_bits(without_feedback(asymmetric[0]), plain[0])
  assert_same_bits(asymmetric[1], plain[1])
  assert differ(asymmetric[2], plain[2])
  rows = linen.layer_rules(random, x)
  assert all(row.rule and 'product' in row.use for row in rows)
  states = jax.tree.leaves(asymmetric[0]['feedback'])
  assert sorted(row.shape for row in rows) == sorted(R.shape for R in states)
  values = [np.ravel(R)[:4] for R in states]
  assert len(np.unique(values, axis=0)) == len(rows), 'draws of their own'


class Noisy(nn.Module):
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
    x = nn.BatchNorm(not train, axis_name=self.axis_name)(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    self.sow('intermediates', 'hidden', x)
    noise = jax.random.normal(self.make_rng('noise'), x.shape)
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x + noise))


def test_statistics_keys_and_what_is_sown_are_those_of_flax():
  """Also where feedback or V is made on the way: the masks stay the same."""
  rngs = {'dropout': jax.random.key(1), 'noise': jax.random.key(2)}
  model = Outer(linen.with_feedback(Noisy(), sbp.brsf()))
  plain, keys = Outer(Noisy()), {'params': KEY, **rngs}

  @jax.jit
  def run():
    y, variables = model.init_with_output(keys, X)
    y_plain, given = plain.init_with_output(keys, X)
    pairs = [((y, without_feedback(variables)), (y_plain, given))]
    for mutable in ('batch_stats', ['batch_stats', 'feedback_weights'], True):
      expected = plain.apply(given, X, rngs=rngs, mutable=mutable)
      for start, key in ((variables, {}), (given, RNGS)):
        y, changed = model.apply(start, X, rngs=rngs | key, mutable=mutable)
        pairs.append(((y, without_feedback(changed)), expected))
    return pairs

  for actual, expected in run():
    assert_same_bits(actual, expected)


def test_init_works_where_it_works_in_flax():
  decoder = nn.MultiHeadDotProductAttention(num_heads=1, decode=True)
  model, x = linen.with_feedback(decoder, sbp.usf()), normal(0, (1, 5, 4))
  variables = decoder.init(KEY, x)
  assert_same_bits(model.init(KEY, x), variables)
  step = lambda model: model.apply(variables, x[:, :1], mutable='cache')
  assert_same_bits(*jax.jit(lambda: (step(model), step(decoder)))())
  keys = {'params': KEY, 'dropout': KEY, 'noise': KEY}
  model = linen.with_feedback(Noisy('devices'), sbp.usf())
  jax.eval_shape(model.init, keys, X)  # There is no such axis.
  # An argument that is no array steers the call.
  model = linen.with_feedback(Noisy(), sbp.usf())
  rows = linen.layer_rules(model, X, train=False)
  assert [row.use for row in rows] == ['product', 'product']


MODEL = linen.with_feedback(Autoencoder(), sbp.rndf())


def test_methods_and_bind():
  variables = MODEL.init(KEY, X)
  plain = Autoencoder().bind(without_feedback(variables))
  bound = MODEL.bind(variables)
  for name in ('encode', 'score'):
    y = getattr(plain, name)(X)
    assert_same_bits(getattr(bound, name)(X), y)
    for method in (name, getattr(Autoencoder, name)):
      assert_same_bits(MODEL.apply(variables, X, method=method), y)
  assert_same_bits(MODEL.init(KEY, X, method=Autoencoder.score), variables)
  assert_same_bits(nn.init(Autoencoder.score, MODEL)(KEY, X), variables)
  assert list(MODEL.init(KEY, X, method='encode')['feedback']) == ['enc']
  assert len(linen.layer_rules(MODEL, X, method='encode')) == 1
  expected = gradient(MODEL, variables, X)
  assert differ(expected, gradient(Autoencoder(), variables, X))
  for method in (Autoencoder.__call__, lambda model, x: model(x)):
    assert_same_bits(gradient(MODEL, variables, X, method=method), expected)
  assert_same_bits(gradient(MODEL, freeze(variables), X), freeze(expected))
  for call in (
    lambda variables: MODEL.bind(variables)(X),
    lambda variables: nn.apply(lambda model: model(X), MODEL)(variables),
  ):
    loss = lambda p, call=call: (call({**variables, 'params': p}) ** 2).sum()
    assert_same_bits(jax.grad(loss)(variables['params']), expected)


def test_summaries_and_intermediates():
  variables, wide = MODEL.init(KEY, X), {'width': 200}
  summary = MODEL.tabulate(KEY, X, console_kwargs=wide)
  assert nn.tabulate(MODEL, KEY, console_kwargs=wide)(X) == summary
  assert 'enc' in summary and 'kernel:rndf(): ' in summary
  for capture in (True, lambda module, name: name == 'encode'):
    options = {'capture_intermediates': capture, 'mutable': 'intermediates'}
    captured = MODEL.apply(variables, X, **options)
    plain = Autoencoder().apply(without_feedback(variables), X, **options)
    assert_same_bits(captured, plain)  # Case F19: each call once.


def test_copies_are_equal_and_one_static_argument_of_jit():
  traced = []

  @functools.partial(jax.jit, static_argnums=0)
  def apply(model, variables):
    traced.append(model)
    return model.apply(variables, X)

  variables, twin = MODEL.init(KEY, X), linen.without_feedback(MODEL)
  for model in (MODEL, twin):
    for again in (
      model,
      model.clone(),
      copy.copy(model),
      copy.deepcopy(model),
      pickle.loads(pickle.dumps(model)),
      cloudpickle.loads(cloudpickle.dumps(model)),
    ):
      assert again == model and hash(again) == hash(model)
      apply(again, variables)
  assert traced == [MODEL, twin]
  assert MODEL != linen.with_feedback(Autoencoder(), sbp.usf())


class Block(nn.Module):
  """An asymmetric layer and an asymmetric model, both linear."""

  @nn.compact
  def __call__(self, x, _=None):
    x = linen.Dense(5, use_bias=False, feedback=sbp.brsf(), name='layer')(x)
    plain = nn.Dense(5, use_bias=False)
    return linen.with_feedback(plain, sbp.rndf())(x), None


class Lifted(nn.Module):
  lift: str
  names: tuple[str, ...] = ('params', 'feedback', 'feedback_weights')

  @nn.compact
  def __call__(self, x):
    each = {
      'variable_axes': dict.fromkeys(self.names, 0),
      'split_rngs': dict.fromkeys(self.names, True),
    }
    if self.lift == 'scan':
      return nn.scan(Block, length=2, **each)()(x, None)[0]
    if self.lift == 'vmap':
      return nn.vmap(Block, in_axes=None, axis_size=2, **each)()(x)[0].sum(0)
    block = {'jit': nn.jit, 'remat': nn.remat}[self.lift](Block)
    return block(name='second')(block(name='first')(x)[0])[0]


@pytest.mark.parametrize('lift', ['scan', 'vmap', 'jit', 'remat'])
def test_lifted_transformations_around_asymmetric_modules(lift):
  model = Lifted(lift)

  @jax.jit
  def run():
    variables = model.init(KEY, X)
    V = linen.feedback_weights(model, variables, X)
    dx = jax.grad(lambda x: model.apply(variables, x).sum())(X)
    plain = linen.without_feedback(model).init(KEY, X)
    return (variables['params'], V, dx), plain['params']

  (params, V, dx), plain = run()
  assert_same_bits(params, plain)
  rows = linen.layer_rules(model, X)
  assert {row.path: row.shape for row in rows} == {
    path: leaf.shape for path, leaf in V.items()
  }
  layers, models = (
    jnp.concatenate(
      [v.reshape(-1, 5, 5) for path, v in V.items() if name in path]
    )
    for name in ('layer', 'Dense')
  )
  assert (layers[0] != layers[1]).all() and (models[0] != models[1]).all()
  first, second = models.mT @ layers.mT
  total = first + second if lift == 'vmap' else second @ first
  np.testing.assert_allclose(dx, jnp.ones((4, 5)) @ total, rtol=1e-4, atol=1e-6)


def test_lifts_that_would_lose_or_change_feedback_are_refused():
  message = r"layer'.*variable_axes={'feedback': 0}"
  with pytest.raises(ValueError, match=message):
    Lifted('scan', ('params',)).init(KEY, X)
  model = Lifted('scan', ('params', 'feedback'))
  variables = model.init(KEY, X)
  with pytest.raises(ValueError, match=r"layer/kernel'\] has no place: add"):
    linen.feedback_weights(model, variables, X)
  for norm, options in (
    (nn.WeightNorm, {}),
    (nn.SpectralNorm, {'update_stats': False}),
  ):
    model = norm(linen.Dense(5, feedback=sbp.rndf()))
    with pytest.raises(ValueError, match="instance' .* put with_feedback"):
      model.init(KEY, X, **options)


def test_an_asymmetric_cell_in_a_recurrent_layer():
  cell, x = nn.SimpleCell(5), X[:, None]
  asymmetric = linen.with_feedback(cell, sbp.rndf())
  assert asymmetric.features == 5
  each = ['params', 'feedback']
  split = dict.fromkeys(each, False)
  inside = nn.RNN(asymmetric, variable_broadcast=each, split_rngs=split)
  around = linen.with_feedback(nn.RNN(cell), sbp.rndf())
  variables = around.init(KEY, x)
  assert jax.tree.structure(inside.init(KEY, x)) == jax.tree.structure(
    variables
  )
  run = lambda: [gradient(model, variables, x) for model in (inside, around)]
  assert_same_bits(*jax.jit(run)())


JitDense = nn.jit(linen.Dense)


class Jitted(nn.Module):
  second: nn.Module

  @nn.compact
  def __call__(self, x):
    x = JitDense(5, feedback=self.second.feedback, name='first')(x)
    return self.second(x)


def test_nn_jit_keeps_no_trace_of_another_rule_and_hides_no_layer():
  usf = Jitted(JitDense(5, feedback=sbp.usf()))
  models = {
    sbp.usf(): usf,
    sbp.nusf(): linen.with_feedback(usf, sbp.nusf()),
    sbp.symmetric(): linen.with_feedback(usf, sbp.symmetric()),
    None: linen.without_feedback(usf),
  }
  variables, paths = usf.init(KEY, X), ['first/kernel', 'second/kernel']
  dW = {
    rule: jax.jit(gradient, static_argnums=0)(model, variables, X)
    for rule, model in models.items()
  }
  five = jax.tree.map(lambda g: 5 * g, dW[sbp.nusf()]['first']['kernel'])
  # Sums of five numbers, and one of five such sums.
  np.testing.assert_allclose(dW[sbp.usf()]['first']['kernel'], five, rtol=1e-5)
  assert_same_bits(dW[sbp.symmetric()], dW[None])
  assert differ(dW[sbp.usf()], dW[None])
  align = lambda: linen.layer_alignment(usf, variables, jnp.sum, X)
  for _ in range(2):
    for rule, model in models.items():
      rows = [(row.path, row.rule) for row in linen.layer_rules(model, X)]
      assert rows == [(path, rule) for path in paths]
    assert list(jax.eval_shape(align)) == paths


def test_the_outermost_with_feedback_wins():
  layers = nn.Sequential([MODEL, linen.Dense(5, feedback=sbp.frsf())])
  for model in (layers, linen.without_feedback(layers)):
    outer = linen.with_feedback(model, {'enc': sbp.usf(), '': sbp.nusf()})
    rules = [row.rule for row in linen.layer_rules(outer, X)]
    assert rules == [sbp.usf(), sbp.nusf(), sbp.nusf()]
    assert list(outer.init(KEY, X)) == ['params']
  assert list(linen.without_feedback(layers).init(KEY, X)) == ['params']


class Named(nn.Module):
  """Its layers are wrapped where they are made, and one of them is reused."""

  wrap: Callable[[nn.Module], nn.Module]

  @nn.compact
  def __call__(self, x):
    first = nn.Dense(5)
    x = self.wrap(nn.Dense(5, name='second'))(self.wrap(first)(x))
    return self.wrap(first)(first(nn.Dense(5)(x)))


class NamedInSetup(nn.Module):
  wrap: Callable[[nn.Module], nn.Module]

  def setup(self):
    self.first = nn.Dense(5)
    self.again = self.wrap(self.first)

  def __call__(self, x):
    return self.again(self.first(x))


@pytest.mark.parametrize('kind', [Named, NamedInSetup])
def test_inside_of_a_model_it_has_the_name_and_parameters_of_the_plain_one(
  kind,
):
  expected = kind(lambda layer: layer).init(KEY, X)
  assert_same_bits(kind(linen.without_feedback).init(KEY, X), expected)
  wrap = functools.partial(linen.with_feedback, rules=sbp.rndf())
  variables = kind(wrap).init(KEY, X)
  assert_same_bits(without_feedback(variables), expected)
  wrapped = ['Dense_0', 'second'] if kind is Named else ['first']
  assert list(variables['feedback']) == wrapped


class Given(nn.Module):
  layer: nn.Module

  @nn.compact
  def __call__(self, x):
    return linen.with_feedback(self.layer, sbp.usf())(x)


class Giving(nn.Module):
  def setup(self):
    self.first = nn.Dense(5)
    self.second = Given(self.first)

  def __call__(self, x):
    return self.second(self.first(x))


def test_a_layer_is_wrapped_in_the_module_that_has_it():
  assert list(Given(nn.Dense(5)).init(KEY, X)['params']) == ['layer']
  with pytest.raises(ValueError, match="model is 'first' of Giving: wrap it"):
    Giving().init(KEY, X)


class Sharing(nn.Module):
  def setup(self):
    self.encoder = nn.Dense(5)
    self.outer = linen.with_feedback(Outer(self.encoder), sbp.usf())

  def __call__(self, x):
    return self.outer(x) + self.encoder(x).sum()


class SharingInCall(nn.Module):
  @nn.compact
  def __call__(self, x):
    encoder = nn.Dense(5)
    x = encoder(x)
    return linen.with_feedback(Outer(encoder), sbp.usf())(x)


def test_an_asymmetric_model_in_another_module():
  encoder = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(4)])
  model = Outer(linen.with_feedback(encoder, {'^layers_': sbp.rndf()}))
  variables = model.init(KEY, X)
  assert_same_bits(without_feedback(variables), Outer(encoder).init(KEY, X))
  assert linen.feedback_table(model, X).splitlines() == [
    'weight                    shape   feedback               use',
    'detached/layers_0/kernel  (5, 4)  rndf()                 product',
    'detached/layers_2/kernel  (4, 4)  rndf()                 product',
    'Dense_0/kernel            (4, 3)  plain backpropagation  not followed',
    '2 of 3 weights with feedback: 36 of 48 parameters',
  ]
  with pytest.raises(ValueError, match="'detached/layers_0/kernel'.*missing"):
    model.apply({'params': variables['params']}, X)
  for sharing in (Sharing(), SharingInCall()):
    with pytest.raises(ValueError, match='model.detached is .*Wrap Sharing'):
      sharing.init(KEY, X)


@pytest.mark.filterwarnings('ignore:Found unknown module paths')
def test_the_bridges_of_nnx():
  """Case F8. (Flax warns of each variable that holds a dictionary.)"""
  model = linen.with_feedback(Autoencoder(), sbp.brsf())
  variables = model.init({'params': KEY, **RNGS}, X)
  bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0, feedback=1)).lazy_init(X)
  for collection in variables.values():
    for layer, leaves in collection.items():
      for name, leaf in leaves.items():
        getattr(bridged, layer)[name][...] = leaf
  for _ in range(2):  # Each has another key.
    gradients = nnx.grad(lambda bridged: (bridged(X) ** 2).sum())(bridged)
    actual = {
      name: nnx.to_pure_dict(gradients)[name] for name in ('enc', 'dec')
    }
    assert_same_bits(actual, gradient(model, variables, X))

  layer = nnx.bridge.to_linen(nnx.Linear, 5, 2)
  layer = linen.with_feedback(layer, sbp.brsf())
  variables = layer.init({'params': KEY, **RNGS}, X)
  W, pull_back = variables['params']['kernel'], jax.jacrev(layer.apply, 1)
  V, again = (pull_back(variables, X[0]).T for _ in range(2))
  assert_same_bits(V, again)
  assert differ(V, W)
  assert_same_bits(jnp.sign(V), jnp.sign(W))


@pytest.mark.filterwarnings('ignore:Found unknown module paths')
def test_an_nnx_model_in_a_linen_model():
  def bridged(rngs):
    return sbp.with_feedback(MLP(rngs), sbp.rndf(), rngs=rngs)

  plain, inner = (
    nn.Sequential([nn.Dense(3), nnx.bridge.to_linen(make)])
    for make in (MLP, bridged)
  )
  paths = ['layers_0/kernel', 'layers_1/body/kernel', 'layers_1/head/kernel']
  ruled = lambda model: {
    row.path: row.rule for row in linen.layer_rules(model, X)
  }
  usf = dict.fromkeys(paths, sbp.usf())
  assert ruled(linen.with_feedback(plain, sbp.usf())) == usf
  assert ruled(linen.with_feedback(inner, sbp.usf())) == usf
  assert ruled(linen.without_feedback(inner)) == dict.fromkeys(paths)
  rndf = dict.fromkeys(paths[1:], sbp.rndf())
  assert ruled(inner) == {paths[0]: None} | rndf
  variables = inner.init(KEY, X)
  aligned = linen.layer_alignment(inner, variables, jnp.sum, X)
  assert sorted(aligned) == paths[1:]
  params = {'params': variables['params']}
  models = (
    (linen.with_feedback(inner, sbp.usf()), linen.without_feedback(inner)),
    (linen.with_feedback(plain, sbp.usf()), plain),
  )
  run = lambda: [
    [gradient(model, given, X) for model in each]
    for each, given in zip(models, (variables, params), strict=True)
  ]
  assert_same_bits(*jax.jit(run)())


def test_a_linen_model_in_an_nnx_model():
  layers = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(3)])
  plain, inner = (
    nnx.Sequential(
      nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(X),
      nnx.Linear(3, 2, rngs=nnx.Rngs(1)),
    )
    for model in (layers, linen.with_feedback(layers, sbp.rndf()))
  )

  @nnx.jit
  def kernels(model):
    dW = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
    layers = nnx.to_pure_dict(dW)['layers']
    return layers[0]['layers_0']['kernel'], layers[1]['kernel']

  make = functools.partial(sbp.with_feedback, rules=sbp.usf())
  assert differ(kernels(inner), kernels(plain))
  assert_same_bits(kernels(sbp.nnx.without_feedback(inner)), kernels(plain))
  assert_same_bits(kernels(make(inner)), kernels(make(plain)))
  paths = ['layers/0/layers_0/kernel', 'layers/0/layers_2/kernel']
  for model in (inner, sbp.nnx.with_feedback(inner, sbp.usf())):
    rows = sbp.nnx.layer_rules(model, X)
    assert [row.path for row in rows if row.rule][:2] == paths
    assert [*sbp.nnx.layer_alignment(model, jnp.sum, X)][:2] == paths
  # And an NNX layer in the Linen model.
  inmost = nnx.bridge.to_linen(sbp.nnx.Linear, 4, 3, feedback=sbp.usf())
  bridged = nnx.bridge.ToNNX(nn.Sequential([nn.Dense(4), inmost]), nnx.Rngs(0))
  model = nnx.Sequential(bridged.lazy_init(X))
  paths = ['layers/0/layers_1/kernel']
  assert [*sbp.nnx.layer_alignment(model, jnp.sum, X)] == paths
