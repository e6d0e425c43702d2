"""The networks whose steps are measured: the quickstart's, and a small ResNet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from examples import digits


class Block(nn.Module):
  """Two 3 x 3 convolutions around a shortcut."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def conv(size, stride=1):
      return nn.Conv(self.width, (size, size), stride, use_bias=False)

    def norm(x):
      return nn.GroupNorm(num_groups=None, group_size=min(8, self.width))(x)

    y = nn.relu(norm(conv(3, self.stride)(x)))
    y = norm(conv(3)(y))
    if x.shape != y.shape:
      x = norm(conv(1, self.stride)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-8 for 32 x 32 x 3 images, with group norm: no batch statistics."""

  width: int = 16

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
    x = nn.relu(nn.GroupNorm(num_groups=None, group_size=min(8, self.width))(x))
    for stage in range(3):
      x = Block(self.width * 2**stage, stride=1 if stage == 0 else 2)(x)
    return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "mlp": (digits.MLP, (8, 8, 1)),
    "cnn": (digits.CNN, (8, 8, 1)),
    "resnet": (ResNet, (32, 32, 3)),
}


class Problem(NamedTuple):
  """A network with a batch.

  Attributes:
    init: gives the initial parameters.
    loss: ``(params, batch) -> mean cross-entropy``.
    batch: ``(inputs, labels)``.
  """

  init: Callable[[], Any]
  loss: Callable[[Any, Any], jax.Array]
  batch: tuple[jax.Array, jax.Array]


def problem(
    name: str, batch_size: int, dtype: str = "float32", **options: Any
) -> Problem:
  """The network of that name on normal inputs and random labels, in one dtype."""
  kind, shape = NETWORKS[name]
  network = kind(**options)
  x = jax.random.normal(jax.random.key(0), (batch_size, *shape)).astype(dtype)
  y = jax.random.randint(jax.random.key(1), (batch_size,), 0, 10)

  def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    logits = network.apply(params, x)
    assert isinstance(logits, jax.Array)
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def init() -> Any:
    params = network.init(jax.random.key(2), x)
    return jax.tree.map(lambda w: w.astype(dtype), params)

  return Problem(init, loss, (x, y))
