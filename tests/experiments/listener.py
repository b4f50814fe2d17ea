"""Listeners that remember the progress of runs, and act at an epoch."""

import functools
import signal


class Crash(Exception):
  """Stands for the end of the process."""


def crash():
  raise Crash


interrupt = functools.partial(signal.raise_signal, signal.SIGINT)
terminate = functools.partial(signal.raise_signal, signal.SIGTERM)
hang_up = functools.partial(signal.raise_signal, signal.SIGHUP)


class Listener:
  """Remembers its events; acts after an epoch, or after so many of all runs."""

  def __init__(self, after=None, act=lambda: None, *, count=None):
    self.events = []
    self._after, self._act, self._count = after, act, count

  def run_started(self, run, first_epoch):
    self.events.append(('started', run.run_id, first_epoch))

  def epoch_finished(self, run, line):
    self.events.append(('epoch', run.run_id, line['epoch']))
    if line['epoch'] == self._after or len(self.epochs()) == self._count:
      self._act()

  def run_finished(self, run, result):
    self.events.append(('finished', run.run_id, result['best_test_error']))

  def run_failed(self, run, error, again):
    self.events.append(('failed', run.run_id, error, again))

  def message(self, text):
    self.events.append(('message', text))

  def of(self, kind):
    return [event[1:] for event in self.events if event[0] == kind]

  def epochs(self):
    return [epoch for _, epoch in self.of('epoch')]
