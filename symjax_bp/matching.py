"""Paths: which layer of a model gets which rule, and what lies where."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from symjax_bp.feedback import FeedbackRule


def check_rule(argument: str, rule: Any) -> None:
  """Raises TypeError unless ``rule`` is a feedback rule."""
  if not isinstance(rule, FeedbackRule):
    raise TypeError(
      f'{argument} must be a feedback rule such as symjax_bp.usf() or '
      f"symjax_bp.from_name('uSF'), not {rule!r}."
    )


@dataclasses.dataclass(frozen=True)
class Patterns:
  """Rules by path, first match wins, and what to leave alone.

  Attributes:
    rules: pairs (regular expression, rule).
    exclude: regular expressions.
  """

  rules: tuple[tuple[str, FeedbackRule], ...]
  exclude: tuple[str, ...]

  @classmethod
  def create(
    cls,
    rule: FeedbackRule | Mapping[str, FeedbackRule],
    exclude: str | Sequence[str],
  ) -> 'Patterns':
    """Checks what a user gave; a single rule is for every path."""
    rules = rule if isinstance(rule, Mapping) else {'': rule}
    if not rules:
      raise ValueError('rule must not be an empty mapping.')
    for pattern, each in rules.items():
      name = f'rule[{pattern!r}]' if isinstance(rule, Mapping) else 'rule'
      check_rule(name, each)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    for pattern in (*rules, *exclude):
      try:
        re.compile(pattern)
      except (re.error, TypeError) as error:
        raise ValueError(
          f'{pattern!r} is not a regular expression: {error}.'
        ) from error
    return cls(tuple(rules.items()), exclude)

  def excluded(self, path: str) -> bool:
    """Whether the layer or parameter is to be left alone."""
    return any(re.search(pattern, path) for pattern in self.exclude)

  def rule(self, path: str) -> FeedbackRule:
    """The rule of the first expression found in the path of a layer."""
    for pattern, rule in self.rules:
      if re.search(pattern, path):
        return rule
    raise ValueError(
      f'layer {path!r} matches none of {[p for p, _ in self.rules]}: add '
      f"'.*': symmetric() for plain backpropagation in all other layers, or "
      f'exclude it.'
    )

  def check_used(
    self, paths: Iterable[str], others: Iterable[str] = ()
  ) -> None:
    """Raises if an expression matches none of the paths of a model.

    Args:
      paths: of layers and modules.
      others: paths that can be excluded, but get no rule.
    """
    paths = sorted(paths)
    excluded = *paths, *others
    for patterns, known in (
      ((pattern for pattern, _ in self.rules), paths),
      (self.exclude, excluded),
    ):
      for pattern in patterns:
        if not any(re.search(pattern, path) for path in known):
          raise ValueError(
            f'{pattern!r} matches nothing in the model; its paths are {paths}.'
          )


def rule_table(
  rows: Mapping[str, tuple[tuple[int, ...], FeedbackRule | None]],
) -> str:
  """Text of {path: (shape, rule or None for plain backpropagation)}."""
  cells = [('layer', 'shape', 'feedback')]
  for path, (shape, rule) in rows.items():
    cells.append((path, str(shape), str(rule or 'plain backpropagation')))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = ('  '.join(map(str.ljust, row, widths)).rstrip() for row in cells)
  return '\n'.join(lines)


def has_arrays(tree: Any) -> bool:
  """Whether an argument is traced, being an array or a tree of some."""
  return any(hasattr(leaf, 'dtype') for leaf in jax.tree.leaves(tree))


def _unboxed(leaf: Any) -> Any:
  if isinstance(leaf, meta.Partitioned):
    return leaf.unbox(apply_constraint=False)
  return meta.unbox(leaf)


def joined(module: str, name: str) -> str:
  """The path of what a module has; '' is the model, or the leaf, itself."""
  return f'{module}/{name}'.strip('/')


def by_path(tree: Any) -> dict[tuple[str, str], Any]:
  """Leaves of a tree of variables by (module path, name), without boxes."""
  leaves = {}
  tree = jax.tree.map(
    _unboxed, tree, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)
  )
  for path, leaf in jax.tree.leaves_with_path(tree):
    names = jax.tree_util.keystr(path, simple=True, separator='/')
    module, _, name = names.rpartition('/')
    leaves[module, name] = leaf
  return leaves
