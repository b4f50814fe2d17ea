"""NNX models: which layers get which rule, what is refused, twins, tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from tests.cases import assert_same_bits, normal
from tests.nnx_models import CNN, SHAPE, Stack, input_gradient, params


def test_attention_and_recurrent_cells_are_reached():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.attention = nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=rngs)
      self.cell = nnx.GRUCell(6, 4, rngs=rngs)

    def __call__(self, x):
      x = self.attention(x)
      carry, _ = self.cell(jnp.zeros((x.shape[0], 4)), x[:, 0])
      return carry

  model = Model(nnx.Rngs(0))
  copy = asymmetric.with_feedback(model, sbp.rndf(), rngs=nnx.Rngs(1))
  rules = asymmetric.layer_rules(copy)
  assert {path: rule for path, (_, rule) in rules.items()} == dict.fromkeys(
    [
      'attention/key', 'attention/out', 'attention/query', 'attention/value',
      'cell/dense_h', 'cell/dense_i',
    ],
    sbp.rndf(),
  )  # fmt: skip
  x = normal(0, (2, 5, 6))
  assert_same_bits(copy(x), model(x))
  ours, plain = (jax.grad(lambda x, m=m: m(x).sum())(x) for m in (copy, model))
  assert not np.allclose(ours, plain)


class Custom(nnx.Module):
  def __init__(self, rngs):
    self.W = nnx.Param(jax.random.normal(rngs.params(), (3, 4)))
    self.layer = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.layer(x @ self.W[...])


class Holder(nnx.Module):
  """A layer, and a weight or module somewhere else."""

  def __init__(self, **attributes):
    self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    for name, value in attributes.items():
      setattr(self, name, nnx.data(value))


class LowRank(nnx.Linear):
  def __init__(self, *args, rngs):
    super().__init__(*args, rngs=rngs)
    self.update = nnx.Param(jax.random.normal(rngs.params(), (3, 3)))

  def __call__(self, x):
    return super().__call__(x) + x @ self.update[...]


def weight():
  return nnx.Param(jnp.ones((3, 3)))


def linen_in_nnx(rngs):
  return nnx.bridge.ToNNX(nn.Sequential([nn.Dense(2)]), rngs=rngs)


@pytest.mark.parametrize(
  'make, path',
  [
    (Custom, 'W'),
    (lambda rngs: nnx.ConvTranspose(2, 3, (2,), rngs=rngs), 'kernel'),
    (lambda rngs: nnx.Einsum('ab,bc->ac', (3, 4), rngs=rngs), 'kernel'),
    (lambda rngs: nnx.Embed(3, 4, rngs=rngs), 'embedding'),
    (lambda rngs: LowRank(3, 3, rngs=rngs), 'update'),
    (lambda rngs: Holder(a={'w': weight()}), 'a/w'),
    (lambda rngs: Holder(a=[nnx.LoRAParam(jnp.ones((3, 3)))]), 'a/0'),
    (lambda rngs: Holder(a=nnx.Param({'w': jnp.ones((3, 3))})), 'a/w'),
    (
      lambda rngs: Holder(a=linen_in_nnx(rngs).lazy_init(jnp.ones((1, 3)))),
      'a/layers_0/kernel',
    ),
    (lambda rngs: Holder(a=linen_in_nnx(rngs)), 'a'),
  ],
)
def test_weights_that_can_not_be_asymmetric_are_refused_by_name(make, path):
  model = make(nnx.Rngs(0))
  with pytest.raises(ValueError, match=f"made asymmetric: '{path}'"):
    asymmetric.with_feedback(model, sbp.usf())
  allowed = asymmetric.with_feedback(model, sbp.usf(), exclude=f'^{path}$')
  assert_same_bits(params(allowed), params(model))
  for each in (allowed, asymmetric.plain_twin(allowed)):
    assert asymmetric.layer_rules(each)[path][1] is None


class Normalised(nnx.Module):
  def __init__(self, rngs):
    self.theirs = nnx.LayerNorm(3, rngs=rngs)
    self.ours = asymmetric.BatchNorm(3, use_scale=True, rngs=rngs)
    self.linear = nnx.Linear(3, 3, rngs=rngs)

  def __call__(self, x):
    return self.linear(self.theirs(x))


def test_normalisations_in_a_stack_are_left_alone():
  model = Stack(Normalised)
  copy = asymmetric.with_feedback(model, sbp.usf())
  assert asymmetric.layer_rules(copy) == {
    'layers/linear': ((3, 3, 3), sbp.usf())
  }
  x = normal(0, (2, 3))
  assert_same_bits(copy(x), model(x))


class Activated(nnx.Linear):
  def __call__(self, x):
    return nnx.tanh(super().__call__(x))


class Pooled(nnx.Conv):
  @nnx.jit
  def __call__(self, x):
    return nnx.max_pool(super().__call__(x), (2,), (2,))


class Scaled(nnx.LinearGeneral):
  def __call__(self, x):
    return 2 * super().__call__(x)


@pytest.mark.parametrize(
  'make, shape',
  [
    (lambda rngs: Activated(3, 4, rngs=rngs), (2, 3)),
    (lambda rngs: Pooled(3, 4, (2,), padding='VALID', rngs=rngs), (2, 9, 3)),
    (
      lambda rngs: Scaled((3, 5), (2, 4), axis=(1, 3), batch_axis={0: 2},
                          rngs=rngs),
      (2, 3, 1, 5),
    ),
    (lambda rngs: Stack(lambda rngs: Activated(4, 4, rngs=rngs)), (2, 4)),
  ],
)  # fmt: skip
def test_a_subclass_that_calls_super_is_asymmetric(make, shape):
  plain = make(nnx.Rngs(0))
  model = asymmetric.with_feedback(plain, sbp.usf())
  x = normal(0, shape)
  y = plain(x)
  assert_same_bits(model(x), y)
  dx, plain_dx = (input_gradient(m, x, y) for m in (model, plain))
  assert not np.allclose(dx, plain_dx)


class OwnMatmul(nnx.Linear):
  def __call__(self, x):
    return x @ self.kernel[...]


class Twice(nnx.Linear):
  """The kernel has another name, too."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.alias = self.kernel

  def __call__(self, x):
    return super().__call__(x) + x @ self.alias[...]


