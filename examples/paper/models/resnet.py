"""ResNets and ResNeXts (He et al. 2016; Xie et al. 2017).

Shortcuts between different widths are 1x1 convolutions with batch norm, as in the
code that the paper's CIFAR networks are from.
"""

from flax import linen as nn

from examples.paper.models import layers


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and the shortcut."""

  width: int
  stride: int
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    make, shortcut = self.make, x
    x = make.conv(self.width, 3, self.stride)(x)
    x = nn.relu(make.norm(train)(x))
    x = make.norm(train)(make.conv(self.width, 3)(x))
    if shortcut.shape != x.shape:
      shortcut = make.conv(self.width, 1, self.stride)(shortcut)
      shortcut = make.norm(train)(shortcut)
    return nn.relu(x + shortcut)


class Bottleneck(nn.Module):
  """1x1, 3x3 (in groups) and 1x1 convolution, and the shortcut."""

  width: int
  features: int
  stride: int
  groups: int
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    make, shortcut = self.make, x
    x = nn.relu(make.norm(train)(make.conv(self.width, 1)(x)))
    x = make.conv(self.width, 3, self.stride, self.groups)(x)
    x = nn.relu(make.norm(train)(x))
    x = make.norm(train)(make.conv(self.features, 1)(x))
    if shortcut.shape != x.shape:
      shortcut = make.conv(self.features, 1, self.stride)(shortcut)
      shortcut = make.norm(train)(shortcut)
    return nn.relu(x + shortcut)


class ResNet(nn.Module):
  """For CIFAR: 6n + 2 layers in three stages of n basic blocks, each twice as wide.

  Attributes:
    classes: the number of logits.
    depth: 6n + 2.
    make: makes the layers.
    width: of the first stage.
    stride: of the first convolution; 2 leaves a quarter of the pixels to all stages.
  """

  classes: int
  depth: int
  make: layers.Layers
  width: int = 16
  stride: int = 1

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.relu(self.make.norm(train)(self.make.conv(self.width, 3, self.stride)(x)))
    for stage in range(3):
      for block in range((self.depth - 2) // 6):
        stride = 2 if stage > 0 and block == 0 else 1
        x = BasicBlock(self.width * 2**stage, stride, self.make)(x, train)
    return self.make.classify(layers.average(x), self.classes)


class ResNeXt(nn.Module):
  """For CIFAR: 9n + 2 layers in three stages of n bottlenecks, 256 to 1024 wide."""

  classes: int
  depth: int
  groups: int
  group_width: int
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.relu(self.make.norm(train)(self.make.conv(64, 3)(x)))
    for stage in range(3):
      width = self.groups * self.group_width * 2**stage
      for block in range((self.depth - 2) // 9):
        stride = 2 if stage > 0 and block == 0 else 1
        features = 256 * 2**stage
        x = Bottleneck(width, features, stride, self.groups, self.make)(x, train)
    return self.make.classify(layers.average(x), self.classes)


class ImageNetResNet(nn.Module):
  """For ImageNet: four stages of bottlenecks, 256 to 2048 wide.

  The stride of a stage is at the 3x3 convolution of its first block, as in torchvision.
  """

  classes: int
  blocks: tuple[int, ...]
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.relu(self.make.norm(train)(self.make.conv(64, 7, 2)(x)))
    x = layers.max_pool(x)
    for stage, blocks in enumerate(self.blocks):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        width = 64 * 2**stage
        x = Bottleneck(width, 4 * width, stride, 1, self.make)(x, train)
    return self.make.classify(layers.average(x), self.classes)
