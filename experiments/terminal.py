"""The terminal: help, width, streams, errors and exit statuses of a program.

The help of an option without a default is ``--train-size INT``, not tyro's
``--train-size {None}|INT (default: None)``. Messages say `python -m
experiments`; ``as_typed`` turns it into the command that works for this user.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
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
    if getattr(sys, name) is None:  # the parent process closed it
      setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
    with contextlib.suppress(AttributeError):  # a test may replace it
      getattr(sys, name).reconfigure(errors='backslashreplace')
  try:
    status = app.cli(
      prog=as_typed(prog),
      description=description,
      config=(tyro.conf.OmitArgPrefixes,),
      registry=_REGISTRY,
    )
    sys.stdout.flush()
  except ValueError as error:  # also DatasetError, StoreError
    print(as_typed(f'error: {error}'), file=sys.stderr)
    status = 2
  except OSError as error:
    if not isinstance(error, BrokenPipeError):  # the reader, such as `head`
      print(as_typed(f'error: {error}'), file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 1
  except KeyboardInterrupt:
    print('stopped; finished runs are kept.', file=sys.stderr)
    status = 130
  sys.exit(status or 0)


def width() -> int:
  """Returns the number of characters in a line of the terminal, 40 to 160."""
  return max(40, min(shutil.get_terminal_size((120, 24)).columns, 160))


def say(text: str) -> None:
  """Prints a paragraph, wrapped between words."""
  print(_filled(text))


def print_table(
  rows: Iterable[Sequence[object]], head: Sequence[str] = ()
) -> None:
  """Prints aligned columns, of which the last one is wrapped.

  On a terminal that is too narrow, each row is its first cell and below it the
  other cells.
  """
  cells = [list(map(str, row)) for row in rows]
  *others, last = zip(*cells, strict=True)
  names = [*head] or [''] * (len(others) + 1)
  widths = [
    max(map(len, (name, *column)))
    for name, column in zip(names, others, strict=False)
  ]
  word = max(len(word) for cell in last for word in cell.split(' '))
  if sum(widths) + 2 * len(widths) + word > width():
    for first, *rest in cells:
      labels = [f'{name} {cell}'.strip() for name, cell in
                zip(names[1:], rest, strict=True)]  # fmt: skip
      print(first)
      print(_filled(', '.join(labels), ' ' * 6))
    return
  table = Table(box=None, show_header=bool(head), pad_edge=False)
  for name, column in zip(names, zip(*cells, strict=True), strict=True):
    numeric = head and all(cell[:1].isdigit() for cell in column)
    table.add_column(name, justify='right' if numeric else 'left')
  for row in cells:
    table.add_row(*map(Text, row))
  console = Console(width=width(), highlight=False)
  with console.capture() as captured:
    console.print(table)
  print('\n'.join(line.rstrip() for line in captured.get().splitlines()))


def _filled(text: str, indent: str = '') -> str:
  return textwrap.fill(
    text, width(), initial_indent=indent, subsequent_indent=indent,
    break_long_words=False, break_on_hyphens=False,
  )  # fmt: skip


def as_typed(text: str) -> str:
  """Replaces `python` and `pip` in commands by those of this environment.

  Without an activated environment, `python -m experiments` would be another
  interpreter, or none.
  """
  python = _python()
  if python == 'python':
    return text
  text = re.sub(r'\bpython -m experiments\b', f'{python} -m experiments', text)
  return re.sub(r'(?<!-m )\bpip install\b', f'{python} -m pip install', text)


def _python() -> str:
  """This interpreter, as a user types it in the current folder."""
  python = Path(sys.executable)
  for name in ('python', 'python3'):
    if shutil.which(name) == str(python):
      return name
  if python.is_relative_to(Path.cwd()):
    python = python.relative_to(Path.cwd())
  return shlex.quote(str(python))


@_REGISTRY.struct_rule
def _options(about: StructTypeInfo) -> Any:
  """Cleans the help of the options that tyro finds in a command."""
  if about.type in _in_progress:
    return None
  _in_progress.add(about.type)  # tyro's own rule answers the next question
  try:
    found = ConstructorRegistry.get_struct_spec(about)
  finally:
    _in_progress.discard(about.type)
  if not isinstance(found, StructConstructorSpec):
    return found
  return dataclasses.replace(found, fields=tuple(map(_cleaned, found.fields)))


def _cleaned(field: StructFieldSpec) -> StructFieldSpec:
  """Removes defaults of None and (), and braces, from the help of an option."""
  changes: dict[str, Any] = {}
  if field.default is None or field.default == ():
    changes['help_behavior_hint'] = ''
  if isinstance(field.type, types.UnionType):
    found = ConstructorRegistry.get_primitive_spec(
      PrimitiveTypeInfo.make(field.type, set())
    )
    if isinstance(found, PrimitiveConstructorSpec):
      names = found.metavar.removeprefix('{None}|').replace('{None,', '{')
      # From 'FLOAT|{[FLOAT [FLOAT ...]]}': several are one or more.
      names = re.sub(
        r'^(\w+)\|\{\[\1 \[\1 \.\.\.\]\]\}$', r'\1 [\1 ...]', names
      )
      changes['metavar'] = names
  if not changes:
    return field
  kind: Any = field.type
  config = tyro.conf.arg(**changes)
  return dataclasses.replace(field, type=Annotated[kind, config])
