"""The same steps in PyTorch and with biotorch's layers, where installed.

Their packages are imported here and nowhere else. What PyTorch has several
ways for is done in its fastest: both memory layouts are measured, rectifying
is in place and after maxima, the update is one fused kernel.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from experiments.bench.contenders import Contender
from experiments.bench.results import BIOTORCH, TORCH
from experiments.bench.workload import PROTOCOL, RATE, Workload
from experiments.datasets import SHAPES
from experiments.training.models import ARCHITECTURES, Conv, Full
from experiments.training.pooling import Pool

_LAYOUTS = ('contiguous', 'channels_last')


def installed(name: str) -> Any:
  """A module, or None where its package is not installed."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name and name.split('.')[0] == error.name.split('.')[0]:
      return None
    raise


def contenders(workload: Workload) -> Iterator[Contender]:
  """Plain backpropagation and biotorch's modes, in each memory layout."""
  torch = installed('torch')
  if torch is None:
    return
  image = len(SHAPES[workload.architecture]) == 3
  layers = {TORCH: torch.nn}
  for mode in BIOTORCH.values():
    module = installed(f'biotorch.layers.{mode}')
    if module is not None:
      layers[f'biotorch {mode}'] = module
  for name, module in layers.items():
    for layout in _LAYOUTS if image else _LAYOUTS[:1]:
      yield Contender(
        name=name,
        variant=layout if image else '',
        step=_step(torch, _network(torch, module, workload), workload, layout),
      )


def _network(torch: Any, layers: Any, workload: Workload) -> Any:
  """The network, of ``Conv2d`` and ``Linear`` from a module."""
  *spatial, features = SHAPES[workload.architecture]
  sample = torch.zeros(2, features, *spatial)
  modules = []

  def add(module: Any) -> None:
    nonlocal sample
    modules.append(module)
    with torch.no_grad():
      sample = module(sample)

  def add_weights(layer: Conv | Full, bias: bool) -> None:
    if isinstance(layer, Conv):
      size = (layer.features, layer.size, layer.stride, layer.padding)
      made = layers.Conv2d(sample.shape[1], *size, bias=bias)
    else:
      if sample.ndim > 2:
        add(torch.nn.Flatten())
      outputs = layer.features(workload.classes)
      made = layers.Linear(sample.shape[1], outputs, bias=bias)
    torch.nn.init.normal_(made.weight, std=PROTOCOL.initial_stds[0])
    add(made)

  *hidden, output = ARCHITECTURES[workload.architecture]
  for layer, following in itertools.pairwise((*hidden, output)):
    if isinstance(layer, Pool):
      kind = 'MaxPool2d' if layer.kind == 'max' else 'AvgPool2d'
      # A window over the edge counts the pixels that exist, as ours does.
      over = layer.padding > 0
      add(getattr(torch.nn, kind)(layer.size, layer.stride, ceil_mode=over))
    else:
      add_weights(layer, bias=workload.batch_norm == 'none')
      if workload.batch_norm != 'none':
        kind = 'BatchNorm2d' if sample.ndim > 2 else 'BatchNorm1d'
        norm = getattr(torch.nn, kind)(
          sample.shape[1],
          eps=PROTOCOL.batch_norm_epsilon,
          affine=False,
          track_running_stats=False,
        )
        add(norm)
      if isinstance(following, Pool) and following.kind == 'max':
        continue
    if not (isinstance(layer, Pool) and layer.kind == 'average'):
      add(torch.nn.ReLU(inplace=True))
  assert not isinstance(output, Pool)
  add_weights(output, bias=True)
  return torch.nn.Sequential(*modules)


def _step(
  torch: Any, network: Any, workload: Workload, layout: str
) -> Callable[[], Any]:
  """A whole step from images in memory, as ``program`` makes it."""
  x, y = map(torch.from_numpy, workload.data())
  y = y.long()
  if layout == 'channels_last':
    network = network.to(memory_format=torch.channels_last)
  elif x.ndim == 4:
    x = x.permute(0, 3, 1, 2).contiguous()
  mean = x.float().mean(0)
  indices = map(torch.from_numpy, workload.indices())
  optimizer = torch.optim.SGD(
    [weight for weight in network.parameters() if weight.requires_grad],
    lr=RATE,
    momentum=PROTOCOL.momentum,
    weight_decay=PROTOCOL.weight_decay,
    fused=True,
  )

  def step() -> tuple[float, int]:
    index = next(indices)
    images = x[index].float() - mean
    if layout == 'channels_last':
      images = images.permute(0, 3, 1, 2)
    optimizer.zero_grad()
    logits, labels = network(images), y[index]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.item(), (logits.argmax(1) != labels).sum().item()

  return step
