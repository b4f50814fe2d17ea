"""Models of every kind, each with a uSF reference that needs no custom_vjp.

A reference computes each product of data x and a weight W as

  y = stop(op(x, W)) + (op(x, V) - stop) + (op(stop(x), W) - stop), V = sign(W),

with ``stop`` for ``stop_gradient`` of the same term. Layers of Linen take it by
an interceptor, layers of NNX and Equinox by a patched method, and functions by
the product that they are written with.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ad_checkpoint, lax
from jax.sharding import AxisType, PartitionSpec

from tests.cases import normal

KEY = jax.random.key(0)
stop = lax.stop_gradient


class Model(NamedTuple):
  """A model as a function.

  Attributes:
    function: ``function(params, *args)``; it may return any tree.
    params: its parameters.
    args: its other arguments.
    reference: the same function with uSF; None where none was written.
    uses: {path: use} of weights that do not only meet data in products.
    exclude: paths without feedback.
  """

  function: Callable[..., Any]
  params: Any
  args: tuple[Any, ...]
  reference: Callable[..., Any] | None = None
  uses: dict[str, str] = {}
  exclude: tuple[str, ...] = ()


def _filled(shapes, mean=0.0, sigma=1.0):
  """Arrays for what eval_shape returned: initializers take long to compile."""

  def fill(seed, leaf):
    if not hasattr(leaf, 'dtype'):
      return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.split(KEY, leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.zeros(leaf.shape, leaf.dtype)
    return mean + sigma * normal(seed, leaf.shape)

  leaves, tree = jax.tree.flatten(shapes)
  return jax.tree.unflatten(tree, map(fill, range(len(leaves)), leaves))


_STATE = {'mean': 1.0, 'sigma': 0.1}  # Variances are positive.


def _input(x):
  return (normal(0, x) if isinstance(x, tuple) else jnp.asarray(x),)


def through(op, x, W, V):
  """The equation above; ``op`` is affine in each of its operands."""
  through_x, through_W = op(x, stop(V)), op(stop(x), W)
  y = stop(op(x, W))
  return y + (through_x - stop(through_x)) + (through_W - stop(through_W))


def _layer(op, x, params):
  """The same for a layer; biases stay in V."""

  def sign(path, leaf):
    names = jax.tree_util.keystr(path)
    kernel = any(name in names for name in ('kernel', 'embedding', 'weight'))
    return jnp.sign(leaf) if kernel else leaf

  V = jax.tree_util.tree_map_with_path(sign, params)
  return through(op, x, params, V)


# --- Linen -------------------------------------------------------------------


def linen(module, x, reference=None, **options):
  """A module, or a function that makes it; ``reference``: another one."""
  build = lambda m: m if isinstance(m, nn.Module) else m()
  module, rngs = build(module), {'params': KEY, 'dropout': KEY}
  x = _input(x)
  state = dict(jax.eval_shape(module.init, rngs, *x))
  params = _filled(state.pop('params'))

  def function(params, state, x, module=module):
    variables = {'params': params, **state}
    return module.apply(variables, x, rngs=rngs, mutable=list(state))

  def intercepted(*args):
    with nn.intercept_methods(_interceptor()):
      return function(*args, module=build(reference or module))

  args = (_filled(state, **_STATE), *x)
  return Model(function, params, args, intercepted, **options)


def _interceptor():
  inside = False

  def intercept(call, args, kwargs, context):
    nonlocal inside
    module, method = context.module, context.method_name
    layers = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)
    layers += (nn.ConvTranspose, nn.ConvLocal)
    attends = isinstance(module, nn.Embed) and method == 'attend'
    layer = isinstance(module, layers) and method == '__call__'
    if inside or not (layer or attends):
      return call(*args, **kwargs)
    clone = module.clone(parent=None)
    inside = True
    op = lambda x, params: clone.apply({'params': params}, x, method=method)
    y = _layer(op, args[0], module.variables['params'])
    inside = False
    return y

  return intercept


def rnn(cell, *args):
  return lambda: nn.RNN(cell(4, *args, param_dtype=jnp.float64))


class Block(nn.Module):
  """A residual block in the form of a scan's body."""

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.relu(nn.Dense(5)(nn.LayerNorm()(x)))
    return x + nn.Dense(x.shape[-1])(h), None


_STACKED = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}


