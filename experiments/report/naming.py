"""Names that mean the same condition, and numbers of things in words."""

import dataclasses
import functools
from collections.abc import Mapping

from experiments.paper.conditions import CONDITIONS, Condition


def counted(number: int, noun: str) -> str:
  """Such as '1 run' and '2 runs'."""
  return f'{number} {noun}' + ('' if number == 1 else 's')


def words(value: object) -> list[str]:
  """A value of a protocol as words of a command, one for each of a list."""
  return [*map(str, value)] if isinstance(value, list) else [str(value)]


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
