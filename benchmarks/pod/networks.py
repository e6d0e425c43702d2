"""The networks whose steps are compiled: an MLP, ResNet-50 and a transformer."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

KEY = jax.random.key


class Problem(NamedTuple):
  """A network with the shapes of a batch; nothing here holds numbers.

  Attributes:
    init: gives the initial parameters; for ``jax.eval_shape``.
    loss: ``(params, batch) -> mean loss``.
    batch: from the number of examples to the batch's abstract arrays.
    sharded: whether the parameters are sharded over the devices (FSDP), or a copy
      of them is on each.
  """

  init: Callable[[], Any]
  loss: Callable[[Any, Any], jax.Array]
  batch: Callable[[int], Any]
  sharded: bool


def mlp(layers: int = 12, width: int = 1024) -> Problem:
  """Equal layers in float32, a copy on each device."""

  def init() -> Any:
    layer = {"kernel": jnp.zeros((width, width)), "bias": jnp.zeros(width)}
    return [layer] * layers

  def loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    for layer in params:
      x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - y) ** 2)

  def batch(size: int) -> Any:
    rows = jax.ShapeDtypeStruct((size, width), jnp.float32)
    return rows, rows

  return Problem(init, loss, batch, sharded=False)


class Bottleneck(nn.Module):
  """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
    norm = functools.partial(nn.GroupNorm, dtype=jnp.bfloat16)
    y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
    y = nn.relu(norm()(conv(self.width, (3, 3), self.stride)(y)))
    y = norm()(conv(4 * self.width, (1, 1))(y))
    if x.shape != y.shape:
      x = norm()(conv(4 * self.width, (1, 1), self.stride)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-50 with group norm: batch norm would add exchanges that are not SAM's."""

  stages: tuple[int, ...] = (3, 4, 6, 3)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=jnp.bfloat16)(x)
    x = nn.relu(nn.GroupNorm(dtype=jnp.bfloat16)(x))
    x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
    for stage, blocks in enumerate(self.stages):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        x = Bottleneck(64 * 2**stage, stride)(x)
    return nn.Dense(1000)(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


def resnet(stages: tuple[int, ...] = (3, 4, 6, 3), side: int = 224) -> Problem:
  """ResNet-50 on ImageNet's shapes: bfloat16 computes, float32 is kept."""
  network = ResNet(stages)
  image = (side, side, 3)

  def loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    logits: Any = network.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def batch(size: int) -> Any:
    images = jax.ShapeDtypeStruct((size, *image), jnp.bfloat16)
    return images, jax.ShapeDtypeStruct((size,), jnp.int32)

  def init() -> Any:
    return network.init(KEY(0), jnp.zeros((1, *image), jnp.bfloat16))

  return Problem(init, loss, batch, sharded=False)