class Spectral(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.SpectralNorm(nn.Dense(6))(x, update_stats=True))
    return nn.SpectralNorm(nn.Dense(2))(h, update_stats=True)


class VisionTransformer(nn.Module):
  @nn.compact
  def __call__(self, x):
    initializer = nn.initializers.normal(1.0)
    x = nn.Conv(8, (2, 2), 2)(x).reshape(x.shape[0], -1, 8)
    token = self.param('token', initializer, (1, 1, 8))
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
    x = x + self.param('position', initializer, (1, *x.shape[1:]))
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    x = x + nn.Dense(8)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
    return nn.Dense(3)(x[:, 0])


class LanguageModel(nn.Module):
  """Causal attention with one embedding at both ends."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(10, 8)
    x = embed(tokens) + nn.Embed(5, 8)(jnp.arange(tokens.shape[1]))[None]
    mask = nn.make_causal_mask(tokens)
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
    return embed.attend(nn.LayerNorm()(x))


LINEN = {
  'DenseGeneral': (nn.DenseGeneral((2, 5), axis=(-2, -1)), (4, 3, 6)),
  'Conv, causal': (nn.Conv(5, (3,), padding='CAUSAL'), (2, 8, 3)),
  'Conv, grouped and strided': (
    nn.Conv(6, (3, 3), 2, feature_group_count=3), (2, 8, 8, 3)
  ),
  'Conv, dilated': (
    nn.Conv(6, (3, 3), kernel_dilation=2, padding='REFLECT'), (2, 8, 8, 3)
  ),
  'Conv, 3-d': (
    nn.Conv(4, (2, 2, 2), input_dilation=2, padding=1), (1, 3, 3, 3, 2)
  ),
  'Conv, masked': (
    nn.Conv(5, (3,), mask=np.tri(9, 5).reshape(3, 3, 5)), (2, 8, 3)
  ),
  'ConvTranspose, transposed kernel': (
    nn.ConvTranspose(5, (3, 3), (2, 2), transpose_kernel=True), (2, 5, 5, 3)
  ),
  'ConvLocal': (nn.ConvLocal(5, (3, 3)), (2, 6, 6, 3)),
  'LSTM': (rnn(nn.LSTMCell), (2, 3, 3)),
  'OptimizedLSTM': (
    rnn(nn.OptimizedLSTMCell), (2, 3, 3), {}, {'reference': rnn(nn.LSTMCell)}
  ),
  'GRU': (rnn(nn.GRUCell), (2, 3, 3)),
  'MGU': (rnn(nn.MGUCell), (2, 3, 3)),
  'ConvLSTM': (rnn(nn.ConvLSTMCell, (3,)), (2, 3, 6, 3)),
  'Bidirectional': (
    lambda: nn.Bidirectional(rnn(nn.SimpleCell)(), rnn(nn.SimpleCell)()),
    (2, 3, 3)
  ),
  'bfloat16': (nn.Sequential(
    [nn.Dense(6, dtype=jnp.bfloat16), nn.Dense(2, dtype=jnp.bfloat16)]
  ), (4, 3)),
  'PReLU and Dropout': (nn.Sequential(
    [nn.Dense(6), nn.PReLU(), nn.Dropout(0.5, deterministic=False)]
  ), (4, 3), {'layers_1/negative_slope': 'scale'}),
  'WeightNorm': (nn.Sequential(
    [nn.WeightNorm(nn.Dense(6)), nn.WeightNorm(nn.Dense(2))]
  ), (4, 3)),
  'SpectralNorm': (Spectral(), (4, 3)),
  'nn.scan of nn.remat': (
    lambda: nn.scan(nn.remat(Block), **_STACKED, length=3)(), (4, 6)
  ),
  'nn.remat_scan': (lambda: nn.remat_scan(nn.Dense, (2, 2))(6), (4, 6)),
  'nn.vmap': (lambda: nn.vmap(nn.Dense, **_STACKED)(5), (4, 2, 3)),
  'vision transformer': (
    VisionTransformer(), (2, 4, 4, 3), {'token': 'added', 'position': 'added'}
  ),
  'language model, tied embedding': (
    LanguageModel(), np.arange(10).reshape(2, 5),
    {'Embed_0/embedding': 'looked up, added, product',
     'Embed_1/embedding': 'added'},
  ),
}  # fmt: skip


# --- NNX and Equinox ---------------------------------------------------------


def _patched(function):
  """The reference of a function that calls layers of NNX or Equinox."""

  def opened(module):
    """Its parameters, and how it is made of others."""
    if isinstance(module, nnx.Module):
      graphdef, params, rest = nnx.split(module, nnx.Param, ...)
      return params, lambda params: nnx.merge(graphdef, params, rest)
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return params, lambda params: eqx.combine(params, rest)

  def patched(original):
    def method(self, x, **_):
      params, closed = opened(self)
      return _layer(lambda x, params: original(closed(params), x), x, params)

    return method

  layers = (
    nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose,
    eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose,
  )  # fmt: skip
  methods = [(nnx.Embed, 'attend'), *((each, '__call__') for each in layers)]

  def reference(*args):
    with contextlib.ExitStack() as stack:
      for kind, name in methods:
        new = patched(getattr(kind, name))
        stack.enter_context(mock.patch.object(kind, name, new))
      return function(*args)

  return reference


def nnx_model(make, x, call=lambda module, x: module(x), **options):
  """The NNX module ``make(rngs)``."""
  module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graphdef, params, rest = nnx.split(module, nnx.Param, ...)
  rest = _filled(rest, **_STATE)

  def function(params, x):
    merged = nnx.merge(graphdef, params, rest, copy=True)
    return call(merged, x), jax.tree.leaves(nnx.state(merged, nnx.BatchStat))

  options.setdefault('reference', _patched(function))
  return Model(function, _filled(params), _input(x), **options)


class Network(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.linear = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
    return self.linear(self.dropout(x))


class Stack(nnx.Module):
  """Layers that are stacked by vmap and called by scan."""

  def __init__(self, rngs):
    make = lambda rngs: nnx.Linear(4, 4, rngs=rngs)
    self.layers = nnx.vmap(make)(rngs.split(3))

  def __call__(self, x):
    axes = {'in_axes': (0, nnx.Carry), 'out_axes': nnx.Carry}
    step = nnx.scan(lambda layer, x: jnp.tanh(layer(x)), **axes)
    return step(self.layers, x)


def nnx_rnn(cell):
  def make(rngs):
    dtypes = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
    return nnx.RNN(cell(3, 4, **dtypes, rngs=rngs), rngs=rngs)

  return make


NNX = {
  'nnx Conv, BatchNorm, Dropout, Linear': (Network, (2, 4, 4, 3)),
  'nnx LinearGeneral': (
    lambda rngs: nnx.LinearGeneral((3, 6), 5, axis=(-2, -1), rngs=rngs),
    (4, 3, 6)
  ),
  'nnx Einsum': (
    lambda rngs: nnx.Einsum('bi,ihd->bhd', (3, 2, 5), rngs=rngs), (4, 3)
  ),
  'nnx ConvTranspose': (
    lambda rngs: nnx.ConvTranspose(3, 5, (3,), strides=2, rngs=rngs), (2, 5, 3)
  ),
  'nnx attention': (
    lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    (2, 5, 8)
  ),
  'nnx LSTM': (nnx_rnn(nnx.LSTMCell), (2, 3, 3)),
  'nnx OptimizedLSTM': (nnx_rnn(nnx.OptimizedLSTMCell), (2, 3, 3)),
  'nnx Embed.attend': (
    lambda rngs: nnx.Embed(7, 4, rngs=rngs), np.arange(3),
    {'embedding': 'looked up, product'},
    {'call': lambda embed, tokens: embed.attend(jnp.tanh(embed(tokens)))},
  ),
  'nnx scan': (Stack, (2, 4)),
}  # fmt: skip


def equinox(make, x, call=lambda module, x: jax.vmap(module)(x), **options):
  """The Equinox module ``make(key=key)``; its arrays are the parameters."""
  module = _filled(eqx.filter_eval_shape(make, key=KEY))
  params, rest = eqx.partition(module, eqx.is_inexact_array)
  function = lambda params, x: call(eqx.combine(params, rest), x)
  options.setdefault('reference', _patched(function))
  return Model(function, params, _input(x), **options)


def _over_time(cell, xs):
  h = jnp.zeros(4, xs.dtype)
  one = lambda xs: lax.scan(lambda h, x: (cell(x, h), None), h, xs)[0]
  return jax.vmap(one)(xs)


EQUINOX = {
  'eqx MLP': (functools.partial(eqx.nn.MLP, 3, 2, 8, 2), (4, 3)),
  'eqx Conv2d': (functools.partial(eqx.nn.Conv2d, 3, 5, 3), (2, 3, 6, 6)),
  'eqx ConvTranspose2d': (
    functools.partial(eqx.nn.ConvTranspose2d, 3, 5, 3, 2), (2, 3, 5, 5)
  ),
  'eqx attention': (
    functools.partial(eqx.nn.MultiheadAttention, 2, 8), (2, 5, 8),
    {}, {'call': lambda module, x: jax.vmap(module)(x, x, x)},
  ),
  'eqx GRU': (
    functools.partial(eqx.nn.GRUCell, 3, 4), (2, 5, 3),
    {'bias_n': 'added'}, {'call': _over_time, 'reference': None},
  ),
}  # fmt: skip


# --- Functions of a product, parameters and data -----------------------------


def plain(x, W, op=jnp.matmul):
  return op(x, W)


def straight_through(x, W, op=jnp.matmul):
  return through(op, x, W, jnp.sign(W))


def function(make, shapes, x, **options):
  """``make(product, params, x)`` with parameters of the given shapes."""
  shapes = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float64),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  call, reference = (
    functools.partial(make, each) for each in (plain, straight_through)
  )
  return Model(call, _filled(shapes), _input(x), reference, **options)


def chain(effective):
  """Two layers with one weight, which ``effective`` prepares."""

  def model(product, W, x):
    h = jnp.tanh(product(x, effective(W)))
    return product(h, effective(W).T)

  return model


@jax.custom_vjp
def quantized(W):
  return jnp.round(4 * W) / 4


quantized.defvjp(lambda W: (quantized(W), None), lambda _, g: (g,))


@jax.custom_jvp
def identity(W):
  return W * 1


identity.defjvp(lambda primals, tangents: (primals[0], tangents[0]))


def _standardized(W):
  W = W - W.mean(0, keepdims=True)
  return W * lax.rsqrt(jnp.square(W).mean(0, keepdims=True) + 1e-5)


def _joined(product, params, x):
  W = jnp.concatenate([params['a'][:, :2], params['b'].reshape(3, 2)], 1)
  return product(jnp.tanh(product(x, W)), jnp.stack([params['c']] * 4))


def _unrolled(product, params, x):
  h = jnp.zeros((x.shape[0], 3), x.dtype)
  for t in range(3):
    h = jnp.tanh(product(h, params['U']) + product(x[:, t], params['W']))
  return h


def _fori(product, W, x):
  return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(product(h, W[i])), x)


def _mapped(product, W, x):
  return lax.map(lambda row: product(jnp.tanh(product(row, W)), W.T), x)


def _ensemble(product, W, x):
  return jax.vmap(lambda W: product(jnp.tanh(product(x, W)), W.T))(W)


def _branches(product, params, x):
  once = lambda W, x: product(x, W)
  twice = lambda W, x: product(jnp.tanh(product(x, W)), W)
  h = lax.cond(x.sum() > 0, once, twice, params['a'], x)
  cases = [lambda a, b: a, lambda a, b: 2 * b]
  W = lax.switch((h.sum() > 0).astype(int), cases, params['a'], params['b'])
  return product(jnp.tanh(h), W)


def _chosen(product, W, x):
  """Data choose between the weight and constants, and where to put it."""
  here, i = x[0, 0] > 0, x[0].argmax()
  either = lax.cond(here, lambda: W, lambda: jnp.eye(3, dtype=W.dtype))
  h = jnp.tanh(product(x, either))
  h = jnp.tanh(product(h, jnp.where(x[:3] > 0, W, 0)))
  return product(h, jnp.zeros((3, 3), W.dtype).at[i].set(W[0]))


def _carried(product, params, x):
  """Backwards, with a learned state, and a weight in place of a constant."""

  def step(carry, x):
    W, h = carry
    return (params['W'], jnp.tanh(x + product(h, W))), h

  first = jnp.eye(3, dtype=x.dtype), params['h']
  return lax.scan(step, first, jnp.stack([x, -x, 2 * x]), reverse=True)


def _checkpointed(product, W, x):
  def inner(W, x):
    h = ad_checkpoint.checkpoint_name(jnp.tanh(product(x, W)), 'h')
    return product(h, W.T)

  policy = jax.checkpoint_policies.save_only_these_names('h')
  return jax.checkpoint(inner, policy=policy)(W, x)


def _sharded(product, W, x):
  """Examples on eight devices, W on each."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  whole, split = PartitionSpec(), PartitionSpec('data')
  return jax.shard_map(
    lambda W, x: product(jnp.tanh(product(x, W)), W.T),
    mesh=mesh,
    in_specs=(whole, split),
    out_specs=split,
  )(W, x)


