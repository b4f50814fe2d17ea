r"""Assertions on feedback weights and gradients, for users' own tests.

As in ``chex``, each returns nothing or raises an ``AssertionError`` that names
the paths of the weights, the numbers and the rule or bound. They need concrete
arrays: call them outside ``jax.jit``. Three take a model, its variables and
arguments to call it with. The variables are

- for a function of ``with_feedback``: ``{'params': params, 'feedback':
  feedback}``,
- for a Linen module: the tree that ``init`` returned,
- for an NNX module: ``None``, since the module holds its own.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from symjax_bp import linen, metrics, transform
from symjax_bp import nnx as nnx_layers

__all__ = [
  'assert_asymmetric_gradients',
  'assert_feedback_matches_params',
  'assert_sign_concordant',
  'assert_symmetric_gradients',
]

Loss = Callable[[Any], jax.Array]

# The path of a rule's state has the name of the rule: 'Dense_0/kernel:rndf()'.
_STATE = re.compile(r'(?:^|[:/])([^:/]+\([^/]*\))(?=/|$)')


def assert_sign_concordant(
  W: Any, V: Any, p_flip: float = 0.0, *, num_sigmas: float = 4.0
) -> None:
  r"""Asserts that V has the signs of W, except for a flipped share of them.

  .. math:: |\mathrm{mean}[\mathrm{sign}(V) = -\mathrm{sign}(W)] - p|
     \le k \sqrt{p (1 - p) / n}

  with p = ``p_flip``, k = ``num_sigmas`` and the n weights of a kernel that are
  not 0. V must be 0 where W is, and only there.

  >>> W, V = jnp.array([0.3, -2.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
  >>> assert_sign_concordant(W, V, p_flip=0.5)
  >>> assert_sign_concordant({'kernel': W}, {'kernel': V})
  Traceback (most recent call last):
    ...
  AssertionError: V must have the signs of W, flipped with p_flip = 0:
    kernel: 1 of 2 signs flipped, a share of 0.5, not 0 +- 0

  Args:
    W: a kernel, or a tree of kernels such as the parameters.
    V: the feedback kernel, or a tree of them with paths of W, such as
      ``feedback_weights`` returns.
    p_flip: probability of a flipped sign in [0, 1].
    num_sigmas: allowed deviation in standard deviations. At 4 a correct kernel
      with at least ten expected flips fails with probability 6e-5.

  Raises:
    AssertionError: if not; the message lists all wrong kernels.
    ValueError: if ``p_flip`` is no probability.
  """
  if not 0 <= p_flip <= 1:
    raise ValueError(f'p_flip must be a probability in [0, 1], not {p_flip!r}.')
  kernels, feedback = _by_path(W), _by_path(V)
  problems = [] if feedback else ['V has no leaves']
  for path, each in feedback.items():
    if path in kernels:
      found = _sign_problems(kernels[path], each, p_flip, num_sigmas)
    else:
      found = [f'not in W, which has {sorted(kernels)}']
    problems.extend(f'{path or "V"}: {problem}' for problem in found)
  title = f'V must have the signs of W, flipped with p_flip = {p_flip:g}:'
  _fail_if(problems, title)


def _sign_problems(W, V, p_flip: float, num_sigmas: float) -> Iterator[str]:
  if V.shape != W.shape:
    yield f'has shape {V.shape}, W has {W.shape}'
    return
  if count := _count(~(jnp.isfinite(V) & jnp.isfinite(W))):
    yield f'{count} of {W.size} weights are not finite in W or V'
  if count := _count((V == 0) != (W == 0)):
    yield f'{count} of {W.size} weights are 0 in W or V alone'
  flipped = _count(((W > 0) & (V < 0)) | ((W < 0) & (V > 0)))
  n = _count(W != 0)
  share = flipped / n if n else p_flip
  bound = num_sigmas * math.sqrt(p_flip * (1 - p_flip) / max(n, 1))
  if abs(share - p_flip) > bound:
    yield (
      f'{flipped} of {n} signs flipped, a share of {share:.3g}, not '
      f'{p_flip:g} +- {bound:.3g}'
    )


def assert_feedback_matches_params(
  model: Any, variables: Any = None, *args, wrt: Any = nnx.Param, **kwargs
) -> None:
  """Asserts that the feedback fits the parameters and their rules.

  Each weight has the state that its own rule makes for it, in shape and dtype,
  with finite values. No optimizer trains it, unless its rule learns.

  >>> import symjax_bp
  >>> layer, x = linen.Dense(2, feedback=symjax_bp.rndf()), jnp.ones((1, 3))
  >>> variables = layer.init(jax.random.key(0), x)
  >>> assert_feedback_matches_params(layer, variables, x)
  >>> variables['feedback']['kernel:rndf()'] = jnp.ones((2, 3))
  >>> assert_feedback_matches_params(layer, variables, x)
  Traceback (most recent call last):
    ...
  AssertionError: feedback must match the parameters:
    kernel:rndf(): float32(2, 3), but rndf() keeps float32(3, 2)

  Args:
    model, variables, *args, **kwargs: see ``symjax_bp.testing``. An NNX model
      needs no arguments here.
    wrt: the variables of an NNX model that are trained: ``optimizer.wrt``.

  Raises:
    AssertionError: if not; the message lists all mismatches.
    TypeError, ValueError: if ``model`` and ``variables`` do not go together.
  """
  _, _, *state = _subject(model, variables, args, kwargs)
  _check_feedback(model, wrt, *state)


def _check_feedback(model: Any, wrt: Any, params, feedback, rows) -> None:
  params, stored = _by_path(params), {}
  rules = {row.path: row.rule for row in rows if row.rule}
  trained = params
  if isinstance(model, nnx.Module):
    trained = _by_path(nnx.state(model, wrt))
  problems = [
    f'{path}: feedback is among the trained variables'
    for path in trained
    if _STATE.search(path) and not transform.is_learned(path)
  ]
  for name, leaf in _by_path(feedback).items():
    name = _STATE.sub(r':\1', name)
    path = name.partition(':')[0]
    stored.setdefault(path, {})[name] = f'{leaf.dtype}{leaf.shape}'
    if path not in params:
      problems.append(f'{name}: no parameter {path}, only {sorted(params)}')
    if count := _count(~jnp.isfinite(leaf)):
      problems.append(f'{name}: {count} of {leaf.size} values are not finite')
  for path, rule in rules.items():
    found, kept = stored.get(path, {}), _kept(path, rule, params[path])
    if not found and rule.redraws and isinstance(model, nn.Module):
      continue  # The call can draw the seed.
    # Layers that were stacked keep stacked states.
    stacks = range(params[path].ndim)
    if all(found != _kept(path, rule, params[path], axes) for axes in stacks):
      problems += [
        f'{name}: {found.get(name, "nothing")}, but {rule!r} keeps '
        f'{kept.get(name, "nothing")}'
        for name in {**kept, **found}
        if found.get(name) != kept.get(name)
      ]
  _fail_if(problems, 'feedback must match the parameters:')


def _kept(path: str, rule: Any, W: jax.Array, stack: int = 0) -> dict[str, str]:
  """{name: dtype and shape} of what a rule keeps, with stacked axes of W."""
  init = rule.init
  for _ in range(stack):
    init = jax.vmap(init, (None, 0))
  state = jax.eval_shape(init, jax.random.key(0), W)
  leaves = transform.by_path({f'{path}:{rule.state_name}': state})
  return {name: f'{leaf.dtype}{leaf.shape}' for name, leaf in leaves.items()}


def assert_asymmetric_gradients(
  model: Any, variables: Any, loss: Loss, *args, min_angle=1e-2, **kwargs
) -> None:
  """Asserts that a model is not trained by backpropagation.

  Its output equals the plain model's, its feedback matches the parameters, and
  the gradient of at least one weight is more than ``min_angle`` from the true
  one. V of a layer changes the gradients of the layers below it, so one layer
  is not enough.

  Args:
    model, variables, *args, **kwargs: see ``symjax_bp.testing``. For Linen,
      ``rngs`` and ``mutable=['batch_stats']`` go to ``apply``.
    loss: the scalar loss as a function of the model's output.
    min_angle: the smallest angle that counts, in degrees in [0, 180). The
      default is far above the effect of rounding if V = W.

  Raises:
    AssertionError: if not; the message has the rule and angle of each weight.
    TypeError, ValueError: if ``model`` and ``variables`` do not go together, or
      ``min_angle`` is out of range.
  """
  if not 0 <= min_angle < 180:
    raise ValueError(
      f'min_angle must be an angle in [0, 180) degrees, not {min_angle!r}.'
    )
  table, angles, _ = _compare(model, variables, loss, args, kwargs)
  passed = any(angle > min_angle for angle in angles)
  title = f'no gradient is more than {min_angle:g} degrees from'
  _fail_if([] if passed else table, f"{title} backpropagation's:")


def assert_symmetric_gradients(
  model: Any, variables: Any, loss: Loss, *args, **kwargs
) -> None:
  """Asserts that a model is trained by backpropagation, bit for bit.

  The control V = W: output and gradients of all parameters equal those of the
  plain model. Gradients that are all 0 or not finite prove nothing and fail. On
  a GPU, JAX's own gradients are reproducible bit for bit only with
  ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.

  >>> import symjax_bp
  >>> mlp = lambda W, x: x @ W[0] @ W[1]
  >>> f = symjax_bp.with_feedback(mlp, symjax_bp.nusf())
  >>> W, x = [jnp.eye(2), jnp.full((2, 1), 3.0)], jnp.ones((1, 2))
  >>> assert_symmetric_gradients(f, {'params': W}, jnp.sum, x)
  Traceback (most recent call last):
    ...
  AssertionError: gradients must be those of plain backpropagation:
    0: 4 of 4 values differ, by up to 2.5
    weight  shape   feedback  use
    0       (2, 2)  nusf()    product, gradient at 0
    1       (2, 1)  nusf()    product, gradient at 0
    2 of 2 weights with feedback: 6 of 6 parameters

  Args and errors are those of ``assert_asymmetric_gradients``.
  """
  table, _, problems = _compare(model, variables, loss, args, kwargs)
  title = 'gradients must be those of plain backpropagation:'
  _fail_if(problems and [*problems, *table], title)


def _subject(model: Any, variables: Any, args, kwargs) -> tuple[Any, ...]:
  """(call(model or twin, params), twin, params, feedback, rows of weights)."""
  if isinstance(model, nnx.Module):
    if variables is not None:
      raise ValueError('variables must be None: an NNX model holds its own.')

    def call(model, params):
      graph, _, rest = nnx.split(model, nnx.Param, ...)
      # A copy, because the call may change batch statistics and keys.
      return nnx.merge(graph, params, rest, copy=True)(*args, **kwargs)

    twin = nnx_layers.without_feedback(model)
    params = nnx.state(model, nnx.Param)
    # A tied weight has a state at each of its paths, but one parameter.
    paths, (_, states) = _by_path(params), nnx_layers.attached(model)
    feedback = {path: states[path] for path in states if path in paths}
    rows = nnx_layers.layer_rules(model)
    return call, twin, params, feedback, rows
  is_linen = isinstance(model, nn.Module)
  if not is_linen and not isinstance(model, transform.FeedbackFunction):
    raise TypeError(
      'model must be a function of with_feedback, a flax.linen.Module or an '
      f'nnx.Module, not {type(model).__name__}.'
    )
  if not isinstance(variables, Mapping) or 'params' not in variables:
    found = jax.tree.structure(variables)
    raise ValueError(f"variables must have 'params', not {found}.")
  params, feedback = variables['params'], variables.get('feedback')
  if is_linen:
    options = {'rngs': kwargs.pop('rngs', None)}
    options['mutable'] = list(kwargs.pop('mutable', ()))

    def call(model, params):
      given = {**variables, 'params': params}
      return model.apply(given, *args, **options, **kwargs)[0]

    twin = linen.without_feedback(model)
    rows = linen.layer_rules(model, *args, **kwargs)
  else:

    def call(model, params):
      return model(params, feedback, *args, **kwargs)

    def twin(params, _, *args, **kwargs):
      return model.function(params, *args, **kwargs)

    rows = model.rows(params, *args, **kwargs)
  return call, twin, params, feedback, rows


def _compare(
  model: Any, variables: Any, loss: Loss, args, kwargs
) -> tuple[list[str], list[jax.Array], list[str]]:
  """A table of gradients, their angles, and differences from the true ones."""
  call, twin, *state = _subject(model, variables, args, kwargs)
  _check_feedback(model, nnx.Param, *state)
  params, _, rows = state
  if isinstance(model, nnx.Module):  # Now it can be called.
    rows = nnx_layers.layer_rules(model, *args, **kwargs)
  reals, rebuilt = transform.separate(params, transform.is_real)
  both = [lambda reals, of=of: call(of, rebuilt(reals)) for of in (model, twin)]
  # Programs of their own: here nothing depends on V, so not a bit may differ.
  problems = _differences(*(jax.jit(each)(reals) for each in both))
  _fail_if(problems, 'the output must be that of the plain model:')
  own, true = (
    rebuilt(jax.jit(jax.grad(lambda reals, f=each: loss(f(reals))))(reals))
    for each in both
  )
  problems = _differences(own, true)
  own, true = _by_path(own), _by_path(true)
  if not any(_count(g != 0) for g in true.values()):
    problems.append('all gradients are 0, which proves nothing')
  angles, lines = [], []
  for row in rows:
    angles.append(metrics.alignment_angle(true[row.path], own[row.path]))
    use = f'{row.use}, gradient at {angles[-1]:.4g}'
    lines.append(row._replace(use=use))
  return transform.format_table(lines).splitlines(), angles, problems


def _differences(actual: Any, expected: Any) -> list[str]:
  problems, expected = [], _by_path(expected)
  for path, value in _by_path(actual).items():
    # NaN differs from NaN here: values that are not finite prove nothing.
    if count := _count(value != expected[path]):
      largest = float(jnp.max(jnp.abs(value - expected[path])))
      numbers = f'{count} of {value.size} values differ, by up to {largest:.3g}'
      problems.append(f'{path or "value"}: {numbers}')
  return problems


def _by_path(tree: Any) -> dict[str, jax.Array]:
  """Arrays of any tree, with paths such as 'Dense_0/kernel'; '' for a leaf."""
  tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
  leaves = transform.by_path(tree).items()
  # Equinox keeps functions among the parameters.
  return {p: jnp.asarray(leaf) for p, leaf in leaves if not callable(leaf)}


def _count(condition: jax.Array) -> int:
  return int(jnp.sum(condition))


def _fail_if(problems: Sequence[str], title: str) -> None:
  if problems:
    raise AssertionError('\n  '.join([title, *problems]))
