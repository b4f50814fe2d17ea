"""Every model of the zoo: bits of plain JAX, uSF by a reference, its table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import symjax_bp as sbp
from tests import zoo
from tests.cases import fast_jit

# Rounded in other places, and written with products of its own.
UNREFERENCED = {'bfloat16', 'eqx GRU'}


def gradients(function, *args):
  """Gradients of all parameters and inputs, and the outputs."""

  def loss(*args):
    outputs = function(*args)
    squares = [
      jnp.sum(leaf.astype(float) ** 2)
      for leaf in jax.tree.leaves(outputs)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return sum(squares), outputs

  every = range(len(args))
  return jax.grad(loss, every, has_aux=True, allow_int=True)(*args)


def every_gradient(functions, model):
  """In one program, which compiles once what is the same."""
  run = fast_jit(lambda *args: [gradients(f, *args) for f in functions])
  return run(model.params, *model.args)


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
  'Dense', 'Conv, grouped and strided', 'Conv, 3-d', 'ConvTranspose', 'LSTM',
  'BatchNorm', 'bfloat16', 'nn.scan', 'nn.vmap', 'vision transformer',
  'language model, tied embedding', 'nnx Conv, BatchNorm, Dropout, Linear',
  'eqx Conv2d', 'W + W.T', 'fori_loop', 'while_loop', 'ragged_dot',
)  # fmt: skip
MARKED = [
  pytest.param(
    name, marks=[pytest.mark.accelerator] if name in ACCELERATED else []
  )
  for name in zoo.NAMES
]


@pytest.mark.parametrize('name', MARKED)
def test_symmetric_is_plain_jax_bit_for_bit(name):
  model = zoo.model(name)
  functions = model.function, asymmetric(model, sbp.symmetric())
  plain, same = map(by_path, every_gradient(functions, model))
  assert plain.keys() == same.keys()
  for path, value in plain.items():
    np.testing.assert_array_equal(same[path], value, path)


@pytest.mark.parametrize(
  'name', [name for name in zoo.NAMES if name not in UNREFERENCED]
)
def test_usf_is_the_reference_without_custom_vjp(name):
  """As R = sign(W), which is made at the start and moves with W."""
  rule = sbp.usf() if name in zoo.ARITHMETIC else sbp.frozen_sign()
  # In float64, where another order of summation explains no difference.
  with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
    model = zoo.model(name, wide=True)
    functions = model.reference, asymmetric(model, rule)
    expected, actual = map(by_path, every_gradient(functions, model))
  assert actual.keys() == expected.keys()
  for path, value in expected.items():
    atol = 1e-10 * np.abs(value).max(initial=1)
    np.testing.assert_allclose(actual[path], value, 0, atol, err_msg=path)


@pytest.mark.parametrize('name', zoo.NAMES)
def test_the_table_says_product(name):
  model = zoo.model(name)
  f = sbp.with_feedback(model.function, sbp.usf(), model.exclude)
  rows = f.rows(model.params, *model.args)
  expected = {row.path: 'product' for row in rows} | model.uses
  assert {row.path: row.use for row in rows} == expected
  for row in rows:
    assert row.rule == (sbp.usf() if 'product' in row.use else None)
  assert any(row.rule for row in rows)