def _while(product, W, x):
  """The loop runs forwards alone: it has no reverse mode."""
  step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ W))
  _, h = lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))
  return product(x + stop(h), W)


def _by_hand(product, W, x):
  """The weight first, as an outer product, and in an einsum."""
  h = jnp.tanh(product(x, W, lambda x, W: (W.T @ x.T).T))
  y = product(h, W.T, lambda h, W: (h[:, :, None] * W[None]).sum(1))
  return product(jnp.tanh(y), W, lambda y, W: jnp.einsum('bi,ij->jb', y, W))


def _ragged(product, W, x):
  op = lambda x, W: lax.ragged_dot(x, W, jnp.array([1, 3], jnp.int32))
  return product(jnp.tanh(product(x, W, op)), W, op)


def _merged(product, params, x):
  """LoRA: the rule is that of the sum."""
  W = params['W'] + params['A'] @ params['B']
  return product(jnp.tanh(product(x, W)), W)


def _gathered(product, params, x):
  gate = nn.softmax(product(x, params['gate']))
  W = params['experts'][gate.argmax(-1)]
  y = product(x, W, functools.partial(jnp.einsum, 'bi,bij->bj'))
  return y * gate.max(-1, keepdims=True)


def _dispatched(product, params, x):
  gate = nn.softmax(product(x, params['gate']))
  best = jax.nn.one_hot(gate.argmax(-1), 4, dtype=x.dtype)
  x = jnp.einsum('bi,be->ebi', x, best)
  op = functools.partial(jnp.einsum, 'ebi,eij->ebj')
  return jnp.einsum(
    'be,ebj->bj', gate * best, product(x, params['experts'], op)
  )


