"""The compiled functions of a run: training step, evaluation, statistics.

``program(setup)`` compiles once for all runs that differ only in rate, seed,
schedule or images. A step receives the rows of its mini-batch and the rate.
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

from experiments.paper.conditions import BATCH_100, Condition
from experiments.paper.protocol import Protocol, Run
from experiments.training import devices, models, plugins
from experiments.training.backward import backward
from experiments.training.data import Arrays, DeviceData, Images
from symjax_bp import combine, metrics, optim, partition, redraw
from symjax_bp.linen import calibrate

State = dict[str, Any]  # params, feedback, optimizer, updates; all arrays
_KEPT_PROGRAMS = 8  # in memory; runs come in an order that needs one or two
# Fields of the protocol that change no compiled function,
_OF_THE_LOOP = (
  'epochs', 'train_size', 'holdout', 'base_rate', 'calibration_batches',
  'layer_metrics',
)  # fmt: skip
# and those that change the backward pass and the update only.
_OF_THE_UPDATE = ('momentum', 'weight_decay', 'reduction', 'batch_norm_groups')


def _defaults(protocol: Protocol, names: tuple[str, ...]) -> Protocol:
  defaults = {name: getattr(Protocol, name) for name in names}
  return dataclasses.replace(protocol, **defaults)


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that the compiled functions of a run depend on.

  Attributes:
    condition: its batch plan is ignored.
    protocol: fields that only the loop over epochs reads have their defaults.
    network: key of ``models.NETWORKS``, or of the plugin's.
    plugin: source of a Python file with rules or networks, or empty.
    shape: of one input.
    classes: number of classes.
    mesh: devices over which mini-batches are divided.
  """

  condition: Condition
  protocol: Protocol
  network: str
  plugin: str
  shape: tuple[int, ...]
  classes: int
  mesh: Mesh | None = None

  @classmethod
  def of(cls, run: Run, data: DeviceData) -> 'Setup':
    """The setup of a run on a dataset."""
    return cls(
      condition=dataclasses.replace(run.condition, batch_plan=BATCH_100),
      protocol=_defaults(run.protocol, _OF_THE_LOOP),
      network=run.network or data.network,
      plugin=run.plugin,
      shape=data.arrays.train.x.shape[1:],
      classes=data.classes,
      mesh=data.mesh,
    )

  def forward(self) -> 'Setup':
    """The setup of all conditions that share the forward pass."""
    return dataclasses.replace(
      self,
      condition=Condition(batch_norm=self.condition.batch_norm),
      protocol=_defaults(self.protocol, _OF_THE_UPDATE),
    )


class Program(NamedTuple):
  """The compiled functions of a setup.

  ``index`` is int32, rows of the images; scores are sums of the loss (nats) and
  of the errors over the examples.

  Attributes:
    initialize: (key) -> state before the first update.
    step: (state, arrays, index, rate) -> (state, scores before the update);
      consumes the state.
    scan: the same for an epoch, with an index per mini-batch.
    evaluate: (variables, arrays, images, index, weight) -> scores; weight 0
      leaves an example out.
    statistics: (params, arrays, an index per mini-batch) -> variables for
      ``evaluate``.
    align: (state, arrays, index) -> {layer: ``metrics.Alignment``}.
    finite: (tree) -> whether each array is.
  """

  initialize: Callable[..., State]
  step: Callable[..., tuple[State, jax.Array]]
  scan: Callable[..., tuple[State, jax.Array]]
  evaluate: Callable[..., jax.Array]
  statistics: Callable[..., Any]
  align: Callable[..., dict[str, metrics.Alignment]]
  finite: Callable[..., jax.Array]


def _in_last_layer(path: Any) -> bool:
  return "['output']" in jax.tree_util.keystr(path)


