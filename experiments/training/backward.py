"""How the error of a condition goes back through its network, by rule.

The paper's rules and those that learn with the weights change V at every layer;
a weight mirror also learns in a noise phase after each step; direct feedback
sends the output's error past the layers. A ``Backward`` hides the difference
from the training step.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

import symjax_bp
from symjax_bp import linen, metrics
from symjax_bp.direct import with_direct_feedback

__all__ = ['Backward', 'Direct', 'Rule', 'backward', 'rule_of']


# The rate of the mirror's noise phase, one update a step: R follows W within 50
# steps, and the noise of that many batches is averaged.
_MIRROR_RATE = 0.02


@dataclasses.dataclass(frozen=True)
class Direct:
  """Direct feedback; the options of ``symjax_bp.direct``."""

  error: str = 'error'
  shared: bool = False
  density: float = 1.0
  sigma: float | None = None


Rule = symjax_bp.FeedbackRule | Direct

_FAMILY: dict[str, Rule] = {
  'FrozenSign': symjax_bp.frozen_sign(),
  'TiedNorm': symjax_bp.tied_norm(),
  'KP': symjax_bp.kolen_pollack(),
  'PFA': symjax_bp.product_feedback(),
  'Mirror': symjax_bp.weight_mirror(),
  'DFA': Direct(),
  'SignDFA': Direct('sign'),
  'CenteredDFA': Direct('centered'),
  'DRTP': Direct('target'),
}


def rule_of(name: str) -> Rule:
  """The rule of a condition, such as 'uSF', 'brSF-25%', 'LowRank4' or 'DFA'.

  Raises:
    ValueError: if there is none.
  """
  if rank := re.fullmatch(r'LowRank([1-9]\d*)', name):
    return symjax_bp.low_rank(rank=int(rank[1]))
  return _FAMILY[name] if name in _FAMILY else symjax_bp.from_name(name)


class Backward(NamedTuple):
  """What a training step needs of a rule.

  Attributes:
    init: (key, params, x) -> feedback.
    logits: (params, feedback, x, y) -> logits, whose gradient uses the rule.
    learns: whether the optimizer of the weights also has the learned part of
      the feedback, see ``symjax_bp.partition``.
    redraws: whether V is drawn again at each update, see ``symjax_bp.redraw``.
    phase: (params, feedback, x, updates) -> feedback after a step.
    align: (params, feedback, x, y, loss) -> {layer: ``metrics.Alignment``},
      with what does not apply to the rule NaN.
  """

  init: Callable[..., Any]
  logits: Callable[..., jax.Array]
  learns: bool
  redraws: bool
  phase: Callable[..., Any]
  align: Callable[..., dict[str, metrics.Alignment]]


def backward(model: nn.Module, rule: Rule | None) -> Backward:
  """The backward pass of a plain model by a rule; None leaves it as it is."""
  if isinstance(rule, Direct):
    return _direct(model, rule)
  if isinstance(rule, symjax_bp.weight_mirror):
    return _mirror(model, rule)
  return _by_rule(model, rule)


def _function(model: nn.Module) -> Callable[..., Any]:
  """The forward pass in training as a function of the parameters."""
  return lambda params, x: model.apply({'params': params}, x, True)


def _unchanged(params, feedback, x, updates):
  del params, x, updates
  return feedback


def _by_layer(rows: dict[str, Any]) -> dict[str, Any]:
  return {path.removesuffix('/kernel'): row for path, row in rows.items()}


def _by_rule(model: nn.Module, rule: symjax_bp.FeedbackRule | None) -> Backward:
  """Feedback weights at every layer."""
  keeps_state = rule is not None and rule.keeps_state
  if rule is not None:
    model = linen.with_feedback(model, rule, row_convolution=True)

  def init(key, params, x):
    del params  # those of the same key
    return model.init(key, x, True)['feedback'] if keeps_state else {}

  def logits(params, feedback, x, y) -> Any:
    del y
    return model.apply({'params': params, 'feedback': feedback}, x, True)

  def align(params, feedback, x, y, loss):
    del y
    variables = {'params': params, 'feedback': feedback}
    return _by_layer(linen.layer_alignment(model, variables, loss, x, True))

  learns = rule is not None and rule.learning is not None
  redraws = rule is not None and rule.redraws
  return Backward(init, logits, learns, redraws, _unchanged, align)


def _mirror(model: nn.Module, rule: symjax_bp.weight_mirror) -> Backward:
  """Feedback weights that follow W in a noise phase after each step."""
  function = symjax_bp.with_feedback(
    _function(model), rule, row_convolution=True
  )

  def init(key, params, x):
    del x
    noise, key = jax.random.split(key)
    return {
      'R': function.init(key, params),
      'noise': jax.random.key_data(noise),
    }

  def logits(params, feedback, x, y):
    del y
    return function(params, feedback['R'], x)

  def phase(params, feedback, x, updates):
    noise = jax.random.wrap_key_data(feedback['noise'])
    gradient = function.mirror(
      jax.random.fold_in(noise, updates), params, feedback['R'], x, decay=1.0
    )
    R = jax.tree.map(lambda R, g: R - _MIRROR_RATE * g, feedback['R'], gradient)
    return feedback | {'R': R}

  def align(params, feedback, x, y, loss):
    return _by_layer(
      metrics.layer_alignment(
        lambda params: loss(logits(params, feedback, x, y)), params
      )
    )

  return Backward(init, logits, False, False, phase, align)


def _direct(model: nn.Module, rule: Direct) -> Backward:
  """The output's error, past the layers."""
  function = with_direct_feedback(_function(model), **dataclasses.asdict(rule))

  def targets(params, y):
    if rule.error != 'target':
      return {}
    classes = params['output']['kernel'].shape[-1]
    return {'targets': jax.nn.one_hot(y, classes) / len(y)}

  def logits(params, feedback, x, y):
    return function(params, feedback, x, **targets(params, y))

  def align(params, feedback, x, y, loss):
    return _by_layer(
      function.layer_alignment(loss, params, feedback, x, **targets(params, y))
    )

  return Backward(function.init, logits, False, False, _unchanged, align)
