"""Calls a program in this process."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import NoReturn
from unittest import mock

import pytest

from experiments.training import machine


def call(
  program: Callable[[], NoReturn], *arguments: object
) -> tuple[object, str, str]:
  """The exit status, output and errors; the settings of JAX stay."""
  output, errors = io.StringIO(), io.StringIO()
  with (
    mock.patch.object(sys, 'argv', ['program', *map(str, arguments)]),
    mock.patch.object(machine, 'configure', lambda devices=None: []),
    contextlib.redirect_stdout(output),
    contextlib.redirect_stderr(errors),
    pytest.raises(SystemExit) as end,
  ):
    program()
  return end.value.code, output.getvalue(), errors.getvalue()
