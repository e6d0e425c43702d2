"""Translation of parallel text: Multi30k, IWSLT'14, or any pair of files."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples import records
from examples.paper import image_task
from examples.paper import tasks
from examples.paper import text
from examples.paper import translation
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import folder_of
from examples.paper.config import Options
from examples.paper.models import costs


def load(config: Config, options: Options) -> text.Corpus:
  """The three parts of the corpus; raises ConfigError where they can't be read."""
  assert options.data is not None  # as it was checked
  try:
    return text.load_corpus(
        options.data, config.source, config.target, train=config.train_files,
        validation=config.validation_files, test=config.test_files,
    )
  except (OSError, ValueError) as error:
    raise ConfigError(f"data={options.data}: {error}") from error


def vocabulary_of(
    corpus: text.Corpus, config: Config, options: Options
) -> text.Vocabulary:
  """The run's subwords, learned from the training text and kept in its folder."""
  path = folder_of(config, options) / "vocabulary.json"
  try:
    if path.exists():
      return text.Vocabulary.load(path)
    learned = text.Vocabulary.train(
        [*corpus.train.source, *corpus.train.target], config.vocabulary
    )
  except ValueError as error:
    raise ConfigError(f"vocabulary={config.vocabulary}: {error}") from error
  records.replace(path, learned.tokenizer.to_str())
  return learned


def training_pairs(pairs: text.Pairs, config: Config) -> text.Pairs:
  """Those that are not too long, and of them as many as are asked for."""
  kept = [
      (source, target) for source, target in zip(*pairs, strict=True)
      if max(len(source), len(target)) <= config.longest
  ]
  wanted = config.examples or len(kept)
  if not 0 < wanted <= len(kept):
    raise ConfigError(
        f"examples={config.examples} with longest={config.longest}: there are"
        f" {len(kept)} sentences."
    )
  return text.Pairs(*map(list, zip(*kept[:wanted], strict=True)))


class TextTask:
  """See :class:`examples.paper.tasks.Task`."""

  stackable = False

  def __init__(self, config: Config, options: Options):
    corpus = load(config, options)
    self.config = config
    self._devices = options.devices or len(jax.devices())
    self.vocabulary = vocabulary_of(corpus, config, options)
    self.pairs = training_pairs(text.encode(self.vocabulary, corpus.train), config)
    self.lengths = text.bucket_lengths(self.pairs)
    if config.subwords < self.lengths[-1]:
      raise ConfigError(
          f"subwords={config.subwords}: a batch must hold a sentence of"
          f" {self.lengths[-1]} pieces; take more, or a smaller longest."
      )
    self.network = image_task.build(config, len(self.vocabulary))
    self.size = len(self.pairs.source)
    self.steps = len(list(self.batches(0)))
    self.data = ()
    self._judged = corpus.validation if config.validation else corpus.test
    self._judge = jax.jit(self._judge_batch)

  def multiply_adds(self):
    # Of a sentence of the median length, on both sides.
    longer = [max(map(len, pair)) for pair in zip(*self.pairs, strict=True)]
    sentence = jax.ShapeDtypeStruct((1, int(np.median(longer))), jnp.int32)
    return costs.multiply_adds(self.network, sentence, sentence)

  def init(self, key):
    words = jnp.ones((1, self.lengths[0]), jnp.int32)
    init = jax.jit(functools.partial(self.network.init, train=False))
    variables = init({"params": key}, words, words)
    return variables.pop("params"), variables

  def batches(self, epoch, done=0):
    rng = np.random.default_rng([self.config.seed, epoch])
    found = text.batches(
        self.pairs, self.lengths, self.config.subwords, rng, self._devices
    )
    # The loss has no use for the sentences' numbers.
    return (batch[:4] for batch in itertools.islice(found, done, None))

  def prepare(self, data, batch, key):
    del data, key
    return batch

  def forward(self, params, variables, inputs, key):
    return self._logits(params, inputs, train=True, rngs={"dropout": key}), variables

  def loss(self, logits, inputs):
    sums = _sums(logits, inputs, self.config.label_smoothing)
    return sums.loss / jnp.maximum(sums.total, 1), sums

  def evaluate(self, params, variables, last):
    del variables
    pairs = text.encode(self.vocabulary, self._judged)
    lengths = text.bucket_lengths(pairs)
    sums = tasks.Sums.zero()
    for batch in text.batches(pairs, lengths, max(self.config.subwords, lengths[-1])):
      sums = sums.plus(self._judge(params, batch[:4]))
    loss, accuracy = sums.means()
    result = {"loss": loss, "accuracy": accuracy}
    if last:
      result["bleu"] = self.bleu(params)
    return result

  def bleu(self, params) -> float:
    """Of a beam search over the set that is judged."""
    found = translation.translate(
        self.network, params, self.vocabulary, self._judged.source,
        beam=self.config.beam, length_penalty=self.config.length_penalty,
    )
    return translation.bleu(found, self._judged.target).score

  def _judge_batch(self, params, batch):
    return _sums(self._logits(params, batch, train=False), batch, 0.0)

  def _logits(self, params, inputs, **options) -> Any:
    return self.network.apply({"params": params}, inputs[0], inputs[1], **options)


def _sums(logits, inputs, smoothing: float) -> tasks.Sums:
  _, _, target, weights = inputs
  loss, total = translation.token_loss(logits, target, weights, smoothing)
  counted = (target != text.PAD) & (weights > 0)[:, None]
  correct = jnp.sum((jnp.argmax(logits, -1) == target) & counted)
  return tasks.Sums(loss, correct, total.astype(jnp.int32))
