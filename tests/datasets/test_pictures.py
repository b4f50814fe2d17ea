"""Pictures of every kind have one meaning, and are resized once."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from experiments import datasets
from experiments.datasets import DatasetError, samples
from tests.datasets import archives


def _part(stored):
  return samples.Part(
    sample=stored.__getitem__,
    labels=np.zeros(len(stored), np.int32),
    names=[f'name {i}' for i in range(len(stored))],
  )


def _decode(stored, shape=(32, 32, 3)):
  return samples.decode(_part(stored), shape, 'here')[0]


def _file(picture, form='PNG', **options):
  file = io.BytesIO()
  picture.save(file, form, **options)
  return file.getvalue()


@pytest.mark.parametrize('size', [(12, 10), (300, 200), (119, 119)])
@pytest.mark.parametrize('form', ['PNG', 'JPEG'])
def test_each_side_is_resized_on_its_own(size, form):
  file = archives.encoded(archives.picture(3, size), form)
  expected = Image.open(io.BytesIO(file)).resize(
    (119, 119), Image.Resampling.BILINEAR
  )
  np.testing.assert_array_equal(_decode([file], (119, 119, 3))[0], expected)


def test_shrinking_is_antialiased():
  stripes = np.zeros((128, 128, 3), np.uint8)
  stripes[:, ::2] = 255
  # Every output pixel averages stripes: sampling single pixels would give
  # 0 or 255.
  assert np.abs(_decode([stripes]).astype(int) - 127).max() <= 16


def test_gray_becomes_three_equal_channels():
  gray = archives.picture(1, (32, 32))[..., :1]
  np.testing.assert_array_equal(_decode([gray])[0], np.repeat(gray, 3, -1))


def test_color_becomes_luminance():
  color = archives.picture(1, (28, 28))
  out = _decode([color], (28, 28, 1))[0, ..., 0]
  expected = color @ np.array([0.299, 0.587, 0.114])
  np.testing.assert_allclose(out, expected, atol=1)


@pytest.mark.parametrize('mode', ['P', 'LA', 'RGBA', 'CMYK', '1', 'YCbCr'])
def test_other_picture_modes(mode):
  white = Image.new('RGB', (40, 40), (255, 255, 255)).convert(mode)
  form = 'TIFF' if mode in ('CMYK', 'YCbCr') else 'PNG'
  assert (_decode([_file(white, form)]) == 255).all()


@pytest.mark.parametrize('mode', ['RGBA', 'P'])
def test_transparency_is_dropped(mode):
  clear = Image.new('RGBA', (32, 32), (10, 20, 30, 0))
  if mode == 'P':
    clear = clear.convert('RGB').quantize(2)
    clear.info['transparency'] = b'\x00\x00'
  np.testing.assert_array_equal(
    _decode([_file(clear)])[0], np.full((32, 32, 3), (10, 20, 30))
  )


_SIXTEEN = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64


def _pgm():
  return b'P5 32 32 65535\n' + _SIXTEEN.astype('>u2').tobytes()


@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'PGM'])
def test_sixteen_bits_are_scaled_to_eight(form):
  file = _pgm()
  if form != 'PGM':
    file = _file(Image.fromarray(_SIXTEEN), form)
  x, _, remarks = samples.decode(_part([file]), (32, 32, 1), 'here')
  np.testing.assert_array_equal(x[0, ..., 0], _SIXTEEN >> 8)
  assert dict(remarks) == {'pictures of 16 bits, scaled to 8': 1}


@pytest.mark.parametrize('kind', [np.int32, np.float32])
def test_thirty_two_bits_are_refused(kind):
  file = _file(Image.fromarray(np.ones((32, 32), kind)), 'TIFF')
  with pytest.raises(DatasetError, match='name 0 .* numbers of 32 bits'):
    _decode([file])


# By EXIF: where the first row and the first column of the file are shown.
_TURNS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: lambda x: x.transpose(1, 0, 2)[::-1],
  9: lambda x: x,
}


@pytest.mark.parametrize('orientation', _TURNS)
@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'WEBP'])
def test_the_orientation_of_exif_is_applied(form, orientation):
  picture = Image.fromarray(archives.picture(4, (32, 32)))
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {'lossless': True} if form == 'WEBP' else {}
  file = _file(picture, form, exif=exif, **options)
  x, hashes, remarks = samples.decode(_part([file]), (32, 32, 3), 'here')
  expected = _TURNS[orientation](archives.picture(4, (32, 32)))
  np.testing.assert_array_equal(x[0], expected)
  turned = orientation in range(2, 9)
  assert ('pictures turned by their EXIF orientation' in remarks) == turned
  # Other pixels than those of an upright file are another digest.
  assert (hashes.tobytes() == hashlib.sha256(file).digest()) == (not turned)


def test_the_note_says_that_pictures_are_turned(tmp_path):
  """White in its upper rows, turned by a quarter: in its right columns."""
  pixels = np.zeros((32, 32, 3), np.uint8)
  pixels[:8] = 255
  arrays = archives.raw_arrays()
  root = archives.image_folder(tmp_path / 'cifar10', arrays)
  exif = Image.Exif()
  exif[0x0112] = 6
  picture = Image.fromarray(pixels)
  picture.save(root / 'train' / 'class 0' / '00000.JPG', exif=exif)
  (root / 'train' / 'class 0' / '00000.png').unlink()
  data = datasets.load('cifar10', data_dir=tmp_path, cache_dir=tmp_path / 'c')
  assert data.x_train[0, :, 24:].mean() > 250
  assert data.x_train[0, :, :24].mean() < 5
  assert '1 pictures turned by their EXIF orientation' in data.note


def test_damaged_exif_turns_nothing():
  picture = Image.fromarray(archives.picture(4, (32, 32)))
  file = _file(picture, exif=b'Exif\x00\x00II*\x00\xff\xff\xff\xff')
  np.testing.assert_array_equal(_decode([file])[0], picture)


@pytest.mark.parametrize('form', ['GIF', 'PNG', 'TIFF', 'WEBP'])
def test_the_first_of_several_frames_is_used(form):
  frames = [Image.new('RGB', (32, 32), (i, 0, 0)) for i in (0, 250)]
  options = {'lossless': True} if form == 'WEBP' else {}
  file = _file(
    frames[0], form, save_all=True, append_images=frames[1:], **options
  )
  x, _, remarks = samples.decode(_part([file] * 3), (32, 32, 3), 'here')
  assert not x.any()
  assert list(remarks.values()) == [3]
  assert 'the first is used' in list(remarks)[0]


def test_every_row_is_in_its_place():
  stored = [archives.picture(i, (32, 32)) for i in range(200)]
  np.testing.assert_array_equal(_decode(stored), np.stack(stored))


def test_hashes_tell_stored_bytes_apart():
  stored = [archives.encoded(archives.picture(i)) for i in (0, 1, 0)]
  _, hashes, _ = samples.decode(_part(stored), (32, 32, 3), 'here')
  assert (hashes[0] == hashes[2]).all()
  assert (hashes[0] != hashes[1]).any()


@pytest.mark.parametrize(
  'sample',
  [
    b'',
    b'no picture',
    b'\xff\xd8\xff\xe0 JPEG?',
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n',  # runs a program
  ],
)
def test_undecodable_samples_are_named(sample):
  stored = [archives.picture(0, (32, 32)), sample]
  with pytest.raises(DatasetError, match=r'here: sample name 1 \(row 1\)'):
    _decode(stored)


def test_a_picture_of_absurd_size_is_refused(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
  with pytest.raises(DatasetError, match='exceeds limit'):
    _decode([archives.encoded(archives.picture(0))])


def test_vectors_of_another_length_are_refused():
  with pytest.raises(DatasetError, match='a vector of 1845 features'):
    _decode([np.zeros(1844, np.float32)], (1845,))
