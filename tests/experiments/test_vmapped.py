"""Several runs as one program: each is what it would have been alone."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.datasets import SPECS
from experiments.training import loop, models, vmapped
from experiments.training.models import Conv, Full
from experiments.training.pooling import Pool
from tests.experiments import tiny

_LAYERS = (
  Conv(5, 8, stride=2),
  Pool('max', 2, 2),
  Conv(3, 8, padding=1),
  Pool('average', 3, 2, padding=1),
  Full(lambda classes: 16),
  Full(lambda classes: classes),
)


def _images(x):
  x = np.clip(25 * x[:, :784] + 128, 0, 255).astype(np.uint8)
  return x.reshape(-1, 28, 28, 1)


def _group(condition, data, **fields):
  return [
    tiny.run(condition, data, rate=rate, seed=seed, **fields)
    for seed in (0, 1)
    for rate in (10.0, 0.1)
  ]


def test_each_run_is_what_it_is_alone(monkeypatch):
  """A convolutional network as one loop; launches have dense ones in steps."""
  data = tiny.dataset()
  monkeypatch.setitem(models.NETWORKS, 'mnist', _LAYERS)
  x_train, x_test = map(_images, (data.x_train, data.x_test))
  data = dataclasses.replace(
    data, x_train=x_train, x_test=x_test, spec=SPECS['MNIST']
  )
  # A standard deviation that no other test compiles a network with.
  runs = _group('brSF-50%', data, initial_std=0.0501, input_scale=0.1)[::3]
  on_device = [tiny.placed(run, data) for run in runs]
  states = [loop.start(*each) for each in zip(runs, on_device, strict=True)]
  *_, last = vmapped.epochs(runs, on_device, states, scan=True)
  for i, run in enumerate(runs):
    _, (*_, line) = tiny.train(run, on_device[i], True)
    tiny.assert_close([last[i][1]], [line])
  assert len({line['test_loss'] for _, line in last.values()}) == len(runs)


@pytest.mark.parametrize('together', [False, True])
def test_rates_and_seeds_compile_the_step_once(together):
  momentum = 0.5 + together / 100
  runs = _group('uSF', tiny.dataset(), epochs=1, momentum=momentum)[::3]
  on_device = [tiny.placed(run) for run in runs]
  with tiny.compiled() as names:
    states = [loop.start(*each) for each in zip(runs, on_device, strict=True)]
    if together:
      list(vmapped.epochs(runs, on_device, states))
    else:
      for run, data, state in zip(runs, on_device, states, strict=True):
        list(loop.epochs(run, data, state))
  assert [name for name in names if 'step' in name] == ['jit(step)']


def test_how_many_are_trained_together(monkeypatch):
  assert vmapped.group_size(None, None) == 1  # on a CPU
  assert vmapped.group_size(5, None) == 5
  with pytest.raises(ValueError, match='together is 5, .* over 2 devices'):
    vmapped.group_size(5, 2)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert vmapped.group_size(None, 1) == 32
  assert vmapped.group_size(None, None) == 1  # there are eight devices
  assert vmapped.group_size(None, 2) == vmapped.group_size(1, 2) == 1
