"""Conditions, rules and networks of one's own, from a Python file.

A plugin is a Python file that defines any of these dictionaries::

  RULES = {'half': symjax_bp.rule(lambda w: 0.5 * w)}
  NETWORKS = {
    'small': (Full(lambda classes: 64), Full(lambda classes: classes))
  }
  CONDITIONS = {'half+BM': Condition(rule='half', batch_manhattan=1)}

A network is a sequence of layers (``experiments.training.models``), or a
function ``(classes, batch_norm)`` that returns a Flax module called with
``(x, train)``, whose last layer has the name ``output``. A run that uses a
plugin keeps its source in its configuration, and the source is a part of the
run's identity. Stored source is never executed.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.paper.conditions import Condition

__all__ = ['Plugin', 'load', 'read']

_KINDS = ('RULES', 'NETWORKS', 'CONDITIONS')


@dataclasses.dataclass(frozen=True)
class Plugin:
  """What a plugin defines, by name."""

  rules: Mapping[str, Any]
  networks: Mapping[str, Any]
  conditions: Mapping[str, Condition]

  def rule(self, name: str) -> Any:
    """The feedback rule of a name; its own come first."""
    from experiments.training.backward import rule_of

    return self.rules[name] if name in self.rules else rule_of(name)


@functools.lru_cache
def load(source: str) -> Plugin:
  """Executes the source of a plugin that the user named; '' defines nothing.

  Raises:
    ValueError: if it fails, or defines nothing.
  """
  names: dict[str, Any] = {}
  if source:
    try:
      exec(compile(source, '<plugin>', 'exec'), names)  # noqa: S102
    except Exception as error:
      raise ValueError(
        f'the plugin fails with {type(error).__name__}: {error}.'
      ) from error
  kinds = [names.get(kind, {}) for kind in _KINDS]
  for name, kind in zip(_KINDS, kinds, strict=True):
    if not isinstance(kind, Mapping):
      raise ValueError(
        f'{name} of the plugin is {kind!r}, but must be a dictionary by name.'
      )
  if source and not any(kinds):
    raise ValueError(
      f'the plugin defines none of the dictionaries {", ".join(_KINDS)}.'
    )
  for name, condition in kinds[2].items():
    if not isinstance(condition, Condition):
      raise ValueError(
        f'CONDITIONS[{name!r}] of the plugin is {condition!r}, but must be an '
        'experiments.paper.conditions.Condition.'
      )
  return Plugin(*kinds)


def read(path: Path | None) -> str:
  """The source of a plugin; '' without a path.

  Raises:
    ValueError: if the file cannot be read.
  """
  if path is None:
    return ''
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'plugin {path} cannot be read: {error}.') from error
