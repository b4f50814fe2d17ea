"""Small datasets in every form that a user may have, made on the spot."""

import io
import itertools
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import datasets


def picture(number: int, size: tuple[int, int] = (12, 10)) -> np.ndarray:
  """A smooth RGB picture, uint8 [H, W, 3], different for each number."""
  height, width = size
  rows, columns = np.mgrid[:height, :width]
  planes = [rows * 9 + number * 7, columns * 8 + number * 13, rows + columns]
  return (np.stack(planes, -1) % 256).astype(np.uint8)


def encoded(
  pixels: np.ndarray | Image.Image, form: str = 'PNG', **options
) -> bytes:
  """The picture as a file."""
  file = io.BytesIO()
  shown = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
  shown.save(file, form, **options)
  return file.getvalue()


def raw_arrays(
  classes: int = 3, train: int = 4, test: int = 2, size: int = 32
) -> dict[str, np.ndarray]:
  """A dataset as the raw npz form has it; counts are per class."""
  arrays = {'classes': np.array([f'class {i}' for i in range(classes)])}
  numbers = itertools.count()
  for part, count in (('train', train), ('test', test)):
    labels = np.tile(np.arange(classes), count)
    pictures = [picture(next(numbers), (size, size)) for _ in labels]
    arrays |= {f'x_{part}': np.stack(pictures), f'y_{part}': labels}
  return arrays


def vectors(features: int = 1845) -> dict[str, np.ndarray]:
  """A dataset of vectors in the raw form, as TIMIT80."""
  rng = np.random.default_rng(0)
  return raw_arrays() | {
    f'x_{part}': rng.standard_normal((count, features), np.float32)
    for part, count in (('train', 12), ('test', 6))
  }


def joined(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same in the form of joined files (PNG, so that nothing is lost)."""
  out = {key: v for key, v in arrays.items() if not key.startswith('x_')}
  for part in ('train', 'test'):
    files = [encoded(x) for x in arrays[f'x_{part}']]
    out[f'jpeg_{part}'] = np.frombuffer(b''.join(files), np.uint8)
    out[f'off_{part}'] = np.cumsum([0, *map(len, files)])
    out[f'file_{part}'] = np.array(
      [f'{part}/{i}.png' for i in range(len(files))]
    )
  return out


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
  """Writes an npz file."""
  np.savez_compressed(path, allow_pickle=True, **arrays)
  return path


def image_folder(path: Path, arrays: dict[str, np.ndarray]) -> Path:
  """The same as a folder of PNG files, named in the order of the rows."""
  files = {}
  for part in ('train', 'test'):
    for row, label in enumerate(arrays[f'y_{part}']):
      name = f'{part}/{arrays["classes"][label]}/{row:05d}.png'
      files[name] = encoded(arrays[f'x_{part}'][row])
  return folder(path, files)


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
  """The files as a folder."""
  for name, content in files.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return path


def packed(path: Path, files: Mapping[str, bytes]) -> Path:
  """An archive of the kind that the suffix says, in the given order."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w') as archive:
      for name, content in files.items():
        archive.writestr(name, content)
    return path
  with tarfile.open(path, 'w' if path.suffix == '.tar' else 'w:gz') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def load(root: Path, name: str = 'cifar10', **options) -> datasets.Dataset:
  """A dataset of a data folder, which has the cache too."""
  return datasets.load(name, data_dir=root, cache_dir=root / 'cache', **options)
