"""Asymmetric backpropagation for JAX and Flax."""

from symjax_bp.feedback import (
  FeedbackRule,
  brsf,
  from_name,
  frsf,
  nusf,
  rndf,
  symmetric,
  usf,
)

__version__ = '0.1.0'

__all__ = [
  'FeedbackRule',
  'brsf',
  'from_name',
  'frsf',
  'nusf',
  'rndf',
  'symmetric',
  'usf',
]
