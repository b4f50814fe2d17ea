"""Pictures are resized once, by Pillow's antialiased bilinear filter."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.datasets import DatasetError, samples as images
from experiments.datasets.samples import Part
from tests.datasets import archives


def _part(samples):
  return Part(
    sample=samples.__getitem__,
    labels=np.zeros(len(samples), np.int32),
    names=[f'name {i}' for i in range(len(samples))],
  )


def _decode(samples, shape):
  return images.decode(_part(samples), shape, 'here')[0]


@pytest.mark.parametrize('size', [(12, 10), (300, 200), (119, 119)])
@pytest.mark.parametrize('form', ['PNG', 'JPEG'])
def test_each_side_is_resized_on_its_own(size, form):
  file = archives.encoded(archives.picture(3, size), form)
  expected = Image.open(io.BytesIO(file)).resize(
    (119, 119), Image.Resampling.BILINEAR
  )
  np.testing.assert_array_equal(
    _decode([file], (119, 119, 3))[0], np.asarray(expected)
  )


def test_shrinking_is_antialiased():
  stripes = np.zeros((128, 128, 3), np.uint8)
  stripes[:, ::2] = 255
  out = _decode([stripes], (32, 32, 3))
  # Every output pixel averages stripes: sampling single pixels would give
  # 0 or 255.
  assert np.abs(out.astype(int) - 127).max() <= 16


def test_grey_becomes_three_equal_channels():
  grey = archives.picture(1, (32, 32))[..., :1]
  out = _decode([grey], (32, 32, 3))[0]
  np.testing.assert_array_equal(out, np.repeat(grey, 3, -1))


def test_colour_becomes_luminance():
  colour = archives.picture(1, (28, 28))
  out = _decode([colour], (28, 28, 1))[0, ..., 0]
  expected = colour @ np.array([0.299, 0.587, 0.114])
  np.testing.assert_allclose(out, expected, atol=1)


@pytest.mark.parametrize('mode', ['P', 'LA', 'RGBA', 'CMYK', '1'])
def test_other_picture_modes(mode):
  file = io.BytesIO()
  Image.new('RGB', (40, 40), (255, 255, 255)).convert(mode).save(
    file, 'TIFF' if mode == 'CMYK' else 'PNG'
  )
  out = _decode([file.getvalue()], (32, 32, 3))
  assert (out == 255).all()


def test_sixteen_bits_are_refused():
  file = io.BytesIO()
  Image.fromarray(np.full((32, 32), 300, np.uint16)).save(file, 'PNG')
  with pytest.raises(DatasetError, match=r'name 0 .* more than 8 bits a pixel'):
    _decode([file.getvalue()], (32, 32, 1))


def test_every_row_is_in_its_place():
  samples = [archives.picture(i, (32, 32)) for i in range(200)]
  np.testing.assert_array_equal(
    _decode(samples, (32, 32, 3)), np.stack(samples)
  )


def test_hashes_tell_stored_bytes_apart():
  samples = [archives.encoded(archives.picture(i)) for i in (0, 1, 0)]
  _, hashes, _ = images.decode(_part(samples), (32, 32, 3), 'here')
  assert (hashes[0] == hashes[2]).all()
  assert (hashes[0] != hashes[1]).any()


@pytest.mark.parametrize(
  'sample', [b'', b'no picture', b'\xff\xd8\xff\xe0 JPEG?']
)
def test_undecodable_samples_are_named(sample):
  samples = [archives.picture(0, (32, 32)), sample]
  with pytest.raises(DatasetError, match=r'here: sample name 1 \(row 1\)'):
    _decode(samples, (32, 32, 3))


def test_a_picture_of_absurd_size_is_refused(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
  with pytest.raises(DatasetError, match='exceeds limit'):
    _decode([archives.encoded(archives.picture(0))], (32, 32, 3))


def test_vectors_of_another_length_are_refused():
  with pytest.raises(DatasetError, match='a vector of 1845 features'):
    _decode([np.zeros(1844, np.float32)], (1845,))