def _decayed(product, params, x):
  y = product(jnp.tanh(product(x, params['W'])), params['W'])
  return (y * params['gain']).sum() + 1e-3 * (params['W'] ** 2).sum()


def _mean_of_tokens(product, params, x):
  """Data choose the rows, four of them twice."""
  tokens = x.argmax(1)[:, None] + np.array([[0, 1], [2, 3], [4, 4], [5, 6]])
  h = params['E'][tokens].mean(1)
  return product(jnp.tanh(product(h, params['W'])), params['U'])


def _clipped(product, W, x):
  limit = jax.lax.stop_gradient(jnp.abs(x).mean())
  return product(x, jax.lax.clamp(-limit, W, limit))


def _buffered(product, params, x):
  """Data are kept in a mutable array."""
  array = jax.new_ref(jnp.zeros_like(x))
  array[...] = jnp.tanh(product(x, params['W']))
  return product(jnp.tanh(product(array[...], params['U'])), params['W'])


def _broadcast(product, W, x):
  def by_hand(x, W):
    each = jnp.broadcast_to(x[:, None], (4, 3, 3)).transpose(0, 2, 1)
    return (each * W[None]).sum(1)

  return product(x, W, by_hand)


def _printed(product, W, x):
  jax.debug.callback(lambda *_: None, W, x)
  return product(x, W)


