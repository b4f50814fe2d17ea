"""Which layer gets which rule, and what is refused or left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import symjax_bp as sbp
from symjax_bp import linen
from tests.cases import assert_same_bits, normal
from tests.linen_models import (
  CNN,
  KEY,
  RNGS,
  Custom,
  gradient,
  weights_used,
)


def test_rules_by_path():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(
    CNN(), {'Conv': sbp.rndf(), '^Dense_0$': sbp.usf(), '.*': sbp.symmetric()}
  )
  rules = {
    path: rule for path, (_, rule) in linen.layer_rules(model, x).items()
  }
  assert rules == {
    'Conv_0': sbp.rndf(), 'Dense_0': sbp.usf(), 'Dense_1': sbp.symmetric(),
  }  # fmt: skip
  variables = model.init(KEY, x)
  assert list(variables['feedback']) == ['Conv_0']
  V = weights_used(model, variables, x, RNGS)
  assert_same_bits(
    V['Dense_1'], {'kernel': variables['params']['Dense_1']['kernel']}
  )


def test_rules_by_path_change_just_the_layers_below():
  """A layer's V is seen by what comes before it, never by its own dW."""
  x = normal(0, (4, 6, 6, 2))
  variables = CNN().init(KEY, x)
  plain = gradient(CNN(), variables, x)
  last = linen.with_feedback(CNN(), {'Dense_1': sbp.usf(), '': sbp.symmetric()})
  actual = gradient(last, variables, x)
  assert_same_bits(actual['Dense_1'], plain['Dense_1'])
  for name in ('Dense_0', 'Conv_0'):
    assert not np.allclose(actual[name]['kernel'], plain[name]['kernel'])
  first = linen.with_feedback(CNN(), {'Conv': sbp.usf(), '': sbp.symmetric()})
  assert_same_bits(gradient(first, variables, x), plain)


@pytest.mark.parametrize(
  'rule, exclude, message',
  [
    ({'Conv_9': sbp.usf(), '': sbp.usf()}, (), r"'Conv_9' matches nothing.*"
     r"'Conv_0', 'Dense_0', 'Dense_1'"),
    ({'Conv_0': sbp.usf()}, (), "layer 'Dense_0' matches none of"),
    (sbp.usf(), 'Conv_7', "'Conv_7' matches nothing"),
  ],
)  # fmt: skip
def test_patterns_that_miss_are_errors(rule, exclude, message):
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), rule, exclude)
  with pytest.raises(ValueError, match=message):
    model.init(KEY, x)
  with pytest.raises(ValueError, match=message):
    model.apply(CNN().init(KEY, x), x)


class Tied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(5, 4)
    return embed.attend(nn.Dense(4)(embed(tokens)))


