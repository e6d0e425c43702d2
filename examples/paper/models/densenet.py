"""DenseNet-BC (Huang et al. 2017)."""

from flax import linen as nn
import jax.numpy as jnp

from examples.paper.models import layers

STEMS = ("cifar", "imagenet")


class DenseLayer(nn.Module):
  """1x1 and 3x3 convolution, norm and ReLU before each; appended to what came in."""

  growth: int
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    new = nn.relu(self.make.norm(train)(x))
    new = self.make.conv(4 * self.growth, 1)(new)
    new = nn.relu(self.make.norm(train)(new))
    new = self.make.conv(self.growth, 3)(new)
    return jnp.concatenate([x, new], -1)


class DenseNet(nn.Module):
  """Dense blocks; between two of them, channels and pixels are halved.

  Attributes:
    stem: "cifar" starts with a 3x3 convolution, "imagenet" with a 7x7 one and max
      pooling, of stride 2 each. The paper does not say which one its accuracies on
      CIFAR are of; 91 % is what the latter reaches on 32x32 images.
  """

  classes: int
  blocks: tuple[int, ...]
  growth: int
  stem: str
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    make, channels = self.make, 2 * self.growth
    if self.stem == "imagenet":
      x = nn.relu(make.norm(train)(make.conv(channels, 7, 2)(x)))
      x = layers.max_pool(x)
    else:
      x = make.conv(channels, 3)(x)
    for block, depth in enumerate(self.blocks):
      if block > 0:
        x = nn.relu(make.norm(train)(x))
        x = make.conv(x.shape[-1] // 2, 1)(x)
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
      for _ in range(depth):
        x = DenseLayer(self.growth, make)(x, train)
    x = nn.relu(make.norm(train)(x))
    return make.classify(layers.average(x), self.classes)


def densenet(
    classes: int,
    make: layers.Layers,
    blocks: tuple[int, ...],
    growth: int = 32,
    stem: str = "cifar",
) -> DenseNet:
  """Raises ValueError for an unknown stem."""
  if stem not in STEMS:
    raise ValueError(f"stem={stem!r}: must be one of {', '.join(STEMS)}.")
  return DenseNet(classes, blocks, growth, stem, make)
