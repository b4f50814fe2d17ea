"""TIMIT80: audio, the 123 features of a frame, and sub-phonetic labels.

The paper names "123 dimensional MFCC features" with 7 frames of context on
each side and 183 sub-phonetic classes, the set-up of Abdel-Hamid et al. (2012),
which it cites; that paper's features are taken: 40 mel filter banks and the
energy, with first and second temporal derivatives. Where it is silent, HTK's
conventions are followed.
"""

import io
import re
from collections.abc import Sequence

import numpy as np

from experiments.datasets.specs import DatasetError, require

SAMPLE_RATE = 16000
WINDOW = 400  # 25 ms
HOP = 160  # 10 ms
FILTERS = 40
FEATURES = 3 * (FILTERS + 1)
CONTEXT = 7

# TIMIT's own set of 61 phones; h# is the silence at both ends.
PHONES: Sequence[str] = (
  'aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er '
  'ey f g gcl h# hh hv ih ix iy jh k kcl l m n ng nx ow oy p pau pcl q r s sh '
  't tcl th uh uw ux v w y z zh'
).split()
THIRDS = 3
SUBPHONES = tuple(
  f'{phone}_{third + 1}' for phone in PHONES for third in range(THIRDS)
)

_FFT = 512
_PREEMPHASIS = 0.97
_DELTA_WIDTH = 2
# Keeps the logarithm of digital silence finite: one quantum of 16 bits.
_FLOOR = 1.0


def frames(wav: bytes, phn: bytes, at: str) -> tuple[np.ndarray, np.ndarray]:
  """Features and sub-phonetic labels of the frames of an utterance."""
  values = features(read_audio(wav, f'{at}.wav'))
  segments = read_segments(phn.decode('ascii', 'replace'), f'{at}.phn')
  return values, subphones(segments, len(values))


def features(samples: np.ndarray) -> np.ndarray:
  """Filter banks, energy and their differences of every whole window.

  Hamming window of 25 ms, hop 10 ms, pre-emphasis 0.97; power spectrum of 512
  points; 40 triangular filters equally spaced from 0 to 8 kHz on the scale
  mel(f) = 2595 log10(1 + f / 700); natural logarithms; the energy is the
  logarithm of the window's sum of squares; differences are regressions over
  two frames on each side, the ends repeated.

  Args:
    samples: audio at 16 kHz as 16 bit integers, [N].

  Returns:
    float32 [T, 123]: 41 values, 41 first and 41 second differences;
    T = 1 + (N - 400) // 160, or 0 if N < 400.
  """
  if len(samples) < WINDOW:
    return np.empty((0, FEATURES), np.float32)
  frames = np.lib.stride_tricks.sliding_window_view(
    samples.astype(np.float64), WINDOW
  )[::HOP]
  energy = np.square(frames).sum(axis=1, keepdims=True)
  emphasized = frames - _PREEMPHASIS * np.concatenate(
    [frames[:, :1], frames[:, :-1]], axis=1
  )
  spectrum = np.fft.rfft(emphasized * np.hamming(WINDOW), _FFT)
  banks = np.square(np.abs(spectrum)) @ mel_filters().T
  static = np.log(np.maximum(np.hstack([banks, energy]), _FLOOR))
  first = differences(static)
  return np.hstack([static, first, differences(first)]).astype(np.float32)


def mel_filters() -> np.ndarray:
  """Weights of the triangular filters on the spectrum, [40, 257].

  Neighboring filters meet at each other's center, so they sum to 1 between
  the first and the last center.
  """
  top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
  edges = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
  bins = np.arange(_FFT // 2 + 1) * (SAMPLE_RATE / _FFT)
  low, center, high = (edges[i : i + FILTERS, np.newaxis] for i in range(3))
  rising = (bins - low) / (center - low)
  falling = (high - bins) / (high - center)
  return np.maximum(0, np.minimum(rising, falling))


def differences(values: np.ndarray) -> np.ndarray:
  """Regression slope over two frames on each side, [T, D] to [T, D]."""
  padded = np.pad(values, ((_DELTA_WIDTH, _DELTA_WIDTH), (0, 0)), 'edge')
  count = len(values)
  slope = np.zeros_like(values)
  for k in range(1, _DELTA_WIDTH + 1):
    later = padded[_DELTA_WIDTH + k : _DELTA_WIDTH + k + count]
    earlier = padded[_DELTA_WIDTH - k : _DELTA_WIDTH - k + count]
    slope += k * (later - earlier)
  return slope / (2 * sum(k * k for k in range(1, _DELTA_WIDTH + 1)))


def subphones(
  segments: Sequence[tuple[int, int, str]], frames: int
) -> np.ndarray:
  """The sub-phonetic class of each frame, by the center of its window.

  Args:
    segments: (first sample, end, phone), as in a .PHN file.
    frames: how many frames there are.

  Returns:
    int64 [frames], indices into `SUBPHONES`; -1 where no segment is. A segment
    is divided into three equal parts.
  """
  labels = np.full(frames, -1, np.int64)
  centers = np.arange(frames) * HOP + WINDOW // 2
  for begin, end, phone in segments:
    inside = (centers >= begin) & (centers < end)
    third = (centers[inside] - begin) * THIRDS // (end - begin)
    labels[inside] = PHONES.index(phone) * THIRDS + third
  return labels


def stacked(values: np.ndarray, frame: int) -> np.ndarray:
  """A frame with 7 on each side, ends repeated: [T, D] to [15 * D]."""
  rows = np.arange(frame - CONTEXT, frame + CONTEXT + 1)
  return values[np.clip(rows, 0, len(values) - 1)].ravel()


def read_audio(content: bytes, at: str) -> np.ndarray:
  """Samples of a SPHERE file, int16 [N]."""
  soundfile = require('soundfile', 'reading TIMIT', 'prepare')
  head = content[:1024]
  if b'shorten' in head:
    raise DatasetError(
      f'{at}: compressed with shorten; unpack it first with the Linguistic '
      "Data Consortium's sph2pipe (sph2pipe -p -f sph)"
    )
  try:
    samples, rate = soundfile.read(io.BytesIO(content), dtype='int16')
  except soundfile.SoundFileError as error:
    raise DatasetError(
      f'{at}: not a readable SPHERE file: {error}; copy it again from the disc'
    ) from error
  if rate != SAMPLE_RATE or samples.ndim != 1:
    raise DatasetError(
      f'{at}: {rate} Hz, shape {samples.shape}; TIMIT is 16000 Hz mono'
    )
  stated = re.search(rb'sample_count -i (\d+)', head)
  if stated is not None and int(stated[1]) != len(samples):
    raise DatasetError(
      f'{at}: truncated, {len(samples)} of {int(stated[1])} samples; copy it '
      'again from the disc'
    )
  return samples


def read_segments(text: str, at: str) -> list[tuple[int, int, str]]:
  """Segments of a .PHN file: "begin end phone" per line, in samples."""
  segments = []
  for number, line in enumerate(text.splitlines(), 1):
    match = re.fullmatch(r'\s*(\d+)\s+(\d+)\s+(\S+)\s*', line)
    if (
      match is None or int(match[1]) >= int(match[2]) or match[3] not in PHONES
    ):
      raise DatasetError(
        f'{at}: line {number} is {line!r}; expected "begin end phone" in '
        'samples with one of the 61 phones of TIMIT; copy it again'
      )
    segments.append((int(match[1]), int(match[2]), match[3]))
  return segments
