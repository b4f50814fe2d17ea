r"""Asymmetric backpropagation for JAX: feedback alignment and its relatives.

Backpropagation sends errors backwards through the transpose of the forward
weights W (the weight transport problem). Here the backward pass, and it alone,
uses feedback weights V:

.. code-block:: text

  forward           y  = op(x, W)
  input gradient    dx = transpose of x -> op(x, V), at g
  kernel gradient   dW = transpose of W -> op(x, W), at g
  feedback          V  = rule(W, R)

(Liao, Leibo and Poggio, "How Important Is Weight Symmetry in
Backpropagation?", AAAI 2016). A function or a Flax model becomes asymmetric in
one line, and an optax chain learns by signs in another:

>>> import jax, jax.numpy as jnp, optax, symjax_bp
>>> def mlp(params, x):
...   return jax.nn.relu(x @ params['W1']) @ params['W2']
>>> f = symjax_bp.with_feedback(mlp, symjax_bp.usf())
>>> optimizer = symjax_bp.optim.batch_manhattan(learning_rate=0.01)
>>> x = jnp.stack([jnp.linspace(-1, 1, 16), jnp.ones(16)], axis=1)
>>> keys = jax.random.split(jax.random.key(0))
>>> params = {
...   'W1': jax.random.normal(keys[0], (2, 8)) / 2,
...   'W2': jax.random.normal(keys[1], (8, 1)) / 4,
... }
>>> feedback = f.init(keys[0], params)
>>> state = optimizer.init(params)
>>> def loss(params):
...   return jnp.mean((f(params, feedback, x) - x[:, :1] ** 2) ** 2)
>>> for step in range(61):
...   value, gradient = jax.value_and_grad(loss)(params)
...   if step % 20 == 0:
...     print(f'{value:.2f}')
...   updates, state = optimizer.update(gradient, state, params)
...   params = optax.apply_updates(params, updates)
1.59
0.13
0.01
0.00

Modules: ``feedback`` (the rules), ``transform`` (``with_feedback``),
``primitives`` (the products), ``linen`` and ``nnx`` (Flax), ``direct`` (direct
feedback alignment), ``optim`` (Batch Manhattan), ``batch_norm`` (the paper's
batch normalization), ``metrics`` and ``testing``.
"""

import importlib
import sys
import typing

from symjax_bp import direct, feedback, metrics, optim, primitives, transform
from symjax_bp.feedback import (
  FeedbackRule,
  brsf,
  from_name,
  frozen_noise,
  frozen_sign,
  frsf,
  kolen_pollack,
  local_loss,
  low_rank,
  nusf,
  product_feedback,
  rndf,
  rule,
  symmetric,
  tied_norm,
  usf,
  weight_mirror,
)
from symjax_bp.transform import (
  FeedbackError,
  FeedbackFunction,
  combine,
  partition,
  redraw,
)

if typing.TYPE_CHECKING:
  import flax.linen
  import flax.nnx

  from symjax_bp import batch_norm, linen, nnx, testing

__version__ = '0.2.0'

__all__ = [
  'FeedbackError',
  'FeedbackFunction',
  'FeedbackRule',
  'batch_norm',
  'brsf',
  'combine',
  'direct',
  'feedback',
  'from_name',
  'frozen_noise',
  'frozen_sign',
  'frsf',
  'kolen_pollack',
  'linen',
  'local_loss',
  'low_rank',
  'metrics',
  'nnx',
  'nusf',
  'optim',
  'partition',
  'primitives',
  'product_feedback',
  'redraw',
  'rndf',
  'rule',
  'symmetric',
  'testing',
  'tied_norm',
  'transform',
  'usf',
  'weight_mirror',
  'with_feedback',
]

Rules = FeedbackRule | typing.Mapping[str, FeedbackRule]
Exclude = str | typing.Sequence[str]
_Module = typing.TypeVar('_Module', bound='flax.nnx.Module')


@typing.overload
def with_feedback(
  target: 'flax.linen.Module', rules: Rules, exclude: Exclude = ()
) -> 'linen.WithFeedback': ...
@typing.overload
def with_feedback(
  target: _Module,
  rules: Rules,
  exclude: Exclude = (),
  *,
  rngs: 'flax.nnx.Rngs | None' = None,
) -> _Module: ...
@typing.overload
def with_feedback(
  target: typing.Callable[..., typing.Any],
  rules: Rules,
  exclude: Exclude = (),
  *,
  row_convolution: bool = False,
) -> FeedbackFunction: ...
def with_feedback(target, rules, exclude=(), **options):
  """Makes the backward pass of a function or a model use feedback weights.

  Args:
    target: a function ``f(params, *args, **kwargs)``, a Linen module or an NNX
      module; see ``symjax_bp.transform.with_feedback``,
      ``symjax_bp.linen.with_feedback`` and ``symjax_bp.nnx.with_feedback``.
    rules: a rule for all weights, or {regular expression: rule}. Expressions
      are searched for in a parameter's path, ``'encoder/Conv_0/kernel'``; the
      first that is found wins.
    exclude: regular expressions for the paths of parameters that plain
      backpropagation trains.
    **options: of the form for that target.
  """
  for front_end, flax in (('linen', 'flax.linen'), ('nnx', 'flax.nnx')):
    # A module of Flax exists only if that part of Flax was imported.
    if flax in sys.modules and isinstance(target, sys.modules[flax].Module):
      module = importlib.import_module(f'{__name__}.{front_end}')
      return module.with_feedback(target, rules, exclude, **options)
  return transform.with_feedback(target, rules, exclude, **options)


# Importing Flax takes longer than all of this: it waits for those who use it.
_IMPORT_FLAX = ('batch_norm', 'linen', 'nnx', 'testing')


def __getattr__(name: str):
  if name in _IMPORT_FLAX:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *__all__})