class LookUp(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(4)(nn.Embed(5, 4)(tokens))


TOKENS = jnp.array([[0, 1, 4]])


UNSUPPORTED = {
  'ConvLocal': (nn.ConvLocal(3, (2,)), normal(0, (2, 5, 3)), 'kernel'),
  'ConvTranspose': (nn.ConvTranspose(3, (2,)), normal(0, (2, 5, 3)), 'kernel'),
  'Einsum': (nn.Einsum((3, 4), 'bi,io->bo'), normal(0, (2, 3)), 'kernel'),
  'custom': (
    nn.Sequential([Custom(), nn.Dense(2)]), normal(0, (2, 3)), 'layers_0/W'
  ),
  'LSTM': (
    nn.RNN(nn.OptimizedLSTMCell(3)), normal(0, (2, 5, 3)), 'cell/(if|hf|ii)'
  ),
  'tied embedding': (Tied(), TOKENS, 'Embed_0/embedding'),
}  # fmt: skip


@pytest.mark.parametrize(
  'model, x, path', UNSUPPORTED.values(), ids=UNSUPPORTED
)
def test_weights_that_can_not_be_asymmetric_are_refused_by_name(model, x, path):
  asymmetric = linen.with_feedback(model, sbp.usf())
  with pytest.raises(ValueError, match=f"asymmetric: '.*{path}"):
    asymmetric.init(KEY, x)
  allowed = linen.with_feedback(model, sbp.usf(), exclude='.*')
  assert_same_bits(allowed.init(KEY, x), model.init(KEY, x))


class OwnProduct(nn.Dense):
  @nn.compact
  def __call__(self, x):
    W = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
    return x @ W


class LowRank(nn.Dense):
  """Adds a product of its own to that of the layer it is."""

  @nn.compact
  def __call__(self, x):
    normal = nn.initializers.normal()
    a = self.param('a', normal, (x.shape[-1], 2))
    b = self.param('b', normal, (2, self.features))
    return super().__call__(x) + x @ a @ b


class Activated(nn.Dense):
  @nn.compact
  def __call__(self, x):
    return jnp.tanh(super().__call__(x))


class Tree(nn.Module):
  container: type = dict

  @nn.compact
  def __call__(self, x):
    def init(key):
      return {'W': jax.random.normal(key, (x.shape[-1], 4))}

    if self.container is tuple:
      return nn.Dense(2)(x @ self.param('pair', lambda k: (init(k)['W'],))[0])
    return nn.Dense(2)(x @ self.param('tree', init)['W'])


@pytest.mark.parametrize(
  'model, message, rows',
  [
    (OwnProduct(3), "'', a OwnProduct, does not use its kernel as Dense", ['']),
    (LowRank(3), "LowRank has weights .* asymmetric: 'a' of", ['a', 'b']),
    (Tree(), "Tree has weights .* asymmetric: 'tree/W' of", ['tree/W']),
    (Tree(tuple), "Tree has weights .* asymmetric: 'pair/0' of", ['pair/0']),
    (
      nnx.bridge.ToLinen(nnx.Linear, (3, 4)),
      "ToLinen has weights .* asymmetric: 'kernel' of",
      [''],
    ),
  ],
  ids=['own product', 'low rank', 'dictionary', 'tuple', 'bridge'],
)  # fmt: skip
def test_nothing_falls_back_to_plain_backpropagation_silently(
  model, message, rows
):
  x = normal(0, (2, 3))
  asymmetric = linen.with_feedback(model, sbp.usf())
  with pytest.raises(ValueError, match=message):
    asymmetric.init(KEY, x)
  with pytest.raises(ValueError, match=message):
    asymmetric.apply(model.init(KEY, x), x)
  names = ['.*'] if rows == [''] else rows
  allowed = linen.with_feedback(model, sbp.usf(), exclude=names)
  table = linen.layer_rules(allowed, x)
  assert [path for path, (_, rule) in table.items() if rule is None] == rows


def test_a_layer_that_calls_flax_and_adds_to_it_is_asymmetric():
  x = normal(0, (2, 3))
  for layer in (Activated(2), nn.jit(Activated)(2)):
    model = linen.with_feedback(nn.Sequential([nn.Dense(3), layer]), sbp.usf())
    variables = model.init(KEY, x)
    plain = gradient(linen.plain_twin(model), variables, x, None)
    for _ in range(2):  # the second time nn.jit has traced it
      actual = gradient(model, variables, x, None)['layers_0']['kernel']
      assert not np.allclose(actual, plain['layers_0']['kernel'])


def test_methods_that_are_functions():
  class Net(nn.Module):
    def setup(self):
      self.first, self.second = nn.Dense(5), nn.Dense(2)

    def __call__(self, x):
      return self.second(jnp.tanh(self.first(x)))

    def score(self, x):
      return self(x).sum()

  x = normal(0, (2, 3))
  model = linen.with_feedback(Net(), sbp.usf())
  variables = model.init(KEY, x, method=Net.__call__)
  assert_same_bits(variables, Net().init(KEY, x))

  def gradients(method):
    def loss(params):
      return model.apply({'params': params}, x, method=method).sum()

    return jax.grad(loss)(variables['params'])

  wanted = gradients(None)
  for method in ('score', Net.score, Net.__call__, lambda net, x: net.score(x)):
    assert_same_bits(gradients(method), wanted)
  params = variables['params']
  apply = nn.apply(Net.__call__, model)
  actual = jax.grad(lambda p: apply({'params': p}, x).sum())(params)
  assert_same_bits(actual, wanted)


class Decoder(nn.Module):
  encoder: nn.Module

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(self.encoder(x))


class InSetup(nn.Module):
  def setup(self):
    self.encoder = nn.Dense(4)
    self.decoder = linen.with_feedback(Decoder(self.encoder), sbp.usf())

  def __call__(self, x):
    return self.decoder(x) + self.encoder(x).sum()


class InCall(nn.Module):
  @nn.compact
  def __call__(self, x):
    encoder = nn.Dense(4)
    y = encoder(x).sum()
    return linen.with_feedback(Decoder(encoder), sbp.usf())(x) + y


class Apart(nn.Module):
  @nn.compact
  def __call__(self, x):
    return linen.with_feedback(Decoder(nn.Dense(4)), sbp.usf())(x)


def test_a_model_that_shares_a_module_with_what_is_around_it_is_refused():
  x = normal(0, (2, 3))
  for model in (InSetup(), InCall()):
    with pytest.raises(ValueError, match='model.encoder is .*Wrap In'):
      model.init(KEY, x)
  variables = Apart().init(KEY, x)
  assert len(jax.tree.leaves(variables)) == 4
  Apart().apply(variables, x)


def test_weights_can_be_excluded_where_a_call_does_not_come_to_them():
  class Net(nn.Module):
    def setup(self):
      self.custom, self.head = Custom(), nn.Dense(2)

    def __call__(self, x):
      return self.head(self.custom(x))

    def only_head(self, x):
      return self.head(x)

  x = normal(0, (2, 4))
  model = linen.with_feedback(Net(), sbp.usf(), exclude='custom/W')
  variables = model.init(KEY, x)
  model.apply(variables, x, method='only_head')
  jitted = nn.Sequential([nn.jit(Custom)(), nn.Dense(2)])
  model = linen.with_feedback(jitted, sbp.usf(), exclude='layers_0/W')
  variables = model.init(KEY, x)
  for _ in range(2):
    model.apply(variables, x)
  # But a kernel alone can't be: its layer has one rule.
  model = linen.with_feedback(CNN(), sbp.usf(), exclude='Dense_0/kernel')
  with pytest.raises(ValueError, match="'Dense_0/kernel' matches nothing"):
    model.init(KEY, normal(0, (4, 6, 6, 2)))


def test_a_layer_in_the_scope_of_another_module():
  class Wide(nn.Module):
    def setup(self):
      self.dense = nn.Dense(3)
      nn.share_scope(self, self.dense)

    def __call__(self, x):
      return self.dense(x)

  x = normal(0, (2, 3))
  model = linen.with_feedback(Wide(), sbp.usf())
  assert_same_bits(model.init(KEY, x), Wide().init(KEY, x))
  assert linen.layer_rules(model, x) == {'': ((3, 3), sbp.usf())}


def test_the_table_of_a_model_with_partitioned_weights():
  mesh = jax.make_mesh((1,), ('d',), axis_types=(AxisType.Auto,))
  init = nn.with_partitioning(
    nn.initializers.lecun_normal(), (None, 'd'), mesh=mesh
  )
  model = linen.with_feedback(nn.Dense(3, kernel_init=init), sbp.usf())
  assert linen.layer_rules(model, normal(0, (2, 4))) == {
    '': ((4, 3), sbp.usf())
  }


def test_arguments_that_are_no_arrays_steer_the_call():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return nn.Dense(2)(x) if train else x

  x = normal(0, (2, 3))
  model = linen.with_feedback(Net(), sbp.usf())
  assert list(linen.layer_rules(model, x, True)) == ['Dense_0']
  shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  assert list(linen.layer_rules(model, shape, train=True)) == ['Dense_0']


def test_an_embedding_that_is_only_looked_up_needs_no_feedback():
  model = linen.with_feedback(LookUp(), sbp.usf())
  gradient(model, model.init(KEY, TOKENS), TOKENS)


def test_excluded_layers_are_left_alone():
  x = normal(0, (4, 6, 6, 2))
  model = linen.with_feedback(CNN(), sbp.usf(), exclude=['Dense_1$'])
  variables = model.init(KEY, x)
  assert set(weights_used(model, variables, x, None)) == {'Conv_0', 'Dense_0'}
  assert linen.layer_rules(model, x)['Dense_1'][1] is None


def test_an_operation_of_the_users_own_is_not_replaced_silently():
  layer = nn.Dense(3, dot_general=jax.lax.dot_general)
  with pytest.raises(ValueError, match='operation of its own'):
    linen.with_feedback(layer, sbp.usf()).init(KEY, normal(0, (2, 4)))


def test_the_table_says_what_is_plain():
  x = normal(0, (2, 3))
  model = nn.Sequential([Custom(), nn.Dense(2)])
  wrapped = linen.with_feedback(model, sbp.brsf(0.25), exclude='layers_0/W')
  assert linen.feedback_table(wrapped, x).splitlines() == [
    'layer       shape   feedback',
    'layers_0/W  (3, 4)  plain backpropagation',
    'layers_1    (4, 2)  brsf(p_flip=0.25)',
  ]
  assert 'brsf' not in linen.feedback_table(model, x)
