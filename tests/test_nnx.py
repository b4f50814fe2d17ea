"""NNX: layers, V and where it is kept, optimizers, copies, redraws, stacks."""

import copy
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import symjax_bp as sbp
from symjax_bp import nnx as asymmetric
from symjax_bp.nnx import Feedback, feedback_weights
from tests.cases import assert_same_bits, normal
from tests.nnx_models import (
  MLP,
  Autoencoder,
  Noisy,
  Stack,
  X,
  gradient,
  params,
  state,
)

LAYERS = {
  'Linear': (sbp.rndf(), nnx.Linear, (4, 5), {'dtype': jnp.bfloat16}, (3, 4)),
  'LinearGeneral': (
    sbp.nusf(), nnx.LinearGeneral, ((4, 5), (3, 2)), {'axis': (1, 2)},
    (2, 4, 5),
  ),
  'Conv': (
    sbp.nusf(), nnx.Conv, (4, 6, (3, 3), 2), {'feature_group_count': 2},
    (2, 6, 7, 4),
  ),
}  # fmt: skip


@nnx.jit
def gradients_and_output(model, x):
  loss = lambda m, x: ((y := m(x)).astype(float).sum(), y)
  (dW, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
  return nnx.to_pure_dict(dW), dx, y


@pytest.mark.parametrize('name', LAYERS)
def test_layers_are_those_of_flax_but_for_dx(name):
  rule, flax, args, kwargs, shape = LAYERS[name]
  ours = getattr(asymmetric, flax.__name__)
  model = ours(*args, feedback=rule, rngs=nnx.Rngs(0), **kwargs)
  plain = flax(*args, rngs=nnx.Rngs(0), **kwargs)
  x, at_V = normal(0, shape), nnx.clone(plain)
  at_V.kernel[...] = feedback_weights(model, x)['kernel']
  assert isinstance(model, flax)
  assert_same_bits(params(model), params(plain))
  dW, dx, y = gradients_and_output(model, x)
  same_dW, other_dx, same_y = gradients_and_output(plain, x)
  assert_same_bits((dW, y), (same_dW, same_y))
  assert_same_bits(dx, gradients_and_output(at_V, x)[1])
  assert (dx != other_dx).any()


jitted_gradient = nnx.jit(gradient)


def mlp(rule, **kwargs):
  kwargs = {'rngs': nnx.Rngs(feedback=1), **kwargs}
  return asymmetric.with_feedback(MLP(nnx.Rngs(0)), rule, **kwargs)


def through_pure_dict(model):
  fresh = asymmetric.with_feedback(
    Noisy(nnx.Rngs(2)), sbp.frsf(0.5), rngs=nnx.Rngs(7)
  )
  new = nnx.state(fresh)
  nnx.replace_by_pure_dict(new, nnx.to_pure_dict(nnx.state(model)))
  nnx.update(fresh, new)
  return fresh


COPIES = {
  'merge': lambda model: nnx.merge(*nnx.split(model)),
  'update': through_pure_dict,
  'clone': nnx.clone,
  'copy': copy.copy,
  'deepcopy': copy.deepcopy,
  'pickle': lambda model: pickle.loads(pickle.dumps(model)),
  'pickled state': lambda model: nnx.merge(
    *pickle.loads(pickle.dumps(nnx.split(model)))
  ),
  'cloudpickle': lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
  'view': lambda model: nnx.view(model, deterministic=False),
}


@pytest.mark.parametrize('make', COPIES.values(), ids=COPIES)
def test_copies_are_asymmetric_models(make):
  plain, rngs = Noisy(nnx.Rngs(0)), nnx.Rngs(1)
  model = asymmetric.with_feedback(plain, sbp.frsf(0.5), rngs=rngs)
  other = make(model)
  assert isinstance(other, Noisy) and type(other) is type(model)
  assert_same_bits(state(other, Feedback), state(model, Feedback))
  dropped = [nnx.clone(each) for each in (model, other)]  # Keys advance.
  assert_same_bits(*(jitted_gradient(each, X) for each in dropped))


def test_copies_of_a_local_class_and_of_a_layer():
  class Local(MLP):
    pass

  layer = asymmetric.Linear(3, 2, feedback=sbp.rndf(), rngs=nnx.Rngs(0))
  local = asymmetric.with_feedback(Local(nnx.Rngs(0)), sbp.usf())
  for model, module in ((layer, pickle), (local, cloudpickle)):
    other = module.loads(module.dumps(model))
    assert type(other).__name__ == type(model).__name__
    assert_same_bits(gradient(other, X), gradient(model, X))


def test_models_in_plain_jax():
  """Split by hand, and as a pytree, under jit, vmap and remat."""
  model = mlp(sbp.usf())
  graph, weights, rest = nnx.split(model, nnx.Param, ...)

  def by_hand(weights):
    return (nnx.merge(graph, weights, rest)(X) ** 2).sum()

  expected = jitted_gradient(model, X)
  dW = jax.jit(jax.grad(by_hand))(weights)
  assert_same_bits(nnx.to_pure_dict(dW), expected)
  tree = jax.jit(jax.grad(lambda model: (model(X) ** 2).sum()))(model)
  assert_same_bits(params(tree), expected)
  for call in (
    lambda model, x: jax.vmap(model)(x),
    lambda model, x: nnx.remat(MLP.__call__)(model, x),
  ):
    other = gradient(model, X, call=call)
    for a, b in zip(*map(jax.tree.leaves, (other, expected)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'streams', [{'default': 0}, {'params': 0, 'feedback': 1}], ids=str
)
def test_feedback_does_not_shift_later_kernels(streams):
  def build(layer, **kwargs):
    rngs = nnx.Rngs(**streams)
    return [layer(3, 3, rngs=rngs, **kwargs) for _ in range(3)]

  ours = build(asymmetric.Linear, feedback=sbp.rndf())
  plain = build(nnx.Linear)
  assert_same_bits(list(map(params, ours)), list(map(params, plain)))
  V = [abs(feedback_weights(layer)['kernel']) for layer in ours]
  assert not (V[0] == V[1]).any() and not (V[1] == V[2]).any()


def test_with_feedback_follows_its_key_and_advances_no_other_stream():
  def draws(rngs):
    return feedback_weights(mlp(sbp.rndf(), rngs=rngs))

  first = draws(nnx.Rngs(feedback=1))
  assert_same_bits(draws(nnx.Rngs(feedback=1)), first)
  other = draws(nnx.Rngs(feedback=2))
  assert not (other['body/kernel'] == first['body/kernel']).any()
  rngs = nnx.Rngs(0)
  assert_same_bits(draws(rngs), draws(nnx.Rngs(0)))
  assert_same_bits(params(MLP(rngs)), params(MLP(nnx.Rngs(0))))
  rngs = nnx.Rngs(1, feedback=0)  # A stream of that name does advance.
  a, b = draws(rngs), draws(rngs)
  assert not (a['body/kernel'] == b['body/kernel']).any()


def test_redraws():
  """The same inside and outside of jit; each weight has a V of its own."""
  key = jax.random.key(3, impl='rbg')
  tied = asymmetric.with_feedback(
    nnx.List([Autoencoder(nnx.Rngs(0)), nnx.Linear(3, 5, rngs=nnx.Rngs(0))]),
    sbp.brsf(0.25),
    rngs=nnx.Rngs(feedback=1),
  )
  jitted, eager = (nnx.clone(tied) for _ in range(2))
  nnx.jit(asymmetric.redraw)(jitted, key)
  asymmetric.redraw(eager, jax.random.key(4))
  asymmetric.redraw(eager, key)
  V = feedback_weights(eager)
  assert_same_bits(feedback_weights(jitted), V)
  a, b = (abs(V[path]) for path in ('0/dec/kernel', '1/kernel'))
  assert not (a == b).any()
  first = abs(feedback_weights(tied)['1/kernel'])
  tied[1].kernel[...] *= 2  # Without a key, a change of W draws again.
  again = abs(feedback_weights(tied)['1/kernel'])
  assert not (first == b).any() and not (first == again).any()


@nnx.jit
def input_gradient(model, x, g):
  return nnx.grad(lambda m, x: (m(x) * g).sum(), argnums=1)(model, x)


def check_stack(model, plain):
  """All is linear: dx is that of plain layers whose kernels are V."""
  x, g = normal(0, (4, 6)), normal(1, (4, 6))
  V = feedback_weights(model, x)['layers/kernel']
  at_V = nnx.clone(plain)
  at_V.layers.kernel[...] = V
  actual, expected = (input_gradient(m, x, g) for m in (model, at_V))
  # Four products of float32.
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
  assert not (abs(V[0]) == abs(V[1])).any()
  return V


@pytest.mark.parametrize(
  'rule', [sbp.rndf(), sbp.brsf(), sbp.low_rank(rank=6)], ids=str
)
def test_every_layer_of_a_stack_has_a_V_of_its_own(rule):
  """Also if what the rule keeps has no axis of layers."""
  plain = Stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
  model = asymmetric.with_feedback(plain, rule, rngs=nnx.Rngs(1))
  check_stack(model, plain)


def test_a_stack_of_our_own_layers_is_redrawn():
  ours = lambda rngs: asymmetric.Linear(6, 6, feedback=sbp.brsf(), rngs=rngs)
  plain = Stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
  model = Stack(ours)
  first = check_stack(model, plain)
  asymmetric.redraw(model, jax.random.key(5))
  assert not (first == check_stack(model, plain)).any()


def test_V_is_drawn_in_the_dtype_of_the_parameters(float64):
  layer = asymmetric.Linear(
    3, 4, feedback=sbp.frsf(0.25), use_bias=False, param_dtype='float64',
    dtype='float32', rngs=nnx.Rngs(0),
  )  # fmt: skip
  used = jax.jit(jax.jacrev(layer))(jnp.ones(3, 'float32')).T
  V = feedback_weights(layer)['kernel']
  assert (V.dtype, used.dtype) == ('float64', 'float32')
  np.testing.assert_array_equal(V.astype(used.dtype), used)
