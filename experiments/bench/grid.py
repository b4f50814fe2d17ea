"""The speed-up of a grid of 16 runs with two workers, each on one core.

``python -m experiments.bench.grid``; both are timed in turn, so that what else
the machine does meets both. The processors' seconds tell what two workers cost
more than one, whatever else the machine does.
"""

import resource
import statistics
import tempfile
import time

import tyro

from experiments import processes, runner
from experiments.options import Selection
from experiments.paper.protocol import Protocol
from experiments.progress import reporter
from experiments.runs.store import Store
from experiments.selection import Loader, selected_runs
from experiments.tasks import Settings
from experiments.training import backend


def measure(repeats: int = 3, epochs: int = 20) -> None:
  """Prints seconds and their ratio; what is compiled is cached before.

  Args:
    repeats: of each of both.
    epochs: of each run, on the embedded digits.
  """
  backend.configure()
  selection = Selection(
    condition=('SGD', 'uSF+BN'), rate=(1.0, 10.0), seed=(0, 1, 2, 3)
  )
  runs = selected_runs(selection, Protocol(epochs=epochs))
  settings = Settings(Loader(None), None, 0.03)
  places = processes.places(2)

  def seconds(workers: int) -> tuple[float, float]:
    """Of the clock, and of the processors in the workers."""
    with tempfile.TemporaryDirectory() as folder, reporter(16) as listener:
      store = Store(folder)
      store.create()
      executor = processes.Processes(settings, places[:workers])
      used, began = _used(), time.perf_counter()
      runner.carry_out(runs, store, executor, listener)
      return time.perf_counter() - began, _used() - used

  seconds(1)
  ratios = []
  for _ in range(repeats):
    (one, used_by_one), (two, used_by_two) = seconds(1), seconds(2)
    ratios.append(one / two)
    print(
      f'1 worker {one:.1f} s (processor {used_by_one:.1f} s), 2 workers '
      f'{two:.1f} s (processors {used_by_two:.1f} s): {ratios[-1]:.2f}',
      flush=True,
    )
  print(f'{len(runs)} runs, median speed-up {statistics.median(ratios):.2f}')


def _used() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


if __name__ == '__main__':
  tyro.cli(measure)
