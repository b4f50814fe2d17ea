"""Step time against batch, width and depth, on networks of one family."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.contenders import Contender, take_turns
from experiments.bench.in_jax import compiled, repeated
from experiments.bench.results import FLAX
from symjax_bp import from_name, linen, optim

AXES: Mapping[str, Sequence[int]] = {
  'batch': (10, 25, 50, 100, 200),
  'width': (4, 8, 16, 32, 64),
  'depth': (1, 2, 4, 8, 16),
}
_RULES = ('uSF', 'brSF')
_SIZE, _CLASSES = 16, 10


class _Network(nn.Module):
  """``depth`` convolutions of ``width`` features, in plain Flax."""

  width: int
  depth: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(self.depth):
      x = nn.relu(nn.Conv(self.width, (3, 3))(x))
    return nn.Dense(_CLASSES)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
  """A network of the family and the size of its mini-batches."""

  batch: int = 50
  width: int = 32
  depth: int = 4


def step_times(
  axes: Mapping[str, Sequence[int]], steps: int
) -> Iterator[dict[str, Any]]:
  """Median seconds of a step of each program, one member after the other.

  Args:
    axes: fields of ``Member`` and the values each of them takes in turn.
    steps: measured steps of each program.
  """
  for axis, values in axes.items():
    for value in values:
      member = Member(**{axis: value})
      contenders = [_contender(member, rule) for rule in (None, *_RULES)]
      medians = np.median(take_turns(contenders, steps, 0), 0)
      names = [contender.name for contender in contenders]
      yield {
        'axis': axis,
        **dataclasses.asdict(member),
        'seconds': dict(zip(names, map(float, medians), strict=True)),
      }


def _contender(member: Member, rule: str | None) -> Contender:
  """A training step under a rule, or of plain Flax."""
  model: nn.Module = _Network(member.width, member.depth)
  if rule is not None:
    model = linen.with_feedback(model, from_name(rule))
  x = jax.random.normal(jax.random.key(0), (member.batch, _SIZE, _SIZE, 3))
  y = jnp.arange(member.batch) % _CLASSES
  optimizer = optim.sgd(0.0, momentum=0.9, weight_decay=5e-4)
  variables: Any = jax.jit(model.init)(jax.random.key(1), x)
  params = variables['params']

  def step(state):
    params, optimizer_state = state

    def loss(params):
      logits: Any = model.apply({**variables, 'params': params}, x)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean()

    updates, optimizer_state = optimizer.update(
      jax.grad(loss)(params), optimizer_state, params
    )
    return optax.apply_updates(params, updates), optimizer_state

  state = params, optimizer.init(params)
  program, seconds = compiled(jax.jit(step, donate_argnums=0), state)
  return Contender(
    name=rule or FLAX, step=repeated(program, state), compile_seconds=seconds
  )