def _optimizer(setup: Setup) -> optax.GradientTransformation:
  """The update of weights and learned feedback without its rate.

  Frozen layers do not move.
  """
  condition, protocol = setup.condition, setup.protocol

  def decays(trained):
    return jax.tree.map_with_path(
      lambda path, _: 'BatchNorm' not in jax.tree_util.keystr(path), trained
    )

  def labels(trained):
    def label(path, _):
      frozen = _in_last_layer(path) == (condition.frozen == 'last layer')
      return 'frozen' if frozen else 'learns'

    return jax.tree.map_with_path(label, trained)

  if condition.adam:
    if condition.batch_manhattan:
      raise ValueError(
        f'batch_manhattan is {condition.batch_manhattan}, but must be 0 where '
        'adam is true: a condition has one update.'
      )
    update = optax.chain(
      optax.scale_by_adam(b1=protocol.momentum),
      optax.add_decayed_weights(protocol.weight_decay, decays),
    )
  else:
    update = optim.scale_by_batch_manhattan(
      condition.batch_manhattan,
      protocol.momentum,
      protocol.weight_decay,
      decays,
    )
  if condition.frozen == 'nothing':
    return update
  return optax.multi_transform(
    {'learns': update, 'frozen': optax.set_to_zero()}, labels
  )


def _network(setup: Setup) -> nn.Module:
  own = plugins.load(setup.plugin).networks
  network: Any = own.get(setup.network, models.NETWORKS.get(setup.network))
  if callable(network):
    module: Any = network(setup.classes, setup.condition.batch_norm)
    return module
  return models.Network(
    layers=tuple(network),
    classes=setup.classes,
    batch_norm=setup.condition.batch_norm,
    initial_stds=setup.protocol.initial_stds,
    epsilon=setup.protocol.batch_norm_epsilon,
  )


def _check(model: nn.Module, setup: Setup) -> None:
  """Checks that a plugin's network is what conditions rely on.

  Raises:
    ValueError: it is not; says what to change.
  """
  if setup.network not in plugins.load(setup.plugin).networks:
    return
  x = jax.ShapeDtypeStruct((1, *setup.shape), jnp.float32)
  logits, variables = jax.eval_shape(
    lambda key, x: model.init_with_output(key, x, True), jax.random.key(0), x
  )
  found = f'network {setup.network!r} of the plugin '
  if logits.shape != (1, setup.classes):
    raise ValueError(
      f'{found}returns shape {logits.shape} for one image, but must return '
      f'(1, {setup.classes}), a logit for each class.'
    )
  params = jax.tree.leaves_with_path(variables['params'])
  if not any(map(_in_last_layer, dict(params))):
    raise ValueError(
      f"{found}must name its last layer 'output', but has "
      f'{", ".join(variables["params"])}.'
    )
  if setup.condition.batch_norm == 'none' and 'batch_stats' in variables:
    raise ValueError(
      f"{found}has batch normalization, but the argument batch_norm is 'none'."
    )


def _init(model: nn.Module, setup: Setup, key: jax.Array) -> dict[str, Any]:
  """All variables of a model; under jit the unused ones are not computed."""
  x = jnp.zeros((1, *setup.shape), jnp.float32)
  return dict(model.init(key, x, True))


def _inputs(setup: Setup, arrays: Arrays, images: Images, index):
  x = images.x[index].astype(jnp.float32) - arrays.mean[None]
  return x * jnp.float32(setup.protocol.input_scale)


def _in_groups(setup: Setup, logits: Callable[..., Any]) -> Callable[..., Any]:
  """Logits in training; each group has its own batch statistics."""
  groups = setup.protocol.batch_norm_groups
  if groups == 1 or setup.condition.batch_norm == 'none':
    return logits

  def grouped(params, feedback, x, y):
    x, y = (each.reshape(groups, -1, *each.shape[1:]) for each in (x, y))
    found = jax.vmap(logits, (None, None, 0, 0))(params, feedback, x, y)
    return found.reshape(-1, found.shape[-1])

  return grouped


_losses = optax.softmax_cross_entropy_with_integer_labels


def _scores(logits, y):
  errors = jnp.argmax(logits, -1) != y
  return jnp.stack([_losses(logits, y), errors.astype(jnp.float32)])


class _Forward(NamedTuple):
  """Functions that depend on neither the rule nor the update."""

  initial_params: Callable[[jax.Array], Any]
  evaluate: Callable[..., jax.Array]
  statistics: Callable[..., Any]


