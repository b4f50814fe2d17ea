"""The compiled functions of a run: training step, evaluation, statistics.

``program(setup)`` compiles once for all runs that differ in rate, seed or
images only. A step is told the rows of its mini-batch and the rate.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.datasets import SHAPES
from experiments.paper.protocol import Run
from experiments.training import devices
from experiments.training.models import Network
from experiments.training.placement import Images, Parts, Placed
from symjax_bp import from_name, linen, metrics, optim, redraw
from symjax_bp.batch_norm import calibrate

State = dict[str, Any]  # params, feedback, optimizer, updates; all arrays
_KEPT_PROGRAMS = 8  # in memory; runs come in an order that needs one or two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """All of a run that its compiled functions depend on.

  Attributes:
    rule: for ``symjax_bp.from_name``; None for Flax's own layers. All other
      fields are those of a run and its dataset.
  """

  architecture: str
  classes: int
  rule: str | None
  batch_manhattan: int
  batch_norm: str
  frozen: str
  momentum: float
  weight_decay: float
  initial_stds: tuple[float, ...]
  input_scale: float
  reduction: str
  batch_norm_epsilon: float
  batch_norm_groups: int
  mesh: Mesh | None

  @classmethod
  def of(cls, run: Run, placed: Placed) -> 'Setup':
    """The setup of a run on a dataset."""
    config = {**run.config(), 'initial_stds': run.protocol.initial_stds}
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(
      architecture=placed.architecture,
      classes=placed.classes,
      mesh=placed.mesh,
      **{name: config[name] for name in names & config.keys()},
    )


class Program(NamedTuple):
  """The compiled functions of a setup.

  ``index`` is int32, rows of the images;
  scores are sums of the loss (nats) and of the errors over the examples.

  Attributes:
    initialize: (key) -> state before the first update.
    step: (state, parts, index, rate) -> (state, scores of before); uses the
      state up.
    scan: the same for an epoch, with an index per mini-batch.
    evaluate: (variables, parts, images, index, weight) -> scores; weight 0
      leaves an example out.
    statistics: (params, parts, an index per mini-batch) -> variables for
      ``evaluate``.
    align: (state, parts, index) -> {layer: ``metrics.Alignment``}.
    finite: (tree) -> whether each array is.
  """

  initialize: Callable[..., State]
  step: Callable[..., tuple[State, jax.Array]]
  scan: Callable[..., tuple[State, jax.Array]]
  evaluate: Callable[..., jax.Array]
  statistics: Callable[..., Any]
  align: Callable[..., dict[str, metrics.Alignment]]
  finite: Callable[..., jax.Array]


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


def _init(model: nn.Module, setup: Setup, key: jax.Array) -> dict[str, Any]:
  """All variables of a model; what is not used is not computed under jit."""
  x = jnp.zeros((1, *SHAPES[setup.architecture]), jnp.float32)
  return dict(model.init(key, x, True))


def _network(setup: Setup) -> Network:
  return Network(
    architecture=setup.architecture,
    classes=setup.classes,
    batch_norm=setup.batch_norm,
    initial_stds=setup.initial_stds,
    epsilon=setup.batch_norm_epsilon,
  )


def _asymmetric(setup: Setup) -> nn.Module:
  """The network whose backward pass uses the rule in all layers of weights."""
  model = _network(setup)
  if setup.rule is None:
    return model
  return linen.with_feedback(model, from_name(setup.rule), row_convolution=True)


def _inputs(parts: Parts, images: Images, index, input_scale: float):
  x = images.x[index].astype(jnp.float32) - parts.mean[None]
  return x * jnp.float32(input_scale)


def _grouped(
  model: nn.Module, setup: Setup
) -> Callable[[Any, jax.Array], jax.Array]:
  """The training mode, each group of a mini-batch with its own statistics."""

  def apply(variables, x) -> Any:
    return model.apply(variables, x, True)

  groups = setup.batch_norm_groups
  if groups == 1 or setup.batch_norm == 'none':
    return apply

  def apply_grouped(variables, x):
    x = x.reshape(groups, -1, *x.shape[1:])
    logits = jax.vmap(apply, (None, 0))(variables, x)
    return logits.reshape(-1, logits.shape[-1])

  return apply_grouped


def _losses(logits, y):
  return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def _scores(logits, y):
  errors = jnp.argmax(logits, -1) != y
  return jnp.stack([_losses(logits, y), errors.astype(jnp.float32)])


class _Common(NamedTuple):
  """What depends neither on the rule nor on the update; see ``Program``."""

  initial_params: Callable[[jax.Array], Any]
  evaluate: Callable[..., jax.Array]
  statistics: Callable[..., Any]


_ANY = {
  'rule': None,
  'batch_manhattan': 0,
  'frozen': 'nothing',
  'momentum': 0.0,
  'weight_decay': 0.0,
  'reduction': 'mean',
  'batch_norm_groups': 1,
}


@functools.lru_cache(maxsize=_KEPT_PROGRAMS)
def _common(setup: Setup) -> _Common:
  """Compiled once for all conditions that differ in ``_ANY`` only."""
  model = _network(setup)
  jit = devices.compiler(setup.mesh)

  @jax.jit
  def initial_params(key):
    return _init(model, setup, key)['params']

  @jit
  def evaluate(variables, parts, images, index, weight):
    x = _inputs(parts, images, index, setup.input_scale)
    logits = model.apply(variables, x, False)
    return (_scores(logits, images.y[index]) * weight[None]).sum(1)

  inputs = jax.jit(functools.partial(_inputs, input_scale=setup.input_scale))

  @functools.cache
  def no_statistics():
    shapes = jax.eval_shape(
      lambda: _init(model, setup, jax.random.key(0))['batch_stats']
    )
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

  def statistics(params, parts, order):
    if model.batch_norm == 'none':
      return {'params': params}
    return calibrate(
      model,
      {'params': params, 'batch_stats': no_statistics()},
      (inputs(parts, parts.train, index) for index in order),
      len(order),
      train=True,
    )

  return _Common(initial_params, evaluate, statistics)


@functools.lru_cache(maxsize=_KEPT_PROGRAMS)
def program(setup: Setup) -> Program:
  """The functions of a setup; one compilation for all rates and seeds."""
  model = _asymmetric(setup)
  jit = devices.compiler(setup.mesh)
  common = _common(dataclasses.replace(setup, **_ANY))
  optimizer = _optimizer(setup)

  def initialize(key):
    params = common.initial_params(key)
    return {
      'params': params,
      'feedback': draw(key) if keeps_state else {},
      'optimizer': optimizer.init(params),
      'updates': jnp.int32(0),
    }

  keeps_state = setup.rule is not None and from_name(setup.rule).keeps_state
  draw = jax.jit(lambda key: _init(model, setup, key)['feedback'])

  def step(state, parts, index, rate):
    x = _inputs(parts, parts.train, index, setup.input_scale)
    y = parts.train.y[index]

    # By the number of the update, so that V is the same on any devices.
    feedback = redraw(state['feedback'], state['updates'])

    def loss(params):
      variables = {'params': params, 'feedback': feedback}
      logits = _grouped(model, setup)(variables, x)
      reduce = jnp.mean if setup.reduction == 'mean' else jnp.sum
      return reduce(_losses(logits, y)), _scores(logits, y).sum(1)

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

  def scan(state, parts, order, rate):
    def body(state, index):
      return step(state, parts, index, rate)

    state, scores = jax.lax.scan(body, state, order)
    return state, scores.sum(0)

  def align(state, parts, index):
    y = parts.train.y[index]
    rows = linen.layer_alignment(
      model,
      {
        'params': state['params'],
        'feedback': redraw(state['feedback'], state['updates']),
      },
      lambda logits: _losses(logits, y).mean(),
      _inputs(parts, parts.train, index, setup.input_scale),
      True,
    )
    return {path.removesuffix('/kernel'): row for path, row in rows.items()}

  def finite(tree):
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])

  return Program(
    initialize=initialize,
    step=jit(step, donate_argnums=0),
    scan=jit(scan, donate_argnums=0),
    evaluate=common.evaluate,
    statistics=common.statistics,
    align=jit(align),
    finite=jit(finite),
  )
