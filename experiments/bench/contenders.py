"""What is measured: programs that make training steps, taking turns."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Pools of threads go on spinning for a while after their work and would take
# the cores from the next program.
_REST = 0.02  # seconds
_UNMEASURED = 2  # rounds; memory has to be mapped, caches have to fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
  """A program of which a call is a whole step.

  Attributes:
    name: what the tables call it.
    step: makes a step and waits for its end.
    variant: tells contenders of one name apart, of which the fastest counts.
    compile_seconds: what tracing and compiling took, where that is done.
    bytes: memory that a step needs at its peak, where that is known.
    draw_bytes: the part of it that stored random draws take.
  """

  name: str
  step: Callable[[], Any]
  variant: str = ''
  compile_seconds: float | None = None
  bytes: int | None = None
  draw_bytes: int = 0


def check_steps(steps: int) -> None:
  """Raises unless there is something to measure.

  Raises:
    ValueError: if ``steps`` is no positive number.
  """
  if steps < 1:
    raise ValueError(f'steps must be at least 1, not {steps}.')


def take_turns(
  contenders: Sequence[Contender], steps: int, seconds: float
) -> np.ndarray:
  """Seconds of every step, (rounds, contenders).

  In each round every contender makes two steps, in an order of that round: what
  else the machine does falls on all. The second step is measured, for training
  makes steps in a row: the first finds another's arrays in the caches and the
  threads asleep.

  Args:
    contenders: what is measured.
    steps: the least number of rounds.
    seconds: go on with rounds for so long.
  """
  random = np.random.default_rng(0)
  rounds: list[np.ndarray] = []
  began = time.perf_counter()
  while (
    len(rounds) < steps + _UNMEASURED or time.perf_counter() - began < seconds
  ):
    times = np.zeros(len(contenders))
    for at in random.permutation(len(contenders)):
      time.sleep(_REST)
      contenders[at].step()
      start = time.perf_counter()
      contenders[at].step()
      times[at] = time.perf_counter() - start
    rounds.append(times)
  return np.array(rounds[_UNMEASURED:])
