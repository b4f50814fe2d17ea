r"""Direct feedback: errors reach each layer from the output, past the others.

In direct feedback alignment (DFA, Nokland 2016) the error at the input h of a
layer is a fixed random projection of the error e at the output of the model,
instead of the error that the layers above would send back:

.. code-block:: text

  forward                       unchanged
  error at a layer's input h    B e, from the loss's gradient e at the output
  gradients of a layer          from that error, by the chain rule of the layer

``with_direct_feedback(function)`` does this at every product of an unmodified
function whose input depends on a parameter; the last layer learns from the true
error. Operations between two products (activations, normalization, residual
connections) are differentiated as usual. The error e is known only after the
forward pass, so the function is traced again for the backward pass; a compiled
program shares the common work.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from symjax_bp import metrics
from symjax_bp.feedback import symmetric
from symjax_bp.kinds import Level, Trait
from symjax_bp.transform import (
  Call,
  FeedbackFunction,
  Rules,
  differentiable,
  fold_path,
  is_real,
  separate,
  undifferentiated,
)

__all__ = ['DirectFunction', 'with_direct_feedback']

_ERRORS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'error': lambda e: e,
  'sign': jnp.sign,
  'centered': lambda e: e - jnp.mean(e, 0, keepdims=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectFunction:
  """A function with direct feedback, as ``with_direct_feedback`` returns it.

  Attributes:
    plain: the function, its products found by ``symjax_bp.transform``. For the
      others see ``with_direct_feedback``.
  """

  plain: FeedbackFunction
  error: str
  shared: bool
  density: float
  sigma: float | None
  learns: bool

  def init(self, key: jax.Array, params: Any, /, *args, **kwargs) -> dict:
    """Draws the feedback matrices B.

    Args:
      key: a PRNG key.
      params: the parameters.
      args, kwargs: arguments of the function; only shapes matter.

    Returns:
      {path of a weight: B} with B of shape (size of the weight's input h for
      one example, size of the output for one example). With ``shared`` there
      is one B, 'shared', as large as the largest.

    Raises:
      ValueError: if the function does not return one array, or the first axis
        of an input h is not the batch of the output.
    """
    sizes: dict[str, int] = {}

    def find(path, h, apply):
      size = math.prod(h.shape[1:])
      if h.shape[:1] != y.shape[:1] or sizes.get(path, size) != size:
        raise ValueError(
          f'the input of {path!r} has shape {h.shape} and the output has '
          f'{y.shape}: direct feedback needs one batch as the first axis of '
          'both, and one size of input for each weight. Exclude the weight.'
        )
      sizes[path] = size
      return apply(h)

    y = jax.eval_shape(lambda: self.plain.function(params, *args, **kwargs))
    if not hasattr(y, 'shape') or not y.shape:
      raise ValueError(
        'function must return one array (batch, ...) for direct feedback, not '
        f'{jax.tree.structure(y)}.'
      )
    jax.eval_shape(lambda: self._evaluate(params, args, kwargs, find))
    outputs = math.prod(y.shape[1:])
    if self.shared:
      sizes = {'shared': max(sizes.values(), default=0)}
    return {
      path: self._draw(fold_path(key, path), (size, outputs), y.dtype)
      for path, size in sizes.items()
    }

  def _draw(self, key, shape: tuple[int, int], dtype) -> jax.Array:
    keys = jax.random.split(key)
    sigma = 1 / math.sqrt(shape[1]) if self.sigma is None else self.sigma
    B = sigma * jax.random.normal(keys[0], shape, dtype)
    if self.density < 1:
      kept = jax.random.bernoulli(keys[1], self.density, shape)
      B = jnp.where(kept, B / math.sqrt(self.density), 0)
    return B.astype(dtype)

  def __call__(
    self, params: Any, feedback: dict, /, *args, targets: Any = None, **kwargs
  ) -> jax.Array:
    """Calls the function; its backward pass uses direct feedback.

    Args:
      params: the parameters.
      feedback: what ``init`` returned.
      args, kwargs: further arguments of the function.
      targets: for ``error='target'``: what takes the place of the error, of
        the shape of the output; one-hot labels, divided by the batch size if
        the loss is a mean.
    """
    if (targets is None) == (self.error == 'target'):
      raise ValueError(
        f'targets must be given if and only if error is "target"; error is '
        f'{self.error!r} and targets {"are not" if targets is None else "are"} '
        'given.'
      )
    arrays, rebuilt = separate((params, args, kwargs))
    # Integers and keys have no gradient, and must not be closed over.
    reals = {i: x for i, x in arrays.items() if is_real(x)}
    others = {i: x for i, x in arrays.items() if i not in reals}

    @jax.custom_vjp
    def call(reals, others, feedback, targets):
      del feedback, targets
      params, args, kwargs = rebuilt({**reals, **others})
      return self.plain.function(params, *args, **kwargs)

    def forward(*operands):
      return call(*operands), operands

    def backward(operands, e):
      reals, others, feedback, targets = operands
      direct = _ERRORS[self.error](e) if targets is None else targets
      if direct.shape != e.shape:
        raise ValueError(
          f'targets must have the shape of the output, {e.shape}, such as '
          f'one-hot labels, not {direct.shape}.'
        )

      def injected(reals, feedback):
        def inject(path, h, apply):
          B = self._matrix(feedback, path, h, math.prod(e.shape[1:]))
          return apply(_inject(self.learns, h, B, direct.astype(B.dtype)))

        params, args, kwargs = rebuilt({**reals, **others})
        return self._evaluate(params, args, kwargs, inject)

      _, pullback = jax.vjp(injected, reals, feedback)
      dreals, dfeedback = pullback(e)
      return dreals, None, dfeedback, None

    call.defvjp(forward, backward)
    if not self.learns:
      guard = functools.partial(undifferentiated, 'the feedback matrix B')
      feedback = jax.tree.map(guard, feedback)
    return call(reals, others, feedback, targets)

  def layer_alignment(
    self,
    loss: Callable[[jax.Array], jax.Array],
    params: Any,
    feedback: dict,
    /,
    *args,
    targets: Any = None,
    **kwargs,
  ) -> dict[str, metrics.Alignment]:
    """How well the error of each layer agrees with backpropagation.

    >>> f = with_direct_feedback(lambda W, x: jnp.tanh(x @ W[0]) @ W[1])
    >>> W, x = [jnp.eye(2), jnp.ones((2, 1))], jnp.eye(2)
    >>> opposite = {'1': -jnp.ones((2, 1))}  # B; backpropagation has W[1]
    >>> rows = f.layer_alignment(jnp.sum, W, opposite, x)
    >>> for path, row in rows.items():
    ...   print(path, row.error_angle, row.update_angle)
    0 180.0 180.0
    1 0.0 0.0

    Args:
      loss: the scalar loss as a function of the output.
      params: the parameters.
      feedback: what ``init`` returned.
      args, kwargs: further arguments of the function.
      targets: as for a call.

    Returns:
      {path of the weight: ``metrics.Alignment``}. Its error signal is summed
      over uses of one shape, such as the steps of a scan. There is no V: the
      concordance, the angle and the norm ratio are NaN.
    """
    found: dict[tuple[str, tuple[int, ...]], tuple[Any, Sequence[int]]] = {}

    def perturbed(params, added, args, kwargs):
      """The function; adds an array to the output of each product."""

      def multiply(op, xs, weight, step):
        y = op(xs, weight.x)
        key = ' + '.join(step.weight.paths), y.shape
        axes = op.feature_axes(y.ndim, weight.x.ndim) or ()
        found.setdefault(key, (y.dtype, axes))
        return y + added[key] if key in added else y

      call = Call(self.plain, params, args, kwargs).plan({})
      return call.evaluate(multiply)

    jax.eval_shape(lambda: perturbed(params, {}, args, kwargs))
    zeros = {key: jnp.zeros(key[1], dtype) for key, (dtype, _) in found.items()}
    direct = dataclasses.replace(
      self, plain=FeedbackFunction(perturbed, self.plain.rules)
    )

    def by_direct(params, added):
      inputs = added, args, kwargs
      return loss(direct(rebuilt(params), feedback, *inputs, targets=targets))

    def by_backpropagation(params, added):
      return loss(perturbed(rebuilt(params), added, args, kwargs))

    arrays, rebuilt = differentiable(params)
    (updates, g), (true_updates, true_g) = (
      jax.grad(of, (0, 1))(arrays, zeros)
      for of in (by_direct, by_backpropagation)
    )
    rows = {}
    for path in dict.fromkeys(path for path, _ in found):
      keys = [key for key in found if key[0] == path]
      parts = metrics.parts_of(path, updates)
      axes = found[keys[0]][1]
      features = jnp.moveaxis(g[keys[0]], axes, range(-len(axes), 0))
      rows[path] = metrics.Alignment(
        concordance=jnp.nan,
        angle=jnp.nan,
        norm_ratio=jnp.nan,
        update_angle=metrics.angle_at(parts, updates, true_updates),
        error_angle=metrics.angle_at(keys, g, true_g),
        effective_rank=metrics.effective_rank(
          features.reshape(-1, math.prod(features.shape[-len(axes) :]))
        ),
      )
    return rows

  def _matrix(
    self, feedback: dict, path: str, h: jax.Array, outputs: int
  ) -> jax.Array:
    size = math.prod(h.shape[1:])
    B = (feedback or {}).get('shared' if self.shared else path)
    if B is None or B.shape[0] < size or B.shape[1] != outputs:
      raise ValueError(
        f'feedback has no B for the input of {path!r}, {size} numbers for one '
        f'example, and an output of {outputs}: pass what init returned for '
        'arguments of these shapes.'
      )
    return B[:size]

  def _evaluate(self, params, args, kwargs, visit) -> jax.Array:
    """The function, with ``visit`` at each product's input."""

    def multiply(op, xs, weight, step):
      x = step.inputs[1 - step.at]
      if x.level is Level.DATA and Trait.HIDDEN not in x:
        return op(xs, weight.x)  # The function's own input.
      path, axis = ' + '.join(step.weight.paths), op.batch_axis(xs[0].ndim)
      if axis is None:
        raise ValueError(
          f'the input of {path!r} has shape {xs[0].shape} without a batch: '
          'pass a batch of examples, or exclude the weight.'
        )

      def apply(h):
        return op((jnp.moveaxis(h, 0, axis), *xs[1:]), weight.x)

      return visit(path, jnp.moveaxis(xs[0], axis, 0), apply)

    call = Call(self.plain, params, args, kwargs).plan({})
    return call.evaluate(multiply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inject(learns, h, B, e):
  """The identity on h; its gradient is B e whatever comes from above."""
  del learns, B, e
  return h


def _inject_forward(learns, h, B, e):
  return h, (h, B, e)


def _inject_backward(learns, operands, g):
  h, B, e = operands
  e = e.reshape(e.shape[0], -1)
  dh = (e @ B.T).reshape(h.shape).astype(h.dtype)
  if not learns:
    return dh, None, None
  rows = h.reshape(h.shape[0], -1).astype(B.dtype)
  return dh, rows.T @ e, None


_inject.defvjp(_inject_forward, _inject_backward)


def with_direct_feedback(
  function: Callable[..., jax.Array],
  exclude: str | Sequence[str] = (),
  *,
  error: str = 'error',
  shared: bool = False,
  density: float = 1.0,
  sigma: float | None = None,
  learns: bool = False,
) -> DirectFunction:
  r"""Trains the layers of a function by direct feedback.

  >>> def mlp(params, x):
  ...   return jnp.tanh(x @ params['W1']) @ params['W2']
  >>> f = with_direct_feedback(mlp)
  >>> params = {'W1': jnp.ones((3, 4)), 'W2': jnp.ones((4, 2))}
  >>> x = jnp.ones((1, 3))
  >>> feedback = f.init(jax.random.key(0), params, x)
  >>> jax.tree.map(jnp.shape, feedback)
  {'W2': (4, 2)}
  >>> loss = lambda params: (f(params, feedback, x) ** 2).sum() / 2
  >>> e, h = mlp(params, x), jnp.tanh(x @ params['W1'])
  >>> dW1 = x.T @ (e @ feedback['W2'].T * (1 - h**2))
  >>> print(jnp.allclose(jax.grad(loss)(params)['W1'], dW1))
  True

  Any front end works through a function of its parameters:
  ``lambda params, x: model.apply({'params': params}, x)`` for Linen,
  ``lambda params, x: nnx.merge(graph, params)(x)`` for NNX. The output is one
  array whose first axis is the batch, and so is that of every layer's input.
  The layers of a ``lax.scan`` share their B.

  Args:
    function: ``function(params, *args, **kwargs)``.
    exclude: regular expressions for the paths of weights whose input gets the
      error of the layer above as usual.
    error: what B projects: 'error' (DFA), 'sign' (of the error), 'centered'
      (minus its mean over the batch) or 'target' (DRTP: ``targets`` of the
      call instead of the error).
    shared: whether all layers use rows of one B (Launay et al. 2020).
    density: share of the entries of B that are not 0 (Crafton et al. 2019).
    sigma: standard deviation of B, its zeros included; by default
      1 / sqrt(size of the output).
    learns: whether B has the gradient :math:`dB = h^T e` (DKP, Webster et al.
      2021), to be given to an optimizer.

  Raises:
    ValueError: if an option is out of range; when called, ``FeedbackError``
      if a weight cannot be followed to its products.

  References:
    Nokland, Direct Feedback Alignment Provides Learning in Deep Neural
    Networks, 2016; Frenkel et al., Learning without Feedback: Fixed Random
    Learning Signals (DRTP), 2021.
  """
  if error not in (*_ERRORS, 'target'):
    raise ValueError(
      f'error must be one of {[*_ERRORS, "target"]}, not {error!r}.'
    )
  if not 0 < density <= 1:
    raise ValueError(f'density must be in (0, 1], not {density!r}.')
  if sigma is not None and not 0 < sigma < math.inf:
    raise ValueError(f'sigma must be positive and finite, not {sigma!r}.')
  plain = FeedbackFunction(function, Rules.create(symmetric(), exclude))
  return DirectFunction(
    plain=plain,
    error=error,
    shared=shared,
    density=density,
    sigma=sigma,
    learns=learns,
  )
