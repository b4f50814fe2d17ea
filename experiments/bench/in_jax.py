"""Training steps as ``run`` makes them, with feedback and without."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.contenders import Contender
from experiments.bench.results import FLAX, PRODUCT
from experiments.bench.workload import PROTOCOL, RATE, Workload
from experiments.paper import conditions
from experiments.paper import protocol as grid
from experiments.paper.protocol import Run
from experiments.training.placement import Images, Parts, Placed
from experiments.training.program import Setup, program

_PRODUCT = 2048  # rows and columns
PRODUCT_FLOPS = 2 * _PRODUCT**3


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
  """A jitted function, compiled for arguments, and the seconds that took."""
  began = time.perf_counter()
  program = function.lower(*arguments).compile()
  return program, time.perf_counter() - began


def peak_bytes(program: Any) -> int:
  """Memory that a compiled program needs: its own, arguments and results."""
  memory = program.memory_analysis()
  return (
    memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def repeated(step: Callable[[Any], Any], state: Any) -> Callable[[], None]:
  """A step that keeps its state and waits for its end."""

  def make_step() -> None:
    nonlocal state
    state = jax.block_until_ready(step(state))

  return make_step


def contender(workload: Workload, rule: str | None) -> Contender:
  """The program of a rule; of Flax's own layers without one."""
  x, y = workload.data()
  images = Images(jnp.asarray(x), jnp.asarray(y))
  placed = Placed(
    architecture=workload.architecture,
    classes=workload.classes,
    parts=Parts(images, images, jnp.asarray(x.mean(0, dtype=np.float32))),
    trained=np.arange(len(y)),
    held_out=np.arange(0),
  )
  setup = dataclasses.replace(Setup.of(_run(workload, rule), placed), rule=rule)
  functions = program(setup)
  indices, rate = workload.indices(), np.float32(RATE)
  state = functions.initialize(jax.random.key(0))
  draws = sum(draw.nbytes for draw in jax.tree.leaves(state['feedback']))
  step, seconds = compiled(
    functions.step, state, placed.parts, next(indices), rate
  )
  return Contender(
    name=rule or FLAX,
    step=repeated(
      lambda state: step(state, placed.parts, next(indices), rate)[0],
      state,
    ),
    compile_seconds=seconds,
    bytes=peak_bytes(step),
    draw_bytes=draws,
  )


def _run(workload: Workload, rule: str | None) -> Run:
  """What ``run`` would be asked for."""
  norm = '' if workload.batch_norm == 'none' else '+BN'
  (run,) = grid.runs_of(
    conditions.find(f'{rule or "BP"}{norm}'),
    (1.0,),
    (0,),
    dataset=workload.architecture,
    digest='',
    source='made by bench',
    note='',
    protocol=PROTOCOL,
  )
  return run


def product() -> Contender:
  """A product of two matrices in float32: what the machine can do."""
  matrix = jax.random.normal(jax.random.key(0), (_PRODUCT, _PRODUCT))
  step, seconds = compiled(jax.jit(jnp.matmul), matrix, matrix)
  return Contender(
    name=PRODUCT,
    step=repeated(lambda _: step(matrix, matrix), None),
    compile_seconds=seconds,
  )
