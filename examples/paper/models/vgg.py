"""VGG with batch norm (Simonyan and Zisserman 2015), for 32x32 images."""

from flax import linen as nn
import jax.numpy as jnp

from examples.paper.models import layers

VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG(nn.Module):
  """Stages of 3x3 convolutions, each halved by max pooling, and one linear layer."""

  classes: int
  stages: tuple[tuple[int, int], ...]  # width, convolutions
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    for width, convolutions in self.stages:
      for _ in range(convolutions):
        x = self.make.conv(width, 3, bias=True)(x)
        x = nn.relu(self.make.norm(train)(x))
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = jnp.reshape(x, (len(x), -1))
    return self.make.classify(x, self.classes)
