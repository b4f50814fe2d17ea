r"""Batch Manhattan: mini-batch SGD on the signs of the gradients.

The paper's update is :math:`w(t+1) = w(t) + \eta\,\tau(t)`. The transformations
here emit :math:`-\tau`, which optax then scales by :math:`-\eta`, so that they
compose with every other optax transformation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ['batch_manhattan', 'scale_by_batch_manhattan', 'sgd', 'signed_trace']


def signed_trace(
  decay: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  r"""Computes a trace of past updates that keeps only its sign.

  .. math::
    t_k = \text{sign}(g_k + \text{decay} \cdot t_{k-1})

  :func:`optax.trace` followed by :func:`optax.scale_by_sign` remembers
  magnitudes. Here the past weighs at most ``decay``, so it decides only where
  the present update is smaller than that.

  Args:
    decay: Decay rate of the trace, a scalar in [0, 1); other values are errors.

  Returns:
    A transformation whose state is an :class:`optax.TraceState`, with arrays
    of the shapes and dtypes of the parameters.

  Examples:
    >>> from symjax_bp import optim
    >>> transform = optim.signed_trace(decay=0.9)
    >>> state = transform.init(jnp.zeros(2))
    >>> for gradients in ([1.0, 1.0], [0.0, -1.0], [-0.5, 0.0]):
    ...   updates, state = transform.update(jnp.array(gradients), state)
    ...   print(updates)
    [1. 1.]
    [ 1. -1.]
    [ 1. -1.]
  """
  inner = optax.trace(_scalar('decay', decay, below=1.0, schedule=False))

  def update_fn(updates, state, params=None):
    updates, _ = inner.update(updates, state, params)
    updates = jax.tree.map(jnp.sign, updates)
    return updates, optax.TraceState(trace=updates)

  return _keep_dtypes(optax.GradientTransformation(inner.init, update_fn))


# The transformations after weight decay, by the paper's number of the setting.
_TAILS: dict[int, Callable[..., optax.GradientTransformation]] = {
  0: optax.trace,
  1: optax.trace,
  2: signed_trace,
  3: lambda decay: optax.chain(optax.trace(decay), optax.scale_by_sign()),
}


def scale_by_batch_manhattan(
  setting: int = 1,
  momentum: optax.ScalarOrSchedule = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: optax.MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces gradients by the paper's :math:`-\tau(t)`.

  With the gradient :math:`G = \sum_b \partial E / \partial w` of the
  mini-batch, momentum :math:`m` and weight decay :math:`d`:

  .. math::
    \text{setting 0 (SGD):}\quad \tau(t) = -G + m\,\tau(t-1) - d\,w(t)

  .. math::
    \text{setting 1:}\quad
    \tau(t) = -\text{sign}(G) + m\,\tau(t-1) - d\,w(t)

  .. math::
    \text{setting 2:}\quad
    \tau(t) = \text{sign}(-\text{sign}(G) + m\,\tau(t-1) - d\,w(t))

  .. math::
    \text{setting 3:}\quad \tau(t) = \text{sign}(\kappa(t)), \quad
    \kappa(t) = -\text{sign}(G) + m\,\kappa(t-1) - d\,w(t)

  with sign(0) = 0. In settings 1, 2 and 3 the scale of the gradients does not
  matter: their sum and their mean over the mini-batch give the same updates.

  The sign is taken once, of the whole mini-batch's gradient: sum or average
  gradients across devices (``jax.lax.psum``) *before* this transformation, and
  over micro-batches with :class:`optax.MultiSteps` around it.

  Args:
    setting: The paper's setting, 0, 1, 2 or 3. It selects the program, so
      :func:`optax.inject_hyperparams` needs it in ``static_args``, like a
      ``weight_decay_mask`` that is a function.
    momentum: :math:`m` in [0, 1), or a schedule.
    weight_decay: :math:`d \ge 0`, or a schedule.
    weight_decay_mask: A tree of booleans with the structure of the parameters
      (or a prefix of it), or a function from parameters to such a tree; only
      the parameters marked True decay.

  Returns:
    A transformation whose ``update`` needs the parameters. Updates and state
    have the shapes and dtypes of the parameters. Numbers of Python and NumPy
    take the dtype of each parameter; with gradients, JAX arrays or schedules of
    a wider dtype JAX computes in that dtype, and results are rounded.

  Raises:
    TypeError: An argument of another type.
    ValueError: A setting or a number out of range. The values of JAX arrays and
      schedules are not checked.

  Examples:
    >>> from symjax_bp import optim
    >>> weights = jnp.array([1.0, -2.0, 0.5])
    >>> gradients = jnp.array([0.25, 0.0, -40.0])
    >>> for setting in range(4):
    ...   transform = optim.scale_by_batch_manhattan(setting, 0.75, 0.125)
    ...   state = transform.init(weights)
    ...   for g in (gradients, gradients, -gradients):
    ...     updates, state = transform.update(g, state, weights)
    ...   print(setting, updates)
    0 [  0.3671875  -0.578125  -12.355469 ]
    1 [ 0.6015625  -0.578125   -0.16796875]
    2 [-1. -1.  1.]
    3 [ 1. -1. -1.]

  References:
    Liao, Leibo and Poggio, `How Important is Weight Symmetry in
    Backpropagation? <https://arxiv.org/abs/1510.05067>`_, 2016, section 3
  """
  setting = _setting(setting)
  momentum = _scalar('momentum', momentum, below=1.0)
  weight_decay = _scalar('weight_decay', weight_decay)
  tail = _TAILS[setting]
  if callable(momentum):
    tail = optax.inject_hyperparams(tail, (), jnp.result_type(float))
  decay = optax.add_decayed_weights(weight_decay, _mask(weight_decay_mask))
  rounding = () if setting == 0 else (optax.scale_by_sign(),)
  return _keep_dtypes(optax.chain(*rounding, decay, tail(momentum)))


