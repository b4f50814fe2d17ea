"""Where a dataset is: npz file, image folder, or folder prepared by TFDS."""

import os
from pathlib import Path

from experiments.datasets import (
  archives,
  embedded,
  folder,
  names,
  npz,
  prepared,
)
from experiments.datasets.errors import DatasetError
from experiments.datasets.raw import Source
from experiments.datasets.spec import Spec


def locate(
  name: str, data_dir: str | os.PathLike[str] | None, seed: int
) -> Source:
  """The source of a dataset, in the order that `load` documents.

  Raises:
    DatasetError: the dataset is nowhere, or what is there is not one.
  """
  source = find_source(name, data_dir, seed)
  if source is None:
    raise DatasetError(missing(names.find(name), data_dir))
  return source


def find_source(
  name: str, data_dir: str | os.PathLike[str] | None, seed: int
) -> Source | None:
  """As `locate`, but None where there is nothing."""
  spec = names.find(name)
  if spec.source == 'embedded':
    return embedded.source(spec, seed)
  if data_dir is not None:
    path = _own(_checked(data_dir, spec), name, spec)
    if path is not None and path.is_dir():
      return folder.source(path)
    if path is not None:
      return npz.source(path, spec)
  for root in prepared.roots(data_dir):
    if (path := prepared.version_folder(root, spec)) is not None:
      return prepared.source(path, spec, seed)
  return None


def missing(spec: Spec, data_dir: str | os.PathLike[str] | None) -> str:
  """What was looked for in vain, and how to get it."""
  alias = spec.aliases[0]
  where = f'in {data_dir}' if data_dir is not None else '(no data_dir is given)'
  text = (
    f'{spec.name} was not found {where}: neither {alias}.npz nor {alias}/train '
    'nor a prepared folder. '
  )
  for root in prepared.roots(data_dir):
    for path in prepared.unfinished(root, spec):
      text += f'The unfinished preparation in {path} is not used. '
  run = f'`python -m experiments data prepare {spec.name}`'
  if spec.source == 'download':
    return f'{text}Run {run}'
  manual_dir = prepared.manual_dir(prepared.roots(data_dir)[0])
  steps = archives.instructions(spec.builder, manual_dir)
  return f'{text}First {steps}, then run {run}'


def _checked(data_dir: str | os.PathLike[str], spec: Spec) -> Path:
  root = Path(data_dir)
  if not root.is_dir():
    raise DatasetError(
      f'data_dir {str(root)!r} is not a folder; name the folder that holds '
      f'{spec.aliases[0]}.npz or {spec.aliases[0]}/train'
    )
  return root


def _own(root: Path, name: str, spec: Spec) -> Path | None:
  """The npz file or image folder of a dataset, by the first name that fits."""
  entries = {names.plain(path.name): path for path in sorted(root.iterdir())}
  candidates = [names.plain(key) for key in (name, *spec.aliases)]
  for candidate in dict.fromkeys(candidates):
    if (path := entries.get(f'{candidate}.npz')) is not None:
      return path
    path = entries.get(candidate)
    if path is not None and path.is_dir() and not prepared.is_tfds(path):
      return path
  return None
