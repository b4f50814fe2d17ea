"""The program as a process that halts itself before it records an epoch.

So what a test does to it then meets it there, however busy the machine is.
"""

import signal
import subprocess
import sys
import time

import psutil

_PROGRAM = """
import os, runpy, signal, sys

left = int(sys.argv.pop(1))


def halt(event, arguments):
  global left
  if event == 'open' and arguments[1] == 'a':
    left -= str(arguments[0]).endswith('/metrics.jsonl')
    if left < 0:
      left = sys.maxsize
      os.kill(os.getpid(), signal.SIGSTOP)


sys.addaudithook(halt)
runpy.run_module('experiments', run_name='__main__')
"""


def program(epochs: int) -> list[str]:
  """The command that halts when it has recorded so many epochs."""
  return [sys.executable, '-c', _PROGRAM, str(epochs)]


def wait(process: subprocess.Popen, within: float) -> None:
  """Until it has halted, in so many seconds."""
  end = time.monotonic() + within
  while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.01)


def go_on(process: subprocess.Popen) -> None:
  """Lets it go on, with the signals that it got meanwhile."""
  process.send_signal(signal.SIGCONT)
