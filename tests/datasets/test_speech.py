"""Audio, features and labels of TIMIT80."""

import numpy as np
import pytest

from experiments.datasets import DatasetError, speech
from tests.datasets import originals

soundfile = pytest.importorskip(
  'soundfile', reason='reading SPHERE audio needs soundfile'
)


def _tone(hertz, amplitude=3000.0, seconds=0.2):
  time = np.arange(int(seconds * speech.SAMPLE_RATE)) / speech.SAMPLE_RATE
  return (amplitude * np.sin(2 * np.pi * hertz * time)).round()


@pytest.mark.parametrize(
  ('samples', 'frames'),
  [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)],
)
def test_one_frame_per_whole_window(samples, frames):
  values = speech.features(np.ones(samples, np.int16))
  assert values.shape == (frames, 123)
  assert values.dtype == np.float32


@pytest.mark.parametrize('hertz', [300, 1000, 2500, 6000])
def test_a_tone_excites_the_filter_around_it(hertz):
  quiet, loud = (speech.features(_tone(hertz, a))[5] for a in (300, 3000))
  weights = speech.mel_filters()[:, round(hertz / 16000 * 512)]
  best = int(loud[:40].argmax())
  assert abs(best - int(weights.argmax())) <= 1
  for column in (best, 40):  # the band of the tone, and the energy
    louder = loud[column] - quiet[column]
    np.testing.assert_allclose(louder, 2 * np.log(10), atol=1e-2)


def test_filters_divide_the_spectrum():
  filters = speech.mel_filters()
  assert filters.shape == (40, 257)
  assert (filters >= 0).all()
  assert filters.any(axis=1).all()
  centers = np.flatnonzero(filters.sum(axis=0) > 0.99)
  total = filters.sum(axis=0)[centers[0] : centers[-1] + 1]
  np.testing.assert_allclose(total, 1, atol=1e-9)


def test_differences_are_slopes():
  time = np.arange(20.0)[:, np.newaxis]
  slopes = speech.differences(np.hstack([3 * time, time**2, time * 0 + 7]))
  np.testing.assert_allclose(slopes[2:-2, 0], 3)
  np.testing.assert_allclose(slopes[2:-2, 1], 2 * time[2:-2, 0])
  np.testing.assert_allclose(slopes[:, 2], 0)


def test_features_are_followed_by_their_differences():
  rng = np.random.default_rng(0)
  values = speech.features(rng.normal(0, 500, 8000).round())
  static = values[:, :41].astype(np.float64)
  first = speech.differences(static)
  np.testing.assert_allclose(values[:, 41:82], first, atol=1e-5)
  np.testing.assert_allclose(
    values[:, 82:], speech.differences(first), atol=1e-5
  )


def test_silence_is_finite():
  assert np.isfinite(speech.features(np.zeros(2000, np.int16))).all()


def test_frames_take_the_third_that_holds_their_center():
  # Centres are at 200, 360, 520, ...
  labels = speech.subphones([(0, 960, 'aa'), (960, 1440, 'z')], 12)
  names = [speech.SUBPHONES[i] if i >= 0 else '' for i in labels]
  assert names == [
    *('aa_1', 'aa_2', 'aa_2', 'aa_3', 'aa_3', 'z_1', 'z_2', 'z_3'),
    *('', '', '', ''),
  ]
  assert len(set(speech.PHONES)) == 61
  assert len(speech.SUBPHONES) == 183


def test_context_is_seven_frames_on_each_side():
  values = np.arange(20.0)[:, np.newaxis] * np.ones((1, 123))
  window = speech.stacked(values, 10).reshape(15, 123)
  np.testing.assert_array_equal(window[:, 0], np.arange(3, 18))
  window = speech.stacked(values, 1).reshape(15, 123)
  np.testing.assert_array_equal(window[:, 5], [0] * 7 + list(range(1, 9)))
  assert speech.stacked(values, 19).shape == (1845,)


def test_big_endian_audio_is_the_same():
  samples = np.arange(-300, 300)
  little = originals.sphere(samples)
  head = little[:1024].replace(b'-s2 01', b'-s2 10')
  big = head + samples.astype('>i2').tobytes()
  for content in (little, big):
    np.testing.assert_array_equal(speech.read_audio(content, 'here'), samples)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (
      originals.sphere(np.zeros(9), sample_coding='pcm,embedded-shorten-v2.00'),
      'compressed with shorten',
    ),
    (originals.sphere(np.zeros(500))[:-100], 'truncated, 450 of 500 samples'),
    (originals.sphere(np.zeros(500))[:300], 'not a readable SPHERE file'),
    (b'no audio' * 200, 'not a readable SPHERE file'),
    (originals.sphere(np.zeros(500), sample_rate=8000), '8000 Hz'),
  ],
)
def test_audio_that_is_not_timits(content, message):
  with pytest.raises(DatasetError, match=f'a/b.wav: .*{message}'):
    speech.read_audio(content, 'a/b.wav')


@pytest.mark.parametrize(
  'line', ['0 100', '100 100 aa', '0 100 xx', '-5 9 aa', 'a b c']
)
def test_segments_of_another_form(line):
  with pytest.raises(DatasetError, match=r'a\.phn: line 2 is '):
    speech.read_segments(f'0 50 h#\n{line}\n', 'a.phn')
