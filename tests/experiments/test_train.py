"""Training: the update, what it depends on, and what is recorded."""

import copy
import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import symjax_bp
from experiments import conditions, datasets, grid, placement, train
from experiments.models import Network
from experiments.program import Setup, program
from tests.experiments import tiny


def _train(run, placed=None, scan=None):
  """All states (copied: the next epoch uses them up) and lines of a run."""
  placed = placed or tiny.placed(run)
  states, lines = [], []
  start = train.start(run, placed)
  for state, line in train.epochs(run, placed, start, 1, scan):
    states.append(jax.tree.map(np.array, state))
    lines.append(line)
  return states, lines


def _equal(a, b) -> bool:
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def _without_seconds(lines):
  return [{k: v for k, v in line.items() if k != 'seconds'} for line in lines]


def test_the_same_run_has_the_same_bits():
  run = tiny.run('brSF-50%+BN+BM')
  (*_, state), lines = _train(run)
  (*_, again), lines_again = _train(run)
  assert _equal(state, again)
  assert _without_seconds(lines) == _without_seconds(lines_again)
  (*_, other), _ = _train(dataclasses.replace(run, seed=1))
  assert not _equal(state['params'], other['params'])


def test_one_compilation_for_all_rates_and_seeds():
  compiled = []
  _train(tiny.run('frSF+BN', rate=1.0, seed=0))
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: compiled.append(event)
    if event == '/jax/core/compile/backend_compile_duration'
    else None
  )
  try:
    _train(tiny.run('frSF+BN', rate=0.1, seed=3))
    assert not compiled
    # That the event is still called so:
    jax.jit(lambda x: x + jnp.float32(math.pi))(jnp.float32(1))
    assert compiled
  finally:
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize('condition', ['uSF', 'brSF-50%+BN+BM'])
def test_the_compiled_loop_gives_the_same_numbers(condition):
  run = tiny.run(condition)
  (*_, looped), lines = _train(run, scan=False)
  (*_, scanned), scanned_lines = _train(run, scan=True)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    looped,
    scanned,
  )
  for a, b in zip(lines, scanned_lines, strict=True):
    assert a['train_error'] == b['train_error']
    assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-4)


@pytest.mark.parametrize('name', ['SGD', 'BN'])
def test_what_is_frozen_does_not_move(name):
  last = {'output'}
  for part in ('Bottom', 'Top'):
    run = tiny.run(f'{name} {part}', weight_decay=0.1)
    placed = tiny.placed(run)
    before = jax.tree.map(np.array, train.start(run, placed)['params'])
    (*_, state), _ = _train(run, placed)
    moved = {
      layer
      for layer in before
      if not _equal(before[layer], state['params'][layer])
    }
    assert moved == (last if part == 'Top' else set(before) - last)


def test_weight_decay_spares_batch_norm_alone():
  decayed, plain = (
    _first_step(tiny.run('BN', weight_decay=decay)) for decay in (0.5, 0.0)
  )
  run = tiny.run('BN')
  before = train.start(run, tiny.placed(run))['params']
  for path, w in jax.tree.leaves_with_path(before):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    difference = _at(decayed, path) - _at(plain, path)
    if name.startswith('BatchNorm'):
      np.testing.assert_array_equal(difference, 0, err_msg=name)
    else:
      wanted = -np.float32(0.01 * 0.5) * np.asarray(w)
      np.testing.assert_allclose(difference, wanted, atol=1e-6, err_msg=name)
  names = set(before)
  assert names == {
    'Dense_0', 'Dense_1', 'output', 'BatchNorm_0', 'BatchNorm_1',
  }  # fmt: skip


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return np.asarray(tree)


def _first_step(run, index=None, rate=None):
  placed = tiny.placed(run)
  functions = program(Setup.of(run, placed))
  index = placed.trained[:100] if index is None else index
  state, _ = functions.step(
    train.start(run, placed),
    placed.parts,
    index,
    np.float32(run.protocol.base_rate if rate is None else rate),
    jax.random.key(0),
  )
  return state['params']


