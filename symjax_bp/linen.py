r"""Flax Linen: asymmetric layers, and unmodified models made asymmetric.

Two ways in, which may be mixed:

* ``Dense``, ``DenseGeneral`` and ``Conv`` are Flax's own layers with one more
  field, ``feedback``: a rule of ``symjax_bp.feedback``.
* ``with_feedback(model, rule)`` turns a model written for plain Flax into one
  whose every dense and convolution layer uses the rule.

Parameters, initial values for a given key, outputs and options are Flax's.
What a rule draws stays out of ``params``:

* a draw that is kept (frSF, RndF) is ``variables['feedback']``, a tree
  parallel to ``params``; pass it to ``apply``. For parameters that came
  without, ``apply(..., rngs={'feedback': key}, mutable=['feedback'])``
  makes it;
* a draw that is made anew for every update (brSF) comes from the key
  stream ``feedback``: ``apply(..., rngs={'feedback': key})``. The same key
  gives the same V, however often a layer is called, so fold the number of the
  update into the key and nothing else;
* V as it was used is to be had by ``apply(..., mutable=['feedback_weights'])``.

Inside ``nn.scan`` and ``nn.vmap`` map what the rule needs as you map
``params``: ``variable_axes={'feedback': 0}`` for a draw that is kept,
``split_rngs={'feedback': True}`` for one that is not. ``nn.WeightNorm`` and
``nn.SpectralNorm`` rewrite everything that is called ``kernel``, feedback too:
inside of them use rules that keep no draw.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from symjax_bp import metrics
from symjax_bp.feedback import FeedbackRule, symmetric
from symjax_bp.injection import injected, recording
from symjax_bp.matching import (
  Patterns,
  by_path,
  check_rule,
  has_arrays,
  joined,
  rule_table,
)
from symjax_bp.wrapping import Detached, WithFeedback, refuse_shared


class Dense(nn.Dense):
  """``flax.linen.Dense`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Dense(2, feedback=symjax_bp.usf())
  >>> x = jnp.ones((1, 3))
  >>> variables = layer.init(jax.random.key(0), x)
  >>> print(jax.grad(lambda x: layer.apply(variables, x).sum())(x))
  [[0. 0. 2.]]
  >>> print(jnp.sign(variables['params']['kernel']).sum(1))  # = dx
  [0. 0. 2.]

  Attributes:
    feedback: the rule; all other fields are those of ``flax.linen.Dense``.
  """

  feedback: FeedbackRule = dataclasses.field(kw_only=True)

  def __post_init__(self):
    check_rule('feedback', self.feedback)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer to ``(..., in_features)``."""
    with injected(self, self.feedback):
      return super().__call__(inputs)


class DenseGeneral(nn.DenseGeneral):
  """``flax.linen.DenseGeneral`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = DenseGeneral((4, 2), axis=(-2, -1), feedback=symjax_bp.rndf())
  >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 5)))
  >>> variables['feedback']['kernel'].shape
  (3, 5, 4, 2)

  Attributes:
    feedback: the rule; all other fields are ``flax.linen.DenseGeneral``'s.
  """

  feedback: FeedbackRule = dataclasses.field(kw_only=True)

  def __post_init__(self):
    check_rule('feedback', self.feedback)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer, contracting ``axis`` of the inputs."""
    with injected(self, self.feedback):
      return super().__call__(inputs)


