"""Getting datasets: what is there, what is missing, and preparing it."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from experiments.datasets import archives, loader, prepared, specs
from experiments.datasets.specs import DatasetError, Spec

_Folder = str | os.PathLike[str] | None


@dataclasses.dataclass(frozen=True)
class Status:
  """Whether a dataset can be loaded, and where it is or how to get it."""

  state: Literal['ready', 'downloadable', 'needs a manual step']
  text: str


def status(name: str, data_dir: _Folder = None, **own: Any) -> Status:
  """Whether a dataset is ready, can be downloaded, or needs a person.

  Files of the paper's datasets are looked for, not read: `check` reads them.

  Args:
    name: as in `load`.
    data_dir: as in `load`.
    **own: architecture and test_share, as in `load`.

  Raises:
    DatasetError: unknown dataset.
  """
  spec = specs.find_known(name)
  try:
    if spec is None:
      return Status('ready', loader.locate(name, data_dir, **own)[1].text)
    if source := loader.find_source(spec, name, data_dir):
      return Status('ready', source.text)
  except specs.UnknownDataset:
    raise
  except DatasetError as error:
    return Status('needs a manual step', str(error))
  how = loader.how_to_get(spec, data_dir)
  manual = how.startswith('First')
  return Status('needs a manual step' if manual else 'downloadable', how)


def prepare(
  name: str,
  data_dir: _Folder = None,
  *,
  cache_dir: _Folder = None,
  progress: Callable[[str], None] = print,
) -> Status:
  """Downloads a dataset, writes it in the format of TFDS, and decodes it.

  Nothing is done for what is there already. tensorflow-datasets shows bars of
  its own while it downloads and writes.

  Args:
    name: the paper's name or an alias.
    data_dir: folder to write to, made if needed; default: that of TFDS.
      Original files that a person puts into its `downloads/manual` are used.
    cache_dir: folder for decoded arrays, as in `load`.
    progress: called with a line of text at each stage.

  Raises:
    DatasetError: original files are missing, damaged or of unexpected layout,
      the download failed, or a library is needed and not installed.
  """
  spec = specs.find_known(name)
  if spec is None:
    raise DatasetError(
      f'{name!r} is not a dataset of the paper; a dataset of your own needs no '
      'preparation'
    )
  if data_dir is not None:
    try:
      Path(data_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise DatasetError(
        f'data_dir {str(data_dir)!r} cannot be made: {error}; name a folder '
        'that can be written'
      ) from error
  if loader.find_source(spec, name, data_dir) is None:
    root = prepared.roots(data_dir)[0].absolute()
    progress(f'{spec.name}: preparing {spec.builder} in {root}')
    _build(spec, root, progress)
  progress(f'{spec.name}: decoding')
  data = loader.load(name, data_dir=data_dir, cache_dir=cache_dir)
  if data.note:
    progress(f'{spec.name}: {data.note}')
  progress(f'{spec.name}: ready, {data.source}')
  return Status('ready', data.source)


def _build(spec: Spec, root: Path, progress: Callable[[str], None]) -> None:
  prepared.check_path(root)
  ours = spec.builder in archives.ORIGINALS
  # Our builders store pictures as they are; others encode with TensorFlow,
  # and so does TFDS when it downloads.
  needed = ['tensorflow_datasets', 'importlib_resources', 'scipy']
  if not archives.in_place(spec.builder, prepared.manual_dir(root)):
    if spec.source == 'manual':
      raise DatasetError(loader.missing(spec, root))
    needed.append('tensorflow')
  if spec.architecture == 'timit':
    needed.append('soundfile')
  for module in needed:
    specs.require(module, f'{spec.name}: preparing it', 'prepare')
  if ours:
    import experiments.datasets.builders  # noqa: F401  (registers)
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(
      spec.builder, data_dir=root, file_format='array_record'
    )
    builder.download_and_prepare()
  except DatasetError:
    raise
  # TFDS reports failed downloads, wrong checksums, full disks and changed
  # formats each in its own way.
  except Exception as error:
    steps = ''
    if ours:
      manual_dir = prepared.manual_dir(root)
      steps = f', or {archives.instructions(spec.builder, manual_dir)}'
    raise DatasetError(
      f'{spec.name}: {spec.builder} could not be prepared in {root}: {error}; '
      f'see to that and run it again{steps}'
    ) from error
  if note := getattr(builder, 'ignored', ''):
    progress(f'{spec.name}: {note}')
