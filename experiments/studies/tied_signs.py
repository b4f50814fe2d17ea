"""Plugin of the study why-batch-manhattan: signs of W with the norm of W."""

import jax.numpy as jnp

import symjax_bp
from experiments.paper.conditions import Condition

__all__ = ['CONDITIONS', 'RULES']


def tied_signs(W):
  r""":math:`V = \mathrm{sign}(W)\,|W| / |\mathrm{sign}(W)|`."""
  signs = jnp.sign(W)
  return signs * jnp.linalg.norm(W) / jnp.linalg.norm(signs)


RULES = {'tiedSigns': symjax_bp.rule(tied_signs)}
CONDITIONS = {
  'tiedSigns': Condition(rule='tiedSigns'),
  'tiedSigns+BM': Condition(rule='tiedSigns', batch_manhattan=1),
}
