"""Pictures of every kind have one meaning, and are resized once."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from experiments.datasets import DatasetError, samples
from tests.datasets import archives
from tests.datasets.archives import encoded, picture


def _part(stored):
  return samples.Part(
    sample=stored.__getitem__,
    labels=np.zeros(len(stored), np.int32),
    names=[f'name {i}' for i in range(len(stored))],
  )


def _all(stored, shape=(32, 32, 3)):
  return samples.decode(_part(stored), shape, 'here')


def _decode(stored, shape=(32, 32, 3)):
  return _all(stored, shape)[0]


@pytest.mark.parametrize('size', [(12, 10), (300, 200), (119, 119)])
def test_each_side_is_resized_on_its_own_and_antialiased(size):
  file = encoded(picture(3, size), 'JPEG')
  expected = Image.open(io.BytesIO(file)).resize(
    (119, 119), Image.Resampling.BILINEAR
  )
  np.testing.assert_array_equal(_decode([file], (119, 119, 3))[0], expected)


def test_gray_and_color():
  color = picture(1, (28, 28))
  gray = color[..., :1]
  three = _decode([gray], (28, 28, 3))[0]
  np.testing.assert_array_equal(three, np.repeat(gray, 3, -1))
  luminance = color @ np.array([0.299, 0.587, 0.114])
  one = _decode([color], (28, 28, 1))[0, ..., 0]
  np.testing.assert_allclose(one, luminance, atol=1)


@pytest.mark.parametrize('mode', ['P', 'LA', 'RGBA', 'CMYK', '1', 'YCbCr'])
def test_other_picture_modes(mode):
  white = Image.new('RGB', (40, 40), (255, 255, 255)).convert(mode)
  form = 'TIFF' if mode in ('CMYK', 'YCbCr') else 'PNG'
  assert (_decode([encoded(white, form)]) == 255).all()


@pytest.mark.parametrize('mode', ['RGBA', 'P'])
def test_transparency_is_dropped(mode):
  clear = Image.new('RGBA', (32, 32), (10, 20, 30, 0))
  if mode == 'P':
    clear = clear.convert('RGB').quantize(2)
    clear.info['transparency'] = b'\x00\x00'
  np.testing.assert_array_equal(
    _decode([encoded(clear)])[0], np.full((32, 32, 3), (10, 20, 30))
  )


_SIXTEEN = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64


def _pgm():
  return b'P5 32 32 65535\n' + _SIXTEEN.astype('>u2').tobytes()


@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'PGM'])
def test_sixteen_bits_are_scaled_to_eight(form):
  file = _pgm()
  if form != 'PGM':
    file = encoded(Image.fromarray(_SIXTEEN), form)
  x, _, remarks = _all([file], (32, 32, 1))
  np.testing.assert_array_equal(x[0, ..., 0], _SIXTEEN >> 8)
  assert dict(remarks) == {'pictures of 16 bits, scaled to 8': 1}


@pytest.mark.parametrize('kind', [np.int32, np.float32])
def test_thirty_two_bits_are_refused(kind):
  file = encoded(Image.fromarray(np.ones((32, 32), kind)), 'TIFF')
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
  pixels = picture(4, (32, 32))
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {'lossless': True} if form == 'WEBP' else {}
  file = encoded(pixels, form, exif=exif, **options)
  x, hashes, remarks = _all([file])
  np.testing.assert_array_equal(x[0], _TURNS[orientation](pixels))
  turned = orientation in range(2, 9)
  assert ('pictures turned by their EXIF orientation' in remarks) == turned
  # Other pixels than those of an upright file are another digest.
  assert (hashes.tobytes() == hashlib.sha256(file).digest()) == (not turned)


def test_damaged_exif_turns_nothing():
  pixels = picture(4, (32, 32))
  file = encoded(pixels, exif=b'Exif\x00\x00II*\x00\xff\xff\xff\xff')
  np.testing.assert_array_equal(_decode([file])[0], pixels)


def test_the_note_says_what_was_done_to_pictures(tmp_path):
  root = archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays())
  exif = Image.Exif()
  exif[0x0112] = 6
  file = encoded(picture(4, (32, 32)), exif=exif)
  archives.folder(root, {'train/class 0/new.PNG': file})
  note = archives.load(tmp_path).note
  assert '1 pictures turned by their EXIF orientation' in note


@pytest.mark.parametrize('form', ['GIF', 'PNG', 'TIFF', 'WEBP'])
def test_the_first_of_several_frames_is_used(form):
  frames = [Image.new('RGB', (32, 32), (i, 0, 0)) for i in (0, 250)]
  options = {'lossless': True} if form == 'WEBP' else {}
  file = encoded(
    frames[0], form, save_all=True, append_images=frames[1:], **options
  )
  x, _, remarks = _all([file] * 3)
  assert not x.any()
  assert list(remarks.values()) == [3]
  assert 'the first is used' in list(remarks)[0]


def test_rows_and_their_hashes_are_in_their_places():
  stored = [encoded(picture(i, (32, 32))) for i in range(99)]
  x, hashes, _ = _all([*stored, stored[0]])
  pixels = [picture(i, (32, 32)) for i in [*range(99), 0]]
  np.testing.assert_array_equal(x, np.stack(pixels))
  assert (hashes[99] == hashes[0]).all()
  assert len({row.tobytes() for row in hashes}) == 99


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
  stored = [picture(0, (32, 32)), sample]
  with pytest.raises(DatasetError, match=r'here: sample name 1 \(row 1\)'):
    _decode(stored)


def test_a_picture_of_absurd_size_is_refused(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50)
  with pytest.raises(DatasetError, match='exceeds limit'):
    _decode([encoded(picture(0))])
