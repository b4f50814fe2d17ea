"""What the command `data` does: gets a dataset, and says what is in it."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.datasets import archives, loader, prepared, specs
from experiments.datasets.loader import Dataset, Folder, load, locate
from experiments.datasets.samples import stored_shape
from experiments.datasets.specs import DatasetError, Spec

_COLUMNS = 10
_MARGIN = 12


@dataclasses.dataclass(frozen=True)
class Status:
  """Whether a dataset can be loaded, and where it is or how to get it."""

  state: Literal['ready', 'downloadable', 'needs a manual step']
  text: str


def status(name: str, data_dir: Folder = None, **own: Any) -> Status:
  """Whether a dataset is ready, can be downloaded, or needs a person.

  Files of the paper's datasets are looked for, not read: `check` reads them.
  All arguments are those of `load`.

  Raises:
    UnknownDataset: if nothing has this name.
  """
  spec = specs.find_known(name)
  try:
    if spec is None:
      return Status('ready', locate(name, data_dir, **own)[1].text)
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
  name: str, data_dir: Folder = None, *, cache_dir: Folder = None
) -> Iterator[str]:
  """Downloads a dataset, writes it in the format of TFDS, and decodes it.

  Yields a line for each step; what is there already is not prepared again.
  tensorflow-datasets shows progress bars of its own.

  Args:
    name: the paper's name or an alias.
    data_dir: folder to write to, made if needed; default: that of TFDS.
      Original files that a person puts into its `downloads/manual` are used.
    cache_dir: folder for decoded arrays, as in `load`.

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
  if not _is_there(spec, name, data_dir):
    root = prepared.roots(data_dir)[0].absolute()
    yield f'{spec.name}: preparing {spec.builder} in {root}'
    yield from _build(spec, root)
  yield f'{spec.name}: decoding'
  data = load(name, data_dir=data_dir, cache_dir=cache_dir)
  if data.note:
    yield f'{spec.name}: {data.note}'
  yield f'{spec.name}: ready, {data.source}'


def _is_there(spec: Spec, name: str, data_dir: Folder) -> bool:
  try:
    return loader.find_source(spec, name, data_dir) is not None
  except prepared.OtherFormat:
    # It does not matter in TFDS's own folder where another one is named.
    if prepared.version_folder(prepared.roots(data_dir)[0], spec) is not None:
      raise
    return False


def _build(spec: Spec, root: Path) -> Iterator[str]:
  prepared.check_path(root)
  ours = spec.builder in archives.ORIGINALS
  manual_dir = prepared.manual_dir(root)
  # Our builders store pictures as they are; others encode with TensorFlow,
  # and so does TFDS when it downloads.
  needed = ['tensorflow_datasets', 'importlib_resources', 'scipy']
  if not archives.in_place(spec.builder, manual_dir):
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
      steps = f', or {archives.instructions(spec.builder, manual_dir)}'
    raise DatasetError(
      f'{spec.name}: {spec.builder} could not be prepared in {root}: {error}; '
      f'see to that and run it again{steps}'
    ) from error
  if note := getattr(builder, 'ignored', ''):
    yield f'{spec.name}: {note}'


