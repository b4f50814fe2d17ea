"""Every model of the zoo: bits of plain JAX, uSF by a reference, its table.

In float64, where another order of summation explains no difference.
"""

import jax
import numpy as np
import pytest

import symjax_bp as sbp
from tests import zoo
from tests.cases import assert_same_bits

# Rounded in other places, and written with products of its own.
UNREFERENCED = {'bfloat16', 'eqx GRU'}


@pytest.fixture(autouse=True)
def double_precision(float64):
  with jax.numpy_dtype_promotion('standard'):
    yield


def gradients(function, *args):
  """Gradients of all parameters and inputs, and the outputs."""

  def loss(*args):
    outputs = function(*args)
    return zoo.squares(outputs), outputs

  every = range(len(args))
  return jax.grad(loss, every, has_aux=True, allow_int=True)(*args)


def by_path(tree):
  """Leaves by path, without those of integers, which have no gradient."""
  return {
    jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.dtype != jax.dtypes.float0
  }


def asymmetric(model, rule):
  f = sbp.with_feedback(model.function, rule, model.exclude)
  return lambda params, *args: f(params, f.init(zoo.KEY, params), *args)


# One of each kind of product and of loop: a GPU compiles for a second each.
ACCELERATED = (
  'DenseGeneral', 'Conv, grouped and strided', 'Conv, 3-d', 'LSTM', 'bfloat16',
  'ConvTranspose, transposed kernel', 'nn.scan of nn.remat', 'nn.vmap',
  'vision transformer', 'language model, tied embedding', 'eqx Conv2d',
  'nnx Conv, BatchNorm, Dropout, Linear', 'W + W.T', 'fori_loop', 'while_loop',
  'ragged_dot',
)  # fmt: skip
MARKED = [
  pytest.param(
    name, marks=[pytest.mark.accelerator] if name in ACCELERATED else []
  )
  for name in zoo.NAMES
]


@pytest.mark.parametrize('name', MARKED)
def test_gradients_are_those_of_plain_jax_and_of_the_reference(name):
  """V = W has the bits of JAX; R = sign(W), which moves with W, is uSF.

  And the table says product.
  """
  model = zoo.model(name)
  f = sbp.with_feedback(model.function, sbp.usf(), model.exclude)
  rows = f.rows(model.params, *model.args)
  expected = {row.path: 'product' for row in rows} | model.uses
  assert {row.path: row.use for row in rows} == expected
  for row in rows:
    assert row.rule == (sbp.usf() if 'product' in row.use else None)
  assert any(row.rule for row in rows)
  functions = [model.function, asymmetric(model, sbp.symmetric())]
  if name not in UNREFERENCED:
    rule = sbp.usf() if name in zoo.ARITHMETIC else sbp.frozen_sign()
    functions += [model.reference, asymmetric(model, rule)]
  # One program, in which what is the same is compiled once.
  run = jax.jit(lambda *args: [gradients(f, *args) for f in functions])
  plain, same, *usf = map(by_path, run(model.params, *model.args))
  assert_same_bits(same, plain)
  if usf:
    expected, actual = usf
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
      atol = 1e-10 * np.abs(value).max(initial=1)
      np.testing.assert_allclose(actual[path], value, 0, atol, err_msg=path)
