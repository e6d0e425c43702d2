"""Classification of images that fit the device: CIFAR-10, CIFAR-100 and fake ones."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.paper import augment
from examples.paper import images as image_data
from examples.paper import models
from examples.paper import tasks
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import Options
from examples.paper.models import costs

EVAL_BATCH = 500
# The subset of the training images is the same for all seeds of a configuration.
_SUBSET_SEED = 2021


def load(config: Config, options: Options) -> image_data.Images:
  """The data set, whole, with the labels that the configuration trains on."""
  if config.dataset == "fake":
    data = fake_images(config)
  else:
    loader = {
        "cifar10": image_data.load_cifar10, "cifar100": image_data.load_cifar100
    }[config.dataset]
    try:
      data = loader(options.data)
    except (OSError, ValueError, RuntimeError) as error:  # the last: no download
      raise ConfigError(f"data={options.data}: {error}") from error
  labels = data.train.labels
  if config.human_labels:
    if options.labels is None:
      raise ConfigError(
          f"human_labels={config.human_labels!r} needs --labels, the place of"
          " CIFAR-10N's labels."
      )
    try:
      labels = image_data.load_cifar10n(options.labels, config.human_labels, labels)
    except (OSError, ValueError) as error:
      raise ConfigError(f"labels={options.labels}: {error}") from error
  if config.noise:
    labels = image_data.flip_labels(labels, config.noise, data.classes, config.seed)
  return data._replace(train=data.train._replace(labels=labels))


def fake_images(config: Config, size: int = 512) -> image_data.Images:
  """Noise in the shape of CIFAR-10, whose class shifts the brightness.

  As many as are asked for, or 512; noise needs no more.
  """
  rng = np.random.default_rng(0)

  def split(size):
    labels = rng.integers(0, 10, size, dtype=np.int32)
    noise = rng.integers(0, 156, (size, 32, 32, 3), dtype=np.uint8)
    return image_data.Split(
        (noise + 11 * labels[:, None, None, None]).astype(np.uint8), labels
    )

  mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
  size = max(size, config.examples)
  return image_data.Images(split(size), split(130), 10, mean, std)


def split_for_training(
    data: image_data.Images, config: Config
) -> tuple[image_data.Split, image_data.Split]:
  """(what is trained on, what is judged on)."""
  size = len(data.train.labels)
  wanted = tasks.subset(size, config)
  order = np.random.default_rng(_SUBSET_SEED).permutation(size)
  take = lambda chosen: image_data.Split(*(x[chosen] for x in data.train))  # noqa: E731
  held_out = order[size - config.validation :]
  judged = take(held_out) if config.validation else data.test
  return take(order[:wanted]), judged


class ImageTask:
  """See :class:`examples.paper.tasks.Task`."""

  stackable = True

  def __init__(self, config: Config, options: Options):
    data = load(config, options)
    train, judged = split_for_training(data, config)
    self.config = config
    self.classes = data.classes
    self.network = build(config, data.classes)
    on_device: Any = map(jnp.asarray, train)
    self.data = image_data.Split(*on_device)
    self.size = len(train.labels)
    self.steps = self.size // config.batch_size
    self._normalize = functools.partial(
        augment.normalize, mean=data.mean, std=data.std
    )
    self._augment = functools.partial(
        augment.augment, mean=data.mean, std=data.std, crop=config.crop,
        flip=config.flip, cutout=config.cutout, auto_augment=config.auto_augment,
    )
    self._judged = judged_batches(judged, EVAL_BATCH)
    self._judge = jax.jit(self._judge_batch)

  def init(self, key):
    images = jnp.zeros((1, *self.data.images.shape[1:]))
    variables = jax.jit(functools.partial(self.network.init, train=False))(
        {"params": key}, images
    )
    params = variables.pop("params")
    return params, variables

  def multiply_adds(self):
    image = jax.ShapeDtypeStruct((1, *self.data.images.shape[1:]), jnp.float32)
    network = build(dataclasses.replace(self.config, conv="lax"), self.classes)
    return costs.multiply_adds(network, image)

  def batches(self, epoch, done=0):
    """Indices [steps, batch]; the few that are left over are others each epoch."""
    rng = np.random.default_rng([self.config.seed, epoch])
    order = rng.permutation(self.size)[: self.steps * self.config.batch_size]
    return order.astype(np.int32).reshape(self.steps, self.config.batch_size)[done:]

  def prepare(self, data, batch, key):
    return self._augment(key, data.images[batch]), data.labels[batch]

  def forward(self, params, variables, inputs, key):
    return forward(self.network, params, variables, inputs[0], key)

  def loss(self, logits, inputs):
    return classification_loss(logits, inputs[1], self.config.label_smoothing)

  def evaluate(self, params, variables, last):
    del last
    loss, accuracy = self._means(params, variables, self._judged)
    return {"loss": loss, "accuracy": accuracy}

  def judge_training(self, params, variables) -> float:
    """Accuracy on the training images as they are, in evaluation mode."""
    split = image_data.Split(*map(np.asarray, self.data))
    return self._means(params, variables, judged_batches(split, EVAL_BATCH))[1]

  def logits(self, params, variables, images) -> jax.Array:
    """In evaluation mode, of uint8 images."""
    logits = self.network.apply(
        {"params": params, **variables}, self._normalize(images), train=False
    )
    return jnp.asarray(logits, jnp.float32)

  def _means(self, params, variables, batches):
    sums = tasks.Sums.zero()
    for batch in batches:
      sums = sums.plus(self._judge(params, variables, batch))
    return sums.means()

  def _judge_batch(self, params, variables, batch):
    images, labels, weights = batch
    logits = self.logits(params, variables, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (jnp.argmax(logits, -1) == labels) & (weights > 0)
    return tasks.Sums(
        jnp.sum(losses * weights), jnp.sum(correct), jnp.sum(weights, dtype=jnp.int32)
    )


def build(config: Config, classes: int) -> Any:
  """The network by name."""
  options: dict[str, Any] = {}
  if config.dropout:
    options["dropout"] = config.dropout
  if config.dtype != "float32":
    options["dtype"] = jnp.dtype(config.dtype)
  if config.conv != "lax":
    options["conv"] = config.conv
  try:
    return models.build(config.model, classes, **options)
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"model={config.model!r}: {error}") from error


def forward(network, params, variables, images, key):
  """(float32 logits in training mode, the new batch statistics)."""
  logits, variables = network.apply(
      {"params": params, **variables},
      images,
      train=True,
      rngs={"dropout": key, "shakedrop": jax.random.fold_in(key, 1)},
      mutable=list(variables),
  )
  return logits.astype(jnp.float32), variables


def classification_loss(logits, labels, smoothing):
  """Cross-entropy with smoothed labels, and the sums."""
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
  loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
  correct = jnp.sum(jnp.argmax(logits, -1) == labels)
  count = jnp.asarray(labels.size, jnp.int32)
  return loss, tasks.Sums(loss * count, correct, count)


def judged_batches(split: image_data.Split, size: int) -> list[Any]:
  """Batches (images, labels, weights) of one shape; the padding weighs nothing."""
  total = len(split.labels)
  size = min(size, total)
  padding = -total % size
  weights = np.pad(np.ones(total, np.float32), (0, padding))
  labels = np.pad(split.labels, (0, padding))
  images = np.pad(split.images, ((0, padding), (0, 0), (0, 0), (0, 0)))
  arrays = [x.reshape(-1, size, *x.shape[1:]) for x in (images, labels, weights)]
  return [tuple(map(jnp.asarray, batch)) for batch in zip(*arrays, strict=True)]