def test_a_summed_gradient_is_the_mean_times_the_batch():
  summed = _first_step(tiny.run(reduction='sum', weight_decay=0.0), rate=0.0001)
  mean = _first_step(tiny.run(weight_decay=0.0), rate=0.01)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    summed,
    mean,
  )


def test_the_rate_follows_the_schedule():
  # Batch Manhattan without momentum moves each weight by the rate or not at
  # all; one update an epoch, at 1, 0.1 and 0.01 of the rate.
  run = tiny.run(
    'BM', rate=10.0, epochs=3, momentum=0.0, weight_decay=0.0, holdout=0.5
  )
  placed = tiny.placed(run)
  states = [jax.tree.map(np.array, train.start(run, placed))]
  states += _train(run, placed)[0]
  for before, after, rate in zip(
    states[:-1], states[1:], (0.1, 0.01, 0.001), strict=True
  ):
    w, w_next = (s['params']['output']['bias'] for s in (before, after))
    np.testing.assert_allclose(np.abs(w_next - w), rate, rtol=1e-3)


def test_feedback_is_redrawn_once_an_update():
  def buffers(condition, updates, key=0):
    run = tiny.run(condition)
    placed = tiny.placed(run)
    state = train.start(run, placed) | {'updates': jnp.int32(updates)}
    # At rate 0 nothing but the gradient is remembered.
    state, _ = program(Setup.of(run, placed)).step(
      state,
      placed.parts,
      placed.trained[:100],
      np.float32(0),
      jax.random.key(key),
    )
    assert state['updates'] == updates + 1
    trace = jax.tree.leaves(state['optimizer'])
    return [np.array(leaf) for leaf in trace if leaf.ndim == 2]

  redrawn = 'brSF-50%+BN+BM'
  assert _equal(buffers(redrawn, 5), buffers(redrawn, 5))
  assert not _equal(buffers(redrawn, 5), buffers(redrawn, 6))
  assert not _equal(buffers(redrawn, 5), buffers(redrawn, 5, key=1))
  assert _equal(buffers('frSF+BN', 5), buffers('frSF+BN', 6, key=1))


@pytest.mark.parametrize('condition', ['frSF+BN', 'RndF+BN', 'uSF+BN'])
def test_the_start_is_that_of_the_model(condition):
  run = tiny.run(condition, seed=3)
  state = train.start(run, tiny.placed(run))
  model = Network(
    'timit',
    tiny.CLASSES,
    symjax_bp.from_name(run.rule),
    batch_norm='plain',
    initial_std=0.05,
  )
  variables = model.init(jax.random.key(3), jnp.zeros((1, 1845)), True)
  for part in ('params', 'feedback'):
    jax.tree.map(
      # One is compiled, which may round the product with 0.05 differently.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      state[part],
      variables.get(part, {}),
    )


def test_a_kept_draw_stays():
  states, _ = _train(tiny.run('frSF+BN'))
  first = jax.tree.leaves(states[0]['feedback'])
  assert len(first) == 3
  assert _equal(first, jax.tree.leaves(states[-1]['feedback']))
  other, _ = _train(tiny.run('frSF+BN', seed=1))
  assert not _equal(first, jax.tree.leaves(other[0]['feedback']))


