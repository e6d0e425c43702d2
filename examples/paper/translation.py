"""Loss, beam search and BLEU of a translator."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from examples.paper import text

NEVER = -1e9  # a log-probability; the sum of many still fits into float32


class Bleu(NamedTuple):
  """A corpus's BLEU, 0 to 100, and what sacrebleu says it is."""

  score: float
  signature: str


def token_loss(
    logits: jax.Array, target_out: jax.Array, weights: jax.Array, smoothing: float = 0.1
) -> tuple[jax.Array, jax.Array]:
  """The sum of the subwords' cross-entropies, and how many there are.

  Args:
    logits: [n, t, vocabulary].
    target_out: int32 [n, t]; padding does not count.
    weights: [n], of the sentences.
    smoothing: the share of a label that is spread evenly over the vocabulary.

  Returns:
    Two float32 scalars; their quotient is the mean loss.
  """
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  hit = jnp.take_along_axis(log_probabilities, target_out[..., None], -1)[..., 0]
  losses = -(1 - smoothing) * hit - smoothing * jnp.mean(log_probabilities, -1)
  counted = (target_out != text.PAD) * weights[:, None]
  return jnp.sum(losses * counted), jnp.sum(counted)


class _Search(NamedTuple):
  """n sentences, k beams each."""

  step: jax.Array
  alive: jax.Array  # int32 [n, k, length], begun translations
  scores: jax.Array  # [n, k], their log-probabilities
  ended: jax.Array  # int32 [n, k, length], those with END
  ended_scores: jax.Array  # [n, k], divided by the length's power
  cache: Any


def beam_search(
    model: nn.Module,
    params: Any,
    source: jax.Array,
    *,
    beam: int = 5,
    max_length: int,
    length_penalty: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """The best translation that a beam search finds; to be called in ``jit``.

  The score is log p / length ** length_penalty, END counted in the length. A beam goes
  on with the likeliest begun translations; the search ends where none of them can
  become better than the ones that are done.

  Args:
    model: a ``transformer.Transformer``.
    params: its parameters.
    source: int32 [n, s].
    beam: how many translations are followed.
    max_length: of a translation, in subwords with END.
    length_penalty: 0 prefers short translations, more longer ones.

  Returns:
    int32 [n, max_length], padded after END, and their scores [n]. A translation that
    does not end by then is cut off and scored as if it were whole.
  """
  count = len(source)
  stepper = model.clone(step_by_step=True)
  memory = model.apply({"params": params}, source, False, method="encode")
  blank = jnp.zeros((count, beam, max_length), jnp.int32)

  def continued(state: _Search) -> jax.Array:
    # Log-probabilities only fall; at best they are divided by the greatest length.
    bound = state.scores[:, 0] / max_length**length_penalty
    better = bound > jnp.min(state.ended_scores, 1)
    return (state.step < max_length) & jnp.any(better)

  def advance(state: _Search) -> _Search:
    previous = state.alive[:, :, jnp.maximum(state.step - 1, 0)]
    previous = jnp.where(state.step == 0, text.START, previous)
    logits, updates = stepper.apply(
        {"params": params, "cache": state.cache},
        memory,
        source,
        previous.reshape(-1, 1),
        False,
        state.step,
        method="decode",
        mutable=["cache"],
    )
    logits = logits.reshape(count, beam, -1)
    logits = logits.at[..., jnp.array([text.PAD, text.START])].set(-jnp.inf)
    logs = jnp.maximum(jax.nn.log_softmax(logits), NEVER)
    return _choose(state, logs, updates["cache"], length_penalty)

  first = _Search(
      step=jnp.int32(0),
      alive=blank,
      scores=jnp.full((count, beam), NEVER).at[:, 0].set(0.0),  # all equal else
      ended=blank,
      ended_scores=jnp.full((count, beam), NEVER),
      cache=_empty_cache(stepper, source, count * beam, max_length),
  )
  last = lax.while_loop(continued, advance, first)
  unfinished = last.ended_scores[:, 0] <= NEVER
  cut_scores = last.scores[:, 0] / max_length**length_penalty
  scores = jnp.where(unfinished, cut_scores, last.ended_scores[:, 0])
  return jnp.where(unfinished[:, None], last.alive[:, 0], last.ended[:, 0]), scores


def _choose(state: _Search, logs, cache, length_penalty) -> _Search:
  """The best continuations: those that end, and those that go on."""
  count, beam, vocabulary = logs.shape
  # Twice as many as beams: were half of them to end, a beam is left that goes on.
  candidates = (state.scores[:, :, None] + logs).reshape(count, -1)
  scores, places = lax.top_k(candidates, min(2 * beam, candidates.shape[1]))
  parents, subwords = places // vocabulary, places % vocabulary
  grown = _pick(state.alive, parents).at[:, :, state.step].set(subwords)
  ends = subwords == text.END

  done = jnp.where(ends, scores / (state.step + 1.0) ** length_penalty, NEVER)
  done = jnp.concatenate([state.ended_scores, jnp.maximum(done, NEVER)], 1)
  ended_scores, best = lax.top_k(done, beam)
  ended = _pick(jnp.concatenate([state.ended, grown], 1), best)

  alive_scores, best = lax.top_k(jnp.where(ends, 2 * NEVER, scores), beam)
  parents = jnp.take_along_axis(parents, best, 1)
  rows = (jnp.arange(count)[:, None] * beam + parents).reshape(-1)
  return _Search(
      step=state.step + 1,
      alive=_pick(grown, best),
      scores=jnp.maximum(alive_scores, 2 * NEVER),
      ended=ended,
      ended_scores=ended_scores,
      cache=jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, cache),
  )