def check(
  name: str,
  data_dir: Folder = None,
  *,
  cache_dir: Folder = None,
  seed: int = 0,
  grid: str | Path | None = None,
  **own: Any,
) -> Iterator[str]:
  """Reads a dataset and describes it, line by line.

  All other arguments are those of `load`.

  Args:
    grid: PNG file to write, training samples of ten classes with their labels.

  Raises:
    DatasetError: as `load`.
  """
  data = load(name, data_dir=data_dir, cache_dir=cache_dir, seed=seed, **own)
  yield f'{data.spec.name}: {data.source}'
  if data.note:
    yield f'note: {data.note}'
  yield f'digest: {data.digest}'
  if len(data.spec.shape) == 3:
    raw = locate(name, data_dir, seed, **own)[1].read()
    sizes = Counter(
      stored_shape(part.sample(row))[:2]
      for part in (raw.train, raw.test)
      for row in range(len(part))
    ).most_common()
    of_size = ', '.join(f'{h}x{w}: {count}' for (h, w), count in sizes)
    yield f'stored sizes: {of_size}'
  else:
    yield 'stored sizes: vectors'
  pairs = duplicates(data)
  yield f'test samples that are training samples too: {len(pairs)}'
  for test, train in pairs:
    yield f'  {test} = {train}'
  yield 'class: train, test'
  for label, name_of_class in enumerate(data.classes):
    train, test = ((y == label).sum() for y in (data.y_train, data.y_test))
    yield f'  {_on_a_line(name_of_class)}: {train}, {test}'
  if grid is not None:
    path = Path(grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(data, path)
    yield f'pictures: {path}'


def show_split(
  name: str, data_dir: Folder = None, *, seed: int = 0, **options: Any
) -> Iterator[str]:
  """The split of a dataset, line by line: 'PART<tab>CLASS<tab>SAMPLE'.

  The first lines, beginning with '#', give the protocol, the seed and the
  digest. All arguments are those of `load`.

  Raises:
    DatasetError: as `load`.
  """
  data = load(name, data_dir=data_dir, seed=seed, **options)
  yield f'# {data.spec.name}: {data.spec.protocol}'
  yield f'# {data.source}, seed {seed}'
  yield f'# digest {data.digest}'
  for part, files, labels in (
    ('train', data.files_train, data.y_train),
    ('test', data.files_test, data.y_test),
  ):
    for row in np.argsort(labels, kind='stable'):
      label = _on_a_line(data.classes[labels[row]])
      yield f'{part}\t{label}\t{_on_a_line(str(files[row]))}'


def _on_a_line(text: str) -> str:
  """The text with tabs, newlines and the like escaped."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def duplicates(data: Dataset) -> tuple[tuple[str, str], ...]:
  """Pairs (test, train) of names of samples that are equal as loaded."""
  trained = {
    hashlib.sha256(x.tobytes()).digest(): name
    for x, name in zip(data.x_train, data.files_train, strict=True)
  }
  hashes = (hashlib.sha256(x.tobytes()).digest() for x in data.x_test)
  return tuple(
    (str(name), str(trained[found]))
    for found, name in zip(hashes, data.files_test, strict=True)
    if found in trained
  )


def draw_grid(data: Dataset, path: Path) -> None:
  """Writes a PNG: a row of training samples for each of up to ten classes.

  The classes are spread over the set; vectors are shown as rows of features.
  """
  from PIL import Image, ImageDraw

  shown = np.unique(
    np.linspace(0, len(data.classes) - 1, _COLUMNS).round().astype(int)
  )
  height, width = _pixels(data.x_train[0]).shape[:2]
  # Labels need some room even where pictures are small.
  cell = max(width, 64), max(height, 32) + _MARGIN
  sheet = Image.new('RGB', (cell[0] * _COLUMNS, cell[1] * len(shown)), 'white')
  pen = ImageDraw.Draw(sheet)
  for row, label in enumerate(shown):
    samples = np.flatnonzero(data.y_train == label)[:_COLUMNS]
    name = data.classes[label].encode('ascii', 'replace').decode()
    for column, sample in enumerate(samples):
      corner = column * cell[0], row * cell[1]
      pen.text(corner, name[: cell[0] // 6], fill='black')
      sheet.paste(
        Image.fromarray(_pixels(data.x_train[sample])),
        (corner[0], corner[1] + _MARGIN),
      )
  sheet.save(path, 'PNG')


def _pixels(sample: np.ndarray) -> np.ndarray:
  if sample.ndim == 1:
    # Three standard deviations to each side of the mean.
    scaled = np.clip(sample.reshape(15, 123) * (127 / 3) + 128, 0, 255)
    return scaled.astype(np.uint8)
  return sample[..., 0] if sample.shape[-1] == 1 else sample
