"""What is said between who keeps the store and who trains.

The driver hands a `Task` out and gets events back, in this process, from
another one, or from another host. Needs no JAX.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.datasets import Dataset
from experiments.paper.protocol import Run

Arrays = Mapping[str, np.ndarray]  # a state's, by their places in it
Load = Callable[[Run], Dataset]


@dataclasses.dataclass(frozen=True)
class Settings:
  """How runs are carried out; equal ones share what a process keeps.

  Attributes:
    load: gives the dataset of a run.
    scan: as for ``train.epochs``.
    checkpoint_share: of a run's time that checkpoints may take; 1 wants one
      after every epoch.
    mesh: devices to divide mini-batches over, a ``jax.sharding.Mesh``; None is
      the default device.
  """

  load: Load
  scan: bool | None
  checkpoint_share: float
  mesh: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
  """A run to be carried out, from where it was interrupted.

  Attributes:
    run: what to do.
    lines: of metrics, of the epochs that are done.
    state: after them; None before the first.
  """

  run: Run
  lines: tuple[dict[str, Any], ...] = ()
  state: Arrays | None = None


@dataclasses.dataclass(frozen=True)
class Epoch:
  """An epoch is done; ``state`` is there if it is time for a checkpoint."""

  line: dict[str, Any]
  state: Arrays | None = None


@dataclasses.dataclass(frozen=True)
class Stopped:
  """Stopped as asked; ``state`` is that after ``epoch`` if not yet told."""

  epoch: int = 0
  state: Arrays | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
  """The run has its result, and this is what it ran on in the end."""

  result: dict[str, Any]
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unfit:
  """The state of the task is of other arrays than the run has."""

  why: str


@dataclasses.dataclass(frozen=True)
class Failed:
  """The run, or the process at it, has come to an end without a result.

  Attributes:
    error: why, in words.
    of_group: whether it was trained with others, and so may not be the cause.
  """

  error: str
  of_group: bool = False


Event = Epoch | Stopped | Finished | Unfit | Failed
