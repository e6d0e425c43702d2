"""A small vision transformer (Dosovitskiy et al. 2021), for 32x32 images."""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

xavier = nn.initializers.xavier_uniform()


class EncoderBlock(nn.Module):
  """Attention and a hidden layer of four times the width, norm before each."""

  heads: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x, train: bool):
    width = x.shape[-1]
    drop = nn.Dropout(self.dropout, deterministic=not train)
    normed = nn.LayerNorm(dtype=self.dtype)(x)
    attention = nn.MultiHeadDotProductAttention(
        self.heads, dtype=self.dtype, kernel_init=xavier
    )
    x += drop(attention(normed, normed))
    normed = nn.LayerNorm(dtype=self.dtype)(x)
    hidden = nn.Dense(4 * width, dtype=self.dtype, kernel_init=xavier)(normed)
    hidden = drop(nn.gelu(hidden))
    return x + drop(nn.Dense(width, dtype=self.dtype, kernel_init=xavier)(hidden))


class ViT(nn.Module):
  """Patches, learned positions, blocks, and the mean of what they give."""

  classes: int
  depth: int
  width: int
  heads: int
  patch: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x, train: bool):
    size = (self.patch, self.patch)
    x = nn.Conv(self.width, size, strides=size, padding=0, dtype=self.dtype)(x)
    x = jnp.reshape(x, (len(x), -1, self.width))
    positions = self.param(
        "positions", nn.initializers.normal(0.02), (1, *x.shape[1:])
    )
    x = x + positions.astype(x.dtype)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    for _ in range(self.depth):
      x = EncoderBlock(self.heads, self.dropout, self.dtype)(x, train)
    x = nn.LayerNorm(dtype=self.dtype)(x)
    logits = nn.Dense(self.classes, dtype=self.dtype)(jnp.mean(x, 1))
    return logits.astype(jnp.float32)
