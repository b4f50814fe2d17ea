"""Original archives through our builders into arrays; TensorFlow unused."""

import shutil

import numpy as np
import pytest
import scipy.io

from experiments import datasets
from experiments.datasets import DatasetError
from experiments.datasets.archives import members
from tests.datasets import archives, originals


def _load(root, name, **kwargs):
  return datasets.load(name, data_dir=root, cache_dir=root / 'cache', **kwargs)


def _prepare(root, name):
  lines = []
  status = datasets.prepare(
    name, root, cache_dir=root / 'cache', progress=lines.append
  )
  assert status.state == 'ready'
  assert lines[-1].startswith(f'{name}: ready')
  return _load(root, name)


def test_flowers17(tmp_path, manual):
  originals.flowers17(manual)
  data = _prepare(tmp_path, 'Flowers17')
  assert np.bincount(data.y_train).tolist() == [60] * 17
  assert np.bincount(data.y_test).tolist() == [20] * 17
  assert data.note == ''
  # Class by number, part by list.
  lists = originals.flowers17_lists()
  tested = set(lists['tst1'].ravel().tolist())
  numbers = [int(name[6:10]) for name in data.files_test]
  assert set(numbers) == tested
  for number, label in zip(numbers, data.y_test, strict=True):
    if number <= 80:
      assert data.classes[label] == 'daffodil'
    if number > 1280:
      assert data.classes[label] == 'pansy'


def test_caltech256(tmp_path, manual, smaller):
  originals.caltech256(manual)
  smaller('Cal256-101', classes=4, train=3, test=2)
  data = _prepare(tmp_path, 'Cal256-101')
  assert data.classes == (
    '001.ak47',
    '002.american-flag',
    '056.dog',
    '198.spider',
  )
  assert np.bincount(data.y_train).tolist() == [3] * 4
  for name, label in zip(data.files_test, data.y_test, strict=True):
    assert name[:3] == data.classes[label][:3]
  assert not set(data.files_train) & set(data.files_test)


def test_icub(tmp_path, manual):
  originals.icub(manual)
  data = _prepare(tmp_path, 'iCub')
  assert len(data.classes) == 10
  assert np.bincount(data.y_train).tolist() == [9] * 10
  # Only the test set "categorization", whose objects were not trained on.
  assert np.bincount(data.y_test).tolist() == [2] * 10
  assert all('_9/' in name for name in data.files_test)


def test_pubfig83(tmp_path, manual, smaller):
  originals.pubfig83(manual, people=5, each=5)
  smaller('PubFig83-ID', classes=4, train=4, test=2)
  data = _prepare(tmp_path, 'PubFig83-ID')
  # Person 0 has 5 pictures, 6 are needed.
  assert data.classes == ('Person 1', 'Person 2', 'Person 3', 'Person 4')
  for name, label in zip(data.files_train, data.y_train, strict=True):
    assert name.startswith(data.classes[label])


def test_sufrw(tmp_path, manual, smaller):
  originals.sufrw(manual, people=4, each=3)
  smaller('SUFR-W-ID', classes=4, train=2, test=1)
  data = _prepare(tmp_path, 'SUFR-W-ID')
  assert data.classes[0] == "1 Name O'Test-0"
  for name, label in zip(data.files_train, data.y_train, strict=True):
    assert (int(name[:5]) - 1) % 4 == label


def test_scene67(tmp_path, manual):
  originals.scene67(manual, train=3, test=2)
  data = _prepare(tmp_path, 'Scene67')
  assert data.classes == ('airport_inside', 'bar', 'winecellar')
  assert set(data.files_train) == {
    f'{scene}/{scene}_{i:04d}.jpg' for scene in data.classes for i in range(3)
  }
  assert np.bincount(data.y_test).tolist() == [2] * 3


