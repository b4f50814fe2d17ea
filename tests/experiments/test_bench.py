"""The benchmark: who takes part, what is compared, what is written."""

import functools
import json
import math
import sys
import time

import jax
import numpy as np
import pytest

from experiments import cli, commands
from experiments.bench import (
  family,
  in_jax,
  in_torch,
  operations,
  overhead,
  scaling,
  store,
)
from experiments.bench.contenders import Contender, take_turns
from experiments.bench.results import summarized
from experiments.bench.workload import Workload
from experiments.datasets import SHAPES
from experiments.training import backend, models
from experiments.training.models import Network
from symjax_bp import symmetric, with_feedback

TIMIT = Workload(architecture='timit', batch_norm='none', batch=4)


@pytest.fixture(name='carry_out')
def _carry_out(monkeypatch):
  """Carries out a command, without torch; JAX's settings are given back."""
  monkeypatch.setattr(backend, 'configure', lambda *_: [])
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.setattr(time, 'sleep', lambda _: None)
  cache = jax.config.jax_enable_compilation_cache
  yield commands.carry_out
  jax.config.update('jax_enable_compilation_cache', cache)


def test_bench_without_torch(carry_out, tmp_path, capsys):
  command = cli.Bench(
    architecture=('timit',),
    batch_norm=('plain',),
    rule=('frSF',),
    batch=4,
    steps=2,
    seconds=0,
    out=tmp_path,
  )
  assert carry_out(command) == 0
  assert 'timit + BN, batch 4' in capsys.readouterr().out
  document = json.loads((tmp_path / 'bench.json').read_text())
  assert {'jax', 'processor', 'cores', 'command'} <= document['machine'].keys()
  (result,) = document['results']
  plain, rule, alone = result['rows']
  names = ('Flax', 'frSF', 'operations alone')
  assert (plain['name'], rule['name'], alone['name']) == names
  assert plain['to'] == {'Flax': 1.0}
  ratios = np.divide(rule['seconds'], plain['seconds'])
  assert rule['to'] == {'Flax': pytest.approx(np.median(ratios))}
  # A draw for every weight is all that frSF keeps.
  weights = 4 * (1845 * 512 + 512 * 256 + 256 * 80)
  assert rule['bytes'] - plain['bytes'] == pytest.approx(weights, rel=0.01)
  assert rule['memory_to_flax'] == pytest.approx(1, abs=0.01)
  markdown = (tmp_path / 'bench.md').read_text()
  assert f'| timit + BN | {rule["to"]["Flax"]:.2f}, ' in markdown
  assert (tmp_path / 'bench.svg').read_bytes().startswith(b'<?xml')


def test_reading_and_reporting_are_timed(capsys):
  store.measure((3, 12))
  _, *rows = capsys.readouterr().out.splitlines()
  assert [row.split()[0] for row in rows] == ['3', '12']


@pytest.mark.parametrize('architecture', SHAPES)
def test_the_operations_are_those_of_the_network(architecture):
  workload = Workload(architecture=architecture, batch_norm='none', batch=2)
  counts = []
  for operation, x, W in operations._layers(workload):
    shapes = [jax.ShapeDtypeStruct(each, 'float32') for each in (x, W, W)]
    y = jax.eval_shape(operation, *shapes)
    counts.append(math.prod(y.shape) * math.prod(W[:-1]))
  wanted = models.multiply_adds(architecture, workload.classes)
  assert counts == [2 * count for count in wanted]


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    ({'architecture': ('lenet',)}, "'general'"),
    ({'batch_norm': ('affine',)}, "'plain'"),
    ({'rule': ('sgn',)}, 'brSF'),
    ({'batch_norm': ()}, "batch_norm must name one or more of 'none' and"),
    ({'batch': 1}, 'batch must be at least 2, not 1'),
    ({'steps': 0}, 'steps must be at least 1, not 0'),
    ({'out': 'file'}, 'out must be a folder'),
  ],
)
def test_what_bench_refuses(carry_out, tmp_path, capsys, options, said):
  (tmp_path / 'file').write_text('')
  options = {'out': 'folder', **options}
  options['out'] = tmp_path / options['out']
  assert carry_out(cli.Bench(**options)) == 2
  assert said in capsys.readouterr().err


def test_plain_flax_has_nothing_of_the_library_and_the_same_numbers():
  x = jax.random.normal(jax.random.key(0), (4, 1845))
  gradients = {}
  for name, rule in (('Flax', None), ('BP', symmetric())):
    model = Network('timit', 80)
    if rule is not None:
      model = with_feedback(model, rule)
    params = model.init(jax.random.key(1), x, True)['params']

    def loss(params, model=model):
      return (model.apply({'params': params}, x, True) ** 2).sum()

    program = str(jax.make_jaxpr(loss)(params))
    assert ('custom_vjp' in program) == (rule is not None)
    gradients[name] = jax.jit(jax.grad(loss))(params)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, gradients['Flax'], gradients['BP'])
  )


