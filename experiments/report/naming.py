"""Which columns a run belongs to: the store knows contents, not names."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping

from experiments.conditions import (
  BATCH_100,
  CONDITIONS,
  BatchPlan,
  Condition,
)
from experiments.report.runs import Run


def _content(thing: Condition | Run, plan: BatchPlan) -> tuple:
  return (
    thing.rule, thing.batch_manhattan, thing.batch_norm, thing.frozen, plan,
  )  # fmt: skip


@functools.cache
def _index() -> Mapping[tuple, tuple[str, ...]]:
  index = defaultdict(list)
  for name, condition in CONDITIONS.items():
    for plan in condition.batch_plans:
      index[_content(condition, plan)].append(name)
  return {key: tuple(names) for key, names in index.items()}


def plans(name: str) -> int:
  """How many batch plans the condition's result is the best of."""
  return len(CONDITIONS[name].batch_plans) if name in CONDITIONS else 1


def same(name: str) -> Condition | str:
  """Equal for names of the same condition, such as BM, BM1 and BM-100."""
  if name not in CONDITIONS:
    return name
  return dataclasses.replace(CONDITIONS[name], name='')


@functools.cache
def _first_names() -> Mapping[Condition | str, str]:
  return {same(name): name for name in reversed(CONDITIONS)}


def first_name(name: str) -> str:
  """The first of a condition's names, in the order of the tables."""
  return _first_names().get(same(name), name)


def condition_names(run: Run) -> tuple[str, ...]:
  """Every column the run belongs to; one that is no column gets a name."""
  return _index().get(_content(run, run.batch_plan)) or (_free_name(run),)


def _free_name(run: Run) -> str:
  """Reads as the paper's names do, and is none of them."""
  symmetric = run.rule == 'BP'
  plain = 'SGD' if run.batch_norm == 'plain' else ''
  rule = plain if symmetric else run.rule
  norm = {'none': '', 'plain': 'BN', 'affine': 'BN(affine)'}.get(
    run.batch_norm, run.batch_norm
  )
  setting = run.batch_manhattan
  update = f'BM{"" if setting == 1 else setting}' if setting else ''
  name = '+'.join(part for part in (rule, norm, update) if part) or 'SGD'
  if run.batch_plan != BATCH_100:
    name += ' batch ' + ', then '.join(
      str(size) + (f' for {epochs} epochs' if epochs else '')
      for epochs, size in run.batch_plan
    )
  suffix = {'nothing': '', 'last layer': ' Bottom', 'before last layer': ' Top'}
  return name + suffix.get(run.frozen, f' {run.frozen}')
