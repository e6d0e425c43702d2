"""A decoder of a billion parameters in bfloat16, sharded over all devices."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from benchmarks.pod.networks import Problem

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 18, 2048, 16, 32_768, 1024


def transformer(
    layers: int = LAYERS,
    scanned: bool = False,
    whole: Callable[[Any], Any] = lambda weights: weights,
    width: int = WIDTH,
    heads: int = HEADS,
    vocabulary: int = VOCABULARY,
    length: int = LENGTH,
) -> Problem:
  """A pre-norm decoder without biases; by default 1.04 billion parameters.

  Every layer is computed again in the backward pass (``jax.checkpoint``).

  Args:
    layers: the number of layers.
    scanned: whether one ``lax.scan`` runs over the layers, whose parameters are
      then stacked; otherwise each layer stands in the program.
    whole: makes weights whole where they are used, such as a sharding constraint.
    width: of the residual stream; the hidden layers have four times as much.
    heads: of the attention.
    vocabulary: the number of tokens.
    length: tokens of an example.

  Returns:
    The problem; an example is a row of ``length`` tokens and its successors.
  """

  def init() -> Any:
    layer = {
        "attention_norm": jnp.zeros(width, jnp.bfloat16),
        "mlp_norm": jnp.zeros(width, jnp.bfloat16),
        "queries_keys_values": jnp.zeros((width, 3 * width), jnp.bfloat16),
        "mixed": jnp.zeros((width, width), jnp.bfloat16),
        "up": jnp.zeros((width, 4 * width), jnp.bfloat16),
        "down": jnp.zeros((4 * width, width), jnp.bfloat16),
    }
    stacked = jax.tree.map(lambda w: jnp.stack([w] * layers), layer)
    return {
        "embedding": jnp.zeros((vocabulary, width), jnp.bfloat16),
        "layers": stacked if scanned else [layer] * layers,
        "output_norm": jnp.zeros(width, jnp.bfloat16),
        "output": jnp.zeros((width, vocabulary), jnp.bfloat16),
    }

  def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
    layer = whole(layer)
    y = _normalized(x, layer["attention_norm"]) @ layer["queries_keys_values"]
    q, k, v = jnp.split(y.reshape(*y.shape[:2], heads, -1), 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + y.reshape(x.shape) @ layer["mixed"]
    y = jax.nn.gelu(_normalized(x, layer["mlp_norm"]) @ layer["up"])
    return x + y @ layer["down"], None

  block = jax.checkpoint(block)

  def loss(params: Any, batch: Any) -> jax.Array:
    tokens, successors = batch
    x = whole(params["embedding"])[tokens]
    if scanned:
      x, _ = lax.scan(block, x, params["layers"])
    else:
      for layer in params["layers"]:
        x, _ = block(x, layer)
    logits = _normalized(x, params["output_norm"]) @ whole(params["output"])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), successors
    )
    return losses.mean()

  def batch(size: int) -> Any:
    tokens = jax.ShapeDtypeStruct((size, length), jnp.int32)
    return tokens, tokens

  return Problem(init, loss, batch, sharded=True)


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Root-mean-square norm, in float32."""
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide**2, axis=-1, keepdims=True)
  return (wide * lax.rsqrt(mean + 1e-6)).astype(x.dtype) * (1 + scale)
