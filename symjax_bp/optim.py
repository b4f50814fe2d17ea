r"""Batch Manhattan: mini-batch SGD on the signs of the gradients.

The paper's update is :math:`w(t+1) = w(t) + \eta\,\tau(t)`. The transformations
here emit :math:`-\tau`, which optax then scales by :math:`-\eta`, so that they
compose with every other optax transformation.
"""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def signed_trace(
  decay: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
  r"""Computes a trace of past updates that keeps only its sign.

  .. math::
    t_k = \text{sign}(g_k + \text{decay} \cdot t_{k-1})

  Not :func:`optax.trace` followed by :func:`optax.scale_by_sign`, which
  remembers magnitudes: here the whole past weighs at most ``decay``, so it
  decides only where the present update is smaller than that.

  Args:
    decay: Decay rate of the trace, a scalar.

  Returns:
    A transformation whose state is an :class:`optax.TraceState`, with arrays
    of the shapes and dtypes of the parameters.

  Examples:
    >>> import jax.numpy as jnp
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
  inner = optax.trace(decay)

  def update_fn(updates, state, params=None):
    updates, _ = inner.update(updates, state, params)
    updates = jax.tree.map(jnp.sign, updates)
    return updates, optax.TraceState(trace=updates)

  return optax.GradientTransformation(inner.init, update_fn)


# What follows the weight decay term, by the paper's number of the setting.
_TAILS: dict[int, Callable[..., optax.GradientTransformation]] = {
  0: optax.trace,
  1: optax.trace,
  2: signed_trace,
  3: lambda momentum: optax.chain(optax.trace(momentum), optax.scale_by_sign()),
}


def scale_by_batch_manhattan(
  setting: int = 1,
  momentum: jax.typing.ArrayLike = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: optax.MaskOrFn = None,
) -> optax.GradientTransformation:
  r"""Replaces gradients by the paper's :math:`-\tau(t)`.

  With the gradient :math:`G = \sum_b \partial E / \partial w` of the
  mini-batch, momentum :math:`m` and weight decay :math:`d`:

  .. math::
    \text{0 (SGD):}\quad \tau(t) &= -G + m\,\tau(t-1) - d\,w(t) \\
    \text{1:}\quad \tau(t) &= -\text{sign}(G) + m\,\tau(t-1) - d\,w(t) \\
    \text{2:}\quad \tau(t) &=
      \text{sign}(-\text{sign}(G) + m\,\tau(t-1) - d\,w(t)) \\
    \text{3:}\quad \tau(t) &= \text{sign}(\kappa(t)), \quad
      \kappa(t) = -\text{sign}(G) + m\,\kappa(t-1) - d\,w(t)

  with sign(0) = 0. In settings 1, 2 and 3 the scale of the gradients does not
  matter, so their sum and their mean over the mini-batch are the same thing.

  The sign is taken once, of the whole mini-batch's gradient: gradients must be
  summed or averaged across devices (``jax.lax.psum``) *before* this
  transformation, and over micro-batches by :class:`optax.MultiSteps` around it.

  Args:
    setting: The paper's setting, 0, 1, 2 or 3. It chooses the program, not a
      number in it, so under :func:`optax.inject_hyperparams` it has to be
      named in ``static_args``, as has a ``weight_decay_mask`` that is a
      function.
    momentum: :math:`m` in [0, 1).
    weight_decay: :math:`d >= 0`, or a schedule.
    weight_decay_mask: A tree of booleans with the structure of the parameters
      (or a prefix of it), or a function from parameters to such a tree; only
      the parameters marked True decay.

  Returns:
    A transformation whose ``update`` needs the parameters. Updates and state
    have the shapes and dtypes of the parameters.

  Raises:
    TypeError: ``setting`` is an array, or a number is expected and not given.
    ValueError: A setting or a number out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from symjax_bp import optim
    >>> weights = jnp.array([1.0, -2.0, 0.5])
    >>> gradients = jnp.array([0.25, 0.0, -40.0])
    >>> for setting in range(4):
    ...   transform = optim.scale_by_batch_manhattan(
    ...     setting, momentum=0.75, weight_decay=0.125
    ...   )
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
  _check_setting(setting)
  _check_range('momentum', momentum, below=1.0)
  if not callable(weight_decay):
    _check_range('weight_decay', weight_decay)
  rounding = () if setting == 0 else (optax.scale_by_sign(),)
  return optax.chain(
    *rounding,
    optax.add_decayed_weights(weight_decay, weight_decay_mask),
    _TAILS[setting](momentum),
  )


def batch_manhattan(
  learning_rate: optax.ScalarOrSchedule,
  momentum: jax.typing.ArrayLike = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  setting: int = 1,
  weight_decay_mask: optax.MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The Batch Manhattan optimizer, :math:`w(t+1) = w(t) + \eta\,\tau(t)`.

  Args:
    learning_rate: :math:`\eta`, or a schedule. Every weight moves by about
      this much at once, so useful rates lie far below those of SGD.
    momentum: See :func:`scale_by_batch_manhattan`, which has the equations.
    weight_decay: See :func:`scale_by_batch_manhattan`.
    setting: See :func:`scale_by_batch_manhattan`.
    weight_decay_mask: See :func:`scale_by_batch_manhattan`.

  Returns:
    An optimizer whose ``update`` needs the parameters.

  Raises:
    TypeError: As :func:`scale_by_batch_manhattan`.
    ValueError: As :func:`scale_by_batch_manhattan`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from symjax_bp import optim
    >>> optimizer = optim.batch_manhattan(learning_rate=0.125, momentum=0.5)
    >>> weights = jnp.array([1.0, -2.0, 0.5])
    >>> state = optimizer.init(weights)
    >>> for _ in range(3):
    ...   gradients = 1e6 * weights
    ...   updates, state = optimizer.update(gradients, state, weights)
    ...   weights = optax.apply_updates(weights, updates)
    ...   print(weights)
    [ 0.875 -1.875  0.375]
    [ 0.6875 -1.6875  0.1875]
    [ 0.46875 -1.46875 -0.03125]

  References:
    Liao, Leibo and Poggio, `How Important is Weight Symmetry in
    Backpropagation? <https://arxiv.org/abs/1510.05067>`_, 2016, section 3
  """
  return optax.chain(
    scale_by_batch_manhattan(
      setting, momentum, weight_decay, weight_decay_mask
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: jax.typing.ArrayLike = 0.9,
  weight_decay: optax.ScalarOrSchedule = 0.0,
  weight_decay_mask: optax.MaskOrFn = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The paper's mini-batch SGD: Batch Manhattan's setting 0.

  .. math::
    \tau(t) = -G + m\,\tau(t-1) - d\,w(t)

  :func:`optax.sgd` with the weight decay added to the gradient, before the
  momentum.

  Args:
    learning_rate: :math:`\eta`, or a schedule.
    momentum: See :func:`scale_by_batch_manhattan`.
    weight_decay: See :func:`scale_by_batch_manhattan`.
    weight_decay_mask: See :func:`scale_by_batch_manhattan`.

  Returns:
    An optimizer whose ``update`` needs the parameters.

  Raises:
    TypeError: As :func:`scale_by_batch_manhattan`.
    ValueError: As :func:`scale_by_batch_manhattan`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from symjax_bp import optim
    >>> optimizer = optim.sgd(learning_rate=0.5, weight_decay=0.25)
    >>> weights = jnp.array([1.0, -2.0])
    >>> updates, _ = optimizer.update(
    ...   jnp.array([3.0, 0.0]), optimizer.init(weights), weights
    ... )
    >>> print(updates)
    [-1.625  0.25 ]

  References:
    Liao, Leibo and Poggio, `How Important is Weight Symmetry in
    Backpropagation? <https://arxiv.org/abs/1510.05067>`_, 2016, section 3
  """
  return batch_manhattan(
    learning_rate, momentum, weight_decay, 0, weight_decay_mask
  )


def _check_setting(setting: object) -> None:
  """Raises unless `setting` is one of the paper's numbers."""
  if isinstance(setting, jax.Array):
    raise TypeError(
      'setting has to be a Python int, 0, 1, 2 or 3, but is an array: '
      "optax.inject_hyperparams makes one of it unless static_args='setting' "
      'is passed to it'
    )
  # True and 1.0 equal 1, so looking in the table is not enough.
  if type(setting) is not int or setting not in _TAILS:
    raise ValueError(
      f'setting is {setting!r}, but must be one of the integers 0 (SGD), 1, 2 '
      'or 3 (Batch Manhattan)'
    )


def _check_range(name: str, value: object, below: float = float('inf')) -> None:
  """Raises unless `value` is an array or a number in [0, below)."""
  # Under inject_hyperparams or jit the value is known on the device only.
  if isinstance(value, jax.Array):
    return
  if not isinstance(value, numbers.Real):
    raise TypeError(
      f'{name} is {value!r}, but must be a number; for a schedule wrap the '
      'optimizer in optax.inject_hyperparams'
    )
  if not 0.0 <= float(value) < below:
    raise ValueError(
      f'{name} is {value}, but must be in [0, {below}); 0 switches it off'
    )
