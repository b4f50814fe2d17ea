"""Cotangents of an operation, and what they should be."""

import jax
import jax.numpy as jnp


def expected_cotangents(operation, x, W, V, g):
  """dx at V and dW at W, each by JAX's own gradient of the plain operation."""
  dx = jax.vjp(lambda x: operation.plain(x, V), x)[1](g)[0]
  dW = jax.vjp(lambda W: operation.plain(x, W), W)[1](g)[0]
  return dx, dW, jnp.zeros_like(V)


def cotangents(operation, x, W, V, g):
  return jax.vjp(operation.asymmetric, x, W, V)[1](g)
