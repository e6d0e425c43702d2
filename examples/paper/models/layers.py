"""The layers that all convolutional networks here are made of.

Initialization and batch norm are those of the networks that the official ASAM code
trains (PyTorch): He's normal distribution by the fan-out for convolutions, gamma 1,
beta 0, PyTorch's default for the last layer, and running means that keep 0.9 of
themselves at each step.

Known differences from that code: both of its passes update the running statistics,
here the clean one alone; PyTorch's running variance is unbiased, Flax's is not. It also
lowers the learning rate once an epoch and trains on the last, smaller batch of each;
here the rate falls with each step, and the few images that are left over are others
each epoch.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
linear_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_uniform(fan_in: int) -> Callable[..., jax.Array]:
  """Uniform in +- 1 / sqrt(fan_in), whatever the bias's own shape."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


@dataclasses.dataclass(frozen=True)
class Layers:
  """Makes the layers of a network.

  Attributes:
    dtype: of the computation; parameters and batch statistics stay float32.
    convolve: what computes the convolutions; None is XLA's own.
  """

  dtype: Any = jnp.float32
  convolve: Callable[..., jax.Array] | None = None

  def conv(
      self, features: int, size: int, stride: int = 1, groups: int = 1, bias=False
  ) -> nn.Conv:
    """A square convolution that keeps height and width, but for the stride."""
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        feature_group_count=groups,
        use_bias=bias,
        dtype=self.dtype,
        kernel_init=he_normal,
        conv_general_dilated=self.convolve,
    )

  def norm(self, train: bool) -> nn.BatchNorm:
    """Batch norm: of the batch's statistics in training, else of the running ones."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
    )

  def classify(self, x: jax.Array, classes: int) -> jax.Array:
    """Logits of features [n, d], in float32 whatever the computation's dtype."""
    dense = nn.Dense(
        classes,
        dtype=self.dtype,
        kernel_init=linear_uniform,
        bias_init=bias_uniform(x.shape[-1]),
    )
    return dense(x).astype(jnp.float32)


def average(x: jax.Array) -> jax.Array:
  """The mean over height and width: [n, h, w, c] to [n, c]."""
  return jnp.mean(x, (1, 2))


def max_pool(x: jax.Array) -> jax.Array:
  """The largest of 3x3, at every other pixel: [n, h, w, c] to [n, h/2, w/2, c]."""
  margin: Any = ((1, 1), (1, 1))
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=margin)
