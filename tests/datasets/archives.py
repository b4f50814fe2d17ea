"""Small datasets in every form that a user may have, made on the spot."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (12, 10)) -> np.ndarray:
  """A smooth RGB picture, uint8 [H, W, 3], different for each number."""
  height, width = size
  rows, columns = np.mgrid[:height, :width]
  planes = [rows * 9 + number * 7, columns * 8 + number * 13, rows + columns]
  return (np.stack(planes, -1) % 256).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str = 'PNG') -> bytes:
  """The picture as a file."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, form)
  return file.getvalue()


def raw_arrays(
  classes: int = 3, train: int = 4, test: int = 2, size: int = 32
) -> dict[str, np.ndarray]:
  """A dataset as the raw npz form has it; counts are per class."""
  arrays = {'classes': np.array([f'class {i}' for i in range(classes)])}
  number = 0
  for part, count in (('train', train), ('test', test)):
    pictures = []
    for _ in range(classes * count):
      pictures.append(picture(number, (size, size)))
      number += 1
    arrays[f'x_{part}'] = np.stack(pictures)
    arrays[f'y_{part}'] = np.tile(np.arange(classes), count)
  return arrays


def joined(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same in the form of joined files (PNG, so that nothing is lost)."""
  out = {key: v for key, v in arrays.items() if not key.startswith('x_')}
  for part in ('train', 'test'):
    files = [encoded(x) for x in arrays[f'x_{part}']]
    out[f'jpeg_{part}'] = np.frombuffer(b''.join(files), np.uint8)
    limits = np.cumsum([0, *map(len, files)])
    out[f'off_{part}'] = limits
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
  for part in ('train', 'test'):
    labels = arrays[f'y_{part}']
    for row, (x, label) in enumerate(
      zip(arrays[f'x_{part}'], labels, strict=True)
    ):
      folder = path / part / str(arrays['classes'][label])
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f'{row:05d}.png').write_bytes(encoded(x))
  return path
