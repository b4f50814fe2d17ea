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
Backpropagation?", AAAI 2016).

>>> import jax, jax.numpy as jnp, symjax_bp
>>> f = symjax_bp.with_feedback(lambda W, x: x @ W, symjax_bp.usf())
>>> W, x = jnp.array([[0.5, -3.0]]), jnp.array([[2.0]])
>>> print(jax.grad(lambda x: f(W, None, x)[0, 1])(x))  # sign(W), not W
[[-1.]]

Modules: ``feedback`` (the rules), ``transform`` (``with_feedback``),
``primitives`` (the products), ``linen`` and ``nnx`` (Flax), ``direct`` (direct
feedback alignment), ``optim`` (Batch Manhattan), ``metrics`` and ``testing``.
"""

import difflib
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

  from symjax_bp import linen, nnx, testing

__version__ = '0.2.0'

__all__ = [
  'FeedbackError',
  'FeedbackFunction',
  'FeedbackRule',
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

  Every weight that meets data in a product uses its rule, however the function
  is written. Parameters, initial values and outputs stay as they are.

  >>> import jax, jax.numpy as jnp
  >>> def mlp(params, x):
  ...   return jnp.tanh(x @ params['W1']) @ params['W2']
  >>> f = with_feedback(mlp, rndf())
  >>> params = {'W1': jnp.ones((3, 4)), 'W2': jnp.ones((4, 2))}
  >>> feedback, x = f.init(jax.random.key(0), params), jnp.ones((1, 3))
  >>> print(f.table(params, x))
  weight  shape   feedback  use
  W1      (3, 4)  rndf()    product
  W2      (4, 2)  rndf()    product
  2 of 2 weights with feedback: 20 of 20 parameters
  >>> loss = lambda params: f(params, feedback, x).sum()
  >>> g = jnp.ones((1, 2)) @ f.weights(params, feedback)['W2'].T
  >>> dW1 = x.T @ (g * (1 - jnp.tanh(x @ params['W1']) ** 2))
  >>> print(jnp.allclose(jax.grad(loss)(params)['W1'], dW1))
  True

  Args:
    target: a function ``f(params, *args, **kwargs)`` of any pytree of
      parameters, a Linen module or an NNX module. The other arguments of a
      function are data, but keys are constants, and what is no array is static.
    rules: a rule for all weights, or {regular expression: rule}. An expression
      is searched for in a parameter's path, such as ``'encoder/Conv_0/kernel'``
      (``^`` and ``$`` anchor it); the first that is found wins. Parameters
      called ``bias`` or ``scale`` have no rule.
    exclude: one or more regular expressions for the paths of parameters that
      plain backpropagation trains.
    **options: ``row_convolution`` for a function or a Linen module, see
      ``symjax_bp.primitives.conv_general_dilated``; ``rngs`` for an NNX module,
      see ``symjax_bp.nnx.with_feedback``.

  Returns:
    For a function an object with ``init(key, params)``,
    ``__call__(params, feedback, *args)``, ``weights(params, feedback)`` and
    ``table(params, *args)``; else a module with the methods of the target.

  Raises:
    TypeError: if ``target`` is none of these, or a rule is no rule.
    ValueError: if an expression matches no parameter; when called,
      ``FeedbackError`` if a weight cannot be given feedback.
  """
  for front_end, flax in (('linen', 'flax.linen'), ('nnx', 'flax.nnx')):
    # A module of Flax exists only if that part of Flax was imported.
    if flax in sys.modules and isinstance(target, sys.modules[flax].Module):
      module = importlib.import_module(f'{__name__}.{front_end}')
      return module.with_feedback(target, rules, exclude, **options)
  return transform.with_feedback(target, rules, exclude, **options)


# Importing Flax takes longer than all of this: it waits for those who use it.
_IMPORT_FLAX = ('linen', 'nnx', 'testing')


def __getattr__(name: str):
  if name in _IMPORT_FLAX:
    return importlib.import_module(f'{__name__}.{name}')
  hint = '' if name.startswith('_') else _hint(name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}{hint}')


def _hint(name: str) -> str:
  """Where a name is that the package itself does not have."""
  parts = ('direct', 'metrics', 'optim', 'primitives', *_IMPORT_FLAX)
  places = {f'{__name__}.{known}': known for known in __all__}
  for part in parts:
    module = importlib.import_module(f'{__name__}.{part}')
    places |= {f'{__name__}.{part}.{known}': known for known in module.__all__}
  lower = name.lower()
  found = [p for p, known in places.items() if known.lower() == lower]
  if not found:
    close = difflib.get_close_matches(lower, map(str.lower, places.values()))
    found = [p for p, known in places.items() if known.lower() in close[:1]]
  return f'; did you mean {" or ".join(found)}?' if found else ''


def __dir__():
  return sorted({*globals(), *__all__})
