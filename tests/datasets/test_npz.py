"""npz files: what is accepted, and what a broken one is told."""

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import DatasetError
from tests.datasets import archives
from tests.datasets.archives import load


def test_raw_arrays_arrive_as_they_are(tmp_path, arrays):
  archives.save(tmp_path / 'cifar10.npz', arrays)
  data = load(tmp_path)
  np.testing.assert_array_equal(data.x_train, arrays['x_train'])
  np.testing.assert_array_equal(data.x_test, arrays['x_test'])
  np.testing.assert_array_equal(data.y_train, arrays['y_train'])
  np.testing.assert_array_equal(data.y_test, arrays['y_test'])
  assert data.x_train.dtype == data.x_test.dtype == np.uint8
  assert data.y_train.dtype == data.y_test.dtype == np.int32
  assert data.classes == ('class 0', 'class 1', 'class 2')
  assert data.spec is datasets.SPECS['CIFAR']
  assert str(tmp_path / 'cifar10.npz') in data.source


def test_joined_files_give_the_same_pictures(tmp_path, arrays):
  stored = archives.joined(arrays)
  archives.save(tmp_path / 'cifar10.npz', stored)
  data = load(tmp_path)
  np.testing.assert_array_equal(data.x_train, arrays['x_train'])
  np.testing.assert_array_equal(data.y_test, arrays['y_test'])
  assert list(data.files_test[:2]) == ['test/0.png', 'test/1.png']
  assert 'lossy' not in data.note  # the files are PNG
  files = [archives.encoded(x, 'JPEG') for x in arrays['x_test']]
  stored['jpeg_test'] = np.frombuffer(b''.join(files), np.uint8)
  stored['off_test'] = np.cumsum([0, *map(len, files)])
  archives.save(tmp_path / 'cifar10.npz', stored)
  assert 'lossy' in load(tmp_path).note
  arrays['classes'] = np.array([7, 8, 9])  # numbers may be names
  archives.save(tmp_path / 'cifar10.npz', arrays)
  assert load(tmp_path).classes == ('7', '8', '9')


def test_an_npz_file_comes_before_a_folder(tmp_path, arrays):
  archives.image_folder(tmp_path / 'cifar10', archives.raw_arrays(classes=2))
  archives.save(tmp_path / 'cifar10.npz', arrays)
  assert len(load(tmp_path).classes) == 3


def test_the_name_given_comes_before_other_aliases(tmp_path):
  for name, classes in (('cifar100', 3), ('cifar100_clean10k', 4)):
    archives.save(tmp_path / f'{name}.npz', archives.raw_arrays(classes))
  for name, classes in (('cifar100_clean10k', 4), ('CIFAR100', 3)):
    assert len(load(tmp_path, name).classes) == classes


def test_gray_pictures_without_channel_axis(tmp_path):
  gray = {
    key: value[..., 0] if key.startswith('x_') else value
    for key, value in archives.raw_arrays(size=28).items()
  }
  archives.save(tmp_path / 'mnist.npz', gray)
  data = load(tmp_path, 'mnist')
  np.testing.assert_array_equal(data.x_train[..., 0], gray['x_train'])
  assert data.x_train.shape == (12, 28, 28, 1)


def test_vectors_stay_float32(tmp_path):
  arrays = archives.vectors()
  archives.save(tmp_path / 'timit.npz', arrays)
  data = load(tmp_path, 'TIMIT80')
  np.testing.assert_array_equal(data.x_train, arrays['x_train'])
  assert data.x_train.dtype == np.float32
  arrays['x_test'][3, 7] = np.nan
  archives.save(tmp_path / 'timit.npz', arrays)
  with pytest.raises(DatasetError, match=r'row 3\) .* not a finite number'):
    load(tmp_path, 'TIMIT80')


def test_the_note_says_what_differs_from_the_paper(tmp_path, arrays):
  archives.save(tmp_path / 'cifar10.npz', arrays)
  note = load(tmp_path, train_size=6).note
  assert "3 of the paper's 10 classes" in note
  assert "12 / 6 train / test samples, the paper's are 50000 / 10000" in note
  assert 'trained on 6 of 12 samples' in note
  assert 'lossy' not in note


def _labels(change):
  return lambda arrays: arrays.update(
    {key: change(arrays[key]) for key in ('y_train', 'y_test')}
  )


def _both_forms(arrays):
  for key, value in archives.joined(arrays).items():
    if key.startswith(('jpeg', 'off')):
      arrays[key] = value


# What changes nothing, in either form.
# fmt: off
_SAME = {
  **{f'labels {kind}': _labels(lambda y,
    kind=kind: y.astype(kind)) for kind in ('u1', 'i1', '>i4', 'u8')},
  'labels (N, 1)': _labels(lambda y: y[:, None]),
  **{f'one-hot {kind}': _labels(lambda y, kind=kind: np.eye(3,
    dtype=kind)[y]) for kind in ('f8', 'u1', '?')},
  'byte names': lambda arrays: arrays.update(
    classes=np.char.encode(arrays['classes'])
  ),
  'both forms': _both_forms,
  'unknown keys': lambda arrays: arrays.update(size=np.array([32, 32, 3])),
}
# fmt: on


@pytest.mark.parametrize('case', _SAME)
def test_forms_that_mean_the_same(tmp_path, arrays, case):
  archives.save(tmp_path / 'cifar10.npz', arrays)
  expected = load(tmp_path)
  _SAME[case](arrays)
  archives.save(tmp_path / 'cifar10.npz', arrays)
  data = load(tmp_path)
  assert data.digest == expected.digest
  assert data.classes == expected.classes
  assert data.note == expected.note


