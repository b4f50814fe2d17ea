"""Networks for pictures of 224 x 224, as a plugin of the program.

ResNet-18 (He et al. 2016) and a vision transformer of one block (Dosovitskiy et
al. 2021; patches of 16 x 16, 384 features, 6 heads). They are there to measure
steps of today's sizes.
"""

import flax.linen as nn

from symjax_bp.linen import BatchNorm

__all__ = ['NETWORKS']


class ResNet18(nn.Module):
  """18 layers of weights; batch norm after each convolution, where asked for.

  Attributes:
    classes: number of classes.
    batch_norm: 'none', 'plain' or 'affine'.
  """

  classes: int
  batch_norm: str = 'plain'

  @nn.compact
  def __call__(self, x, train):
    """Returns logits (batch, classes)."""
    affine = self.batch_norm == 'affine'

    def conv(x, features, size, stride=1):
      bias = self.batch_norm == 'none'
      x = nn.Conv(features, (size, size), stride, use_bias=bias)(x)
      if self.batch_norm == 'none':
        return x
      return BatchNorm(
        use_running_average=not train, use_scale=affine, use_bias=affine
      )(x)

    x = nn.relu(conv(x, 64, 7, 2))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for stage, features in enumerate((64, 128, 256, 512)):
      for block in range(2):
        stride = 2 if stage and not block else 1
        y = nn.relu(conv(x, features, 3, stride))
        y = conv(y, features, 3)
        x = conv(x, features, 1, stride) if stride > 1 else x
        x = nn.relu(x + y)
    return nn.Dense(self.classes, name='output')(x.mean((1, 2)))


class VisionTransformer(nn.Module):
  """One block of attention over patches; layer norm, whatever is asked for.

  Attributes:
    classes: number of classes.
  """

  classes: int

  @nn.compact
  def __call__(self, x, train):
    """Returns logits (batch, classes)."""
    del train
    x = nn.Conv(384, (16, 16), 16)(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    y = nn.LayerNorm()(x)
    x += nn.MultiHeadDotProductAttention(num_heads=6)(y, y)
    y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
    x += nn.Dense(x.shape[-1])(nn.gelu(y))
    return nn.Dense(self.classes, name='output')(x.mean(1))


NETWORKS = {
  'resnet18': ResNet18,
  'vit': lambda classes, _: VisionTransformer(classes),
}