class Conv(nn.Conv):
  """``flax.linen.Conv`` with feedback weights.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Conv(1, (2, 2), padding='VALID', feedback=symjax_bp.usf())
  >>> x = jnp.ones((1, 3, 3, 1))
  >>> variables = layer.init(jax.random.key(0), x)
  >>> print(jnp.sign(variables['params']['kernel'][..., 0, 0]))
  [[ 1. -1.]
   [-1.  1.]]
  >>> dx = jax.grad(lambda x: layer.apply(variables, x).sum())(x)
  >>> print(dx[0, :, :, 0])
  [[ 1.  0. -1.]
   [ 0.  0.  0.]
   [-1.  0.  1.]]

  Attributes:
    feedback: the rule; all other fields are those of ``flax.linen.Conv``.
  """

  feedback: FeedbackRule = dataclasses.field(kw_only=True)

  def __post_init__(self):
    check_rule('feedback', self.feedback)
    super().__post_init__()

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer to ``(batch, *spatial, in_features)``."""
    with injected(self, self.feedback):
      return super().__call__(inputs)


def with_feedback(
  model: nn.Module,
  rule: FeedbackRule | Mapping[str, FeedbackRule],
  exclude: str | Sequence[str] = (),
) -> WithFeedback:
  """Makes an unmodified Linen model asymmetric.

  Every ``Dense``, ``DenseGeneral`` and ``Conv`` in it, however deep (attention,
  recurrent cells, ``nn.remat``, shared modules), uses the rule. The ``params``
  tree, its initial values and the outputs stay the model's own.

  >>> import flax.linen as nn, jax, jax.numpy as jnp, symjax_bp
  >>> mlp = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
  >>> model = with_feedback(
  ...   mlp, {'layers_0': symjax_bp.usf(), 'layers_2': symjax_bp.rndf()}
  ... )
  >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
  >>> jax.tree.map(jnp.shape, variables['feedback'])
  {'layers_2': {'kernel': (3, 2)}}
  >>> print(feedback_table(model, jnp.ones((1, 4))))
  layer     shape   feedback
  layers_0  (4, 3)  usf()
  layers_2  (3, 2)  rndf()

  Args:
    model: the model; it is not changed.
    rule: a rule for all layers, or a mapping {regular expression: rule}. An
      expression is searched for in a layer's path, such as ``'encoder/Conv_0'``
      (``^`` and ``$`` anchor it); the first that is found wins.
    exclude: one or more regular expressions for the paths of layers, and of
      other parameters, to leave as they are.

  Returns:
    A module with the methods of the model.

  Raises:
    TypeError: if ``rule`` is no rule or mapping to rules.
    ValueError: if the model shares a submodule with the one around it; when
      called, if a layer matches no expression, an expression matches no layer,
      or the model has weights that can't be made asymmetric.
  """
  if not isinstance(model, nn.Module):
    raise TypeError(
      f'model must be a flax.linen.Module, not {type(model).__name__}; for an '
      'nnx.Module use symjax_bp.nnx.with_feedback.'
    )
  refuse_shared(model)
  return WithFeedback(Detached(model), Patterns.create(rule, exclude))


def plain_twin(model: nn.Module) -> nn.Module:
  """The same model trained by plain backpropagation, on the same variables.

  Layers with a rule get ``symmetric()`` in its place, all others are as before.
  It needs neither the collection nor the key stream ``feedback``, so it is
  also the model to evaluate.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> model = Dense(2, feedback=symjax_bp.brsf())
  >>> x = jnp.ones((1, 3))
  >>> variables = model.init(jax.random.key(0), x)
  >>> y = model.apply(variables, x, rngs={'feedback': jax.random.key(1)})
  >>> bool((plain_twin(model).apply(variables, x) == y).all())
  True

  Args:
    model: any Linen model, asymmetric in whole, in part or not at all.
  """
  return WithFeedback(Detached(model), instead=symmetric())


def layer_rules(
  model: nn.Module, *args, **kwargs
) -> dict[str, tuple[tuple[int, ...], FeedbackRule | None]]:
  """Shape and rule of all weights, or None for plain backpropagation.

  Args:
    model: any Linen model.
    *args: arguments to call it with; only shapes and dtypes matter.
    **kwargs: further arguments to call it with.

  Returns:
    ``{path: (kernel shape, rule)}`` for every parameter of two or more axes.
    The path is the module's, without the parameter's name, for a layer.
  """
  # A wrapper that leaves every layer as it is, so that nothing traced before
  # is taken for what the model does.
  probe = WithFeedback(Detached(model))
  # What is no array, such as train=True, may decide what is called.
  arrays = {at: arg for at, arg in enumerate(args) if has_arrays(arg)}

  def init(key, arrays):
    traced = [arrays.get(at, arg) for at, arg in enumerate(args)]
    return probe.init(key, *traced, **kwargs)

  with recording() as record:
    variables = jax.eval_shape(init, jax.random.key(0), arrays)
  rows = {}
  for (module, name), value in by_path(variables['params']).items():
    rule = record.get(module)
    if name == 'kernel':
      rows[module] = (value.shape, rule)
    elif value.ndim >= 2 and not (rule and name == 'bias'):
      rows[joined(module, name)] = (value.shape, None)
  return rows


def feedback_table(model: nn.Module, *args, **kwargs) -> str:
  """Which layer uses which rule, as text: is it really not backpropagation?

  Args:
    model: any Linen model.
    *args: arguments to call it with; only shapes and dtypes matter.
    **kwargs: further arguments to call it with.
  """
  return rule_table(layer_rules(model, *args, **kwargs))


def layer_alignment(
  model: nn.Module,
  variables: Mapping[str, Any],
  loss: Callable[[Any], jax.Array],
  *args,
  rngs=None,
  mutable: Sequence[str] = (),
  **kwargs,
) -> dict[str, metrics.Alignment]:
  """How well feedback and updates of each layer agree with backpropagation.

  Works under ``jax.jit``. Layers inside ``nn.scan`` or ``nn.vmap`` appear if
  these map the collection ``feedback_weights``, those inside ``nn.WeightNorm``
  do not.

  >>> import jax, jax.numpy as jnp, symjax_bp
  >>> layer = Dense(2, feedback=symjax_bp.usf())
  >>> x = jnp.array([[1.0, 2.0, 3.0]])
  >>> variables = layer.init(jax.random.key(0), x)
  >>> row = layer_alignment(layer, variables, lambda y: (y**2).sum(), x)
  >>> print(row['']._asdict().keys())
  dict_keys(['concordance', 'angle', 'norm_ratio', 'gradient_angle'])
  >>> print(row[''].concordance, row[''].gradient_angle)
  1.0 0.0

  Args:
    model: an asymmetric model.
    variables: its variables.
    loss: the scalar loss as a function of the model's output.
    *args: arguments to call the model with.
    rngs: key streams, as for ``apply``.
    mutable: collections that the call changes, such as ``batch_stats``.
    **kwargs: further arguments to call the model with.

  Returns:
    {module path: ``metrics.Alignment``} of every layer that uses a rule, all
    computed from the V that was used.
  """
  state = {name: value for name, value in variables.items() if name != 'params'}
  changing = ['feedback_weights', *mutable]

  def evaluate(module, params):
    output, changed = module.apply(
      {**state, 'params': params}, *args, rngs=rngs, mutable=changing, **kwargs
    )
    return loss(output), changed.get('feedback_weights', {})

  params = variables['params']
  gradient = jax.grad(evaluate, argnums=1, has_aux=True)
  gradients, feedback = gradient(model, params)
  true_gradients, _ = gradient(plain_twin(model), params)
  W, dW, true_dW = map(by_path, (params, gradients, true_gradients))
  return {
    layer[0]: metrics.alignment(W[layer], V, dW[layer], true_dW[layer])
    for layer, V in by_path(feedback).items()
  }
