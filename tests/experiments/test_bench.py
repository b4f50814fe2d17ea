"""The measurements: who takes part, what is compared, what is written."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import contenders, epoch, in_torch, output, scaling
from experiments.bench.contenders import Contender, Workload, of_network
from experiments.datasets import SHAPES
from experiments.runs.train import Outcome
from experiments.training import models, plugins
from experiments.training.step import program
from symjax_bp import linen, usf
from tests.experiments import tiny
from tests.experiments.command_line import call


@pytest.fixture(name='main')
def _main(monkeypatch):
  """Calls the program without torch: (exit status, output, errors)."""
  monkeypatch.setattr(in_torch, 'installed', lambda _: None)
  monkeypatch.setattr(time, 'sleep', lambda _: None)
  names = 'jax_enable_compilation_cache', 'jax_default_matmul_precision'
  before = {name: getattr(jax.config, name) for name in names}
  yield lambda arguments: call(bench.main, *arguments.split())
  for name, value in before.items():
    jax.config.update(name, value)


def _trained(architecture, norm):
  """A workload that moves; plain Flax's weights before and after two steps."""
  workload = Workload(of_network(architecture, norm, 4).setup, 4, rate=1e-3)
  program.cache_clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(linen, 'with_feedback', None)  # plain Flax needs none
    flax = contenders.in_jax(workload, None)
  functions = program(workload.setup, plain=True)
  before = functions.initialize(jax.random.key(0))['params']
  flax.step()
  return workload, before, jax.device_get(flax.step()['params'])


def _assert_same_update(*trees):
  for w, x, y in zip(*map(jax.tree.leaves, trees), strict=True):
    assert np.abs(x - w).max() > 0
    tolerance = 1e-3 * np.abs(x - w).max()
    np.testing.assert_allclose(y - w, x - w, atol=tolerance)


@pytest.mark.parametrize('network', [('timit', 'plain'), ('mnist', 'none')])
def test_flax_and_the_rule_make_the_same_update(network):
  workload, before, after = _trained(*network)
  rule = contenders.in_jax(workload, 'BP')
  rule.step()
  _assert_same_update(before, after, jax.device_get(rule.step()['params']))
  if network[0] == 'timit':  # two steps as one program, too
    loop = contenders.in_jax(dataclasses.replace(workload, repeat=2), 'BP')
    assert loop.steps == 2
    _assert_same_update(before, after, jax.device_get(loop.step()['params']))


@pytest.mark.parametrize('norm', ['none', 'plain'])
def test_torch_makes_the_same_update(norm):
  torch = pytest.importorskip('torch')
  workload, before, after = _trained('mnist', norm)

  def ordered(params):
    """The arrays in torch's order of layers and axes."""
    for name, layer in sorted(params.items()):
      if 'kernel' in layer:
        W = np.array(layer['kernel'])
        if name == 'Dense_0':  # torch flattens the channels first
          W = W.reshape(4, 4, 50, -1).transpose(2, 0, 1, 3).reshape(W.shape)
        yield W.transpose(3, 2, 0, 1) if W.ndim == 4 else W.T
        if 'bias' in layer:
          yield np.array(layer['bias'])

  for layout in in_torch.LAYOUTS:
    network = in_torch.build(torch, torch.nn, workload)
    with torch.no_grad():
      for w, array in zip(network.parameters(), ordered(before), strict=True):
        w.copy_(torch.from_numpy(array.copy()))
    twice = dataclasses.replace(workload, repeat=2)
    in_torch.step_of(torch, network, twice, layout)()
    theirs = [w.detach().numpy() for w in network.parameters()]
    _assert_same_update([*ordered(before)], [*ordered(after)], theirs)


class _Layers(list):
  """Stands for ``torch.nn``: a list of (kind, sizes, bias) of what is made."""

  def __getattr__(self, kind):
    def make(*sizes, bias=None, **_):
      self.append((kind, sizes[:2], bias))
      return SimpleNamespace(weight=None)

    make.normal_ = lambda *_, **__: None
    return make


