"""PyramidNet with bottlenecks (Han et al. 2017) and ShakeDrop (Yamada et al. 2019)."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from examples.paper.models import layers


def shake_drop(key: jax.Array, branch: jax.Array, keep: float) -> jax.Array:
  """ShakeDrop of a residual branch in training, one draw an image.

  With b = 1 with probability ``keep``, else 0, alpha uniform in [-1, 1] and beta in
  [0, 1], the branch is multiplied by b + alpha - b alpha going forward, and its
  gradient by b + beta - b beta going back: kept with b = 1, shaken with b = 0.

  Args:
    key: a random key.
    branch: [n, height, width, channels].
    keep: the probability that the branch stays as it is.
  """
  keep_key, alpha_key, beta_key = jax.random.split(key, 3)
  shape = (len(branch), 1, 1, 1)
  kept = jax.random.bernoulli(keep_key, keep, shape)
  alpha = jax.random.uniform(alpha_key, shape, branch.dtype, -1, 1)
  beta = jax.random.uniform(beta_key, shape, branch.dtype)
  forward, backward = jnp.where(kept, 1, alpha), jnp.where(kept, 1, beta)
  # The value of the one, the derivative of the other.
  return backward * branch + jax.lax.stop_gradient((forward - backward) * branch)


class Block(nn.Module):
  """A bottleneck of norms and convolutions; the shortcut has no weights.

  New channels of the shortcut are zeros, fewer pixels are averages.
  """

  width: int
  stride: int
  keep: float
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    make, shortcut = self.make, x
    x = make.conv(self.width, 1)(make.norm(train)(x))
    x = nn.relu(make.norm(train)(x))
    x = nn.relu(make.norm(train)(make.conv(self.width, 3, self.stride)(x)))
    x = make.norm(train)(make.conv(4 * self.width, 1)(x))
    if train and self.keep < 1:
      x = shake_drop(self.make_rng("shakedrop"), x, self.keep)
    else:
      x = self.keep * x  # the forward factor's mean, as alpha's is zero
    if self.stride > 1:
      shortcut = nn.avg_pool(shortcut, (2, 2), strides=(2, 2))
    new = x.shape[-1] - shortcut.shape[-1]
    return x + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, new)))


class PyramidNet(nn.Module):
  """9n + 2 layers in three stages of n blocks, each a little wider than the last.

  Attributes:
    widening: channels that are added from the first block to the last (alpha).
    shake_drop: the probability that the last block is shaken; it grows linearly from
      the first block on.
  """

  classes: int
  depth: int
  widening: int
  shake_drop: float
  make: layers.Layers

  @nn.compact
  def __call__(self, x, train: bool):
    blocks = (self.depth - 2) // 9
    x = self.make.norm(train)(self.make.conv(16, 3)(x))
    for number in range(1, 3 * blocks + 1):
      width = round(16 + self.widening * number / (3 * blocks))
      stride = 2 if number in (blocks + 1, 2 * blocks + 1) else 1
      keep = 1 - self.shake_drop * number / (3 * blocks)
      x = Block(width, stride, keep, self.make)(x, train)
    x = nn.relu(self.make.norm(train)(x))
    return self.make.classify(layers.average(x), self.classes)