@functools.lru_cache(maxsize=_KEPT_PROGRAMS)
def _forward(setup: Setup) -> _Forward:
  """Compiled once for all conditions that share ``Setup.forward``."""
  model = _network(setup)
  _check(model, setup)
  jit = devices.compiler(setup.mesh)

  @jax.jit
  def initial_params(key):
    return _init(model, setup, key)['params']

  @jit
  def evaluate(variables, arrays, images, index, weight):
    logits = model.apply(
      variables, _inputs(setup, arrays, images, index), False
    )
    return (_scores(logits, images.y[index]) * weight[None]).sum(1)

  inputs = jax.jit(functools.partial(_inputs, setup))

  @functools.cache
  def no_statistics():
    variables = jax.eval_shape(lambda: _init(model, setup, jax.random.key(0)))
    # Not in _check: steps alone, as the benchmark takes them, need none.
    if 'batch_stats' not in variables:
      raise ValueError(
        f'network {setup.network!r} of the plugin has no batch normalization, '
        f'but the argument batch_norm is {setup.condition.batch_norm!r}.'
      )
    shapes = variables['batch_stats']
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

  def statistics(params, arrays, order):
    if setup.condition.batch_norm == 'none':
      return {'params': params}
    return calibrate(
      model,
      {'params': params, 'batch_stats': no_statistics()},
      (inputs(arrays, arrays.train, index) for index in order),
      len(order),
      train=True,
    )

  return _Forward(initial_params, evaluate, statistics)


@functools.lru_cache(maxsize=_KEPT_PROGRAMS)
def program(setup: Setup, plain: bool = False) -> Program:
  """The functions of a setup; one compilation for all rates and seeds.

  Args:
    setup: what they depend on.
    plain: leave Flax's own layers as they are, to compare with.
  """
  rule = None
  if not plain:
    rule = plugins.load(setup.plugin).rule(setup.condition.rule)
  way = backward(_network(setup), rule)
  jit = devices.compiler(setup.mesh)
  forward = _forward(setup.forward())
  optimizer = _optimizer(setup)
  logits = _in_groups(setup, way.logits)
  draw = jax.jit(way.init)

  def initialize(key):
    params = forward.initial_params(key)
    x = jnp.zeros((1, *setup.shape), jnp.float32)
    feedback = draw(key, params, x)
    return {
      'params': params,
      'feedback': feedback,
      'optimizer': optimizer.init(trained_part(params, feedback)),
      'updates': jnp.int32(0),
    }

  def redrawn_feedback(state):
    if not way.redraws:
      return state['feedback']
    # By the number of the update, so that V is the same on any devices.
    return redraw(state['feedback'], state['updates'])

  def trained_part(params, feedback):
    """The arrays that the optimizer updates."""
    learned = {'feedback': partition(feedback)[0]} if way.learns else {}
    return {'params': params} | learned

  def step(state, arrays, index, rate):
    x = _inputs(setup, arrays, arrays.train, index)
    y = arrays.train.y[index]
    redrawn = redrawn_feedback(state)
    before = trained_part(state['params'], redrawn)

    def loss(trained):
      feedback = redrawn
      if way.learns:
        feedback = combine(trained['feedback'], partition(redrawn)[1])
      found = logits(trained['params'], feedback, x, y)
      reduce = jnp.mean if setup.protocol.reduction == 'mean' else jnp.sum
      return reduce(_losses(found, y)), _scores(found, y).sum(1)

    gradient, scores = jax.grad(loss, has_aux=True)(before)
    updates, optimizer_state = optimizer.update(
      gradient, state['optimizer'], before
    )
    trained = jax.tree.map(
      lambda w, minus_tau: w - rate * minus_tau, before, updates
    )
    feedback = state['feedback']
    if way.learns:
      feedback = combine(trained['feedback'], partition(feedback)[1])
    new = {
      'params': trained['params'],
      'feedback': way.phase(trained['params'], feedback, x, state['updates']),
      'optimizer': optimizer_state,
      'updates': state['updates'] + 1,
    }
    return new, scores

  def scan(state, arrays, order, rate):
    def body(state, index):
      return step(state, arrays, index, rate)

    state, scores = jax.lax.scan(body, state, order)
    return state, scores.sum(0)

  def align(state, arrays, index):
    y = arrays.train.y[index]
    return way.align(
      state['params'],
      redrawn_feedback(state),
      _inputs(setup, arrays, arrays.train, index),
      y,
      lambda logits: _losses(logits, y).mean(),
    )

  def finite(tree):
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])

  return Program(
    initialize=initialize,
    step=jit(step, donate_argnums=0),
    scan=jit(scan, donate_argnums=0),
    evaluate=forward.evaluate,
    statistics=forward.statistics,
    align=jit(align),
    finite=jit(finite),
  )
