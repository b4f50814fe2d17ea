"""A strict session: nothing is promoted, broadcast or warned about silently."""

import os

# Eight host devices, so that pmap, shard_map and sharded jit really run.
os.environ['JAX_PLATFORMS'] = os.environ.get('JAX_PLATFORMS', 'cpu')
_FLAGS = os.environ.get('XLA_FLAGS', '')
if 'xla_force_host_platform_device_count' not in _FLAGS:
  os.environ['XLA_FLAGS'] = (
    f'{_FLAGS} --xla_force_host_platform_device_count=8'.strip()
  )

import jax  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