def test_pictures_are_stored_byte_for_byte(tmp_path, manual, smaller):
  """The digest of a folder with the same files is the same."""
  originals.pubfig83(manual, people=2, each=5)
  smaller('PubFig83-ID', classes=2, train=3, test=2)
  data = _prepare(tmp_path, 'PubFig83-ID')
  other = tmp_path / 'other' / 'pubfig83'
  for part, names in (('train', data.files_train), ('test', data.files_test)):
    for name in names:
      person, number = name.split('/')
      path = other / part / name
      path.parent.mkdir(parents=True, exist_ok=True)
      number = 100 * int(person[-1]) + int(number[:-4])
      path.write_bytes(originals.jpeg(number))
  again = datasets.load('pubfig83', data_dir=other.parent, cache_dir=tmp_path)
  assert again.digest == data.digest


def test_an_unpacked_folder_does_as_well(tmp_path, manual, smaller):
  originals.sufrw(manual)
  smaller('SUFR-W-ID', classes=4, train=2, test=1)
  expected = _prepare(tmp_path, 'SUFR-W-ID').digest
  place = tmp_path / 'second' / 'downloads' / 'manual' / 'sufr_w'
  for name in ('image_files', 'info_files'):
    shutil.unpack_archive(manual / 'sufr_w' / f'{name}.zip', place)
  assert _prepare(tmp_path / 'second', 'SUFR-W-ID').digest == expected


def test_a_draw_is_seeded(tmp_path, manual, smaller):
  originals.pubfig83(manual, people=5, each=5)
  smaller('PubFig83-ID', classes=2, train=3, test=2)
  _prepare(tmp_path, 'PubFig83-ID')
  digests = {_load(tmp_path, 'pubfig83', seed=s).digest for s in range(4)}
  assert len(digests) == 4
  assert _load(tmp_path, 'pubfig83', seed=3).digest in digests


def test_too_few_people(tmp_path, manual):
  originals.pubfig83(manual)
  with pytest.raises(
    DatasetError, match=r'80 classes with at least 100 samples .* 0 of 4'
  ):
    _prepare(tmp_path, 'PubFig83-ID')


@pytest.mark.parametrize(
  'name', ['iCub', 'PubFig83-ID', 'SUFR-W-ID', 'TIMIT80']
)
def test_without_originals_a_person_is_told_what_to_do(tmp_path, manual, name):
  with pytest.raises(DatasetError, match='First .* put it') as caught:
    _prepare(tmp_path, name)
  assert str(manual) in str(caught.value)
  assert 'http' in str(caught.value)


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_a_truncated_tar_archive(tmp_path, manual):
  originals.pubfig83(manual, people=30)
  _truncate(manual / 'pubfig83' / 'pubfig83.v1.tgz')
  with pytest.raises(DatasetError, match='v1.tgz: damaged or truncated'):
    _prepare(tmp_path, 'PubFig83-ID')
  assert datasets.status('PubFig83-ID', tmp_path).state != 'ready'


@pytest.mark.parametrize('kept', [0, 200])  # of a header
def test_a_tar_archive_cut_between_members(tmp_path, kept):
  files = {f'{i}.txt': bytes(1000) for i in range(3)}
  path = originals.tar(tmp_path / 'a.tar', files)
  whole = path.read_bytes()
  assert [name for name, _ in members(path)] == list(files)
  path.write_bytes(whole[: 2 * (512 + 1024) + kept])
  with pytest.raises(DatasetError, match='a.tar: damaged or truncated'):
    list(members(path))


def test_a_truncated_zip_archive(tmp_path, manual):
  originals.icub(manual)
  _truncate(manual / 'icub_world' / 'iCubWorld.zip')
  with pytest.raises(DatasetError, match='iCubWorld.zip: damaged or truncated'):
    _prepare(tmp_path, 'iCub')


def test_a_wrong_checksum(tmp_path, manual):
  originals.caltech256(manual)
  with pytest.raises(
    DatasetError, match='MD5 is .* expected 67b4f42ca05d46448c6bb8ecd2220f6d'
  ):
    _prepare(tmp_path, 'Cal256-101')


