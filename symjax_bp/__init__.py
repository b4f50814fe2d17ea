r"""Asymmetric backpropagation for JAX and Flax.

Backpropagation sends errors backwards through the transpose of the forward
weights W. Here the backward pass, and it alone, uses feedback weights V:

.. code-block:: text

  forward           y  = op(x, W)
  input gradient    dx = transpose of x -> op(x, V), at g
  kernel gradient   dW = transpose of W -> op(x, W), at g
  feedback          V  = rule(W, R)

(Liao, Leibo and Poggio, "How Important Is Weight Symmetry in
Backpropagation?", AAAI 2016). An unmodified Flax model becomes asymmetric in
one line, and an optax chain learns by signs in another:

>>> import flax.linen as nn, jax, jax.numpy as jnp, optax, symjax_bp
>>> mlp = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])
>>> model = symjax_bp.linen.with_feedback(mlp, symjax_bp.usf())
>>> optimizer = symjax_bp.optim.batch_manhattan(learning_rate=0.01)
>>> x = jnp.linspace(-1, 1, 16)[:, None]
>>> variables = model.init(jax.random.key(0), x)
>>> params, state = variables['params'], optimizer.init(variables['params'])
>>> def loss(params):
...   return jnp.mean((model.apply({'params': params}, x) - x**2) ** 2)
>>> for step in range(61):
...   value, gradient = jax.value_and_grad(loss)(params)
...   if step % 20 == 0:
...     print(f'{value:.2f}')
...   updates, state = optimizer.update(gradient, state, params)
...   params = optax.apply_updates(params, updates)
1.15
0.04
0.01
0.00

Modules: ``feedback`` (the rules), ``primitives`` (the operations), ``linen``
and ``nnx`` (Flax), ``optim`` (Batch Manhattan), ``normalization`` (batch norm
with the paper's protocol), ``metrics`` and ``testing``.
"""

import importlib
import typing

from symjax_bp import feedback, linen, metrics, optim, primitives
from symjax_bp.feedback import (
  FeedbackRule,
  brsf,
  from_name,
  frsf,
  nusf,
  rndf,
  symmetric,
  usf,
)

if typing.TYPE_CHECKING:
  from symjax_bp import nnx, normalization, testing

__version__ = '0.1.0'

__all__ = [
  'FeedbackRule',
  'brsf',
  'feedback',
  'from_name',
  'frsf',
  'linen',
  'metrics',
  'nnx',
  'normalization',
  'nusf',
  'optim',
  'primitives',
  'rndf',
  'symmetric',
  'testing',
  'usf',
]

# Importing Flax's NNX takes four times as long as all of this: it waits for
# those who use it.
_IMPORT_NNX = ('nnx', 'normalization', 'testing')


def __getattr__(name: str):
  if name in _IMPORT_NNX:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *__all__})