class Unused(nnx.Linear):
  def __call__(self, x):
    return x


class Trained(nnx.Linear):
  def __call__(self, x, train):
    return super().__call__(x)


@pytest.mark.parametrize(
  'kind, reason',
  [
    (OwnMatmul, 'takes its kernel elsewhere'),
    (Twice, 'takes its kernel elsewhere'),
    (Unused, 'takes its kernel elsewhere'),
    (Trained, 'can not be tried .*TypeError.*train'),
  ],
)
def test_a_subclass_with_a_product_of_its_own_is_refused(kind, reason):
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), kind(3, 3, rngs=rngs))
  message = f"layer 'layers/1' can not .* {kind.__name__}.__call__ {reason}"
  with pytest.raises(ValueError, match=message):
    asymmetric.with_feedback(model, sbp.usf())
  allowed = asymmetric.with_feedback(model, sbp.usf(), exclude='layers/1')
  rules = [rule for _, rule in asymmetric.layer_rules(allowed).values()]
  assert rules == [sbp.usf(), None]


def test_plain_twin_and_table():
  model = asymmetric.with_feedback(
    Custom(nnx.Rngs(0)), sbp.rndf(), rngs=nnx.Rngs(1), exclude='W'
  )
  assert asymmetric.feedback_table(model).splitlines() == [
    'layer  shape   feedback',
    'W      (3, 4)  plain backpropagation',
    'layer  (4, 2)  rndf()',
  ]
  twin = asymmetric.plain_twin(model)
  x = normal(0, (2, 3))
  loss = lambda m: (m(x) ** 2).sum()
  expected = nnx.grad(loss)(Custom(nnx.Rngs(0)))
  actual = nnx.grad(loss)(twin)
  assert_same_bits(nnx.to_pure_dict(actual), nnx.to_pure_dict(expected))


def test_plain_twin_leaves_plain_layers_as_they_are():
  def own_operation(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)

  rngs = nnx.Rngs(0)
  model = asymmetric.with_feedback(
    nnx.Sequential(
      nnx.Linear(3, 4, rngs=rngs),
      nnx.Linear(4, 4, rngs=rngs),
      nnx.Linear(4, 2, dot_general=own_operation, rngs=rngs),
    ),
    sbp.usf(),
    exclude='layers/2',
  )
  twin = asymmetric.plain_twin(model)
  assert twin.layers[2].dot_general is own_operation
  rules = [rule for _, rule in asymmetric.layer_rules(twin).values()]
  assert rules == [sbp.symmetric(), sbp.symmetric(), None]
  rows = asymmetric.layer_alignment(model, jnp.sum, normal(0, (2, 3)))
  assert list(rows) == ['layers/0', 'layers/1']
  assert rows['layers/0'].gradient_angle > 1


