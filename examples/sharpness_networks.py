"""The networks of the sharpness study: digits, a small MLP, a grid of settings.

All networks of one batch size train at once under ``vmap``; learning rate, weight
decay and dropout differ between them, and so do the random keys.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

TRAIN = 400
WIDTHS = (64, 64, 64, 10)
GRID = {
    "batch_size": (8, 16, 32, 64, 128),
    "learning_rate": (0.0033, 0.01, 0.033, 0.1, 0.33),
    "weight_decay": (5e-7, 5e-6, 5e-5, 5e-4, 5e-3),
    "dropout": (0.0, 0.125, 0.25, 0.375, 0.5),
}


class Setting(NamedTuple):
  """One network's hyper-parameters, all but the batch size."""

  learning_rate: Any
  weight_decay: Any
  dropout: Any


def digits(seed: int = 0):
  """The 8 x 8 digits in [0, 1], 400 for training and 1397 for the test."""
  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(seed).permutation(len(labels))
  images, labels = (images[order] / 16).astype(np.float32), labels[order]
  cut = TRAIN
  return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def settings(grid=GRID) -> list[Setting]:
  return [Setting(*values) for values in itertools.product(
      grid["learning_rate"], grid["weight_decay"], grid["dropout"])]


def init(key, widths=WIDTHS):
  keys = jax.random.split(key, len(widths) - 1)
  return [
      {"kernel": jnp.sqrt(2 / a) * jax.random.normal(k, (a, b)), "bias": jnp.zeros(b)}
      for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
  ]


def predict(params, images, key=None, dropout=0.0):
  """Logits; with a key in training mode, dropout after each hidden layer."""
  x = images
  for i, layer in enumerate(params):
    x = x @ layer["kernel"] + layer["bias"]
    if i + 1 < len(params):
      x = jax.nn.relu(x)
      if key is not None:
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape)
        x = jnp.where(keep, x / (1 - dropout), 0)
  return x


def cross_entropy(params, batch, key=None, dropout=0.0):
  images, labels = batch
  logits = predict(params, images, key, dropout)
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels))


def optimizer(setting: Setting, steps: int) -> optax.GradientTransformation:
  """SGD with momentum 0.9, weight decay and a cosine schedule, as in the paper."""
  schedule = lambda step: setting.learning_rate * (  # noqa: E731
      1 + jnp.cos(jnp.pi * step / steps)) / 2
  return optax.chain(
      optax.add_decayed_weights(setting.weight_decay), optax.sgd(schedule, 0.9))


@functools.partial(jax.jit, static_argnames="steps")
def _train_epoch(params, states, batches, keys, settings, first, steps):
  """One epoch of all networks; ``batches`` have leading axes [steps, size]."""

  def one(params, state, key, setting):
    tx = optimizer(setting, steps)

    def step(carry, inputs):
      params, state = carry
      index, batch = inputs
      grads = jax.grad(cross_entropy)(
          params, batch, jax.random.fold_in(key, index), setting.dropout)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    count = len(batches[1])
    carry, _ = jax.lax.scan(
        step, (params, state), (first + jnp.arange(count), batches))
    return carry

  return jax.vmap(one)(params, states, keys, settings)


def train(batch_size: int, chosen: list[Setting], epochs: int, seed: int):
  """Trains one network per setting; returns their parameters, stacked."""
  (images, labels), _ = digits()
  per_epoch = len(labels) // batch_size
  stacked = Setting(*(jnp.array(column) for column in zip(*chosen, strict=True)))
  keys = jax.random.split(
      jax.random.fold_in(jax.random.key(seed), batch_size), len(chosen))
  params = jax.vmap(init)(keys)
  steps = per_epoch * epochs
  states = jax.vmap(lambda s, p: optimizer(s, steps).init(p))(stacked, params)
  rng = np.random.default_rng([seed, batch_size])
  for epoch in range(epochs):
    order = rng.permutation(len(labels))[: per_epoch * batch_size]
    order = order.reshape(per_epoch, batch_size)
    params, states = _train_epoch(
        params, states, (images[order], labels[order]), keys, stacked,
        epoch * per_epoch, steps)
  return params


@jax.jit
def evaluate(params, batch):
  """Loss and accuracy of each of the stacked networks."""
  images, labels = batch

  def one(params):
    logits = predict(params, images)
    return (cross_entropy(params, batch),
            jnp.mean(jnp.argmax(logits, axis=-1) == labels))

  return jax.vmap(one)(params)