@pytest.mark.parametrize('kind', ['u1', 'u8'])
def test_limits_of_any_integer_type(tmp_path, kind):
  """An unsigned difference of limits would never be negative."""
  arrays = archives.joined(archives.raw_arrays(2, 1, 1, size=2))
  archives.save(tmp_path / 'cifar10.npz', arrays)
  expected = load(tmp_path).digest
  arrays |= {key: arrays[key].astype(kind) for key in ('off_train', 'off_test')}
  archives.save(tmp_path / 'cifar10.npz', arrays)
  assert load(tmp_path).digest == expected


def _without(key):
  return lambda arrays: arrays.pop(key)


def _with(**values):
  return lambda arrays: arrays.update(values)


# fmt: off
_RAW = {
  'no classes': (_without('classes'), 'has no classes'),
  'no labels': (_without('y_test'), 'has no y_test'),
  'no pictures': (_without('x_train'), 'has no jpeg_train, off_train'),
  'objects': (_with(classes=np.array(['a', None, 3], object)),
    'classes is stored as Python objects'),
  'label too large': (_with(y_train=np.arange(12) % 4),
    r'y_train: label 3 in row 3 is not in 0 to 2'),
  'label below 0': (_with(y_test=np.arange(6) - 1), 'label -1 in row 0'),
  'huge label': (_with(y_test=np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64)),
    'label 18446744073709551615 in row 5'),
  'empty class': (_with(y_train=np.arange(12) % 2),
    "y_train: no sample of class 'class 2'"),
  'float labels': (_with(y_train=np.zeros(12)), 'labels must be integers'),
  'two ones in a row': (_with(y_train=np.ones((12, 3), int)),
    'a row of one-hot labels must have a single 1'),
  'too wide a row': (_with(y_train=np.eye(4, dtype=int)[np.arange(12) % 3]),
    'one-hot rows of 3, found int64 of shape'),
  'too few labels': (_with(y_train=np.arange(9) % 3),
    'y_train has 9 entries for 12 train samples'),
  'float pictures': (_with(x_train=np.zeros((12, 32, 32, 3))),
    'x_train must be uint8 .* found float64 of shape'),
  'four channels': (_with(x_test=np.zeros((6, 8, 8, 4), np.uint8)),
    'with 1 or 3 channels'),
  'no area': (_with(x_test=np.zeros((6, 0, 8, 3), np.uint8)), 'must be uint8'),
  'vectors': (_with(x_test=np.zeros((6, 9), np.float32)),
    r'test row 0 .* expected a picture, found shape \(9,\)'),
  'no class': (_with(classes=np.array([], 'U1')), 'classes must be a vector'),
  'float names': (_with(classes=np.ones(3)), 'must be a vector of names'),
  'two classes of a name': (_with(classes=np.array(['a', 'b', 'a'])),
    "two classes are named 'a'"),
  'no text': (_with(classes=np.full(3, 0x7FFFFFFF, '<u4').view('<U1')),
    'classes is no text'),
  'beyond Unicode': (_with(classes=np.array([97, 98, 0x110000],
    '<u4').view('<U1')), 'classes is no text'),
}
# fmt: on

# fmt: off
_JOINED = {
  'unsigned, not rising': (_with(off_test=np.array([0, 9, 5], np.uint32)),
    'must be rising'),
  'past the end': (_with(off_train=np.arange(13) * 10**6),
    'off_train must be rising integers from 0 to'),
  'float limits': (_with(off_train=np.arange(13.0)), 'must be rising'),
  'wide bytes': (_with(jpeg_test=np.zeros(9, np.int32)), 'a uint8 vector'),
  'too few names': (_with(file_test=np.array(['a'])), 'file_test has 1 entr'),
  'names in a table': (_with(file_test=np.full((6, 1), 'a')),
    'file_test must be a vector of names'),
}
# fmt: on


@pytest.mark.parametrize('case', [*_RAW, *_JOINED])
def test_a_broken_file(tmp_path, arrays, case):
  change, message = (_RAW | _JOINED)[case]
  if case in _JOINED:
    arrays = archives.joined(arrays)
  change(arrays)
  path = archives.save(tmp_path / 'cifar10.npz', arrays)
  with pytest.raises(DatasetError, match=message) as caught:
    load(tmp_path)
  assert str(path) in str(caught.value)


def _zeros_within(content):
  middle = len(content) // 2
  return content[:middle] + bytes(40) + content[middle + 40 :]


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda content: content[: len(content) // 3], ''),
    (_zeros_within, ' at '),
    (lambda _: b'<html>404</html>', ''),
  ],
)
def test_damaged_files(tmp_path, arrays, damage, message):
  path = archives.save(tmp_path / 'cifar10.npz', arrays)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(
    DatasetError, match=f'cifar10.npz: broken or truncated npz file{message}'
  ):
    load(tmp_path)


def test_missing_data(tmp_path):
  with pytest.raises(DatasetError, match="nowhere' is not a folder"):
    load(tmp_path / 'nowhere')
  with pytest.raises(DatasetError, match='experiments data prepare SVHN'):
    load(tmp_path, 'svhn')


def test_digits_need_no_folder(tmp_path):
  data = datasets.load('digits', cache_dir=tmp_path)
  assert data.x_train.shape == (1437, 28, 28, 1)
  assert data.x_test.shape == (360, 28, 28, 1)
  assert np.bincount(data.y_test).tolist() == [36] * 10
  assert data.x_train.max() > 200
  assert "not one of the paper's datasets" in data.note
  again = datasets.load('digits', cache_dir=tmp_path, seed=1)
  assert again.digest != data.digest
