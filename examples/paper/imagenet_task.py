"""Classification of images in folders, which Grain decodes: ImageNet."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.paper import augment
from examples.paper import image_task
from examples.paper import imagenet
from examples.paper import tasks
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import Options
from examples.paper.models import costs

SIZE = 224


class ImageNetTask:
  """See :class:`examples.paper.tasks.Task`."""

  stackable = False

  def __init__(self, config: Config, options: Options):
    assert options.data is not None  # as it was checked
    try:
      folders = imagenet.load_folders(options.data)
    except (OSError, ValueError) as error:
      raise ConfigError(f"data={options.data}: {error}") from error
    if config.examples or config.validation or config.noise:
      raise ConfigError(
          "examples, validation and noise are not for dataset=imagenet: leave them 0."
      )
    self.config, self.workers = config, options.workers
    self.train, self.test = folders.train, folders.test
    self.classes = len(folders.classes)
    self.network = image_task.build(config, self.classes)
    self.size = tasks.subset(len(self.train.paths), config)
    self.steps = self.size // config.batch_size
    self.data = ()
    self._normalize = functools.partial(
        augment.normalize, mean=imagenet.MEAN, std=imagenet.STD
    )
    self._judge = jax.jit(self._judge_batch)

  def multiply_adds(self):
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return costs.multiply_adds(self.network, image)

  def init(self, key):
    init = jax.jit(functools.partial(self.network.init, train=False))
    variables = init({"params": key}, jnp.zeros((1, SIZE, SIZE, 3)))
    return variables.pop("params"), variables

  def batches(self, epoch, done=0):
    # A stream of its own for each epoch: it is found again without those before it.
    seed = (self.config.seed * 100_003 + epoch) % 2**31
    stream: Any = imagenet.train_batches(
        self.train, self.config.batch_size, seed, size=SIZE, workers=self.workers
    )
    state = stream.get_state()
    if set(state) == {"next_index"}:  # else, with several processes, it is decoded
      stream.set_state({"next_index": done})
      done = 0
    rest = itertools.islice(stream, done, None)
    return ((batch.images, batch.labels) for batch in rest)

  def prepare(self, data, batch, key):
    del data, key  # crop and flip come from Grain
    images, labels = batch
    return self._normalize(images), labels

  def forward(self, params, variables, inputs, key):
    return image_task.forward(self.network, params, variables, inputs[0], key)

  def loss(self, logits, inputs):
    return image_task.classification_loss(
        logits, inputs[1], self.config.label_smoothing
    )

  def evaluate(self, params, variables, last):
    del last
    sums, among_five = tasks.Sums.zero(), 0
    for batch in imagenet.eval_batches(self.test, self.config.batch_size, size=SIZE):
      new, five = self._judge(params, variables, tuple(batch))
      sums, among_five = sums.plus(new), among_five + five
    loss, accuracy = sums.means()
    total = int(sums.total)
    return {"loss": loss, "accuracy": accuracy, "top_5": int(among_five) / total}

  def _judge_batch(self, params, variables, batch):
    images, labels, weights = batch
    logits: Any = self.network.apply(
        {"params": params, **variables}, self._normalize(images), train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    _, best = jax.lax.top_k(logits, min(5, self.classes))
    hits = (best == labels[:, None]) & (weights > 0)[:, None]
    total = jnp.sum(weights, dtype=jnp.int32)
    sums = tasks.Sums(jnp.sum(losses * weights), jnp.sum(hits[:, 0]), total)
    return sums, jnp.sum(hits)
