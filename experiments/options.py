"""Groups of options that several commands have: which runs, how, and where.

Nothing here imports JAX.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiments.paper.protocol import RATES, Protocol, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """Which cells of the grid.

  Attributes:
    table: tables of the paper (2, 3, 4-C1, 4-C2, 5, 6); all their conditions.
      4 is both halves.
    condition: conditions by name, such as uSF+BN or frSF-10%+BN+BM.
    dataset: datasets by name, such as mnist; see `list`.
    rate: multiples of the base rate.
    seed: seeds; several give means and intervals.
    data_dir: folder with NAME.npz files or image folders.
  """

  table: tuple[str, ...] = ()
  condition: tuple[str, ...] = ()
  dataset: tuple[str, ...] = ('digits',)
  rate: tuple[float, ...] = RATES
  seed: tuple[int, ...] = (0,)
  data_dir: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolOptions(Protocol):
  """What is common to all runs of a comparison."""

  def __post_init__(self):
    """Checks nothing: `checked` does, so that its message is the program's."""

  def checked(self) -> Protocol:
    """The protocol.

    Raises:
      ValueError: if a number is out of its range.
    """
    return Protocol(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
  """Several processes that do the runs together, usually one a host.

  Attributes:
    coordinator: HOST:PORT of process 0, the same for all processes.
    process_id: number of this process, from 0.
    process_count: number of all processes.
    distributed: find the other processes by Slurm, Open MPI or the TPU.
  """

  coordinator: str | None = None
  process_id: int | None = None
  process_count: int | None = None
  distributed: bool = False

  def several(self) -> bool:
    """Whether there are other processes.

    Raises:
      ValueError: if the options don't say where they are.
    """
    named = (self.coordinator, self.process_id, self.process_count)
    if self.distributed or named == (None, None, None):
      return self.distributed
    host, _, port = (self.coordinator or '').rpartition(':')
    if not (host and port.isdigit()):
      raise ValueError(
        f'coordinator is {self.coordinator!r}, but must be HOST:PORT where '
        'process 0 can be reached.'
      )
    if self.process_count is None or self.process_count < 1:
      raise ValueError(
        f'process_count is {self.process_count}, but must be the number of '
        'processes, at least 1.'
      )
    if self.process_id is None or not (
      0 <= self.process_id < self.process_count
    ):
      raise ValueError(
        f'process_id is {self.process_id}, but must be from 0 to '
        f'{self.process_count - 1}, another for every process.'
      )
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """Where and how runs are carried out.

  Attributes:
    executor: this process, one worker process for each part of this host, or
      Ray tasks.
    workers: number of worker processes (default: one for each accelerator, or
      else each core).
    devices: of this process, over which mini-batches are divided (default: as
      many accelerators as divide them; one CPU).
    together: how many runs that differ in rate or seed only this process trains
      as one program (default: up to 32 on a single accelerator, else 1).
    ray_address: of a Ray cluster (default: one is started on this host).
    cpus_per_run: that a Ray task asks for (default: 1).
    gpus_per_run: that a Ray task asks for (default: 0).
    shard: I/N, the I-th of N equal parts of the runs, such as 1/4.
    retries: how often a run that fails is tried again; then its error is
      recorded, and the others go on.
    lease: seconds without a sign of life after which a run may be taken over
      from another process.
    scan: compile a whole epoch as one loop (default: not on a CPU).
    checkpoint_share: share of a run's time that checkpoints may take; 1 writes
      one after every epoch.
  """

  executor: Literal['local', 'processes', 'ray'] = 'local'
  workers: int | None = None
  devices: int | None = None
  together: int | None = None
  ray_address: str | None = None
  cpus_per_run: float | None = None
  gpus_per_run: float | None = None
  shard: str | None = None
  retries: int = 2
  lease: float = 120.0
  scan: bool | None = None
  checkpoint_share: float = 0.03

  def check(self) -> None:
    """Checks what no type says.

    Raises:
      ValueError: if a number is out of its range.
    """
    for name, allowed, holds in (
      ('workers', 'positive', self.workers is None or self.workers > 0),
      ('together', 'positive', self.together is None or self.together > 0),
      ('cpus_per_run', 'at least 0', (self.cpus_per_run or 0) >= 0),
      ('gpus_per_run', 'at least 0', (self.gpus_per_run or 0) >= 0),
      ('retries', 'at least 0', self.retries >= 0),
      ('lease', 'from 1 to a million seconds', 1 <= self.lease <= 1e6),
      ('checkpoint_share', 'in [0, 1]', 0 <= self.checkpoint_share <= 1),
    ):
      if not holds:
        value = getattr(self, name)
        raise ValueError(f'{name} must be {allowed}, not {value!r}.')
    for name, executor in (
      ('workers', 'processes'),
      ('ray_address', 'ray'),
      ('cpus_per_run', 'ray'),
      ('gpus_per_run', 'ray'),
    ):
      value = getattr(self, name)
      if value is not None and self.executor != executor:
        raise ValueError(
          f'{name} is {value!r}, but only --executor {executor} has it: add '
          f'that, or leave out --{name.replace("_", "-")}.'
        )
    if self.devices is not None and self.executor != 'local':
      raise ValueError(
        f'devices is {self.devices}, but only --executor local divides '
        f'mini-batches; with {self.executor} every run has one device.'
      )
    if (self.together or 1) > 1 and self.executor != 'local':
      raise ValueError(
        f'together is {self.together}, but only --executor local trains '
        f'several runs as one program; with {self.executor} it must be 1.'
      )

  def part_of(self, runs: Sequence[Run]) -> Sequence[Run]:
    """The shard of the runs.

    Raises:
      ValueError: if the shard is none.
    """
    if self.shard is None:
      return runs
    found = re.fullmatch(r'(\d+)/(\d+)', self.shard)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
      raise ValueError(
        f'shard must be I/N with I from 1 to N, such as 1/4, not '
        f'{self.shard!r}.'
      )
    return runs[part - 1 :: parts]
