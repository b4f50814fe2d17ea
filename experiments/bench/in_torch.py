"""The same step in PyTorch and with biotorch's layers, where installed.

Their packages are imported here only. Where PyTorch has several ways, the
fastest is taken: both memory layouts are measured, rectification is in place
and after maxima, and the update is one fused kernel.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from experiments.bench.contenders import Contender, Workload
from experiments.training.models import Conv, Full
from experiments.training.pooling import Pool

TORCH, COMPILED = 'torch', 'torch.compile'
# The mode of biotorch that is a variant of each rule.
BIOTORCH = {'BP': 'backpropagation', 'uSF': 'usf', 'brSF': 'brsf',
            'frSF': 'frsf', 'RndF': 'fa'}  # fmt: skip
LAYOUTS = ('contiguous', 'channels_last')


def installed(name: str) -> Any:
  """A module, or None if its package is not installed."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name and name.split('.')[0] == error.name.split('.')[0]:
      return None
    raise


def contenders(workload: Workload) -> Iterator[Contender]:
  """Plain backpropagation and biotorch's modes, in each memory layout.

  On a GPU, where JAX uses one, plain backpropagation is compiled, too, and what
  fails is left out.
  """
  if (torch := installed(TORCH)) is None or workload.layers is None:
    return
  torch.backends.cuda.matmul.allow_tf32 = workload.precision != 'float32'
  torch.backends.cudnn.allow_tf32 = workload.precision != 'float32'
  on_gpu = _device(torch) == 'cuda'
  layers = {TORCH: torch.nn}
  if on_gpu:
    layers[COMPILED] = torch.nn
  if workload.precision != 'bfloat16':  # biotorch's products are of one dtype
    for mode in BIOTORCH.values():
      layers[f'biotorch {mode}'] = installed(f'biotorch.layers.{mode}')
  layouts = LAYOUTS if len(workload.setup.shape) == 3 else ('',)
  for (name, module), layout in itertools.product(layers.items(), layouts):
    compiles = name == COMPILED
    # Compiling takes long, so it is measured in the layout of its kernels only.
    if module is None or (compiles and layout != layouts[-1]):
      continue
    before = torch.cuda.memory_allocated() if on_gpu else 0
    network = build(torch, module, workload)
    step = step_of(torch, network, workload, layout, compiles)
    if on_gpu:
      torch.cuda.reset_peak_memory_stats()
      try:
        step()
      except Exception as error:  # the others are still measured
        print(f'{name} {layout} is left out: {error}', flush=True)
        continue
    yield Contender(
      name=name,
      variant=layout,
      step=step,
      steps=workload.repeat,
      bytes=torch.cuda.max_memory_allocated() - before if on_gpu else None,
    )


def _device(torch: Any) -> str:
  """The device that JAX uses too."""
  on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
  return 'cuda' if on_gpu else 'cpu'


def build(torch: Any, layers: Any, workload: Workload) -> Any:
  """The network, of ``Conv2d`` and ``Linear`` from the module ``layers``."""
  shapes = (W for _, _, W in workload.weights())
  protocol = workload.setup.protocol
  has_norm = workload.setup.condition.batch_norm != 'none'
  modules = []

  def add_weights(layer: Conv | Full, bias: bool) -> int:
    *_, inputs, outputs = next(shapes)
    if isinstance(layer, Conv):
      size = layer.size, layer.stride, layer.padding
      made = layers.Conv2d(inputs, outputs, *size, bias=bias)
    else:
      modules.append(torch.nn.Flatten())
      made = layers.Linear(inputs, outputs, bias=bias)
    torch.nn.init.normal_(made.weight, std=protocol.initial_stds[0])
    modules.append(made)
    return outputs

  assert workload.layers is not None  # see `contenders`
  for layer, following in itertools.pairwise(workload.layers):
    if isinstance(layer, Pool):
      rectified = layer.kind == 'max'
      kind = torch.nn.MaxPool2d if rectified else torch.nn.AvgPool2d
      # A window over the edge counts the pixels that exist, as ours does.
      over = layer.padding > 0
      modules.append(kind(layer.size, layer.stride, ceil_mode=over))
    else:
      rectified = not (isinstance(following, Pool) and following.kind == 'max')
      outputs = add_weights(layer, bias=not has_norm)
      if has_norm:
        is_conv, nn = isinstance(layer, Conv), torch.nn
        norm = (nn.BatchNorm2d if is_conv else nn.BatchNorm1d)(
          outputs,
          eps=protocol.batch_norm_epsilon,
          affine=False,
          track_running_stats=False,
        )
        modules.append(norm)
    if rectified:
      modules.append(torch.nn.ReLU(inplace=True))
  output = workload.layers[-1]
  assert isinstance(output, Full)
  add_weights(output, bias=True)
  return torch.nn.Sequential(*modules)


def step_of(
  torch: Any,
  network: Any,
  workload: Workload,
  layout: str,
  compiles: bool = False,
) -> Callable[[], Any]:
  """Whole steps from images in memory, as ``contenders.in_jax`` makes them."""
  images, labels, indices = workload.data()
  device = _device(torch)
  x = torch.from_numpy(images).to(device)
  y = torch.from_numpy(labels).long().to(device)
  network = network.to(device)
  if layout == 'channels_last':
    network = network.to(memory_format=torch.channels_last)
  elif x.ndim == 4:
    x = x.permute(0, 3, 1, 2).contiguous()
  mean, protocol = x.float().mean(0), workload.setup.protocol
  optimizer = torch.optim.SGD(
    [weight for weight in network.parameters() if weight.requires_grad],
    lr=workload.rate,
    momentum=protocol.momentum,
    weight_decay=protocol.weight_decay,
    fused=True,
  )
  # CUDA graphs: the kernels of a small network are shorter than their launch.
  forward = (
    torch.compile(network, mode='reduce-overhead') if compiles else network
  )
  autocast = torch.autocast(
    device, torch.bfloat16, enabled=workload.precision == 'bfloat16'
  )

  def one(index) -> tuple[Any, Any]:
    images = x[index].float() - mean
    if layout == 'channels_last':
      images = images.permute(0, 3, 1, 2)
    optimizer.zero_grad()
    with autocast:
      logits, labels = forward(images).float(), y[index]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.argmax(1) != labels).sum()

  def step() -> list[tuple[float, int]]:
    order = torch.from_numpy(workload.order(indices)).to(device)
    scores = [one(index) for index in order]
    return [(loss.item(), errors.item()) for loss, errors in scores]

  return step