def _spectral(product, params, x):
  W = params['W']
  h = jnp.tanh(product(x, W / jnp.linalg.norm(W @ jnp.ones(3))))
  return product(h, params['U'] * params['E'][x[0].argmax(), 0])


_EXPERTS = {'experts': (4, 3, 5), 'gate': (3, 4)}

CHAINS = {
  'tied and transposed': lambda W: W,
  'cast': lambda W: W.astype(jnp.bfloat16).astype(W.dtype),
  'scaled by constants': lambda W: (2 * W - 1) / 3,
  'rolled and gathered': lambda W: jnp.roll(W, 1, 0)[np.array([2, 0, 1])],
  'set into zeros': lambda W: jnp.zeros((3, 5), W.dtype).at[:, 1:4].set(W),
  'identity (custom_jvp)': identity,
  'relu (custom_jvp)': nn.relu,
  'softmax': functools.partial(nn.softmax, axis=0),
  'quantized (custom_vjp)': quantized,
  'straight-through sign': lambda W: W + stop(jnp.sign(W) - W),
  'weight standardization': _standardized,
  'W + W.T': lambda W: W + W.T,
}

# Arithmetic that may change signs, which R does not follow.
ARITHMETIC = {
  'WeightNorm',
  'scaled by constants',
  'relu (custom_jvp)',
  'softmax',
  'quantized (custom_vjp)',
  'weight standardization',
  'W + W.T',
  'LoRA, merged',
}