@pytest.mark.parametrize(
  ('architecture', 'norm'),
  [*((name, 'none') for name in SHAPES), ('mnist', 'plain')],
)
def test_torch_and_the_operations_have_the_layers_of_flax(architecture, norm):
  workload, layers = of_network(architecture, norm, 2), _Layers()
  in_torch.build(SimpleNamespace(nn=layers), layers, workload)
  initialize = program(workload.setup, plain=True).initialize
  params = jax.eval_shape(initialize, jax.random.key(0))['params']
  wanted = [
    (layer['kernel'].shape, 'bias' in layer)
    for _, layer in sorted(params.items())
    if 'kernel' in layer
  ]
  weights = [made for made in layers if made[0] in ('Conv2d', 'Linear')]
  assert [made[1:] for made in weights] == [(W[-2:], b) for W, b in wanted]
  kinds = [kind for kind, *_ in layers]
  assert kinds.count('ReLU') == len(wanted) - 1
  norms = kinds.count('BatchNorm2d') + kinds.count('BatchNorm1d')
  assert norms == (len(wanted) - 1) * (norm == 'plain')
  counts, shapes = [], []
  for operation, x, W in workload.weights():
    arrays = [jax.ShapeDtypeStruct(each, 'float32') for each in (x, W, W)]
    y = jax.eval_shape(operation, *arrays)
    counts.append(math.prod(y.shape) * math.prod(W[:-1]) // 2)
    shapes.append(W)
  assert shapes == [W for W, _ in wanted]
  setup = workload.setup
  assert counts == models.multiply_adds(
    workload.layers, setup.shape, setup.classes
  )


def test_ratios_are_of_steps_in_the_same_round():
  names = 'product', 'Flax', 'uSF', 'torch', 'torch', 'biotorch usf'
  programs = [
    Contender(name=name, variant=str(at), step=list, flops=2000)
    for at, name in enumerate(names)
  ]
  times = [
    [1.0, 1.0, 2.0, 9.0, 4.0, 8.0],
    [1.0, 4.0, 4.0, 9.0, 4.0, 2.0],  # the machine was busy
    [2.0, 2.0, 3.0, 1.0, 5.0, 3.0],
  ]
  workload = of_network('timit', 'none', 4)
  result = output.summarize(workload, programs, np.array(times))
  rows = {row['name']: row for row in result['rows']}
  assert list(rows) == ['Flax', 'uSF', 'torch', 'biotorch usf']
  assert result['product_rate'] == 2000
  assert rows['torch']['variant'] == '4'  # the faster one
  uSF = rows['uSF']
  assert (uSF['median'], uSF['quartiles']) == (3.0, [2.5, 3.5])
  assert uSF['to'] == {'Flax': 1.5, 'torch': 0.6, 'biotorch usf': 1.0}
  share = 0.5 * workload.flops / 2000  # of 1/2, 1/4, 2/3
  assert uSF['peak_share'] == pytest.approx(share)


def test_every_contender_makes_two_steps_in_each_round(monkeypatch):
  calls, now = [], [0.0]
  monkeypatch.setattr(time, 'sleep', lambda _: None)
  monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

  def contender(name, steps):
    def step():
      calls.append(name)
      now[0] += 6.0

    return Contender(name=name, step=step, steps=steps)

  programs = [contender('a', 1), contender('b', 2), contender('c', 3)]
  times = contenders.take_turns(programs, 5)
  assert times.tolist() == 5 * [[6.0, 3.0, 2.0]]
  assert calls[::2] == calls[1::2]
  rounds = [tuple(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
  assert len(rounds) > 5  # the first ones are not measured
  assert all(sorted(each) == ['a', 'b', 'c'] for each in rounds)
  assert len(set(rounds)) > 1
  began = now[0]
  contenders.take_turns(programs, 1, seconds=500.0)
  assert now[0] - began >= 500


def test_measurements_go_on_where_they_stopped(main, monkeypatch, tmp_path):
  monkeypatch.setattr(contenders, 'all_in_jax', _instead_of_all_in_jax)
  product = Contender(name=contenders.PRODUCT, step=list, flops=1)
  monkeypatch.setattr(contenders, 'product', lambda: product)
  options = '--architecture timit mnist --batch-norm none --steps 1 --seconds 0'
  command = f'steps {options} --repeat 2 --out {tmp_path} --batch'
  status, out, _ = main(f'{command} 4')
  assert (status, 'torch is not installed' in out) == (0, True)
  status, out, _ = main(f'{command} 4 8 --precision float32 bfloat16 --resume')
  assert (status, out.count('rounds')) == (0, 6)
  results = json.loads((tmp_path / 'bench.json').read_text())['results']
  measured = [
    (row['batch'], row['precision'], row['architecture']) for row in results
  ]
  assert len({*measured}) == len(measured) == 8
  assert measured[:2] == [(4, 'float32', 'timit'), (4, 'float32', 'mnist')]
  assert {row['repeat'] for row in results} == {2}
  markdown = (tmp_path / 'bench.md').read_text()
  assert '| mnist, batch 8, bfloat16 ' in markdown
  assert '/ torch' not in markdown
  assert (tmp_path / 'bench.svg').exists()
  status, out, _ = main(f'{command} 4 --resume')
  assert (status, 'rounds' in out) == (0, False)
  status, out, _ = main(f'{command} 5 6 --resume --limit 0')
  assert (status, out.count('rounds')) == (0, 1)


def _instead_of_all_in_jax(workload, rules):
  """Plain Flax; with a large mini-batch something else takes part, too."""
  assert jax.config.jax_default_matmul_precision == workload.precision
  names = [contenders.FLAX, *rules[1:2]][: workload.batch // 4]
  return [Contender(name=name, step=list) for name in names]


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ('steps --architecture lenet', 'general'),
    ('steps --batch-norm', 'batch_norm must name one or more'),
    ('steps --rule sgn', 'brSF'),
    ('steps --batch 1', 'batch must be at least 2, not 1'),
    ('steps --repeat 0', 'repeat must be at least 1, not 0'),
    ('steps --steps 0', 'steps must be at least 1, not 0'),
    ('scaling --steps 0', 'steps must be at least 1, not 0'),
    ('steps --out FILE', 'out must be a folder'),
    ('grid --repeats 0', 'repeats must be at least 1, not 0'),
  ],
)
def test_what_is_refused(main, tmp_path, arguments, said):
  (tmp_path / 'file').write_text('')
  status, _, errors = main(arguments.replace('FILE', str(tmp_path / 'file')))
  assert (status, said in errors) == (2, True)


def test_scaling(main, monkeypatch, tmp_path):

  def in_jax(workload, rule):
    program(workload.setup, plain=rule is None)
    return Contender(name=rule or contenders.FLAX, step=list)

  monkeypatch.setattr(contenders, 'in_jax', in_jax)  # compiles nothing
  monkeypatch.setattr(scaling, 'AXES', {'depth': (1,)})
  # 2 s to start, 0.3 s a run and 3 epochs of 1 s.
  monkeypatch.setattr(
    scaling, '_grid', lambda runs: (2 + 3.3 * runs, [1.0] * 3 * runs)
  )
  status, out, _ = main(f'scaling --steps 1 --out {tmp_path}')
  assert (status, '0.30 s a run: 1.0 % of a run of 30 s' in out) == (0, True)
  document = json.loads((tmp_path / 'scaling.json').read_text())
  (point,) = document['steps']
  assert point['seconds'].keys() == {'Flax', 'uSF', 'brSF'}
  assert document['grid']['seconds_per_start'] == pytest.approx(2)
  assert '| depth 1 ' in (tmp_path / 'scaling.md').read_text()
  assert (tmp_path / 'scaling.png').exists()


def test_one_and_two_workers_take_turns(main, monkeypatch):
  used = []

  def in_processes(options, places):
    used.append(len(places))
    return lambda runs, *_: ((run, Outcome('done')) for run in runs)

  monkeypatch.setattr(scaling.processes, 'in_processes', in_processes)
  status, out, _ = main('grid --repeats 2')
  assert (status, used) == (0, [1, 1, 2, 1, 2])
  assert '16 runs, median speed-up' in out


def _check_steps(folder):
  document = json.loads((folder / 'bench.json').read_text())
  about, (result,) = document['machine'], document['results']
  assert {'jax', 'processor', 'cores'} <= about.keys()
  assert about['command'].startswith('python -m experiments.bench steps --arch')
  rows = {row['name']: row for row in result['rows']}
  plain, rule, _ = (rows[name] for name in ('Flax', 'frSF', 'operations alone'))
  # frSF keeps a draw for every weight, and nothing else.
  weights = 4 * (1845 * 512 + 512 * 256 + 256 * 80)
  assert rule['bytes'] - plain['bytes'] == pytest.approx(weights, rel=0.01)
  assert rule['memory_to_flax'] == pytest.approx(1, abs=0.01)
  markdown = (folder / 'bench.md').read_text()
  ratio = f'| {rule["to"]["Flax"]:.2f} '
  for text in (about['command'], 'timit + BN, batch 4, float32', ratio):
    assert text in markdown
  assert (folder / 'bench.svg').read_bytes().startswith(b'<?xml')
  assert (folder / 'bench.png').exists()


def test_the_script_for_an_accelerator_goes_on_another_day(tmp_path):
  script = Path(bench.__file__).with_name('accelerator.sh')

  def call(day, *stages):
    folders = {'OUT': day, 'RESULTS': f'{day}-results', 'DATA': 'monday'}
    environment = {name: str(tmp_path / at) for name, at in folders.items()}
    done = subprocess.run(
      ['bash', script, '--dry', *stages],
      env=os.environ | environment | {'PYTHON': sys.executable},
      capture_output=True,
      text=True,
      check=True,
    )
    files = sorted(path.name for path in (tmp_path / day).iterdir())
    return done.stdout, files, (tmp_path / day / 'mnist-65-epochs.jsonl')

  stopped = tmp_path / 'monday-results' / ('0' * 20)  # an unfinished run
  stopped.mkdir(parents=True)
  (stopped / 'config.json').write_text('{"version": 2}')
  out, files, study = call('monday', 'tests', 'steps', 'grid')
  assert len(files) <= 8
  assert 'test_gradients_are_those_of_plain_jax_and_of_the_reference[' in out
  _check_steps(tmp_path / 'monday')
  _, *runs = study.read_text().splitlines()
  assert len(runs) == 5  # a condition at five rates
  out, _, again = call('tuesday', 'grid')
  assert 'all 5 runs are finished' in out
  assert again.read_text() == study.read_text()


@pytest.mark.parametrize(
  ('name', 'multiply_adds', 'weights'),
  # He et al.: 1.8 billion; 196 tokens of 384 features, 12 x 384^2 weights and
  # two products of 196 x 196 x 384 in a block, patches of 768 inputs.
  [('resnet18', 1.814e9, 21), ('vit', 4.35e8, 8)],
)
def test_networks_for_large_pictures(monkeypatch, name, multiply_adds, weights):
  count = jax.stages.Lowered.cost_analysis

  def only_on_a_cpu(lowered):  # as where CUDA is the default
    return count(lowered) if jax.config.jax_default_device else None

  monkeypatch.setattr(jax.stages.Lowered, 'cost_analysis', only_on_a_cpu)
  workload = of_network(name, 'plain', 2)
  operations = 2 * 3 * 2 * multiply_adds  # two images; forward, dW and dx
  assert 0.9 < workload.flops / operations < 1.1
  network = plugins.load(workload.setup.plugin).networks[name](1000, 'plain')
  x = jax.ShapeDtypeStruct((2, 224, 224, 3), np.float32)
  rules = linen.layer_rules(linen.with_feedback(network, usf()), x, True)
  assert len([row for row in rules if row.rule]) == weights


def test_the_parts_of_an_epoch(main, monkeypatch):
  monkeypatch.setattr(epoch, '_EVALUATED', (100, 10_000))  # there are fewer
  options = '--condition uSF+BN --rate 1 --train-size 200 --repeats 1'
  status, out, _ = main(f'epoch {options} {" ".join(tiny.NETWORK)}')
  _, text = out.split('\ndigits ')
  assert (status, text.split()[0]) == (0, 'uSF+BN')
  for part in (
    'training', 'evaluation, test', 'evaluation, held out',
    'statistics for testing', 'angles of layers', 'a checkpoint',
  ):  # fmt: skip
    assert f'| {part} ' in text
  shares = re.findall(r'(\d+) %', text)
  assert 97 <= sum(map(int, shares)) <= 103  # each is rounded
  assert re.findall(r'\n\| (\d+) ', text) == ['100']
  status, _, errors = main('epoch --condition SGD --repeats 0')
  assert (status, 'repeats must be at least 1' in errors) == (2, True)
