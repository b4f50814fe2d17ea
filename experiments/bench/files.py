"""What a measurement leaves: JSON, a picture, and Markdown."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.plots import Picture
from experiments.runs import files
from experiments.training import machine


def folder(out: Path) -> Path:
  """Makes the folder before anything is measured.

  Raises:
    ValueError: if that is not possible.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'out must be a folder, or a path where one can be made, not {out}: '
      f'{error.strerror}.'
    ) from error
  return out


def write(
  out: Path, measured: Mapping[str, Any], picture: Picture, markdown: str
) -> list[Path]:
  """Writes the files, named as the picture is.

  Args:
    out: the folder.
    measured: what JSON is to have besides the machine.
    picture: its two forms.
    markdown: what comes after the machine.
  """
  about = machine.described()
  lines = '\n'.join(f'{name}: {value}' for name, value in about.items())
  bodies = {
    'json': json.dumps({'machine': about, **measured}, indent=1).encode(),
    'md': f'```\n{lines}\n```\n\n{markdown}\n'.encode(),
    'svg': picture.svg,
    'png': picture.png,
  }
  return [
    files.write_whole(out / f'{picture.name}.{kind}', body)
    for kind, body in bodies.items()
  ]
