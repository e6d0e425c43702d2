"""Wide ResNets (Zagoruyko and Komodakis 2016)."""

from flax import linen as nn

from examples.paper.models import layers


class Block(nn.Module):
  """Norm and ReLU before each of two 3x3 convolutions; dropout between them."""

  width: int
  stride: int
  dropout: float
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    make, shortcut = self.make, x
    x = nn.relu(make.norm(train)(x))
    x = make.conv(self.width, 3, self.stride)(x)
    x = nn.relu(make.norm(train)(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = make.conv(self.width, 3)(x)
    if shortcut.shape != x.shape:
      shortcut = make.conv(self.width, 1, self.stride)(shortcut)
    return x + shortcut


class WideResNet(nn.Module):
  """6n + 4 layers in three stages of n blocks, 16k, 32k and 64k wide."""

  classes: int
  depth: int
  widen: int
  dropout: float
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    x = self.make.conv(16, 3)(x)
    for stage in range(3):
      for block in range((self.depth - 4) // 6):
        stride = 2 if stage > 0 and block == 0 else 1
        width = 16 * self.widen * 2**stage
        x = Block(width, stride, self.dropout, self.make)(x, train)
    x = nn.relu(self.make.norm(train)(x))
    return self.make.classify(layers.average(x), self.classes)
