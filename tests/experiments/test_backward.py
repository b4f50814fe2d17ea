"""Rules beyond the paper's in training: closed forms in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper.conditions import FAMILY
from experiments.training import loop
from experiments.training.backward import rule_of
from experiments.training.step import Setup, program
from tests.experiments import tiny

_BATCH = 100
_LAYERS = ('Dense_0', 'Dense_1', 'output')


def _relu(x):
  return np.maximum(x, 0)


def _run(name, **fields):
  """A run's start, its compiled functions and a mini-batch."""
  run = tiny.run(name, **fields)
  placed = tiny.placed(run)
  functions = program(Setup.of(run, placed))
  state = jax.tree.map(np.array, loop.start(run, placed))
  return state, functions, placed, placed.trained[:_BATCH]


def _step(state, functions, placed, index, rate):
  before = jax.tree.map(jnp.array, state)
  # optax's bias correction of Adam promotes an integer.
  with jax.numpy_dtype_promotion('standard'):
    new, _ = functions.step(before, placed.arrays, index, np.float32(rate))
  return jax.tree.map(np.array, new)


def _passes(state, placed, index):
  """Inputs of the layers, the error at the logits, and kernels, in float64."""
  x = np.asarray(placed.arrays.train.x, np.float64)[index]
  x -= np.asarray(placed.arrays.mean, np.float64)
  layers = [
    jax.tree.map(lambda w: np.asarray(w, np.float64), state['params'][name])
    for name in _LAYERS
  ]
  inputs = [x]
  for layer in layers:
    inputs.append(_relu(inputs[-1] @ layer['kernel'] + layer['bias']))
  logits = inputs[-2] @ layers[-1]['kernel'] + layers[-1]['bias']
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  y = np.eye(tiny.CLASSES)[np.asarray(placed.arrays.train.y)[index]]
  kernels = [layer['kernel'] for layer in layers]
  return inputs[:3], (p - y) / len(y), y / len(y), kernels


def _angle(a, b):
  cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
  return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@pytest.mark.parametrize('name', ['DFA', 'DRTP'])
def test_direct_feedback_projects_the_output_error(name):
  state, functions, placed, index = _run(name, weight_decay=0.0)
  inputs, e, y, (_, W1, W2) = _passes(state, placed, index)
  B = {k: np.asarray(v, np.float64) for k, v in state['feedback'].items()}
  projected = {'DFA': e, 'DRTP': y}[name]
  # The error at a layer's output, before its rectification.
  errors = [
    (projected @ B[f'{layer}/kernel'].T) * (h > 0)
    for layer, h in (('Dense_1', inputs[1]), ('output', inputs[2]))
  ]
  new = _step(state, functions, placed, index, 1.0)
  wanted = [*errors, e]
  for layer, x, error in zip(_LAYERS, inputs, wanted, strict=True):
    moved = state['params'][layer]['kernel'] - new['params'][layer]['kernel']
    dW = x.T @ error
    # Eight times the rounding of float32 numbers as large as W and dW.
    bound = 1e-6 * (1 + np.abs(dW).max())
    np.testing.assert_allclose(moved, dW, rtol=1e-4, atol=bound)

  true = [(e @ W2.T) * (inputs[2] > 0), e]
  true.insert(0, (true[0] @ W1.T) * (inputs[1] > 0))
  aligned = functions.align(state, placed.arrays, index)
  for layer, x, error, true_error in zip(
    _LAYERS, inputs, wanted, true, strict=True
  ):
    row = aligned[layer]
    assert np.isnan(row.angle)
    assert abs(row.error_angle - _angle(error, true_error)) < 0.05
    update = _angle(x.T @ error, x.T @ true_error)
    assert abs(row.update_angle - update) < 0.05


@pytest.mark.parametrize('name', ['KP+BN', 'KP+BM', 'KP+BN+Adam'])
def test_learned_feedback_has_the_update_of_the_weights(name):
  decay, momentum, rate, steps = 0.5, 0.9, 0.01, 4
  state, functions, placed, _ = _run(name, weight_decay=decay)

  def difference(state):
    learned = state['feedback']['Dense_1']['kernel:kolen_pollack()']['learned']
    return learned - state['params']['Dense_1']['kernel']

  wanted = np.asarray(difference(state), np.float64)
  remembered = np.zeros_like(wanted)
  for step in range(steps):
    index = placed.trained[step : step + _BATCH]
    state = _step(state, functions, placed, index, rate)
    # dR = dW cancels; weight decay is left, and its momentum.
    previous = momentum * remembered if name == 'KP+BN' else 0
    remembered = decay * wanted + previous
    if name != 'KP+BM':
      wanted = wanted - rate * remembered
  found = difference(state)
  if name == 'KP+BM':  # The sign of both gradients is nearly always the same.
    assert np.linalg.norm(found) < 1.05 * np.linalg.norm(wanted)
  else:
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_mirror_follows_the_weights_without_labels():
  state, functions, placed, index = _run('Mirror')

  def angles():
    aligned = functions.align(state, placed.arrays, index)
    return [float(aligned[name].angle) for name in ('Dense_1', 'output')]

  first = angles()
  for _ in range(60):
    # At rate 0 the weights rest.
    state, _ = functions.step(state, placed.arrays, index, np.float32(0))
  last = angles()
  assert min(first) > 80
  # 1 - exp(-60 / 50) of W is in R, beside the rest of its start and noise.
  assert max(last) < 70
  assert last < first


def test_adam_is_that_of_its_paper_with_decoupled_decay():
  decay, rate = 0.5, 0.01
  state, functions, placed, index = _run('Adam', weight_decay=decay)
  inputs, e, _, (*_, W) = _passes(state, placed, index)
  new = _step(state, functions, placed, index, rate)
  g = inputs[2].T @ e
  wanted = W - rate * (g / (np.abs(g) + 1e-8) + decay * W)
  found = new['params']['output']['kernel']
  # Where the gradient is far from Adam's epsilon.
  clear = np.abs(g) > 1e-5
  assert clear.mean() > 0.5
  np.testing.assert_allclose(found[clear], wanted[clear], atol=2e-5)


def test_one_update_a_condition():
  run = tiny.run('BM')
  condition = dataclasses.replace(run.condition, adam=True)
  with pytest.raises(ValueError, match='batch_manhattan is 1, but must be 0'):
    tiny.train(dataclasses.replace(run, condition=condition))


def test_every_name_of_the_family_is_a_rule():
  rules = [rule_of(name) for name in (*FAMILY, 'LowRank16')]
  assert len(set(map(repr, rules))) == len(FAMILY) + 1
  direct = ('DFA', 'SignDFA', 'CenteredDFA', 'DRTP')
  projected = [rule_of(name).error for name in direct]
  assert projected == ['error', 'sign', 'centered', 'target']
  assert rule_of('LowRank16').rank == 16
  with pytest.raises(ValueError, match='name must be one of'):
    rule_of('LowRank')