FUNCTIONS = {
  **{name: (chain(each), (3, 3), (4, 3)) for name, each in CHAINS.items()},
  'joined': (_joined, {'a': (3, 3), 'b': (6,), 'c': (2,)}, (4, 3)),
  'unrolled': (  # From a state that is a constant.
    _unrolled, {'U': (3, 3), 'W': (3, 3)}, (4, 3, 3), {'U': 'added, product'}
  ),
  'fori_loop': (_fori, (3, 3, 3), (4, 3)),
  'lax.map': (_mapped, (3, 5), (4, 3)),
  'ensemble': (_ensemble, (2, 3, 5), (4, 3)),
  'chosen by data': (_chosen, (3, 3), (4, 3)),
  'carried': (
    _carried, {'W': (3, 3), 'h': (4, 3)}, (4, 3), {'h': 'added'}
  ),
  'cond and switch': (_branches, {'a': (3, 3), 'b': (3, 3)}, (4, 3)),
  'checkpoint': (_checkpointed, (3, 5), (4, 3)),
  'shard_map': (_sharded, (3, 5), (8, 3)),
  'while_loop': (_while, (3, 3), (4, 3)),
  'weight first and by hand': (_by_hand, (3, 5), (4, 3)),
  'ragged_dot': (_ragged, (2, 3, 3), (4, 3)),
  'LoRA, merged': (
    _merged, {'W': (3, 3), 'A': (3, 1), 'B': (1, 3)}, (4, 3),
    {'A': 'excluded', 'B': 'excluded'}, {'exclude': ('A', 'B')},
  ),
  'mean of tokens': (
    _mean_of_tokens, {'W': (3, 3), 'U': (3, 3), 'E': (9, 3)}, (4, 3),
    {'E': 'looked up'},
  ),
  'clipped': (_clipped, (3, 3), (4, 3)),
  'mutable array': (_buffered, {'W': (3, 3), 'U': (3, 3)}, (4, 3)),
  'broadcast by hand': (_broadcast, (3, 3), (4, 3)),
  'printed': (_printed, (3, 3), (4, 3)),
  'spectral norm': (
    _spectral, {'W': (3, 3), 'U': (3, 3), 'E': (9, 3)}, (4, 3),
    {'W': 'scale, product', 'E': 'looked up, scale'},
  ),
  'experts, gathered': (
    _gathered, _EXPERTS, (6, 3), {'experts': 'looked up, product'}
  ),
  'experts, dispatched': (_dispatched, _EXPERTS, (6, 3)),
  'scale and weight decay': (
    _decayed, {'W': (3, 3), 'gain': (1, 3)}, (4, 3),
    {'W': 'product, added', 'gain': 'scale'},
  ),
}  # fmt: skip

_KINDS = (
  (linen, LINEN), (nnx_model, NNX), (equinox, EQUINOX), (function, FUNCTIONS)
)  # fmt: skip
NAMES = [name for _, table in _KINDS for name in table]


def squares(outputs) -> jax.Array:
  """The sum of the squares of all numbers that a model returns."""
  return sum(
    jnp.sum(leaf.astype(float) ** 2)
    for leaf in jax.tree.leaves(outputs)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  )


@functools.cache
def model(name: str) -> Model:
  """A model in double precision, which must be enabled."""
  assert jax.config.read('jax_enable_x64')
  make, row = next((make, t[name]) for make, t in _KINDS if name in t)
  count = 3 if make is function else 2
  uses, options = (*row[count:], {}, {})[:2]
  return make(*row[:count], uses=uses, **options)
