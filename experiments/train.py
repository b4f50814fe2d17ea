"""Training of one run: pure step functions and the loop over epochs.

``program(setup)`` compiles once for all runs that differ in rate, seed or
images only. The images stay on the device; a step takes the indices of its
mini-batch. On a CPU an epoch is a loop over a jitted step, because XLA's
convolutions are several times slower inside a compiled loop there; elsewhere it
is one ``lax.scan``. The numbers are the same.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.datasets import Dataset, splits
from experiments.grid import Run
from experiments.models import Network
from symjax_bp import from_name, linen, optim
from symjax_bp.normalization import calibrate

State = dict[str, Any]  # params, feedback, optimizer, updates; all arrays
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """All of a run that its compiled functions depend on."""

  architecture: str
  classes: int
  rule: str
  batch_manhattan: int
  batch_norm: str
  frozen: str
  momentum: float
  weight_decay: float
  initial_std: float
  input_scale: float
  reduction: str
  batch_norm_epsilon: float

  @classmethod
  def of(cls, run: Run, data: Dataset) -> 'Setup':
    """The setup of a run on a dataset."""
    config = run.config()
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(
      architecture=data.spec.architecture,
      classes=len(data.classes),
      **{name: config[name] for name in names & config.keys()},
    )


class Stopped(Exception):
  """Asked to stop in the middle of an epoch, which is then as not begun."""


class Images(NamedTuple):
  """One part of a dataset on the device."""

  x: jax.Array  # uint8 (n, height, width, channels), or float32 (n, features)
  y: jax.Array  # int32 (n,)


class Parts(NamedTuple):
  """A dataset as a run uses it."""

  train: Images
  holdout: Images | None
  test: Images
  mean: jax.Array  # mean training image, float32


class Program(NamedTuple):
  """The compiled functions of a setup."""

  initialize: Callable[..., State]
  step: Callable[..., tuple[State, jax.Array]]
  scan: Callable[..., tuple[State, jax.Array]]
  evaluate: Callable[..., jax.Array]
  statistics: Callable[..., Any]
  align: Callable[..., Any]
  finite: Callable[..., jax.Array]


def place(data: Dataset, run: Run) -> Parts:
  """Sets aside the held-out part and puts everything on the device."""
  rows = np.arange(len(data.y_train))
  held_out = round(run.protocol.holdout * len(rows))
  chosen = splits.balanced_rows(data.y_train, held_out, run.seed)
  train = np.setdiff1d(rows, chosen)
  x_train = data.x_train[train]
  mean = x_train.mean(axis=0, dtype=np.float64).astype(np.float32)

  def images(x, y):
    return Images(jnp.asarray(x), jnp.asarray(y, jnp.int32))

  return Parts(
    train=images(x_train, data.y_train[train]),
    holdout=images(data.x_train[chosen], data.y_train[chosen])
    if held_out
    else None,
    test=images(data.x_test, data.y_test),
    mean=jnp.asarray(mean),
  )


def _optimizer(setup: Setup) -> optax.GradientTransformation:
  """The update without its rate; what is frozen does not move."""

  def decays(params):
    return jax.tree.map_with_path(
      lambda path, _: 'BatchNorm' not in jax.tree_util.keystr(path), params
    )

  def labels(params):
    frozen = {
      'nothing': (),
      'last layer': ('output',),
      'before last layer': tuple(set(params) - {'output'}),
    }[setup.frozen]
    return {name: 'frozen' if name in frozen else 'learns' for name in params}

  update = optim.scale_by_batch_manhattan(
    setup.batch_manhattan, setup.momentum, setup.weight_decay, decays
  )
  if setup.frozen == 'nothing':
    return update
  return optax.multi_transform(
    {'learns': update, 'frozen': optax.set_to_zero()}, labels
  )


@functools.cache
def program(setup: Setup) -> Program:
  """The functions of a setup; one compilation for all rates and seeds."""
  model = Network(
    architecture=setup.architecture,
    classes=setup.classes,
    rule=from_name(setup.rule),
    batch_norm=setup.batch_norm,
    initial_std=setup.initial_std,
    epsilon=setup.batch_norm_epsilon,
  )
  twin = linen.plain_twin(model)  # evaluates without feedback
  optimizer = _optimizer(setup)

  def inputs(parts: Parts, images: Images, index):
    x = images.x[index].astype(jnp.float32) - parts.mean[None]
    return x * jnp.float32(setup.input_scale)

  def initialize(key, parts):
    index = jnp.zeros(1, jnp.int32)
    variables = dict(model.init(key, inputs(parts, parts.train, index), True))
    params = variables.pop('params')
    return {
      'params': params,
      'feedback': variables.get('feedback', {}),
      'optimizer': optimizer.init(params),
      'updates': jnp.int32(0),
    }

  def losses(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)

  def score(logits, y):
    errors = jnp.argmax(logits, -1) != y
    return jnp.stack([losses(logits, y), errors.astype(jnp.float32)])

  def step(state, parts, index, rate, key):
    x = inputs(parts, parts.train, index)
    y = parts.train.y[index]
    rngs = {'feedback': jax.random.fold_in(key, state['updates'])}

    def loss(params):
      variables = {'params': params, 'feedback': state['feedback']}
      logits = model.apply(variables, x, True, rngs=rngs)
      reduce = jnp.mean if setup.reduction == 'mean' else jnp.sum
      return reduce(losses(logits, y)), score(logits, y).sum(1)

    gradient, scores = jax.grad(loss, has_aux=True)(state['params'])
    updates, optimizer_state = optimizer.update(
      gradient, state['optimizer'], state['params']
    )
    params = jax.tree.map(
      lambda w, minus_tau: w - rate * minus_tau, state['params'], updates
    )
    new = {
      'params': params,
      'feedback': state['feedback'],
      'optimizer': optimizer_state,
      'updates': state['updates'] + 1,
    }
    return new, scores

  def scan(state, parts, order, rate, key):
    def body(state, index):
      return step(state, parts, index, rate, key)

    state, scores = jax.lax.scan(body, state, order)
    return state, scores.sum(0)

  def evaluate(variables, parts, images, index, weight):
    logits = twin.apply(variables, inputs(parts, images, index), False)
    return (score(logits, images.y[index]) * weight[None]).sum(1)

  def statistics(params, parts, order):
    if setup.batch_norm == 'none':
      return {'params': params}
    # Shapes of the collection; calibrate starts it anew.
    x = inputs(parts, parts.train, order[0])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, True))
    stats = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes['batch_stats']
    )
    return calibrate(
      twin,
      {'params': params, 'batch_stats': stats},
      (inputs(parts, parts.train, index) for index in order),
      len(order),
      train=True,
    )

  def align(state, parts, index, key):
    rngs = {'feedback': jax.random.fold_in(key, state['updates'])}
    y = parts.train.y[index]
    return linen.layer_alignment(
      model,
      {'params': state['params'], 'feedback': state['feedback']},
      lambda logits: losses(logits, y).mean(),
      inputs(parts, parts.train, index),
      True,
      rngs=rngs,
    )

  def finite(tree):
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])

  return Program(
    initialize=jax.jit(initialize),
    step=jax.jit(step, donate_argnums=0),
    scan=jax.jit(scan, donate_argnums=0),
    evaluate=jax.jit(evaluate),
    statistics=statistics,
    align=jax.jit(align),
    finite=jax.jit(finite),
  )


def start(run: Run, data: Dataset, parts: Parts) -> State:
  """The state before the first epoch."""
  key = jax.random.key(run.seed)
  return program(Setup.of(run, data)).initialize(key, parts)


def _order(run: Run, epoch: int, count: int, batches: int | None = None):
  """Shuffled mini-batches of an epoch; what is left over waits for the next.

  With a number of ``batches``, goes round as often as that takes.
  """
  size = min(run.batch_size(epoch), count)
  random = np.random.default_rng([run.seed, epoch, int(batches is not None)])
  rounds = (
    1 if batches is None else -(-batches * size // (count - count % size))
  )
  whole = count - count % size
  index = np.concatenate(
    [random.permutation(count)[:whole] for _ in range(rounds)]
  )
  return index.astype(np.int32).reshape(-1, size)[:batches]


def _percent(scores: np.ndarray, count: int) -> tuple[float | None, float]:
  """Mean loss (None if not finite) and error in percent."""
  loss = float(scores[0]) / count
  return (loss if np.isfinite(loss) else None), 100 * float(scores[1]) / count


def _evaluate(functions: Program, variables, parts: Parts, images: Images):
  count = len(images.y)
  size = min(EVALUATION_BATCH, count)
  total = 0
  for first in range(0, count, size):
    rows = np.arange(first, first + size, dtype=np.int32)
    weight = (rows < count).astype(np.float32)
    total = total + functions.evaluate(
      variables, parts, images, np.minimum(rows, count - 1), weight
    )
  return _percent(np.asarray(total), count)


def epochs(
  run: Run,
  data: Dataset,
  parts: Parts,
  state: State,
  first: int = 1,
  scan: bool | None = None,
  stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[State, dict[str, Any]]]:
  """Trains epoch by epoch; ends early once a parameter is not finite.

  Args:
    run: what to do.
    data: the dataset.
    parts: the same as ``place`` gives it.
    state: before epoch ``first``; its buffers are used up.
    first: number of the epoch to begin with, from 1.
    scan: whether an epoch is one compiled loop; default: not on a CPU.
    stopping: asked before every step whether to stop.

  Yields:
    The state after each epoch and its line of metrics: errors in percent,
    losses in nats, seconds.

  Raises:
    Stopped: if ``stopping()`` says so.
  """
  functions = program(Setup.of(run, data))
  protocol = run.protocol
  key = jax.random.fold_in(jax.random.key(run.seed), 1)
  scan = jax.default_backend() != 'cpu' if scan is None else scan
  for epoch in range(first, protocol.epochs + 1):
    began = time.perf_counter()
    order = _order(run, epoch, len(parts.train.y))
    rate = np.float32(
      protocol.base_rate * run.rate * protocol.rate_factor(epoch)
    )
    if scan:
      state, scores = functions.scan(state, parts, order, rate, key)
    else:
      steps = []
      for index in order:
        if stopping():
          raise Stopped
        state, step_scores = functions.step(state, parts, index, rate, key)
        steps.append(step_scores)
      scores = np.sum(jax.device_get(steps), axis=0, dtype=np.float32)
    line: dict[str, Any] = {'epoch': epoch}
    names = ('train_loss', 'train_error')
    line |= zip(names, _percent(np.asarray(scores), order.size), strict=True)
    calibration = _order(
      run, epoch, len(parts.train.y), protocol.calibration_batches
    )
    variables = functions.statistics(state['params'], parts, calibration)
    for name in ('test', 'holdout'):
      images = getattr(parts, name)
      if images is not None:
        loss, error = _evaluate(functions, variables, parts, images)
        line |= {f'{name}_loss': loss, f'{name}_error': error}
    if protocol.layer_metrics:
      rows = functions.align(state, parts, order[0], key)
      line['layers'] = {
        layer: {name: float(x) for name, x in row._asdict().items()}
        for layer, row in rows.items()
      }
    finite = bool(np.all(functions.finite(state['params'])))
    line['finite'] = finite
    line['seconds'] = round(time.perf_counter() - began, 3)
    yield state, line
    if not finite:
      return


def result(run: Run, classes: int, lines: list[dict[str, Any]]) -> dict:
  """Both results of a run from its lines of metrics.

  The paper's: the best test error of all epochs. The honest one: the test
  error of the epoch that is best on the held-out images.
  """
  best = min(lines, key=lambda line: line['test_error'])
  summary = {
    'paper_error': best['test_error'],
    'paper_epoch': best['epoch'],
    'holdout_error': None,
    'honest_epoch': None,
    'honest_error': None,
    'epochs_run': len(lines),
    'diverged': not lines[-1]['finite'],
    'chance_error': 100 * (1 - 1 / classes),
  }
  if run.protocol.holdout > 0:
    chosen = min(lines, key=lambda line: line['holdout_error'])
    summary |= {
      'holdout_error': chosen['holdout_error'],
      'honest_epoch': chosen['epoch'],
      'honest_error': chosen['test_error'],
    }
  return summary
