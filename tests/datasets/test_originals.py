"""Original archives become arrays, in whatever form a person has them."""

import errno
import sys

import numpy as np
import pytest

from experiments import datasets
from experiments.datasets import DatasetError
from experiments.datasets.archives import members
from tests.datasets import archives, originals
from tests.datasets.archives import load
from tests.experiments.command_line import python


def _flowers17(data):
  assert np.bincount(data.y_train).tolist() == [5] * 17
  tested = originals.flowers17_lists()['tst1'].ravel().tolist()
  assert {int(name[6:10]) for name in data.files_test} == set(tested)
  for name, label in zip(data.files_test, data.y_test, strict=True):
    if int(name[6:10]) in range(1, 7):
      assert data.classes[label] == 'daffodil'


def _caltech256(data):
  assert '257.clutter' not in data.classes
  assert np.bincount(data.y_train).tolist() == [3] * 4
  for name, label in zip(data.files_test, data.y_test, strict=True):
    assert name[:3] == data.classes[label][:3]


def _icub(data):
  assert np.bincount(data.y_train).tolist() == [9] * 10
  # Only the test set "categorization", whose objects were not trained on.
  assert np.bincount(data.y_test).tolist() == [2] * 10
  assert all('_9/' in name for name in data.files_test)


def _pubfig83(data):
  # Person 0 has 5 pictures, 6 are needed.
  assert data.classes == ('Person 1', 'Person 2', 'Person 3', 'Person 4')
  for name, label in zip(data.files_train, data.y_train, strict=True):
    assert name.startswith(data.classes[label])


def _sufrw(data):
  assert data.classes[0] == "0 Name O'Test-0"
  for name, label in zip(data.files_train, data.y_train, strict=True):
    assert int(name[:5]) % 4 == label


def _scene67(data):
  assert data.classes == ('airport_inside', 'bar', 'winecellar')
  assert set(data.files_train) == {
    f'{scene}/{scene}_{i:04d}.jpg' for scene in data.classes for i in range(3)
  }
  assert np.bincount(data.y_test).tolist() == [2] * 3


def _timit(data):
  assert data.x_train.shape == (120, 1845)
  assert np.bincount(data.y_test).tolist() == [5] * 6
  for name, label in zip(data.files_train, data.y_train, strict=True):
    # Development speakers only, no SA sentences.
    assert name.split('/')[0] in ('faks0', 'mgwt0')
    assert '/sa' not in name
    center = int(name.rpartition(':')[2]) * 160 + 200
    phone, place = divmod(center, originals.PHONE)
    third = place * 3 // originals.PHONE + 1
    assert data.classes[label] == f'{originals.PHONES[phone]}_{third}'
  # The middle frame of each is normalized over the training set.
  middle = data.x_train.reshape(-1, 15, 123)[:, 7]
  np.testing.assert_allclose(middle.mean(axis=0), 0, atol=1e-4)
  np.testing.assert_allclose(middle.std(axis=0), 1, atol=1e-4)


_RIGHT = {
  'Flowers17': _flowers17, 'Cal256-101': _caltech256, 'iCub': _icub,
  'PubFig83-ID': _pubfig83, 'SUFR-W-ID': _sufrw, 'Scene67': _scene67,
  'TIMIT80': _timit,
}  # fmt: skip


_IGNORED = {
  'Cal256-101': 'Cal256-101: ignored 2 files: 1 .m, 1 without extension',
  'PubFig83-ID': '',
}


def _mac(files):
  """The files as macOS packs them: with a shadow of each, and its settings."""
  shadows = {}
  for name in files:
    folder, _, file = name.rpartition('/')
    shadows[f'__MACOSX/{folder}/._{file}'] = b'\x00\x05\x16\x07 Mac OS X'
    shadows[f'{folder}/.DS_Store'] = b'Bud1'
  return {**files, **shadows}


def _other_top(files):
  return {
    f'My set (1)/x/{name.partition("/")[2]}': content
    for name, content in files.items()
  }