@pytest.mark.parametrize(
  ('name', 'place'),
  [
    ('PubFig83-ID', 'pubfig83/a.tar'),
    ('SUFR-W-ID', 'sufr_w/a.tar'),
    ('iCub', 'icub_world/a.tar'),
    ('TIMIT80', 'timit_subphones/a.tar'),
  ],
)
def test_an_unexpected_layout(tmp_path, manual, name, place):
  originals.tar(manual / place, {'else/where/0001.jpg': originals.jpeg(0)})
  with pytest.raises(DatasetError, match='; expected ') as caught:
    _prepare(tmp_path, name)
  assert str((manual / place).parent) in str(caught.value)


def test_a_listed_picture_that_is_missing(tmp_path, manual):
  originals.scene67(manual)
  with open(manual / 'TestImages.txt', 'a') as file:
    file.write('bar/no.jpg\n')
  with pytest.raises(DatasetError, match=r'1 pictures of TestImages.*bar/no'):
    _prepare(tmp_path, 'Scene67')


def test_more_pictures_than_people_listed(tmp_path, manual):
  originals.sufrw(manual)
  originals.zipped(
    manual / 'sufr_w' / 'more.zip',
    {'x/SUFR_in_the_wild/99.jpg': originals.jpeg(0)},
  )
  with pytest.raises(DatasetError, match=r'99\.jpg but 12 lines'):
    _prepare(tmp_path, 'SUFR-W-ID')


def test_a_list_of_people_of_another_form(tmp_path, manual):
  originals.folder(
    manual / 'sufr_w',
    {
      'SUFR_in_the_wild_info.txt': b'1 # A\nnobody\n',
      'SUFR_in_the_wild/1.jpg': originals.jpeg(0),
    },
  )
  with pytest.raises(DatasetError, match="line 2 of .* is 'nobody'"):
    _prepare(tmp_path, 'SUFR-W-ID')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tst1': None}, 'not a list of splits'),
    ({'tst1': np.arange(1, 341)[None]}, 'tst1 does not list 20'),
    ({'tst1': 'train'}, 'a picture is in two lists'),
  ],
)
def test_lists_of_flowers_that_cannot_be(tmp_path, manual, change, message):
  originals.flowers17(manual)
  lists = originals.flowers17_lists()
  for key, value in change.items():
    if value is None:
      del lists[key]
    else:
      # Twenty pictures of each class that train already.
      overlap = lists['trn1'].reshape(17, 40)[:, :20].reshape(1, -1)
      lists[key] = overlap if isinstance(value, str) else value
  scipy.io.savemat(manual / 'datasplits.mat', lists)
  with pytest.raises(DatasetError, match=message):
    _prepare(tmp_path, 'Flowers17')


def test_a_missing_flower(tmp_path, manual):
  originals.flowers17(manual)
  files = {f'jpg/image_{i:04d}.jpg': b'x' for i in range(1, 1360)}
  originals.tar(manual / '17flowers.tgz', files, 'w:gz')
  with pytest.raises(DatasetError, match=r'image_1360\.jpg is not there'):
    _prepare(tmp_path, 'Flowers17')


def test_nothing_of_an_archive_is_written_elsewhere(tmp_path, manual, smaller):
  smaller('PubFig83-ID', classes=1, train=1, test=1)
  files = {
    '../../pubfig83/Person 0/1.jpg': originals.jpeg(1),
    '/pubfig83/Person 0/2.jpg': originals.jpeg(2),
  }
  originals.tar(manual / 'pubfig83' / 'a.tar', files)
  before = {path for path in tmp_path.parent.rglob('*.jpg')}
  _prepare(tmp_path, 'PubFig83-ID')
  assert {path for path in tmp_path.parent.rglob('*.jpg')} == before


def test_preparing_again_does_nothing(tmp_path):
  archives.image_folder(tmp_path / 'stl10', archives.raw_arrays(10))
  _prepare(tmp_path, 'STL10')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['cache', 'stl10']


def test_the_data_folder_is_made(tmp_path):
  with pytest.raises(DatasetError, match='First accept the terms'):
    _prepare(tmp_path / 'new' / 'folder', 'PubFig83-ID')
  assert (tmp_path / 'new' / 'folder').is_dir()
  (tmp_path / 'file').write_text('')
  with pytest.raises(DatasetError, match="file' cannot be made"):
    _prepare(tmp_path / 'file', 'PubFig83-ID')
