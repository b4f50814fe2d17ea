"""Plugins: conditions, rules and networks of a user, from a Python file.

A plugin is a Python file that defines any of these dictionaries::

  RULES = {'half': symjax_bp.rule(lambda w: 0.5 * w)}
  NETWORKS = {
    'small': (Full(lambda classes: 64), Full(lambda classes: classes))
  }
  CONDITIONS = {'mine': Condition(rule='half', batch_norm='affine')}

A rule is used like the paper's: ``half``, ``half+BN+BM``. It is a
``symjax_bp.FeedbackRule`` or an ``experiments.training.backward.Direct``. A
condition needs an entry only for what such a name cannot say. A network is a
sequence of layers (``experiments.training.models``), or a function
``(classes, batch_norm)`` that returns a Flax module. The module is called with
``(x, train)``, and its last layer is named ``output``. A run that uses a plugin
keeps its source in its configuration, and the source is a part of the run's
identity. Stored source is never executed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.paper.conditions import Condition, problems_of_name

__all__ = ['Plugin', 'load', 'read']

_KINDS = ('RULES', 'NETWORKS', 'CONDITIONS')


@dataclasses.dataclass(frozen=True)
class Plugin:
  """The definitions of a plugin by name."""

  rules: Mapping[str, Any]
  networks: Mapping[str, Any]
  conditions: Mapping[str, Condition]

  def rule(self, name: str) -> Any:
    """Returns the rule of that name: the plugin's, or else the paper's."""
    from experiments.training.backward import rule_of

    return self.rules[name] if name in self.rules else rule_of(name)


@functools.lru_cache
def load(source: str) -> Plugin:
  """Executes the source of a plugin; '' defines nothing.

  Call it only with source that the user has named.

  Raises:
    ValueError: the source fails, defines nothing, or an entry is none.
  """
  names: dict[str, Any] = {}
  if source:
    try:
      exec(compile(source, '<plugin>', 'exec'), names)  # noqa: S102
    except Exception as error:
      raise ValueError(
        f'the plugin fails with {type(error).__name__}: {error}.'
      ) from error
  kinds = {name: names.get(name, {}) for name in _KINDS}
  for name, kind in kinds.items():
    if not isinstance(kind, Mapping) or not all(
      isinstance(key, str) for key in kind
    ):
      raise ValueError(
        f'{name} of the plugin is {kind!r}, but must be a dictionary with '
        'names as keys.'
      )
  if source and not any(kinds.values()):
    raise ValueError(
      f'the plugin defines none of the dictionaries {", ".join(_KINDS)}.'
    )
  for name, kind in kinds.items():
    for key, value in kind.items():
      for problem in _problems(name, key, value, kinds['RULES']):
        raise ValueError(f'{name}[{key!r}] of the plugin {problem}.')
  return Plugin(*kinds.values())


def _problems(
  kind: str, name: str, value: Any, rules: Mapping[str, Any]
) -> Iterator[str]:
  """What is wrong with an entry of a plugin, the first thing first."""
  if kind == 'CONDITIONS':
    if not isinstance(value, Condition):
      yield (
        f'is {value!r}, but must be an experiments.paper.conditions.Condition'
      )
    else:
      yield from value.problems(rules)
  elif kind == 'RULES':
    from experiments.training.backward import Direct
    from symjax_bp import FeedbackRule

    if not isinstance(value, FeedbackRule | Direct):
      yield (
        f'is {value!r}, but must be a symjax_bp.FeedbackRule, such as '
        'symjax_bp.rule(function of W), or an '
        'experiments.training.backward.Direct'
      )
    yield from problems_of_name(name, rules)
  elif not callable(value):
    from experiments.training.models import Conv, Full, Pool

    layers = value if isinstance(value, Sequence) else [value]
    if not layers or not all(isinstance(e, Conv | Pool | Full) for e in layers):
      yield (
        f'is {value!r}, but must be a sequence of layers '
        '(experiments.training.models), or a function (classes, batch_norm) '
        'that returns a Flax module'
      )


def read(path: Path | None) -> str:
  """Returns the source of a plugin; '' without a path.

  Raises:
    ValueError: the file cannot be read.
  """
  if path is None:
    return ''
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'plugin {path} cannot be read: {error}.') from error
