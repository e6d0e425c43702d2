"""What a step of each method costs, measured beside SGD's in one run."""

import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import asam_jax
from examples import digits
from examples import frontier_methods as methods
from examples import frontier_training as training


class ResNet20(nn.Module):
  """The ResNet-20 of CIFAR, with group norm, so that it has no statistics."""

  @nn.compact
  def __call__(self, images):
    def convolve(x, width, stride=1, size=3):
      x = nn.Conv(width, (size, size), stride, use_bias=False)(x)
      return nn.GroupNorm(8)(x)

    x = nn.relu(convolve(images, 16))
    for width, first in ((16, 1), (32, 2), (64, 2)):
      for stride in (first, 1, 1):
        inner = nn.relu(convolve(x, width, stride))
        inner = convolve(inner, width)
        shortcut = x if x.shape == inner.shape else convolve(x, width, stride, 1)
        x = nn.relu(inner + shortcut)
    return nn.Dense(digits.CLASSES)(x.mean((1, 2)))


class Network(NamedTuple):
  """What a step is measured on; a batch size of None is the task's."""

  model: nn.Module
  image: tuple[int, ...]
  batch_size: int | None = None


NETWORKS = {
    "mlp": Network(digits.MLP(), (8, 8, 1)),
    "cnn": Network(digits.CNN(), (8, 8, 1)),
    "mlp_2m": Network(digits.MLP(width=1050), (28, 28, 1), 128),
    "mlp_2m_256": Network(digits.MLP(width=1050), (28, 28, 1), 256),
    "resnet20": Network(ResNet20(), (32, 32, 3), 128),
}
RHO = 0.1  # no cost depends on it
# The methods that the larger networks are measured for.
LARGE = ("sgd", "asam", "momentum", "stale")


def measure(config: dict[str, Any]) -> list[dict[str, Any]]:
  """One row a method; all their steps take turns, in random order.

  A method that skips ascents has two steps, which are compiled and timed apart:
  a row's ``flops`` and ``time`` are pairs of (step without, step with an ascent),
  relative to the SGD step; of the times the median over the rounds, and quartiles.

  Args:
    config: the ``network`` of NETWORKS, the ``methods``, the ``batch_size``, and the
      number of ``rounds``, in each of which each step is timed once.

  Returns:
    The rows.
  """
  model, shape, _ = NETWORKS[config["network"]]
  names, batch_size = config["methods"], config["batch_size"]
  images = jax.random.normal(jax.random.key(0), (batch_size, *shape))
  labels = jnp.arange(batch_size) % digits.CLASSES
  steps = {}
  for name in ("sgd", *(name for name in names if name != "sgd")):
    for ascend in (False, True):
      steps[name, ascend] = _Step(name, model, images, labels, ascend)
      if not steps[name, ascend].skips:
        break

  seconds = {key: [] for key in steps}
  keys, order = list(steps), np.random.default_rng(0)
  for _ in tqdm.trange(
      config["rounds"], desc=f"cost, {config['network']}", disable=None
  ):
    for i in order.permutation(len(keys)):
      key, step = keys[i], steps[keys[i]]
      # The first step finds the caches full of another method's arrays, which no
      # step in a training loop does.
      step.run()
      seconds[key].append(step.run())
  base = np.array(seconds["sgd", False])
  rows = []
  for name in names:
    variants = [steps[key] for key in steps if key[0] == name]
    ratios = [np.array(seconds[key]) / base for key in seconds if key[0] == name]
    quartiles = [np.percentile(ratio, (25, 50, 75)).round(4) for ratio in ratios]
    flops = [step.flops / steps["sgd", False].flops for step in variants]
    both = [0, -1]  # one step stands for both where there is but one
    rows.append({
        "config": config,
        "method": name,
        "sgd_ms": round(1e3 * float(np.median(base)), 3),
        "flops": [round(flops[i], 5) for i in both],
        "time": [quartiles[i].tolist() for i in both],
    })
  return rows


class _Step:
  """A compiled training step with its parameters and state."""

  def __init__(self, name: str, model: Any, images, labels, ascend: bool):
    method = methods.METHODS[name]
    tx = optax.with_extra_args_support(
        method.make(methods.base_optimizer(0.01, 1000), RHO, 1000)
    )
    self.carry = jax.jit(
        lambda: (
            (params := model.init(jax.random.key(0), images[:1])),
            tx.init(params),
        )
    )()
    is_choice = lambda node: isinstance(node, asam_jax.SometimesState)  # noqa: E731
    nodes = jax.tree.leaves(self.carry[1], is_leaf=is_choice)
    self.skips = any(is_choice(node) for node in nodes)
    extra = {"ascend": ascend} if self.skips else {}

    def step(params, state):
      grads, grad_fn = training.gradients(model, method, RHO, params, images, labels)
      updates, state = tx.update(grads, state, params, grad_fn=grad_fn, **extra)
      return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    self.step = jitted.lower(*self.carry).compile()
    analysis = self.step.cost_analysis()
    assert analysis is not None
    self.flops = analysis["flops"]
    self.run()  # the first run is slower

  def run(self) -> float:
    start = time.perf_counter()
    self.carry = jax.block_until_ready(self.step(*self.carry))
    return time.perf_counter() - start
