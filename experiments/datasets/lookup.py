"""Where a dataset is: npz file, image folder, or folder prepared by TFDS."""

import os
from pathlib import Path

from experiments.datasets import embedded, folder, names, npz
from experiments.datasets.errors import DatasetError
from experiments.datasets.raw import Source


def locate(
  name: str, data_dir: str | os.PathLike[str] | None, seed: int
) -> Source:
  """The source of a dataset, in the order that `load` documents.

  Raises:
    DatasetError: the dataset is nowhere, or what is there is not one.
  """
  spec = names.find(name)
  if spec.source == 'embedded':
    return embedded.source(spec, seed)
  if data_dir is not None:
    root = Path(data_dir)
    if not root.is_dir():
      raise DatasetError(
        f'data_dir {str(root)!r} is not a folder; name the folder that holds '
        f'{spec.aliases[0]}.npz or {spec.aliases[0]}/train'
      )
    entries = {names.plain(path.name): path for path in sorted(root.iterdir())}
    candidates = [names.plain(name), *map(names.plain, spec.aliases)]
    for candidate in dict.fromkeys(candidates):
      if (path := entries.get(f'{candidate}.npz')) is not None:
        return npz.source(path, spec)
      path = entries.get(candidate)
      if path is not None and path.is_dir():
        return folder.source(path)
  where = f'in {data_dir}' if data_dir is not None else '(no data_dir is given)'
  raise DatasetError(
    f'{spec.name} was not found {where}: neither {spec.aliases[0]}.npz nor '
    f'{spec.aliases[0]}/train. Run `python -m experiments data prepare '
    f'{spec.name}`'
  )
