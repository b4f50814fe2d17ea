r"""Assertions on feedback weights and gradients, for users' own tests.

In the style of ``chex``: each returns nothing or raises an ``AssertionError``
that names the paths of the layers, the numbers and the rule or bound. They are
for concrete arrays: call them outside ``jax.jit``.

* ``assert_sign_concordant``: V has the signs of W, but for a share ``p_flip``;
* ``assert_feedback_matches_params``: the state beside the parameters is sound;
* ``assert_asymmetric_gradients``: this is really not backpropagation;
* ``assert_symmetric_gradients``: this is (the control, V = W).

The last three take models of Flax Linen (with their variables) and of NNX.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from symjax_bp import linen, metrics
from symjax_bp import nnx as nnx_layers
from symjax_bp.feedback import FeedbackRule
from symjax_bp.matching import by_path, joined, rule_table

Leaves = dict[str, jax.Array]


def assert_sign_concordant(
  W: Any, V: Any, p_flip: float = 0.0, *, num_sigmas: float = 4.0
) -> None:
  r"""Asserts that V has the signs of W but for a share of flipped ones.

  .. math:: |\mathrm{mean}[\mathrm{sign}(V) = -\mathrm{sign}(W)] - p|
     \le k \sqrt{p (1 - p) / n}

  in every kernel, for p = ``p_flip``, k = ``num_sigmas`` and the n weights that
  are not 0. For p = 0 and p = 1 this is exact. Where W is 0 it has no sign to
  follow, so V must be 0 there, and nowhere else.

  >>> import symjax_bp
  >>> W = jax.random.normal(jax.random.key(0), (100, 10))
  >>> rule = symjax_bp.brsf(p_flip=0.25)
  >>> V = rule.weights(W, rule.draw(jax.random.key(1), W))
  >>> assert_sign_concordant(W, V, p_flip=0.25)
  >>> assert_sign_concordant({'kernel': W}, {'kernel': V})
  Traceback (most recent call last):
    ...
  AssertionError: V must have the signs of W, flipped with p_flip = 0:
    kernel: 276 of 1000 signs flipped, a share of 0.276, not 0

  Args:
    W: forward kernel, or a tree such as ``variables['params']``; as it is used,
      that is, times its mask if it has one.
    V: feedback kernel, or a tree whose leaves are found in W by their paths,
      such as the collection ``feedback_weights``. (The collection ``feedback``
      is not V but what the rule draws.)
    p_flip: probability of a flipped sign in [0, 1].
    num_sigmas: how many standard deviations the share may be off. At 4 a sound
      kernel fails with probability 6e-5; fewer than some ten expected flips
      need more.

  Raises:
    AssertionError: if a share is off, zeros or shapes differ, a value is not
      finite, or a leaf of V has no counterpart in W.
    ValueError: if ``p_flip`` is no probability or ``num_sigmas`` negative.
  """
  if not 0 <= p_flip <= 1:
    raise ValueError(f'p_flip must be a probability in [0, 1], not {p_flip!r}.')
  if not num_sigmas >= 0:
    raise ValueError(f'num_sigmas must be 0 or more, not {num_sigmas!r}.')
  kernels, feedback = _by_path(W), _by_path(V)
  problems = [] if feedback else ['V has no leaves']
  for path, kernel in feedback.items():
    if path not in kernels:
      problems.append(f'{path or "V"}: not in W, which has {sorted(kernels)}')
    else:
      found = _sign_problems(kernels[path], kernel, p_flip, num_sigmas)
      problems.extend(f'{path}: {each}' if path else each for each in found)
  _fail_if(
    problems,
    f'V must have the signs of W, flipped with p_flip = {p_flip:g}:',
  )


def _sign_problems(
  W: jax.Array, V: jax.Array, p_flip: float, num_sigmas: float
) -> Iterator[str]:
  if V.shape != W.shape:
    yield f'V has shape {V.shape}, W has {W.shape}'
    return
  for name, array in (('W', W), ('V', V)):
    if count := _count(~jnp.isfinite(array)):
      yield f'{count} of {array.size} values of {name} are not finite'
  sign_W, sign_V = (jnp.sign(array).astype(jnp.int8) for array in (W, V))
  for name, zero, other in (('V', sign_V, sign_W), ('W', sign_W, sign_V)):
    if count := _count((zero == 0) & (other != 0)):
      yield f'{name} alone is 0 at {count} of {W.size} weights'
  flipped, n = _count(sign_W * sign_V < 0), _count(sign_W != 0)
  bound = num_sigmas * math.sqrt(p_flip * (1 - p_flip) / max(n, 1))
  share = flipped / max(n, 1)
  if n and abs(share - p_flip) > bound:
    tolerance = f' +- {bound:.3g} ({num_sigmas:g} sigmas)' if bound else ''
    yield (
      f'{flipped} of {n} signs flipped, a share of {share:.3g}, not '
      f'{p_flip:g}{tolerance}'
    )


def assert_feedback_matches_params(
  variables: Mapping[str, Any] | nnx.Module,
) -> None:
  """Asserts that the feedback state lies beside the parameters, and fits.

  Every leaf of ``variables['feedback']`` must be finite and have a kernel of
  its path, shape and dtype in ``variables['params']``, which in turn must hold
  no feedback: an optimizer would train it. Models whose rules keep no draw have
  no such state, which is fine.

  >>> import symjax_bp
  >>> layer = linen.Dense(2, feedback=symjax_bp.rndf())
  >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
  >>> assert_feedback_matches_params(variables)
  >>> variables['feedback']['kernel'] = jnp.ones((2, 3))
  >>> assert_feedback_matches_params(variables)
  Traceback (most recent call last):
    ...
  AssertionError: feedback must match the kernels:
    kernel: feedback has shape (2, 3), the kernel has (3, 2)

  Args:
    variables: the variables of a Linen model, or an NNX model, where a layer's
      ``Feedback`` is compared with its kernel.

  Raises:
    AssertionError: if there is a mismatch; the message lists all of them.
    ValueError: if the variables have no 'params'.
  """
  if isinstance(variables, nnx.Module):
    params, feedback, misplaced = _nnx_state(variables)
  elif 'params' in variables:
    params = _by_path(variables['params'])
    feedback = _by_path(variables.get('feedback', {}))
    misplaced = [path for path in params if _is_feedback(path, params)]
  else:
    raise ValueError(
      "variables must be what a Linen model's init returns, with 'params', or "
      f'an nnx.Module, not {list(variables)}.'
    )
  problems = [
    f'{path}: feedback is among the parameters and would be trained'
    for path in misplaced
  ]
  for path, draw in feedback.items():
    if path not in params:
      problems.append(
        f'{path}: no such kernel; the parameters are {sorted(params)}'
      )
      continue
    for name in ('shape', 'dtype'):
      actual, expected = getattr(draw, name), getattr(params[path], name)
      if actual != expected:
        problems.append(
          f'{path}: feedback has {name} {actual}, the kernel has {expected}'
        )
    if count := _count(~jnp.isfinite(draw)):
      problems.append(f'{path}: {count} of {draw.size} values are not finite')
  _fail_if(problems, 'feedback must match the kernels:')


def _is_feedback(path: str, params: Leaves) -> bool:
  """Feedback in the wrong place, and not a module of that name."""
  return f'/{path}'.endswith('/feedback') or (
    path.startswith('feedback/') and path.removeprefix('feedback/') in params
  )


def _nnx_state(model: nnx.Module) -> tuple[Leaves, Leaves, list[str]]:
  """Kernels and draws of the asymmetric layers; draws that are parameters."""
  params, feedback, misplaced = {}, {}, []
  for path, layer in nnx.iter_modules(model):
    for operation in vars(layer).values():
      draw = getattr(operation, 'kernel', None)
      if isinstance(operation, nnx_layers._Operation) and draw is not None:
        name = '/'.join(map(str, (*path, 'kernel')))
        params[name] = vars(layer)['kernel'][...]
        feedback[name] = draw[...]
        if isinstance(draw, nnx.Param):
          misplaced.append(name)
  return params, feedback, misplaced


def assert_asymmetric_gradients(
  model: nn.Module | nnx.Module,
  variables: Mapping[str, Any] | None,
  loss: Callable[[Any], jax.Array],
  *args,
  rngs: Any = None,
  mutable: Sequence[str] = (),
  min_angle: float = 1e-2,
  **kwargs,
) -> None:
  """Asserts that a model is trained by something else than backpropagation.

  That is: its output is that of its plain twin, its feedback matches the
  parameters and gets no gradient, and the gradient of at least one kernel is
  more than ``min_angle`` degrees away from the true one. (A layer's V is seen
  by the layers below it, never by its own gradient.)

  >>> import symjax_bp
  >>> mlp = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(2)])
  >>> x, loss = jnp.ones((1, 4)), lambda y: (y**2).sum()
  >>> model = linen.with_feedback(mlp, symjax_bp.usf())
  >>> variables = model.init(jax.random.key(0), x)
  >>> assert_asymmetric_gradients(model, variables, loss, x)
  >>> first = {'layers_0': symjax_bp.usf(), '': symjax_bp.symmetric()}
  >>> model = linen.with_feedback(mlp, first)
  >>> assert_asymmetric_gradients(model, variables, loss, x)
  Traceback (most recent call last):
    ...
  AssertionError: is it really not backpropagation? No gradient is more than
  min_angle = 0.01 degrees away from the true one:
    layer     shape   feedback     gradient angle
    layers_0  (4, 3)  usf()        0
    layers_2  (3, 2)  symmetric()  0

  Args:
    model: a Linen or an NNX model.
    variables: the variables of a Linen model; None for an NNX model.
    loss: the scalar loss as a function of the model's output.
    *args: arguments to call the model with.
    rngs: key streams, as for the ``apply`` of a Linen model.
    mutable: collections that the call of a Linen model changes, such as
      ``batch_stats``.
    min_angle: the least angle that counts, degrees in [0, 180); the default is
      far above what rounding makes of V = W.
    **kwargs: further arguments to call the model with.

  Raises:
    AssertionError: if not; the message has the rule and angle of every layer.
    TypeError: if the model is of neither kind.
    ValueError: if ``variables`` do not go with the model, or ``min_angle`` is
      out of range.
  """
  if not 0 <= min_angle < 180:
    raise ValueError(
      f'min_angle must be an angle in [0, 180) degrees, not {min_angle!r}.'
    )
  own, true, rules = _compare(
    model, variables, loss, args, kwargs, rngs, mutable
  )
  _assert_same_output(own, true)
  _fail_if(
    [
      f'{path}: gradient of up to {float(jnp.max(jnp.abs(gradient))):.3g}'
      for path, gradient in own.feedback_gradients.items()
      if _count(gradient != 0)
    ],
    'feedback must have no gradient:',
  )
  angles = _angles(own, true)
  if not any(angle > min_angle for angle in angles.values()):
    _fail_if(
      _table(rules, angles),
      'is it really not backpropagation? No gradient is more than\n'
      f'min_angle = {min_angle:g} degrees away from the true one:',
    )


def assert_symmetric_gradients(
  model: nn.Module | nnx.Module,
  variables: Mapping[str, Any] | None,
  loss: Callable[[Any], jax.Array],
  *args,
  rngs: Any = None,
  mutable: Sequence[str] = (),
  **kwargs,
) -> None:
  """Asserts that a model is trained by backpropagation, bit for bit.

  The control V = W: output and gradients of all parameters equal those of the
  plain twin. (This holds too where only the first layer is asymmetric: no
  layer below it sees its V.) On a GPU, JAX's own gradients repeat bit for bit
  only with ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.

  >>> import symjax_bp
  >>> rngs = nnx.Rngs(0)
  >>> mlp = nnx.Sequential(
  ...   nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
  ... )
  >>> x, loss = jnp.ones((1, 4)), lambda y: (y**2).sum()
  >>> model = nnx_layers.with_feedback(mlp, symjax_bp.symmetric())
  >>> assert_symmetric_gradients(model, None, loss, x)
  >>> model = nnx_layers.with_feedback(mlp, symjax_bp.nusf())
  >>> assert_symmetric_gradients(model, None, loss, x)
  Traceback (most recent call last):
    ...
  AssertionError: gradients must be those of plain backpropagation:
    layers/0/bias: 3 of 3 values differ, by up to ...
    layers/0/kernel: 12 of 12 values differ, by up to ...
    layer     shape   feedback  gradient angle
    layers/0  (4, 3)  nusf()    ...
    layers/1  (3, 2)  nusf()    0

  Args:
    model: a Linen or an NNX model.
    variables: the variables of a Linen model; None for an NNX model.
    loss: the scalar loss as a function of the model's output.
    *args: arguments to call the model with.
    rngs: key streams, as for the ``apply`` of a Linen model.
    mutable: collections that the call of a Linen model changes, such as
      ``batch_stats``.
    **kwargs: further arguments to call the model with.

  Raises:
    AssertionError: if a bit differs, a gradient is not finite, or all of them
      are 0; the message has the rule and angle of every layer.
    TypeError: if the model is of neither kind.
    ValueError: if ``variables`` do not go with the model.
  """
  own, true, rules = _compare(
    model, variables, loss, args, kwargs, rngs, mutable
  )
  _assert_same_output(own, true)
  angles = _angles(own, true)
  problems = _differences(own.gradients, true.gradients)
  if not any(_count(gradient != 0) for gradient in true.gradients.values()):
    problems.append('all gradients are 0, which shows nothing')
  _fail_if(
    problems and [*problems, *_table(rules, angles)],
    'gradients must be those of plain backpropagation:',
  )


class _Pass(NamedTuple):
  """What a forward and a backward pass give, by path."""

  output: Leaves
  gradients: Leaves  # of the parameters
  feedback_gradients: Leaves  # of what rules have drawn and keep


def _compare(
  model: Any, variables: Any, loss, args, kwargs, rngs, mutable
) -> tuple[_Pass, _Pass, dict[str, tuple[tuple[int, ...], Any]]]:
  """A model, its plain twin, and {path: (shape, rule)} of its layers."""
  if isinstance(model, nn.Module):
    if variables is None:
      raise ValueError(
        'variables must be those of the Linen model, as init returns them, '
        'not None.'
      )
    assert_feedback_matches_params(variables)
    calls = (
      _linen_call(each, variables, args, kwargs, rngs, mutable)
      for each in (model, linen.plain_twin(model))
    )
    rules = linen.layer_rules(model, *args, **kwargs)
  elif isinstance(model, nnx.Module):
    if not (variables is None and rngs is None and not mutable):
      raise ValueError(
        'variables, rngs and mutable are for Linen models: an NNX model holds '
        'its own, so pass None, for instance '
        'assert_asymmetric_gradients(model, None, loss, x).'
      )
    assert_feedback_matches_params(model)
    calls = (
      _nnx_call(each, args, kwargs)
      for each in (model, nnx_layers.plain_twin(model))
    )
    rules = nnx_layers.layer_rules(model)
  else:
    raise TypeError(
      'model must be a flax.linen.Module or an nnx.Module, not '
      f'{type(model).__name__}.'
    )
  own, true = (_run(loss, *call) for call in calls)
  return own, true, rules


def _linen_call(model: nn.Module, variables, args, kwargs, rngs, mutable):
  def output(params, feedback):
    state = {**variables, 'params': params, 'feedback': feedback}
    return model.apply(
      state, *args, rngs=rngs, mutable=list(mutable), **kwargs
    )[0]

  return output, variables['params'], variables.get('feedback', {})


def _nnx_call(model: Any, args, kwargs):
  def is_draw(path, value):
    return isinstance(value, nnx_layers.Feedback) and path[-1] == 'kernel'

  graph, params, draws, rest = nnx.split(model, nnx.Param, is_draw, ...)

  def output(params, draws):
    # A copy, whose batch statistics and keys the call may change.
    own = nnx.merge(graph, params, draws, rest, copy=True)
    return own(*args, **kwargs)

  return output, params, draws


def _run(loss, output, params, feedback) -> _Pass:
  # Two programs: in the first nothing depends on V, so the twin has the same
  # and not a bit may differ.
  y = jax.jit(output)(params, feedback)
  gradient = jax.grad(lambda *trees: loss(output(*trees)), argnums=(0, 1))
  return _Pass(_by_path(y), *map(_by_path, jax.jit(gradient)(params, feedback)))


def _assert_same_output(own: _Pass, true: _Pass) -> None:
  _fail_if(
    _differences(own.output, true.output),
    'the output must be that of the plain twin:',
  )


def _differences(actual: Leaves, expected: Leaves) -> list[str]:
  problems = []
  for path, value in actual.items():
    # NaN differs from NaN here: nothing is shown by what is not finite.
    if count := _count(value != expected[path]):
      largest = float(jnp.max(jnp.abs(value - expected[path])))
      problems.append(
        f'{path or "value"}: {count} of {value.size} values differ, by up to '
        f'{largest:.3g}'
      )
  return problems


def _angles(own: _Pass, true: _Pass) -> dict[str, float]:
  """Degrees from the true gradient, by path as in ``layer_rules``."""
  angles = {}
  for path, gradient in own.gradients.items():
    if gradient.ndim >= 2:
      layer, _, name = path.rpartition('/')
      angle = metrics.alignment_angle(gradient, true.gradients[path])
      angles[layer if name == 'kernel' else path] = float(angle)
  return angles


def _table(
  rules: Mapping[str, tuple[tuple[int, ...], FeedbackRule | None]],
  angles: Mapping[str, float],
) -> list[str]:
  """Lines of the table of layers, with one more column."""
  lines = rule_table(rules).splitlines()
  width = max(map(len, lines))
  # A layer that the call does not reach has no gradient here.
  cells = (f'{angles.get(path, math.nan):.4g}' for path in rules)
  return [
    f'{line:<{width}}  {cell}'
    for line, cell in zip(lines, ('gradient angle', *cells), strict=True)
  ]


def _by_path(tree: Any) -> Leaves:
  """Leaves of any tree, with paths such as 'Dense_0/kernel'; '' for a leaf."""
  if isinstance(tree, nnx.State):
    tree = nnx.to_pure_dict(tree)
  return {
    joined(module, name): jnp.asarray(leaf)
    for (module, name), leaf in by_path(tree).items()
  }


def _count(condition: jax.Array) -> int:
  return int(jnp.sum(condition))


def _fail_if(problems: Sequence[str], title: str) -> None:
  if problems:
    raise AssertionError('\n  '.join([title, *problems]))
