"""What the training loop must know of a task, and the choice of the task."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import Options


class Sums(NamedTuple):
  """Sums over predictions, as scalars on the device; float32, int32, int32.

  A prediction is an image or, of text, a piece.
  """

  loss: jax.Array
  correct: jax.Array
  total: jax.Array  # a tuple's own count is taken

  @classmethod
  def zero(cls) -> "Sums":
    return cls(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def plus(self, other: "Sums") -> "Sums":
    return Sums(*(a + b for a, b in zip(self, other, strict=True)))

  def means(self) -> tuple[float, float]:
    """Loss and accuracy."""
    total = max(int(self.total), 1)
    return float(self.loss) / total, int(self.correct) / total


class Task(Protocol):
  """Data, network and loss.

  Attributes:
    data: a pytree of arrays, kept on the device and handed to ``prepare``.
    size: training examples.
    steps: steps in an epoch.
    stackable: whether all batches of an epoch have the same shape.
  """

  data: Any
  size: int
  steps: int
  stackable: bool

  def init(self, key: jax.Array) -> tuple[Any, Any]:
    """(parameters, other variables such as batch statistics)."""
    ...

  def multiply_adds(self) -> int:
    """Multiplications with additions of one example, going forward."""
    ...

  def batches(self, epoch: int, done: int = 0) -> Any:
    """What each step of the epoch gets, from that after so many on.

    A function of the seed and the epoch: an array with the step as its first axis, or,
    if not stackable, an iterator.
    """
    ...

  def prepare(self, data: Any, batch: Any, key: jax.Array) -> Any:
    """The inputs that both passes share; inside jit."""
    ...

  def forward(
      self, params: Any, variables: Any, inputs: Any, key: jax.Array
  ) -> tuple[jax.Array, Any]:
    """(logits, the new variables) in training mode; inside jit."""
    ...

  def loss(self, logits: jax.Array, inputs: Any) -> tuple[jax.Array, Sums]:
    """(the mean loss, sums); inside jit."""
    ...

  def evaluate(self, params: Any, variables: Any, last: bool) -> dict[str, float]:
    """What is reported of the test (or validation) set; last: after all epochs."""
    ...


def make(config: Config, options: Options) -> Task:
  """The task of a configuration, with its data loaded."""
  if config.dataset == "imagenet":
    from examples.paper import imagenet_task  # grain is needed for it alone

    return imagenet_task.ImageNetTask(config, options)
  if config.dataset == "parallel":
    from examples.paper import text_task  # tokenizers and sacrebleu, likewise

    return text_task.TextTask(config, options)
  from examples.paper import image_task

  return image_task.ImageTask(config, options)


def subset(size: int, config: Config) -> int:
  """How many of so many examples are trained on; raises if it can't be had."""
  available = size - config.validation
  wanted = config.examples or available
  if not 0 < wanted <= available:
    raise ConfigError(
        f"examples={config.examples} with validation={config.validation}: the training"
        f" set has {size}, so {max(available, 0)} are left."
    )
  if wanted < config.batch_size:
    raise ConfigError(
        f"batch_size={config.batch_size}: there are only {wanted} training examples."
    )
  return wanted
