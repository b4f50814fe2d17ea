"""Leases: who is at a run, told by files alone.

::

  LEASES/NAME.1    the first owner's claim: host, process, since when
         NAME.2    of who took the run over after that

A claim is a file of the next number, made in the way of which all file systems
know one winner (O_EXCL); it is renewed by its time of change. A claim that its
owner gave up, whose process has died on this host, or that was not renewed for
as long as the time limit says gives way to the next number. Ages are told by
the file system's own clock, so those of the hosts may differ. Locks of the
system are not used: network folders may not have them, and filelock's lease
needs an exchange of names, which NFS refuses, to take a stale one over.

A lease says who should be at a run: who was stopped for longer than the limit
asks ``held`` before it writes.
"""

import dataclasses
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from experiments.runs.files import StoreError, not_written, read_text

_RENEWALS = 4  # within a time limit
_GIVEN_UP = (0.0, 0.0)  # times of access and change


def _host() -> str:
  """Where a process number means the same process."""
  try:  # containers may share the name of their host
    return f'{socket.gethostname()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


@dataclasses.dataclass(frozen=True)
class Lease:
  """A claim that this process has made.

  Attributes:
    folder: of all leases.
    name: what is claimed.
    number: of the claim, from 1.
    record: what its file holds, different for each claim.
  """

  folder: Path
  name: str
  number: int
  record: str

  def held(self) -> bool:
    """Whether nobody has taken over."""
    following = _path(self.folder, self.name, self.number + 1)
    path = _path(self.folder, self.name, self.number)
    return not following.exists() and read_text(path) == self.record

  def renew(self) -> None:
    """Sets the time of change to now."""
    if self.held():
      os.utime(_path(self.folder, self.name, self.number))

  def give_up(self) -> None:
    """Lets anyone go on at once."""
    if self.held():
      os.utime(_path(self.folder, self.name, self.number), _GIVEN_UP)

  def remove(self) -> None:
    """Forgets all claims; for what is finished, and so is not done again."""
    if self.held():
      for number in range(1, self.number + 1):
        _path(self.folder, self.name, number).unlink(missing_ok=True)


class Leases:
  """The leases of a folder; as a context, renews those of this process.

  Attributes:
    limit: seconds without renewal after which others take over.
  """

  def __init__(self, folder: Path, limit: float):
    """Names the folder, which must be there."""
    self._folder = folder
    self.limit = limit
    self._mine: set[Lease] = set()
    self._end = threading.Event()
    self._heart = threading.Thread(target=self._beat, daemon=True)

  def __enter__(self) -> 'Leases':
    """Begins to renew."""
    self._heart.start()
    return self

  def __exit__(self, *_) -> None:
    """Gives up what is still held."""
    self._end.set()
    self._heart.join()
    for lease in list(self._mine):
      self.give_up(lease)

  def acquire(self, name: str) -> Lease | None:
    """The lease of a name, or None if another has it.

    Raises:
      StoreError: if the folder can't be read or written.
    """
    try:
      last = max(self._numbers(name), default=0)
      if last and not self._free(_path(self._folder, name, last)):
        return None
      lease = Lease(self._folder, name, last + 1, _record())
      with _path(self._folder, name, lease.number).open('x') as file:
        file.write(lease.record)
    except FileExistsError:  # another was quicker
      return None
    except OSError as error:
      raise not_written(self._folder / name, error) from error
    self._mine.add(lease)
    return lease

  def give_up(self, lease: Lease) -> None:
    """Lets anyone go on at once."""
    self._mine.discard(lease)
    lease.give_up()

  def remove(self, lease: Lease) -> None:
    """Forgets a lease, for what it was about is finished."""
    self._mine.discard(lease)
    lease.remove()

  def _numbers(self, name: str) -> list[int]:
    endings = (path.suffix[1:] for path in self._folder.glob(f'{name}.*'))
    return [int(ending) for ending in endings if ending.isdecimal()]

  def _free(self, path: Path) -> bool:
    """Whether a claim may give way to the next."""
    text = read_text(path)
    try:
      # Reading has made a network file system ask for the times anew.
      changed = path.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
      text = None
    if text is None:  # removed: finished meanwhile
      return True
    with tempfile.TemporaryFile(dir=self._folder) as file:
      now = os.fstat(file.fileno()).st_mtime
    return now - changed > self.limit or _died(text)

  def _beat(self) -> None:
    while not self._end.wait(self.limit / _RENEWALS):
      for lease in list(self._mine):
        try:
          lease.renew()
        except (OSError, StoreError):
          continue  # network folders come back, or the limit passes


def forget(folder: Path, name: str) -> None:
  """Removes all claims of a name, whoever made them; for what is finished."""
  for path in folder.glob(f'{name}.*'):
    path.unlink(missing_ok=True)


def _path(folder: Path, name: str, number: int) -> Path:
  return folder / f'{name}.{number}'


def _record() -> str:
  owner = {
    'host': _host(),
    'process': os.getpid(),
    'started': psutil.Process().create_time(),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'claim': uuid.uuid4().hex,
  }
  return json.dumps(owner) + '\n'


def _died(record: str) -> bool:
  """Whether the owner was a process of this host that is no more."""
  try:
    owner: Any = json.loads(record)
    if owner['host'] != _host():
      return False
    return psutil.Process(owner['process']).create_time() != owner['started']
  except psutil.NoSuchProcess:
    return True
  except (ValueError, TypeError, KeyError, OverflowError, psutil.Error):
    return False  # written at this moment, or not by this program