def test_rules_by_path_and_a_second_conversion():
  model = asymmetric.with_feedback(
    CNN(nnx.Rngs(0)), {'conv': sbp.usf(), 'layers': sbp.nusf()}
  )
  rules = [rule for _, rule in asymmetric.layer_rules(model).values()]
  assert rules == [sbp.usf(), sbp.nusf(), sbp.nusf()]
  again = asymmetric.with_feedback(model, sbp.symmetric())
  rules = [rule for _, rule in asymmetric.layer_rules(again).values()]
  assert rules == [sbp.symmetric()] * 3


def test_layer_alignment_measures_the_V_that_was_used():
  model = asymmetric.with_feedback(
    CNN(nnx.Rngs(0)),
    {'conv': sbp.usf(), 'layers/0': sbp.rndf(), '': sbp.symmetric()},
    rngs=nnx.Rngs(1),
  )
  x = normal(0, SHAPE)
  before = nnx.to_pure_dict(nnx.state(model))
  loss = lambda y: (y**2).sum()
  measure = nnx.jit(lambda m: asymmetric.layer_alignment(m, loss, x))
  rows = measure(model)
  assert_same_bits(nnx.to_pure_dict(nnx.state(model)), before)
  V = asymmetric.feedback_weights(model)
  for path, row in rows.items():
    module = dict(asymmetric._layers(model))[path]
    W, used = np.asarray(module.kernel[...]), np.asarray(V[path])
    ratio = np.linalg.norm(used) / np.linalg.norm(W)
    np.testing.assert_allclose(row.norm_ratio, ratio, rtol=1e-5)
    concordance = (np.sign(W) == np.sign(used)).mean()
    np.testing.assert_allclose(row.concordance, concordance, rtol=1e-6)
  assert rows['conv'].concordance == 1
  assert rows['layers/0'].gradient_angle == 0
  assert rows['conv'].gradient_angle > 1


@pytest.mark.parametrize(
  'call, error, message',
  [
    (lambda m: asymmetric.with_feedback(m, 'uSF'), TypeError, "not 'uSF'"),
    (lambda m: asymmetric.with_feedback(m, sbp.rndf()), ValueError,
     r'rndf\(\) draws random feedback: pass rngs'),
    (lambda m: asymmetric.with_feedback(m, sbp.frsf(), rngs=0), TypeError,
     r'rngs must be an nnx.Rngs, for instance .*, not 0\.'),
    (lambda m: asymmetric.with_feedback(m, sbp.usf(), rngs=nnx.Rngs(0).params),
     TypeError, 'rngs must be an nnx.Rngs'),
    (lambda m: asymmetric.with_feedback(m, sbp.rndf(), rngs=nnx.Rngs(other=0)),
     ValueError, r'rndf\(\) draws random feedback: pass rngs'),
    (lambda m: asymmetric.redraw(m, 3), TypeError, 'key must be .*, not 3'),
    (lambda m: asymmetric.with_feedback(m, {'conv': sbp.usf()}), ValueError,
     "layer 'layers/0' matches none"),
    (lambda m: asymmetric.with_feedback(m, {'x': sbp.usf(), '': sbp.usf()}),
     ValueError, r"'x' matches nothing in the model.*'conv', 'layers/0'"),
    (lambda m: asymmetric.with_feedback(jnp.sum, sbp.usf()), TypeError,
     'must be an nnx.Module'),
    (lambda m: asymmetric.Linear(2, 3, feedback=1, rngs=nnx.Rngs(0)),
     TypeError, 'not 1'),
    (lambda m: asymmetric.Linear(2, 3, feedback=sbp.usf(), rngs=nnx.Rngs(0),
                                 dot_general=lambda *a, **k: None),
     ValueError, 'operation of its own'),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
  with pytest.raises(error, match=message):
    call(CNN(nnx.Rngs(0)))