def _pick(arrays: jax.Array, chosen: jax.Array) -> jax.Array:
  """Of [n, k, length] those [n, j, length] with the numbers [n, j]."""
  return jnp.take_along_axis(arrays, chosen[:, :, None], 1)


def _empty_cache(stepper: nn.Module, source, rows: int, max_length: int) -> Any:
  """Room for what the decoder keeps of ``max_length`` subwords."""
  targets = jnp.zeros((rows, max_length), jnp.int32)
  shapes = jax.eval_shape(
      lambda: stepper.init(jax.random.key(0), source, targets, False)
  )["cache"]
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# Static, the model: one compilation for each shape of a batch.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("beam", "max_length"))
def _search(model, params, source, length_penalty, *, beam, max_length):
  return beam_search(
      model,
      params,
      source,
      beam=beam,
      max_length=max_length,
      length_penalty=length_penalty,
  )[0]


def translate(
    model: nn.Module,
    params: Any,
    vocabulary: text.Vocabulary,
    sentences: Sequence[str],
    *,
    beam: int = 5,
    length_penalty: float = 1.0,
    subwords: int = 2048,
    progress: Callable[[int], Any] = lambda sentences: None,
) -> list[str]:
  """Translates every sentence, in order.

  Args:
    model: a ``transformer.Transformer``.
    params: its parameters.
    vocabulary: of its subwords.
    sentences: in the source language.
    beam: how many translations are followed.
    length_penalty: as ``beam_search`` takes it.
    subwords: of a batch's sources, padding included.
    progress: called after each batch with the number of sentences in it.

  Returns:
    A translation for each. They have at most twice as many subwords as the longest
    sentence of their bucket, and 8 more.
  """
  encoded = vocabulary.encode_all(sentences)
  pairs = text.Pairs(encoded, encoded)
  translations = [""] * len(sentences)
  lengths = text.bucket_lengths(pairs)
  for batch in text.batches(pairs, lengths, max(subwords, lengths[-1])):
    found = _search(
        model,
        params,
        batch.source,
        length_penalty,
        beam=beam,
        max_length=2 * batch.source.shape[1] + 8,
    )
    for number, numbers in zip(batch.number, np.asarray(found), strict=True):
      if number >= 0:
        translations[number] = vocabulary.decode(numbers)
    progress(int(batch.weights.sum()))
  return translations


def bleu(translations: Sequence[str], references: Sequence[str]) -> Bleu:
  """Detokenized BLEU of a corpus (Post 2018), by sacrebleu with its defaults.

  Raises:
    ValueError: for another number of references than of translations.
  """
  import sacrebleu

  if len(translations) != len(references):
    raise ValueError(
        f"{len(translations)} translations and {len(references)} references: there must"
        " be one for each."
    )
  metric = sacrebleu.BLEU()
  score = metric.corpus_score(list(translations), [list(references)]).score
  return Bleu(score, str(metric.get_signature()))
