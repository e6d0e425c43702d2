"""The networks of the radius study: with and without normalization, and attention."""

from flax import linen as nn
import jax.numpy as jnp

from examples import digits


class BatchNormMLP(nn.Module):
  """Two hidden layers, each normalized over the batch, also over the one judged on.

  Without running averages, for no run here keeps a state beside its weights.
  """

  width: int = 256

  @nn.compact
  def __call__(self, images):
    x = images.reshape(images.shape[0], -1)
    for layer in range(2):
      x = nn.Dense(self.width, use_bias=False)(x)
      scale = self.param(f"scale_{layer}", nn.initializers.ones, (self.width,))
      shift = self.param(f"bias_{layer}", nn.initializers.zeros, (self.width,))
      x = (x - jnp.mean(x, 0)) / jnp.sqrt(jnp.var(x, 0) + 1e-5)
      x = nn.relu(scale * x + shift)
    return nn.Dense(digits.CLASSES)(x)


class Transformer(nn.Module):
  """Two layers of attention over the 16 patches of 2 x 2 pixels."""

  width: int = 32
  heads: int = 2

  @nn.compact
  def __call__(self, images):
    x = images.reshape(-1, 4, 2, 4, 2, 1).swapaxes(2, 3).reshape(-1, 16, 4)
    x = nn.Dense(self.width)(x)
    x = x + self.param("position", nn.initializers.normal(0.02), (16, self.width))
    for _ in range(2):
      x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
      y = nn.Dense(2 * self.width)(nn.LayerNorm()(x))
      x = x + nn.Dense(self.width)(nn.gelu(y))
    return nn.Dense(digits.CLASSES)(jnp.mean(nn.LayerNorm()(x), 1))


NETWORKS: dict[str, type[nn.Module]] = {
    **digits.NETWORKS,
    "batch_norm_mlp": BatchNormMLP,
    "transformer": Transformer,
}