def _repacked(path, files):
  """Packed under another top folder, then zipped again on a Mac."""
  inner = archives.packed(path.with_name(f'inner {path.name}'), files)
  content = inner.read_bytes()
  inner.unlink()
  again = {path.name: content, f'._{path.name}': b'no archive'}
  archives.packed(path.with_name(f'{path.name.split(".")[0]}.zip'), again)


def _zipped_on_a_mac(path, files):
  name = f'{path.name.split(".")[0]}.zip'
  archives.packed(path.with_name(name), _mac(_other_top(files)))


def _unpacked_twice(path, files):
  folder = path.with_name(path.name.split('.')[0])
  archives.folder(folder, _mac({**files, **_other_top(files)}))


@pytest.mark.parametrize('name', _RIGHT)
def test_all_forms_give_the_same_samples(tmp_path, prepare, original, name):
  original.write(tmp_path / 'downloads' / 'manual')
  data, lines = prepare(name)
  _RIGHT[name](data)
  assert not set(data.files_train) & set(data.files_test)
  said = ''.join(line for line in lines if 'ignored' in line)
  assert said == _IGNORED.get(name, said)
  for write in (_repacked, _zipped_on_a_mac, _unpacked_twice):
    root = tmp_path / write.__name__
    manual = root / 'downloads' / 'manual'
    archives.folder(manual, original.beside)
    for place, files in original.packed.items():
      write(manual / place, files)
    assert prepare(name, root)[0].digest == data.digest, write


