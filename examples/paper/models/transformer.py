"""The encoder-decoder Transformer (Vaswani et al. 2017) for translation.

The sizes of "transformer" are those of fairseq's transformer_iwslt_de_en: norm after
each sublayer, dropout of its result and of the embeddings, sinusoidal positions, one
joint vocabulary and one embedding for source, target and output. Padding has the
index 0.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PAD = 0
xavier = nn.initializers.xavier_uniform()


class Attention(nn.Module):
  """Attention over ``memory``, with the residual and the norm after it."""

  heads: int
  dropout: float
  dtype: Any
  step_by_step: bool = False

  @nn.compact
  def __call__(self, x, memory, mask, train: bool):
    attend = nn.MultiHeadDotProductAttention(
        self.heads, dtype=self.dtype, kernel_init=xavier, decode=self.step_by_step
    )
    new = attend(x, memory, mask=mask)
    new = nn.Dropout(self.dropout, deterministic=not train)(new)
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x + new)


class Feedforward(nn.Module):
  """A hidden layer, with the residual and the norm after it."""

  hidden: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x, train: bool):
    new = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier)(x)
    new = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier)(nn.relu(new))
    new = nn.Dropout(self.dropout, deterministic=not train)(new)
    return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)(x + new)


class Transformer(nn.Module):
  """``(source, target_in, train) -> logits``.

  Attributes:
    vocabulary: the number of subwords, of both languages together.
    depth: of the encoder, and of the decoder.
    width: of the embeddings.
    hidden: width of the hidden layers.
    heads: of attention.
    dropout: in training, with the random stream ``dropout``.
    dtype: of the computation; parameters and logits are float32.
    step_by_step: whether the decoder gets one subword at a time, and keeps what it
      needs of those before in the collection ``cache``.
  """

  vocabulary: int
  depth: int = 6
  width: int = 512
  hidden: int = 1024
  heads: int = 4
  dropout: float = 0.3
  dtype: Any = jnp.float32
  step_by_step: bool = False

  def setup(self):
    self.embedding = self.param(
        "embedding",
        nn.initializers.normal(self.width**-0.5),
        (self.vocabulary, self.width),
    )
    options = (self.dropout, self.dtype)
    layers = range(self.depth)
    self.drop = nn.Dropout(self.dropout)
    self.encoder_self = [Attention(self.heads, *options) for _ in layers]
    self.encoder_feedforward = [Feedforward(self.hidden, *options) for _ in layers]
    self.decoder_self = [
        Attention(self.heads, *options, self.step_by_step) for _ in layers
    ]
    self.decoder_source = [Attention(self.heads, *options) for _ in layers]
    self.decoder_feedforward = [Feedforward(self.hidden, *options) for _ in layers]

  def __call__(self, source: jax.Array, target_in: jax.Array, train: bool):
    """Logits of each next subword.

    Args:
      source: int32 [n, s], padded with 0.
      target_in: int32 [n, t], the target after a start symbol, padded with 0.
      train: whether dropout is on.

    Returns:
      float32 [n, t, vocabulary].
    """
    memory = self.encode(source, train)
    return self.decode(memory, source, target_in, train)

  def encode(self, source: jax.Array, train: bool) -> jax.Array:
    """[n, s, width] of int32 [n, s]."""
    x = self._embed(source, train)
    mask = _seen(source)
    for attention, feedforward in zip(
        self.encoder_self, self.encoder_feedforward, strict=True
    ):
      x = feedforward(attention(x, x, mask, train), train)
    return x

  def decode(
      self,
      memory: jax.Array,
      source: jax.Array,
      target_in: jax.Array,
      train: bool,
      start: Any = 0,
  ) -> jax.Array:
    """float32 [m, t, vocabulary], each place from those up to it.

    There may be m = n k targets, k in a row for each of the n sources.

    Args:
      memory: what ``encode`` gives, [n, s, width].
      source: int32 [n, s].
      target_in: int32 [m, t]; t = 1 where it is decoded step by step.
      train: whether dropout is on.
      start: the place of the first subword.
    """
    x = self._embed(target_in, train, start)
    causal = None
    if not self.step_by_step:
      causal = nn.make_causal_mask(target_in, dtype=bool) & _seen(target_in)
    for over_target, over_source, feedforward in zip(
        self.decoder_self, self.decoder_source, self.decoder_feedforward, strict=True
    ):
      x = over_target(x, x, causal, train)
      # Targets of one source look at it side by side: its keys are computed once.
      together = x.reshape(len(memory), -1, self.width)
      together = over_source(together, memory, _seen(source), train)
      x = feedforward(together.reshape(x.shape), train)
    logits = x @ self.embedding.T.astype(self.dtype)
    return logits.astype(jnp.float32)

  def _embed(self, tokens, train, start=0):
    embedded = jnp.take(self.embedding, tokens, axis=0) * self.width**0.5
    x = embedded + positions(start + jnp.arange(tokens.shape[1]), self.width)
    return self.drop(x.astype(self.dtype), deterministic=not train)


def positions(places: jax.Array, width: int) -> jax.Array:
  """Sines and cosines [n, width] of places [n], wavelengths 2 pi to 20,000 pi."""
  rates = np.exp(-np.log(10_000) * np.arange(width // 2) / (width // 2 - 1))
  angles = places[:, None] * jnp.asarray(rates, jnp.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def _seen(tokens):
  """[n, 1, 1, length]: which places may be attended to."""
  return (tokens != PAD)[:, None, None, :]
