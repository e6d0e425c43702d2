"""The digits task: noisy labels, two networks, and training of many runs at once.

scikit-learn's embedded digits (1797 images of 8x8 pixels, 10 classes), one half to
train on with a part of its labels wrong, the other half to test on with all labels
right. Small enough to train a network in a second, and hard enough to tell
optimizers apart: one that memorizes the wrong labels loses test accuracy.
"""

from collections.abc import Callable, Sequence
import functools
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from sklearn import model_selection

from examples import label_noise

CLASSES = 10


class Halves(NamedTuple):
  """The data: images [n, 8, 8, 1] in [0, 1] and their true labels [n]."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


class Runs(NamedTuple):
  """What each of R runs trains on and is judged on; the leading axis is the run."""

  train_images: np.ndarray  # [R, n, 8, 8, 1]
  train_labels: np.ndarray  # [R, n]
  eval_images: np.ndarray  # [R, m, 8, 8, 1]
  eval_labels: np.ndarray  # [R, m]


class Training(NamedTuple):
  """The outcome of R runs."""

  epochs: list[int]  # those after which the runs were judged
  accuracy: np.ndarray  # [len(epochs), R], of the eval set, in [0, 1]
  seconds: float  # of the training steps of all runs together
  compile_seconds: float  # spent before the first step, and not counted above


def load_halves(split_seed: int = 0) -> Halves:
  """The digits in two halves with the same share of each class."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  labels = labels.astype(np.int32)
  train, test = model_selection.train_test_split(
      np.arange(len(labels)),
      train_size=0.5,
      stratify=labels,
      random_state=split_seed,
  )
  return Halves(images[train], labels[train], images[test], labels[test])