def batch_manhattan(
  learning_rate: optax.ScalarOrSchedule,
  momentum: optax.ScalarOrSchedule = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  setting: int = 1,
  weight_decay_mask: optax.MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The Batch Manhattan optimizer, :math:`w(t+1) = w(t) + \eta\,\tau(t)`.

  :func:`scale_by_batch_manhattan` has the equations of :math:`\tau`, the other
  arguments, the dtypes, the errors and the source.

  Args:
    learning_rate: :math:`\eta >= 0`, or a schedule. Every weight moves by about
      this much at each step, so useful rates lie far below those of SGD.
    momentum, weight_decay, setting, weight_decay_mask: As there.

  Examples:
    >>> from symjax_bp import optim
    >>> optimizer = optim.batch_manhattan(learning_rate=0.125, momentum=0.5)
    >>> weights = jnp.array([1.0, -2.0, 0.5])
    >>> state = optimizer.init(weights)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(1e6 * weights, state, weights)
    ...   weights = optax.apply_updates(weights, updates)
    ...   print(weights)
    [ 0.875 -1.875  0.375]
    [ 0.6875 -1.6875  0.1875]
    [ 0.46875 -1.46875 -0.03125]
  """
  minus_tau = scale_by_batch_manhattan(
    setting, momentum, weight_decay, weight_decay_mask
  )
  rate = optax.scale_by_learning_rate(_scalar('learning_rate', learning_rate))
  return _keep_dtypes(optax.chain(minus_tau, rate))


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: optax.ScalarOrSchedule = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: optax.MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The paper's mini-batch SGD: Batch Manhattan's setting 0.

  .. math::
    \tau(t) = -G + m\,\tau(t-1) - d\,w(t)

  This is :func:`optax.sgd` after :func:`optax.add_decayed_weights`. Arguments,
  dtypes, errors and source are those of :func:`batch_manhattan`.
  """
  return batch_manhattan(
    learning_rate, momentum, weight_decay, 0, weight_decay_mask
  )


def _keep_dtypes(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Casts updates to the dtypes of the parameters, and state to its own."""
  inner = optax.with_extra_args_support(inner)

  def cast(x, like):
    return None if x is None else jnp.asarray(x, jnp.result_type(like))

  def init_fn(params):
    # Strict promotion would refuse a scalar of another dtype.
    with jax.numpy_dtype_promotion('standard'):
      return inner.init(params)

  def update_fn(updates, state, params=None, **extra_args):
    like = (updates if params is None else params), state
    with jax.numpy_dtype_promotion('standard'):
      results = inner.update(updates, state, params, **extra_args)
    return jax.tree.map(cast, results, like, is_leaf=lambda x: x is None)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scalar(name: str, value: Any, below=jnp.inf, schedule=True) -> Any:
  """Checks a number or schedule; makes known numbers weakly typed floats."""
  if schedule and callable(value):
    return value
  dtype = getattr(value, 'dtype', type(value))
  is_scalar = any(jnp.issubdtype(dtype, k) for k in (np.integer, np.floating))
  is_scalar = is_scalar and np.ndim(value) == 0
  # Reading an array would wait for the device, and a tracer has no value.
  if is_scalar and isinstance(value, jax.Array):
    return value
  if is_scalar and 0.0 <= float(value) < below:
    return float(value)
  raise (ValueError if is_scalar else TypeError)(
    f'{name} is {value!r}, but must be a number in [0, {below}), a scalar array'
    f'{" or a schedule" * schedule}; 0 switches it off'
  )


def _setting(setting: Any) -> int:
  # True and 1.0 equal 1, so looking in the table is not enough.
  is_integer = isinstance(setting, int | np.integer)
  if is_integer and not isinstance(setting, bool) and setting in _TAILS:
    return int(setting)
  raise (TypeError if isinstance(setting, jax.Array) else ValueError)(
    f'setting is {setting!r}, but must be one of the integers 0 (SGD), 1, 2 or '
    "3 (Batch Manhattan); optax.inject_hyperparams needs static_args='setting'"
  )


def _mask(mask: Any, is_result: bool = False) -> Any:
  """Checks that a mask holds booleans; optax takes any object for one."""
  leaves = jax.tree.leaves(mask)
  is_leaf = any(leaf is mask for leaf in leaves)
  if is_leaf and callable(mask):
    return lambda params: _mask(mask(params), is_result=True)
  kinds = {(np.ndim(x), getattr(x, 'dtype', type(x))) for x in leaves}
  if kinds - {(0, bool), (0, np.dtype(bool))} or (is_leaf and not is_result):
    raise TypeError(
      f'weight_decay_mask is {mask!r}, but must be a tree with True (decay) or '
      'False for each parameter, or a function that returns one, which '
      'optax.inject_hyperparams needs in static_args; None decays all'
    )
  return mask
