"""Our builders under the test of TFDS, and its builders under our splits."""

import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
pytest.importorskip(
  'tensorflow',
  reason='TFDS writes through TensorFlow: pip install "symjax-bp[prepare]"',
)
pytest.importorskip('importlib_resources', reason='TFDS imports it')
pytest.importorskip('dill', reason='the test case of TFDS imports it')

import tensorflow_datasets as tfds  # noqa: E402

from experiments import datasets  # noqa: E402
from experiments.datasets import archives, builders  # noqa: E402
from tests.datasets import originals  # noqa: E402
from tests.datasets.archives import picture  # noqa: E402


def _case(builder, write, splits):
  """TFDS's test case for one of our builders, over what `write` writes."""

  class Case(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = builder
    SPLITS = splits
    DL_DOWNLOAD_RESULT = {
      archive.name: archive.name
      for archive in archives.ORIGINALS[builder.name].archives
    }
    # No checksum that TFDS could use is published for these archives.
    SKIP_CHECKSUMS = True
    MOCK_OUT_FORBIDDEN_OS_FUNCTIONS = False

    @classmethod
    def setUpClass(cls):
      folder = tempfile.TemporaryDirectory()
      cls.addClassCleanup(folder.cleanup)
      cls.EXAMPLE_DIR = folder.name
      write(Path(folder.name))
      super().setUpClass()

    def test_download_and_prepare_as_dataset(self):
      with mock.patch.object(archives, 'verify'):
        super().test_download_and_prepare_as_dataset()

    def test_session(self, *args, **kwargs):
      return super().test_session(*args, **kwargs)

    # TensorFlow's helper of that name is no test.
    test_session.__test__ = False

  return Case


TestFlowers17 = _case(
  builders.OxfordFlowers17,
  originals.flowers17,
  {'train': 680, 'validation': 340, 'test': 340},
)
TestCaltech256 = _case(builders.Caltech256, originals.caltech256, {'train': 25})
TestIcubWorld = _case(
  builders.IcubWorld, originals.icub, {'train': 90, 'test': 20}
)
TestPubfig83 = _case(builders.Pubfig83, originals.pubfig83, {'train': 26})
TestSufrW = _case(builders.SufrW, originals.sufrw, {'train': 12})
TestMitIndoor67 = _case(
  builders.MitIndoor67, originals.scene67, {'train': 9, 'test': 6}
)


@pytest.fixture(name='prepare')
def _prepare(tmp_path, monkeypatch):
  """Prepares a set of TFDS from files on disk instead of a download."""

  def run(name, extracted):
    def download_and_extract(self, urls):
      return extracted

    monkeypatch.setattr(
      tfds.download.DownloadManager,
      'download_and_extract',
      download_and_extract,
    )
    datasets.prepare(
      name, tmp_path, cache_dir=tmp_path / 'cache', progress=lambda _: None
    )
    return datasets.load(name, data_dir=tmp_path, cache_dir=tmp_path / 'cache')

  return run


def test_lfw(tmp_path, prepare, smaller):
  """Its records have no file names, and two pictures may be equal."""
  files = {}
  for person in range(3):
    for i in range(4):
      face = originals.encoded_face(person if i < 2 else 10 * person + i)
      name = f'Person_{person}'
      files[f'lfw/{name}/{name}_{i:04d}.jpg'] = face
  originals.folder(tmp_path / 'extracted', files)
  smaller('LFW-ID', classes=2, train=2, test=2)
  data = prepare('LFW-ID', str(tmp_path / 'extracted'))
  assert set(data.classes) < {'Person_0', 'Person_1', 'Person_2'}
  assert np.bincount(data.y_train).tolist() == [2, 2]
  assert not set(data.files_train) & set(data.files_test)


def test_flowers102(tmp_path, prepare):
  """Official training and validation lists train."""
  count = 102 * 4
  files = {
    f'jpg/image_{i + 1:05d}.jpg': originals.jpeg(i) for i in range(count)
  }
  originals.folder(tmp_path / 'images', files)
  labels = np.arange(count) % 102 + 1
  scipy.io.savemat(tmp_path / 'imagelabels.mat', {'labels': labels[None]})
  ids = np.arange(1, count + 1).reshape(4, 1, 102)
  lists = {'trnid': ids[0], 'valid': ids[1], 'tstid': np.hstack(ids[2:])}
  scipy.io.savemat(tmp_path / 'setid.mat', lists)
  data = prepare(
    'Flowers102',
    {
      'images': str(tmp_path / 'images'),
      'labels': str(tmp_path / 'imagelabels.mat'),
      'setid': str(tmp_path / 'setid.mat'),
    },
  )
  assert np.bincount(data.y_train).tolist() == [2] * 102
  assert np.bincount(data.y_test).tolist() == [2] * 102
  assert data.classes[0] == 'pink primrose'
  numbers = {int(name[6:11]) for name in data.files_train}
  assert numbers == set(range(1, 205))


def test_caltech101(tmp_path, prepare, smaller):
  """Both splits of TFDS, itself drawn, are drawn from anew."""
  names = ('accordion', 'BACKGROUND_Google', 'Faces')
  files = {
    f'101_ObjectCategories/{name}/image_{i + 1:04d}.jpg': originals.jpeg(i)
    for name in names
    for i in range(33)
  }
  place = tmp_path / 'extracted' / 'caltech-101' / '101_ObjectCategories.tar.gz'
  originals.tar(place, files, 'w:gz')
  smaller('Cal101', classes=3, train=30, test=10)
  data = prepare('Cal101', tmp_path / 'extracted')
  assert data.classes == ('accordion', 'background_google', 'faces')
  assert np.bincount(data.y_train).tolist() == [30] * 3
  assert np.bincount(data.y_test).tolist() == [3] * 3
  # All 33 pictures of a class are used, whichever split of TFDS had them.
  for label in range(3):
    assert (
      len(
        {
          *data.files_train[data.y_train == label],
          *data.files_test[data.y_test == label],
        }
      )
      == 33
    )


def test_stl10(tmp_path, prepare):
  """Arrays are stored without loss; unlabelled pictures are left out."""
  folder = tmp_path / 'extracted' / 'stl10_binary'
  folder.mkdir(parents=True)
  names = 'airplane bird car cat deer dog horse monkey ship truck'.split()
  (folder / 'class_names.txt').write_text('\n'.join(names) + '\n')
  pictures = np.stack([picture(i, (96, 96)) for i in range(30)])
  labels = np.arange(30, dtype=np.uint8) % 10 + 1
  for part, rows in (('train', slice(0, 20)), ('test', slice(20, 30))):
    # Column by column, channel by channel.
    stored = pictures[rows].transpose(0, 3, 2, 1)
    (folder / f'{part}_X.bin').write_bytes(stored.tobytes())
    (folder / f'{part}_y.bin').write_bytes(labels[rows].tobytes())
  stored = pictures[:4].transpose(0, 3, 2, 1)
  (folder / 'unlabeled_X.bin').write_bytes(stored.tobytes())
  data = prepare('STL10', str(tmp_path / 'extracted'))
  assert data.classes == tuple(names)
  assert np.bincount(data.y_train).tolist() == [2] * 10
  assert np.bincount(data.y_test).tolist() == [1] * 10
  assert 'lossy' not in data.note
  report = datasets.check('STL10', tmp_path, cache_dir=tmp_path / 'cache')
  assert report.sizes == {(96, 96): 30}


def test_a_failed_download_says_what_a_person_can_do(tmp_path, monkeypatch):
  def offline(self, urls):
    raise OSError('no route to host')

  monkeypatch.setattr(tfds.download.DownloadManager, 'download', offline)
  with pytest.raises(
    datasets.DatasetError,
    match=r'could not be prepared .*: no route to host; .* put 17flowers\.tgz',
  ):
    datasets.prepare('Flowers17', tmp_path, progress=lambda _: None)
  assert datasets.status('Flowers17', tmp_path).state == 'downloadable'


def test_without_tensorflow_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tensorflow', None)
  with pytest.raises(
    datasets.DatasetError, match=r'needs tensorflow.*symjax-bp\[prepare\]'
  ):
    datasets.prepare('MNIST', tmp_path, progress=lambda _: None)