def flip_labels(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Gives round(fraction * n) of the n labels a random other class."""
  return label_noise.flip_labels(labels, fraction, CLASSES, seed)


def final_runs(halves: Halves, seeds: Sequence[int], noise: float) -> Runs:
  """One run a seed, which draws the wrong labels: the whole half, clean test."""
  labels = [flip_labels(halves.train_labels, noise, seed) for seed in seeds]
  repeated = [
      np.stack([array] * len(seeds))
      for array in (halves.train_images, halves.test_images, halves.test_labels)
  ]
  return Runs(repeated[0], np.stack(labels), repeated[1], repeated[2])


def validation_runs(
    halves: Halves, seeds: Sequence[int], noise: float, fraction: float
) -> Runs:
  """The same runs without a look at the test half.

  Each is judged on a part of its training half, whose labels are as noisy as the
  rest: nothing here knows which labels are true.
  """
  runs = []
  for seed in seeds:
    labels = flip_labels(halves.train_labels, noise, seed)
    kept, held_out = label_noise.validation_split(len(labels), fraction, seed)
    images = halves.train_images
    runs.append((images[kept], labels[kept], images[held_out], labels[held_out]))
  return Runs(*(np.stack(arrays) for arrays in zip(*runs, strict=True)))


def convolve_patches(inputs, kernel, strides, padding, **unused):
  """What ``nn.Conv`` wants of a convolution, as one matrix product.

  For odd square kernels with "SAME" padding that is the same on all sides. Under
  vmap over the kernels, XLA's own convolution is two to three times slower on CPU.
  """
  del padding, unused
  size, step = kernel.shape[0], strides[0]
  height, width = inputs.shape[1:3]
  margin = (size // 2, size // 2)
  padded = jnp.pad(inputs, ((0, 0), margin, margin, (0, 0)))
  shifted = [
      padded[:, i : i + height : step, j : j + width : step]
      for i in range(size)
      for j in range(size)
  ]
  return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


class MLP(nn.Module):
  """Two hidden layers."""

  width: int = 256

  @nn.compact
  def __call__(self, images):
    x = images.reshape(images.shape[0], -1)
    x = nn.relu(nn.Dense(self.width)(x))
    x = nn.relu(nn.Dense(self.width)(x))
    return nn.Dense(CLASSES)(x)


class CNN(nn.Module):
  """Two convolutions of stride 2, and one hidden layer."""

  width: int = 32

  @nn.compact
  def __call__(self, images):
    x = images
    for channels in (self.width, 2 * self.width):
      x = nn.relu(
          nn.Conv(
              channels,
              (3, 3),
              strides=2,
              padding=1,
              conv_general_dilated=convolve_patches,
          )(x)
      )
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(2 * self.width)(x))
    return nn.Dense(CLASSES)(x)


NETWORKS = {"mlp": MLP, "cnn": CNN}


def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross entropy of a batch."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


def cross_entropy(model: nn.Module, params: Any, images, labels) -> jax.Array:
  """The same, from the images."""
  logits: Any = model.apply(params, images)
  return loss(logits, labels)


def accuracy(model: nn.Module, params: Any, images, labels) -> jax.Array:
  """The share of right answers."""
  logits: Any = model.apply(params, images)
  return jnp.mean(jnp.argmax(logits, -1) == labels)


def train(
    model: nn.Module,
    optimizer: Callable[[Any], optax.GradientTransformation],
    runs: Runs,
    seeds: Sequence[int],
    rhos: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    eval_every: int = 1,
    progress: Callable[[int], Any] = lambda steps: None,
) -> Training:
  """Trains R networks side by side, each with its own data, seed and radius.

  The radius is a traced number, so one compiled step serves all of them. A seed
  fixes the initial weights and the order of the batches, whatever the optimizer.

  Args:
    model: the network.
    optimizer: makes the optimizer from a radius; one without a use for it may
      ignore it. Its update is passed ``value`` and ``value_fn``.
    runs: the data of the R runs.
    seeds: R seeds.
    rhos: R radii.
    epochs: passes over the training set. The examples that are left over by whole
      batches are others in each epoch.
    batch_size: examples in a batch, at most as many as there are.
    eval_every: epochs between two looks at the eval set; there is one at the end.
    progress: called after each epoch with the number of steps done.

  Returns:
    The accuracies and the time it took.
  """

  def step(params, opt_state, runs, batch, rho):
    images, labels = runs.train_images[batch], runs.train_labels[batch]
    tx = optax.with_extra_args_support(optimizer(rho))
    value_fn = lambda params: cross_entropy(model, params, images, labels)  # noqa: E731
    value, grads = jax.value_and_grad(value_fn)(params)
    updates, opt_state = tx.update(
        grads, opt_state, params, value=value, value_fn=value_fn
    )
    return optax.apply_updates(params, updates), opt_state

  start = time.perf_counter()
  size = runs.train_images.shape[1]
  runs = jax.tree.map(jnp.asarray, runs)
  rho = jnp.asarray(rhos, jnp.float32)
  params = _initial(model, seeds)
  opt_state = jax.jit(jax.vmap(optimizer(0.0).init))(params)
  orders = [np.random.default_rng([seed, 2]) for seed in seeds]
  batches = _batches(orders, size, batch_size)
  # A step is called from Python: in lax.scan, XLA's CPU code is slower.
  first = (params, opt_state, runs, batches[0], rho)
  fast_step = jax.jit(jax.vmap(step), donate_argnums=(0, 1)).lower(*first).compile()
  compile_seconds = time.perf_counter() - start

  seconds, judged, curve = 0.0, [], []
  for epoch in range(1, epochs + 1):
    start = time.perf_counter()
    for batch in batches:
      params, opt_state = fast_step(params, opt_state, runs, batch, rho)
    jax.block_until_ready(params)
    seconds += time.perf_counter() - start
    if epoch == epochs or epoch % eval_every == 0:
      judged.append(epoch)
      judgement = _accuracies(model, params, runs.eval_images, runs.eval_labels)
      curve.append(np.asarray(judgement, np.float64))
    progress(len(batches))
    batches = _batches(orders, size, batch_size)
  return Training(judged, np.stack(curve), seconds, compile_seconds)


# Static, the model: equal ones share what is compiled.
@functools.partial(jax.jit, static_argnums=0)
def _accuracies(model: nn.Module, params: Any, images, labels) -> jax.Array:
  """The accuracy of each run."""
  return jax.vmap(functools.partial(accuracy, model))(params, images, labels)


@functools.partial(jax.jit, static_argnums=0)
def _initial_run(model: nn.Module, seed: Any) -> Any:
  # XLA compiles this generator in a fraction of the time that the default one takes.
  return model.init(jax.random.key(seed, impl="rbg"), jnp.zeros((1, 8, 8, 1)))


def _initial(model: nn.Module, seeds: Sequence[int]) -> Any:
  """The initial weights, each leaf with the run as its leading axis."""
  params = {seed: _initial_run(model, seed) for seed in set(seeds)}
  return jax.tree.map(lambda *leaves: np.stack(leaves), *map(params.get, seeds))


def _batches(orders, size: int, batch_size: int) -> list[np.ndarray]:
  """The indices of an epoch's batches, each [R, batch_size]."""
  count = size // batch_size
  order = np.stack([rng.permutation(size) for rng in orders]).astype(np.int32)
  return np.split(order[:, : count * batch_size], count, axis=1)
