"""TIMIT (LDC93S1): features and sub-phonetic labels of each utterance.

The paper used TIMIT's development set: the customary 50 speakers of its test
part (Halberstadt 1998), without the two sentences (SA) that all speakers read.
"""

import collections
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets import archives, speech
from experiments.datasets.builders.base import Examples, OriginalBuilder
from experiments.datasets.errors import DatasetError

SPEAKERS = frozenset(
  (
    'faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 '
    'mcsh0 fadg0 fdms0 fedw0 mgjf0 mglb0 mrtk0 mtaa0 mtdt0 mthc0 mwjg0 fnmr0 '
    'frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0 mrcs0 mrjm4 '
    'fcal1 mmwh0 fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 '
    'fmml0 mrws1'
  ).split()
)

_SENTENCES = 8  # SI and SX, of each speaker

_FILE = re.compile(
  r'(?:.*/)?test/dr\d/([a-z0-9]+)/(s[ix]\d+)\.(wav|phn)', re.IGNORECASE
)


class TimitSubphones(OriginalBuilder):
  """One example per utterance: features of its frames and their labels."""

  MANUAL_DOWNLOAD_INSTRUCTIONS = archives.instructions(
    'timit_subphones', 'downloads/manual'
  )

  def _features(self) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
      {
        'features': tfds.features.Tensor(
          shape=(None, speech.FEATURES), dtype=np.float32
        ),
        'labels': tfds.features.Tensor(shape=(None,), dtype=np.int64),
        'file': tfds.features.Text(),
      }
    )

  def _generate_examples(self, path: Path) -> Examples:
    halves: dict[str, dict[str, bytes]] = {}
    sentences = collections.Counter[str](dict.fromkeys(SPEAKERS, 0))
    for name, read in archives.members(path):
      match = _FILE.fullmatch(name)
      if match is None or match[1].lower() not in SPEAKERS:
        continue
      utterance = f'{match[1]}/{match[2]}'.lower()
      half = halves.setdefault(utterance, {})
      half[match[3].lower()] = read()
      if len(half) == 2:
        sentences[match[1].lower()] += 1
        yield utterance, _example(path, utterance, **halves.pop(utterance))
    if halves:
      utterance, half = min(halves.items())
      raise self._layout_error(
        path, f'{utterance} has only a .{min(half)} file'
      )
    if odd := {who for who, read in sentences.items() if read != _SENTENCES}:
      who = min(odd)
      raise self._layout_error(
        path,
        f'{len(odd)} of the 50 speakers of the development set do not have '
        f'their {_SENTENCES} sentences, such as {who} with {sentences[who]}',
      )


def _example(
  path: Path, utterance: str, wav: bytes, phn: bytes
) -> dict[str, Any]:
  at = f'{path}: {utterance}'
  samples = read_audio(wav, f'{at}.wav')
  values = speech.features(samples)
  segments = read_segments(phn.decode('ascii', 'replace'), f'{at}.phn')
  return {
    'features': values,
    'labels': speech.subphones(segments, len(values)),
    'file': utterance,
  }


def read_audio(content: bytes, at: str) -> np.ndarray:
  """Samples of a SPHERE file, int16 [N].

  Raises:
    DatasetError: compressed, damaged or truncated, or not 16 kHz mono.
  """
  import soundfile

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
  if rate != speech.SAMPLE_RATE or samples.ndim != 1:
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
  """Segments of a .PHN file: "begin end phone" per line, in samples.

  Raises:
    DatasetError: a line of another form, or an unknown phone.
  """
  segments = []
  for number, line in enumerate(text.splitlines(), 1):
    match = re.fullmatch(r'\s*(\d+)\s+(\d+)\s+(\S+)\s*', line)
    if (
      match is None
      or int(match[1]) >= int(match[2])
      or match[3] not in speech.PHONES
    ):
      raise DatasetError(
        f'{at}: line {number} is {line!r}; expected "begin end phone" in '
        'samples with one of the 61 phones of TIMIT; copy it again'
      )
    segments.append((int(match[1]), int(match[2]), match[3]))
  return segments