def test_memory_is_that_of_weights_momentum_and_images():
  made = in_jax.contender(TIMIT, None)
  weights = 1845 * 512 + 512 + 512 * 256 + 256 + 256 * 80 + 80
  assert made.bytes
  assert made.bytes > 4 * (2 * weights + 4 * 4 * 1845)
  assert made.bytes < 4 * (3 * weights + 20 * 4 * 1845)
  assert made.draw_bytes == 0


def test_each_step_goes_on_from_the_last():
  seen = []

  def step(state):
    seen.append(state)
    return state + 1

  call = in_jax.repeated(step, 0)
  call()
  call()
  assert seen == [0, 1]


def test_ratios_are_of_steps_in_the_same_round():
  contenders = [
    Contender(name=name, variant=variant, step=lambda: None)
    for name, variant in (
      ('product', ''),
      ('Flax', ''),
      ('uSF', ''),
      ('torch', 'contiguous'),
      ('torch', 'channels_last'),
      ('biotorch usf', ''),
    )
  ]
  times = np.array(
    [
      [1.0, 1.0, 2.0, 9.0, 4.0, 8.0],
      [1.0, 4.0, 4.0, 9.0, 4.0, 2.0],  # the machine was busy
      [2.0, 2.0, 3.0, 1.0, 5.0, 3.0],
    ]
  )
  result = summarized(TIMIT, contenders, times, flops=6, product_flops=12)
  rows = {row.name: row for row in result.rows}
  assert list(rows) == ['Flax', 'uSF', 'torch', 'biotorch usf']
  assert result.product_rate == 12.0
  assert rows['torch'].variant == 'channels_last'
  uSF = rows['uSF']
  assert uSF.median == 3.0
  assert uSF.quartiles == (2.5, 3.5)
  assert uSF.to == {'Flax': 1.5, 'torch': 0.6, 'biotorch usf': 1.0}
  assert uSF.peak_share == 0.25  # 1/4, 1/8, 1/3


def test_every_contender_makes_two_steps_in_each_round(monkeypatch):
  monkeypatch.setattr(time, 'sleep', lambda _: None)
  calls = []
  contenders = [
    Contender(name=name, step=lambda name=name: calls.append(name))
    for name in 'abc'
  ]
  times = take_turns(contenders, steps=5, seconds=0)
  assert times.shape == (5, 3)
  assert (times > 0).all()
  assert calls[::2] == calls[1::2]
  rounds = [tuple(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
  assert len(rounds) > 5  # the first ones are not measured
  assert all(sorted(each) == ['a', 'b', 'c'] for each in rounds)
  assert len(set(rounds)) > 1
  began = time.perf_counter()
  take_turns(contenders, steps=1, seconds=0.05)
  assert time.perf_counter() - began >= 0.05


def test_what_is_not_installed_is_told_from_what_is_broken(monkeypatch):
  assert in_torch.installed('no_such_package.layers') is None

  def broken(name):
    raise ModuleNotFoundError(name='its_dependency')

  monkeypatch.setattr(in_torch.importlib, 'import_module', broken)
  with pytest.raises(ModuleNotFoundError):
    in_torch.installed('torch')


def test_scaling(carry_out, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(scaling, 'AXES', {'depth': (1,)})
  tiny = functools.partial(family.Member, batch=2, width=2)
  monkeypatch.setattr(family, 'Member', tiny)
  # 2 s to start, 0.3 s a run and 3 epochs of 1 s.
  monkeypatch.setattr(
    overhead,
    '_grid',
    lambda runs: {'seconds': 2 + 3.3 * runs, 'epochs': [1.0] * 3 * runs},
  )
  assert carry_out(cli.Scaling(steps=1, out=tmp_path)) == 0
  assert '0.30 s a run: 1.0 % of a run of 30 s' in capsys.readouterr().out
  document = json.loads((tmp_path / 'scaling.json').read_text())
  (point,) = document['steps']
  assert point['depth'] == 1
  assert point['seconds'].keys() == {'Flax', 'uSF', 'brSF'}
  assert document['grid']['seconds_per_start'] == pytest.approx(2)
  assert len(document['grid']['points']) == len(overhead.RUNS)
  assert 'depth 1' in (tmp_path / 'scaling.md').read_text()
  assert (tmp_path / 'scaling.png').exists()