class _Plain(nn.Module):
  """The MNIST network as anyone would write it."""

  @nn.compact
  def __call__(self, x):
    for features in (20, 50):
      x = nn.relu(nn.Conv(features, (5, 5), padding='VALID')(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
    return nn.Dense(10, name='output')(x)


def test_a_symmetric_run_is_plain_flax_and_optax_step_by_step():
  data = datasets.load('digits', train_size=200)
  (run,) = grid.runs_of(
    conditions.find('SGD'),
    (1.0,),
    dataset='digits',
    digest=data.digest,
    protocol=grid.Protocol(base_rate=1e-4, initial_std=0.05, momentum=0.8),
  )
  placed = placement.place(placement.upload(data), run)
  functions = program(Setup.of(run, placed))
  state = train.start(run, placed)
  plain = _Plain()
  params = jax.tree.map(jnp.array, state['params'])
  optimizer = optax.chain(
    optax.add_decayed_weights(5e-4), optax.trace(0.8), optax.scale(-1e-4)
  )
  memory = optimizer.init(params)

  @jax.jit
  def update(params, memory, x, y):
    def loss(params):
      logits = plain.apply({'params': params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    changes, memory = optimizer.update(gradient, memory, params)
    return optax.apply_updates(params, changes), memory, value

  mean = data.x_train[placed.trained].mean(0, dtype=np.float64)
  for step in range(4):
    index = placed.trained[30 * step : 30 * step + 30]
    x = (data.x_train[index] - mean).astype(np.float32)
    params, memory, value = update(params, memory, x, data.y_train[index])
    state, scores = functions.step(
      state, placed.parts, index, np.float32(1e-4), jax.random.key(0)
    )
    assert float(scores[0]) / 30 == pytest.approx(float(value), rel=1e-4)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      dict(state['params']),
      dict(params),
    )


def _numpy_logits(x, variables):
  """The network for TIMIT with batch normalisation, in float64."""
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), variables)
  for layer in (0, 1):
    x = x @ params['params'][f'Dense_{layer}']['kernel']
    stats = params['batch_stats'][f'BatchNorm_{layer}']
    x = np.maximum((x - stats['mean']) / stats['std'], 0)
  output = params['params']['output']
  return x @ output['kernel'] + output['bias']


def test_evaluation_uses_averaged_statistics_of_training_batches(monkeypatch):
  run = tiny.run('uSF+BN', epochs=1, base_rate=0.05)
  data = tiny.dataset()
  placed = tiny.placed(run, data)
  (state,), (line,) = _train(run, placed)
  functions = program(Setup.of(run, placed))
  batches = placement.calibration_batches(run, 1, placed.trained)
  variables = functions.statistics(state['params'], placed.parts, batches)

  # Moving averages (alpha 0.05) of means and standard deviations, over 20
  # mini-batches, starting from nothing: weights 0.95^(19 - k), normalised.
  mean = data.x_train[placed.trained].mean(0, dtype=np.float64)
  W = np.asarray(state['params']['Dense_0']['kernel'], np.float64)
  outputs = [(data.x_train[rows] - mean) @ W for rows in batches]
  weights = 0.95 ** np.arange(19, -1, -1)
  weights /= weights.sum()
  stats = variables['batch_stats']['BatchNorm_0']
  np.testing.assert_allclose(
    stats['mean'],
    sum(w * y.mean(0) for w, y in zip(weights, outputs, strict=True)),
    atol=1e-4,
  )
  np.testing.assert_allclose(
    stats['std'],
    sum(
      w * np.sqrt(y.var(0) + 1e-4)
      for w, y in zip(weights, outputs, strict=True)
    ),
    rtol=1e-4,
  )
  # Which the line of the epoch was computed with.
  for name, x, y in (
    ('test', data.x_test, data.y_test),
    ('holdout', data.x_train[placed.held_out], data.y_train[placed.held_out]),
  ):
    logits = _numpy_logits(x - mean, variables)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    assert line[f'{name}_loss'] == pytest.approx(losses.mean(), rel=1e-3)
    errors = 100 * np.mean(logits.argmax(1) != y)
    assert line[f'{name}_error'] == pytest.approx(errors, abs=1e-9)
  # However the images are divided: the last batch is padded.
  monkeypatch.setattr(train, 'EVALUATION_BATCH', 7)
  _, (divided,) = _train(run, placed)
  assert divided['test_error'] == line['test_error']
  assert divided['test_loss'] == pytest.approx(line['test_loss'], rel=1e-5)


def test_training_scores_are_of_the_images_as_they_were_met():
  run = tiny.run(epochs=1, base_rate=1e-30, momentum=0.0)
  data = tiny.dataset()
  placed = tiny.placed(run, data)
  (state,), (line,) = _train(run, placed)
  met = placement.mini_batches(run, 1, placed.trained).ravel()
  x = data.x_train[met] - data.x_train[placed.trained].mean(0)
  params = state['params']
  for layer in ('Dense_0', 'Dense_1'):
    x = np.maximum(x @ params[layer]['kernel'] + params[layer]['bias'], 0)
  logits = x @ params['output']['kernel'] + params['output']['bias']
  wrong = 100 * np.mean(logits.argmax(1) != data.y_train[met])
  assert line['train_error'] == pytest.approx(wrong, abs=1e-4)
  assert len(met) == 200


def test_a_diverged_run_ends_and_is_a_result():
  run = tiny.run('uSF', rate=1e30, epochs=5)
  _, lines = _train(run)
  assert len(lines) == 1
  assert lines[0]['finite'] is False
  assert lines[0]['train_loss'] is lines[0]['test_loss'] is None
  result = train.result(run, tiny.CLASSES, lines)
  assert result['diverged'] is True
  assert result['chance_error'] == 90.0
  assert result['paper_error'] == result['honest_error'] == 90.0
  assert result['epochs_run'] == 1


def test_layer_metrics():
  _, (line, _) = _train(tiny.run('uSF+BN', layer_metrics=True))
  assert set(line['layers']) == {'Dense_0', 'Dense_1', 'output'}
  for row in line['layers'].values():
    assert set(row) == {'concordance', 'angle', 'norm_ratio', 'gradient_angle'}
    assert row['concordance'] == 1.0
    assert 0 < row['angle'] < 90
    assert row['norm_ratio'] > 1
  assert line['layers']['Dense_0']['gradient_angle'] > 0
  _, (line, _) = _train(tiny.run('SGD', layer_metrics=True))
  for row in line['layers'].values():
    assert row['concordance'] == row['norm_ratio'] == 1.0
    assert row['angle'] == row['gradient_angle'] == 0.0


def test_layer_metrics_that_are_no_numbers_are_none():
  _, lines = _train(tiny.run('uSF', rate=1e30, layer_metrics=True))
  assert lines[-1]['layers']['output']['angle'] is None


def test_metrics_do_not_change_training():
  redrawn = 'brSF-50%+BN+BM'
  (*_, with_metrics), _ = _train(tiny.run(redrawn, layer_metrics=True))
  (*_, without), _ = _train(tiny.run(redrawn))
  assert _equal(with_metrics, without)


@pytest.mark.parametrize('scan', [False, True])
def test_stopping(scan):
  run = tiny.run()
  placed = tiny.placed(run)
  answers = iter([False] if scan else [False, False, False])
  epochs = train.epochs(
    run,
    placed,
    train.start(run, placed),
    scan=scan,
    stopping=lambda: next(answers, True),
  )
  next(epochs)  # two steps, or one scan
  with pytest.raises(train.Stopped):
    next(epochs)


def test_both_results():
  run = tiny.run(epochs=4)
  lines = [
    {'epoch': i, 'test_error': test, 'holdout_error': held, 'finite': True}
    for i, test, held in (
      (1, 9.0, 8.0), (2, 5.0, 7.0), (3, 6.0, 4.0), (4, 5.0, 4.0),
    )
  ]  # fmt: skip
  assert train.result(run, 4, lines) == {
    'paper_error': 5.0,
    'paper_epoch': 2,
    'holdout_error': 4.0,
    'honest_epoch': 3,
    'honest_error': 6.0,
    'epochs_run': 4,
    'diverged': False,
    'chance_error': 75.0,
  }
  diverged = copy.deepcopy(lines[:3])
  diverged[2] |= {'finite': False, 'test_error': 90.0, 'holdout_error': 90.0}
  result = train.result(run, 4, diverged)
  assert result['diverged'] is True
  assert (result['paper_error'], result['honest_error']) == (5.0, 5.0)
  for line in lines:
    del line['holdout_error']
  result = train.result(run, 4, lines)
  assert result['paper_error'] == 5.0
  assert result['honest_error'] is result['honest_epoch'] is None
