"""The terminal: help, streams, errors and exit statuses of a program.

Help comes without the noise of options that are not set. An option whose
default is None or empty shows neither that default nor None as a value to type:
``--train-size INT`` and not ``--train-size {None}|INT (default: None)``.
"""

import contextlib
import dataclasses
import os
import sys
import types
import typing
from typing import Annotated, Any, NoReturn

import tyro
from tyro.constructors import (
  ConstructorRegistry,
  PrimitiveConstructorSpec,
  PrimitiveTypeInfo,
  StructConstructorSpec,
  StructFieldSpec,
  StructTypeInfo,
)

_REGISTRY = ConstructorRegistry()
_in_progress: set[Any] = set()


def run(
  app: tyro.extras.SubcommandApp, prog: str, description: str
) -> NoReturn:
  """Parses the command line, runs the command and exits.

  The exit status is what the command returns; 2 for invalid input, 1 if output
  fails, 130 after Ctrl-C.
  """
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed by who started the program
      setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
    with contextlib.suppress(AttributeError):  # a test may replace it
      getattr(sys, name).reconfigure(errors='backslashreplace')
  try:
    status = app.cli(
      prog=prog,
      description=description,
      config=(tyro.conf.OmitArgPrefixes,),
      registry=_REGISTRY,
    )
    sys.stdout.flush()
  except ValueError as error:  # DatasetError and StoreError are of that kind
    print(f'error: {error}', file=sys.stderr)
    status = 2
  except OSError as error:
    if not isinstance(error, BrokenPipeError):  # the reader, such as `head`
      print(f'error: {error}', file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
  except KeyboardInterrupt:
    print('stopped; finished runs are kept.', file=sys.stderr)
    status = 130
  sys.exit(status or 0)


@_REGISTRY.struct_rule
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
