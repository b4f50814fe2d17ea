"""Leases: one owner at a time, and nobody waits for the dead."""

import concurrent.futures
import json
import os
import subprocess
import sys
import time

import pytest

from experiments.leases import Leases
from experiments.runs.files import StoreError


def _aged(folder, seconds: float) -> None:
  """As if all claims had last been renewed so long ago."""
  then = time.time() - seconds
  for path in folder.iterdir():
    os.utime(path, (then, then))


def _elsewhere(folder) -> None:
  """As if all claims were those of another host."""
  for path in folder.iterdir():
    path.write_text(json.dumps(json.loads(path.read_text()) | {'host': 'far'}))


def test_one_owner_of_a_name(tmp_path):
  with Leases(tmp_path, 60) as mine, Leases(tmp_path, 60) as others:
    lease = mine.acquire('a')
    assert lease is not None
    assert lease.held()
    assert others.acquire('a') is None
    assert mine.acquire('a') is None
    assert others.acquire('b') is not None
    mine.give_up(lease)
    again = others.acquire('a')
    assert again is not None
    assert again.held()
    assert not lease.held()
  owner = json.loads((tmp_path / 'a.2').read_text())
  assert owner['process'] == os.getpid()
  assert {'host', 'since', 'started'} < owner.keys()


def test_what_is_finished_leaves_nothing(tmp_path):
  with Leases(tmp_path, 60) as leases:
    for _ in range(3):
      lease = leases.acquire('a')
      assert lease is not None
      leases.give_up(lease)
    lease = leases.acquire('a')
    assert lease is not None
    assert len(list(tmp_path.iterdir())) == 4
    leases.remove(lease)
    assert list(tmp_path.iterdir()) == []
    assert not lease.held()


def test_a_stale_lease_is_taken_over_by_one_of_many(tmp_path):
  with Leases(tmp_path, 1000) as mine:
    lease = mine.acquire('a')
    assert lease is not None
    _elsewhere(tmp_path)
    _aged(tmp_path, 900)
    assert Leases(tmp_path, 1000).acquire('a') is None
    _aged(tmp_path, 1100)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      won = list(
        pool.map(lambda _: Leases(tmp_path, 1000).acquire('a'), range(64))
      )
    assert len([lease for lease in won if lease is not None]) == 1
    # Who was away does not touch what is another's now.
    assert not lease.held()
    lease.renew()
    lease.give_up()
    lease.remove()
  (winner,) = [lease for lease in won if lease is not None]
  assert winner.held()
  assert Leases(tmp_path, 1000).acquire('a') is None


def test_a_heart_beats(tmp_path):
  with Leases(tmp_path, 0.4) as mine:
    lease = mine.acquire('a')
    assert lease is not None
    _aged(tmp_path, 60)
    before = (tmp_path / 'a.1').stat().st_mtime
    end = time.monotonic() + 60
    while (tmp_path / 'a.1').stat().st_mtime == before:
      assert time.monotonic() < end
      time.sleep(0.01)
    assert Leases(tmp_path, 60).acquire('a') is None


def test_the_dead_of_this_host_are_not_waited_for(tmp_path):
  code = (
    'import sys, pathlib; from experiments.leases import Leases;'
    "assert Leases(pathlib.Path(sys.argv[1]), 1e6).acquire('a')"
  )
  command = [sys.executable, '-c', code, str(tmp_path)]
  subprocess.run(command, check=True, env={**os.environ, 'PYTHONPATH': '.'})
  claim = (tmp_path / 'a.1').read_text()
  _elsewhere(tmp_path)
  assert Leases(tmp_path, 1e6).acquire('a') is None
  (tmp_path / 'a.1').write_text(claim)
  assert Leases(tmp_path, 1e6).acquire('a') is not None
  # A process that got the number of a dead one is not the owner.
  other = json.loads((tmp_path / 'a.2').read_text()) | {'started': 1.0}
  (tmp_path / 'a.2').write_text(json.dumps(other))
  assert Leases(tmp_path, 1e6).acquire('a') is not None


def test_a_claim_that_is_removed_while_it_is_looked_at(tmp_path, monkeypatch):
  def read_text(path):
    text = path.read_text()
    path.unlink()  # its owner has finished
    return text

  assert Leases(tmp_path, 60).acquire('a') is not None
  monkeypatch.setattr('experiments.leases.read_text', read_text)
  assert Leases(tmp_path, 60).acquire('a') is not None


@pytest.mark.parametrize(
  'text', ['', '{', '[]', '{"host": 1}', '\x00', '{"process": -1}', '9' * 5000]
)
def test_a_claim_that_says_nothing_counts_until_its_time(tmp_path, text):
  (tmp_path / 'a.7').write_text(text)
  assert Leases(tmp_path, 60).acquire('a') is None
  _aged(tmp_path, 100)
  lease = Leases(tmp_path, 60).acquire('a')
  assert lease is not None
  assert lease.number == 8


@pytest.mark.parametrize('process', [-1, 2**80, 1.5, '1', None, []])
def test_an_owner_that_can_not_be(tmp_path, process):
  Leases(tmp_path, 60).acquire('a')
  owner = json.loads((tmp_path / 'a.1').read_text()) | {'process': process}
  (tmp_path / 'a.1').write_text(json.dumps(owner))
  Leases(tmp_path, 60).acquire('a')


def test_links_are_not_followed(tmp_path):
  (tmp_path / 'leases').mkdir()
  (tmp_path / 'leases' / 'a.1').symlink_to(tmp_path / 'outside')
  with pytest.raises(StoreError, match='a.1 is a link'):
    Leases(tmp_path / 'leases', 60).acquire('a')
  assert not (tmp_path / 'outside').exists()


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(StoreError, match='could not be written: No such file'):
    Leases(tmp_path / 'none', 60).acquire('a')
