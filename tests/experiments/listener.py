"""What a driver tells, remembered."""


class Listener:
  """Remembers what it was told; does something after an epoch."""

  def __init__(self, after: int | None = None, act=lambda: None):
    self.told = []
    self._after, self._act = after, act

  def run_started(self, run, first_epoch):
    self.told.append(('started', run.run_id, first_epoch))

  def epoch_finished(self, run, line):
    self.told.append(('epoch', run.run_id, line['epoch']))
    if line['epoch'] == self._after:
      self._act()

  def run_finished(self, run, result):
    self.told.append(('finished', run.run_id, result['paper_error']))

  def run_failed(self, run, error, again):
    self.told.append(('failed', run.run_id, error, again))

  def message(self, text):
    self.told.append(('message', text))

  def epochs(self):
    return [event[2] for event in self.told if event[0] == 'epoch']

  def messages(self):
    return [event[1] for event in self.told if event[0] == 'message']
