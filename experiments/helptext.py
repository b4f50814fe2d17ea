"""Help without the noise of options that are not set.

An option whose default is None or empty shows neither that default nor None as
a value to type: ``--train-size INT`` and not ``--train-size {None}|INT
(default: None)``.
"""

import dataclasses
import types
import typing
from typing import Annotated, Any

import tyro
from tyro.constructors import (
  ConstructorRegistry,
  PrimitiveConstructorSpec,
  PrimitiveTypeInfo,
  StructConstructorSpec,
  StructFieldSpec,
  StructTypeInfo,
)

REGISTRY = ConstructorRegistry()
_in_progress: set[Any] = set()


@REGISTRY.struct_rule
def _options(about: StructTypeInfo) -> Any:
  """Changes what tyro's own rule says of a dataclass of options."""
  if about.type in _in_progress or not dataclasses.is_dataclass(about.type):
    return None
  _in_progress.add(about.type)  # so that this rule gives way to tyro's
  try:
    found = ConstructorRegistry.get_struct_spec(about)
  finally:
    _in_progress.discard(about.type)
  if not isinstance(found, StructConstructorSpec):
    return found
  return dataclasses.replace(found, fields=tuple(map(_quiet, found.fields)))


def _quiet(field: StructFieldSpec) -> StructFieldSpec:
  if field.default not in (None, ()):
    return field
  config = tyro.conf.arg(help_behavior_hint='', metavar=_metavar(field.type))
  kind: Any = field.type
  return dataclasses.replace(field, type=Annotated[kind, config])


def _metavar(kind: Any) -> str | None:
  """Of the kind without None; None keeps tyro's."""
  kinds = {*typing.get_args(kind)} - {types.NoneType}
  if not isinstance(kind, types.UnionType) or len(kinds) != 1:
    return None
  info = PrimitiveTypeInfo.make(kinds.pop(), set())
  found = ConstructorRegistry.get_primitive_spec(info)
  return found.metavar if isinstance(found, PrimitiveConstructorSpec) else None