@pytest.mark.parametrize('name', ['Flowers17'])
def test_a_truncated_archive(manual, tmp_path, prepare, original, name):
  original.write(manual)
  path = manual / list(original.packed)[-1]
  content = path.read_bytes()
  path.write_bytes(content[: len(content) * 2 // 3])
  with pytest.raises(DatasetError, match='damaged or truncated') as caught:
    prepare(name)
  assert str(path) in str(caught.value)
  assert datasets.status(name, tmp_path).state != 'ready'


def test_pictures_of_any_format(manual, small, prepare):
  (files,) = originals.pubfig83().packed.values()
  other = archives.encoded(archives.picture(7), 'WEBP')
  files = {name.replace('/1.jpg', '/1.WEBP'): other for name in files}
  archives.packed(manual / 'pubfig83' / 'a.zip', files)
  data, lines = prepare('PubFig83-ID')
  assert len(data.x_train) == 16
  assert not any('ignored' in line for line in lines)


def test_pictures_are_stored_byte_for_byte(manual, tmp_path, small, prepare):
  """The digest of a folder with the same files is the same."""
  original = originals.pubfig83()
  original.write(manual)
  data, _ = prepare('PubFig83-ID')
  (files,) = original.packed.values()
  for part, names in (('train', data.files_train), ('test', data.files_test)):
    wanted = {f'{part}/{name}': files[f'pubfig83/{name}'] for name in names}
    archives.folder(tmp_path / 'other' / 'pubfig83', wanted)
  assert load(tmp_path / 'other', 'pubfig83').digest == data.digest
  # The draw is seeded.
  assert load(tmp_path, 'pubfig83', seed=1).digest != data.digest


@pytest.mark.parametrize('kept', [0, 200])  # of a header
def test_a_tar_archive_cut_between_members(tmp_path, kept):
  files = {f'{i}.txt': bytes(1000) for i in range(3)}
  path = archives.packed(tmp_path / 'a.tar', files)
  assert [name for name, _ in members(path)] == list(files)
  path.write_bytes(path.read_bytes()[: 2 * (512 + 1024) + kept])
  with pytest.raises(DatasetError, match='a.tar: damaged or truncated'):
    list(members(path))


def test_names_that_macos_wrote_are_read_as_utf8(tmp_path):
  path = archives.packed(tmp_path / 'a.zip', {'Jose\u0301/1.jpg': b''})
  content = path.read_bytes().replace(b'\x00\x08', b'\x00\x00')  # no UTF-8 flag
  path.write_bytes(content)
  assert [name for name, _ in members(path)] == ['Jos\xe9/1.jpg']


def test_a_wrong_checksum(manual, prepare):
  originals.caltech256().write(manual)
  with pytest.raises(
    DatasetError, match='MD5 is .* expected 67b4f42ca05d46448c6bb8ecd2220f6d'
  ):
    prepare('Cal256-101')


# Those that a person has to get.
@pytest.mark.parametrize(
  ('name', 'place'),
  [
    ('PubFig83-ID', 'pubfig83'),
    ('SUFR-W-ID', 'sufr_w'),
    ('iCub', 'icub_world'),
    ('TIMIT80', 'timit_subphones'),
  ],
)
def test_no_original_and_another_one(manual, prepare, name, place):
  with pytest.raises(DatasetError, match='First .*http.* put it') as caught:
    prepare(name)
  assert str(manual) in str(caught.value)
  archives.packed(manual / place / 'a.tar', {'0001.jpeg': originals.jpeg(0)})
  with pytest.raises(DatasetError, match='; expected ') as caught:
    prepare(name)
  assert str(manual / place) in str(caught.value)


def _lists(**changed):
  return {
    'datasplits.mat': originals.mat(originals.flowers17_lists() | changed)
  }


# A dataset, extra files beside its originals, and the expected message.
# fmt: off
_WRONG = {
  'two pictures of one name': ('PubFig83-ID',
    lambda: {'pubfig83/b/Person 0/1.JPG': originals.jpeg(0)},
    'b/Person 0/1.JPG and pubfig83/Person 0/1.jpg are different files'),
  'a listed picture is missing': ('Scene67',
    lambda: {'TestImages.txt': b'bar/no.jpg\n'},
    '1 listed pictures are missing, such as bar/no'),
  'a picture of both lists': ('Scene67',
    lambda: {'TestImages.txt': b'bar/bar_0001.jpg\n'},
    'bar/bar_0001.jpg is listed twice'),
  'no text': ('Scene67', lambda: {'TestImages.txt': b'bar/\xff.jpg\n'},
    'TestImages.txt: not a list'),
  'more pictures than people': ('SUFR-W-ID',
    lambda: {'sufr_w/SUFR_in_the_wild/99.jpg': originals.jpeg(0)},
    r'99\.jpg: a picture, but 12 lines'),
  'a line of another form': (
    'SUFR-W-ID',
    lambda: {'sufr_w/SUFR_in_the_wild_info.txt': b'1 # A\nnobody\n'},
    "line 2 of .* is 'nobody'",
  ),
  'no lists': ('Flowers17',
    lambda: {'datasplits.mat': originals.mat({'x': np.zeros(3)})},
    'not a list of splits'),
  'too short a list': ('Flowers17', lambda: _lists(tst1=np.arange(1, 17)[None]),
    'tst1 does not list 1 '),
  'a picture of two lists': ('Flowers17',
    lambda: _lists(tst1=originals.flowers17_lists()['trn1'][:, ::3]),
    r'image_\d{4}\.jpg is listed twice'),
}
# fmt: on


@pytest.mark.parametrize('case', _WRONG)
def test_wrong_files(manual, small, prepare, case):
  name, change, message = _WRONG[case]
  originals.MAKERS[name]().write(manual)
  archives.folder(manual, change())
  with pytest.raises(DatasetError, match=message):
    prepare(name)


# A dataset, the member left out, and the expected message.
@pytest.mark.parametrize(
  ('name', 'gone', 'said'),
  [
    (
      'Flowers17',
      'image_0001',
      '1 listed pictures are missing, such as image_0001.jpg',
    ),
    ('iCub', 'train/lemons', 'no train pictures of lemons'),
    ('SUFR-W-ID', 'info.txt', 'no SUFR_in_the_wild_info.txt'),
    ('TIMIT80', 'FAKS0/SX37.PHN', r'faks0/sx37 has only a \.wav file'),
    ('TIMIT80', '/FAKS0/', '8 sentences, such as faks0 with 0'),
    ('TIMIT80', '/FAKS0/SX37', '8 sentences, such as faks0 with 7'),
  ],
)
def test_missing_members(manual, prepare, original, name, gone, said):
  for files in original.packed.values():
    for member in [member for member in files if gone in member]:
      del files[member]
  original.write(manual)
  with pytest.raises(DatasetError, match=said):
    prepare(name)


def test_nothing_of_an_archive_is_written_elsewhere(
  tmp_path, manual, smaller, prepare
):
  smaller('PubFig83-ID', classes=2, train=1, test=1)
  files = {
    '../../pubfig83/Person 0/1.jpg': originals.jpeg(1),
    '/pubfig83/Person 0/2.jpg': originals.jpeg(2),
    '../../pubfig83/Person 1/1.jpg': originals.jpeg(3),
    '/pubfig83/Person 1/2.jpg': originals.jpeg(4),
  }
  archives.packed(manual / 'pubfig83' / 'a.tar', files)
  before = set(tmp_path.parent.rglob('*.jpg'))
  prepare('PubFig83-ID')
  assert set(tmp_path.parent.rglob('*.jpg')) == before


def test_the_data_folder(tmp_path, prepare):
  """It is made if need be, and nothing is prepared that is there already."""
  with pytest.raises(DatasetError, match='First accept the terms'):
    prepare('PubFig83-ID', tmp_path / 'new' / 'folder')
  archives.image_folder(tmp_path / 'new' / 'stl10', archives.raw_arrays(10))
  prepare('STL10', tmp_path / 'new')
  assert {path.name for path in (tmp_path / 'new').iterdir()} == {
    'folder', 'cache', 'stl10',
  }  # fmt: skip
  (tmp_path / 'file').write_text('')
  with pytest.raises(DatasetError, match="file' cannot be made"):
    prepare('PubFig83-ID', tmp_path / 'file')


@pytest.mark.parametrize('root', ['a[b]@2', '{a,b}*?', '~', '%\n é'])
def test_data_and_cache_folders_of_any_name(tmp_path, prepare, root):
  originals.scene67().write(tmp_path / root / 'downloads' / 'manual')
  data, _ = prepare('Scene67', tmp_path / root)
  _scene67(data)
  assert len(list((tmp_path / root / 'cache').iterdir())) == 1


def test_a_data_folder_that_is_not_utf8(tmp_path, prepare):
  root = tmp_path / 'caf\udce9'
  archives.save(root.parent / 'x.npz', archives.raw_arrays())
  originals.scene67().write(root / 'downloads' / 'manual')
  with pytest.raises(DatasetError, match='takes only names in UTF-8'):
    prepare('Scene67', root)
  # Files that need no tensorflow-datasets are read from there.
  archives.save(root / 'cifar10.npz', archives.raw_arrays())
  data = load(root, 'CIFAR')
  assert len(data.x_train) == 12
  assert 'caf\\udce9' in data.source


@pytest.mark.parametrize(
  ('module', 'name'),
  [
    ('tensorflow', 'MNIST'),
    ('importlib_resources', 'PubFig83-ID'),
    ('soundfile', 'TIMIT80'),
    ('tensorflow_datasets', 'MNIST'),
  ],
)
def test_a_missing_library_is_named_with_its_extra(
  manual, small, prepare, monkeypatch, module, name
):
  if name in originals.MAKERS:
    originals.MAKERS[name]().write(manual)
  for loaded in [m for m in sys.modules if m.split('.')[0] == module]:
    monkeypatch.setitem(sys.modules, loaded, None)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(DatasetError, match=rf"needs {module}.*-e '\.\["):
    prepare(name)


_FULL = """
import resource, signal, sys
from experiments import datasets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, -1))
try:
  list(datasets.prepare('Scene67', sys.argv[1], cache_dir=sys.argv[1]))
except datasets.DatasetError as error:
  print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
print(datasets.status('Scene67', sys.argv[1]).state)
"""


def test_a_full_disk_leaves_nothing_that_looks_ready(tmp_path, manual, prepare):
  originals.scene67().write(manual)
  *_, error, state = python(_FULL, tmp_path).splitlines()
  assert 'Scene67: mit_indoor67 could not be prepared' in error
  assert 'File too large' in error or errno.errorcode[errno.EFBIG] in error
  assert state == 'downloadable'
  prepare('Scene67')  # once there is room
