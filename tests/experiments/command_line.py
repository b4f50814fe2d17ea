"""Calls a program in this process, or Python in another."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest

import experiments
from experiments.training import machine

ROOT = Path(experiments.__file__).parents[1]


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


def python(
  program: str, *arguments: object, env: Mapping[str, str] | None = None
) -> str:
  """The output of a program, given as text; it must not fail, nor warn."""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', program, *map(str, arguments)],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout
