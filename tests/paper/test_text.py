"""Sentences become batches and batches become translations, none lost on the way."""

import gzip
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.paper import models
from examples.paper import text
from examples.paper import translation

SENTENCES = ["Ein Hund läuft.", "Zwei Männer – im Büro", "", "A “quoted” dog 狗"]


@pytest.fixture(scope="module")
def vocabulary():
  return text.Vocabulary.train(SENTENCES * 2, size=320)


def test_any_sentence_comes_back_from_its_subwords(vocabulary):
  for sentence in [*SENTENCES, "never seen: ß ½ 🐕"]:
    numbers = vocabulary.encode(sentence)
    assert numbers.dtype == np.int32
    assert numbers[-1] == text.END
    assert text.PAD not in numbers
    assert vocabulary.decode(numbers) == sentence
    assert vocabulary.decode([*numbers, 7, 8]) == sentence


def test_a_vocabulary_is_learnt_saved_and_read(vocabulary, tmp_path):
  assert 259 < len(vocabulary) <= 320
  assert len(vocabulary.encode("Ein Hund")) < len("Ein Hund")
  path = tmp_path / "vocabulary.json"
  vocabulary.save(path)
  again = text.Vocabulary.load(path)
  for sentence in SENTENCES:
    np.testing.assert_array_equal(again.encode(sentence), vocabulary.encode(sentence))


def test_bad_vocabularies_are_errors(tmp_path):
  with pytest.raises(ValueError, match="size=258: must be at least 259"):
    text.Vocabulary.train(SENTENCES, size=258)
  path = tmp_path / "vocabulary.json"
  with pytest.raises(FileNotFoundError, match=r"vocabulary.json: no such file"):
    text.Vocabulary.load(path)
  path.write_text("{")
  with pytest.raises(ValueError, match=r"vocabulary.json: is no vocabulary"):
    text.Vocabulary.load(path)


def _write_corpus(folder, parts):
  for name, lines in parts.items():
    raw = "".join(f"{line}\n" for line in lines).encode()
    if name.endswith(".gz"):
      raw = gzip.compress(raw)
    (folder / name).write_bytes(raw)


@pytest.fixture
def corpus_folder(tmp_path):
  parts = {
      "train.de.gz": ["ein Hund", "zwei\u2028Hunde ", ""],
      "train.en.gz": ["a dog", "two dogs", "x"],
      "valid.de": ["eins"],
      "valid.en": ["one"],
      "test.de": ["zwei"],
      "test.en.gz": ["two"],
  }
  _write_corpus(tmp_path, parts)
  return tmp_path


def test_files_are_read_line_by_line_packed_or_not(corpus_folder):
  corpus = text.load_corpus(corpus_folder, validation="valid", test="test")
  # A line separator of Unicode is no end of a line here, as for other tools.
  assert corpus.train.source == ["ein Hund", "zwei\u2028Hunde", ""]
  assert corpus.train.target == ["a dog", "two dogs", "x"]
  assert corpus.validation == (["eins"], ["one"])
  assert corpus.test == (["zwei"], ["two"])


def test_bad_files_are_errors(corpus_folder):
  def load():
    text.load_corpus(corpus_folder, validation="valid", test="test")

  with pytest.raises(FileNotFoundError, match=r"val.de: no such file, nor with .gz"):
    text.load_corpus(corpus_folder)
  path = corpus_folder / "train.de.gz"
  packed = path.read_bytes()
  path.write_bytes(packed[:-9])
  with pytest.raises(ValueError, match=r"train.de.gz: cannot be read"):
    load()
  path.write_bytes(packed)
  (corpus_folder / "test.de").write_text("zwei\ndrei\n")
  with pytest.raises(ValueError, match=r"test.de has 2 lines, .*test.en.gz has 1"):
    load()
  (corpus_folder / "test.de").write_bytes(b"zw\xff")
  with pytest.raises(ValueError, match=r"test.de: cannot be read .*UTF-8"):
    load()
  (corpus_folder / "test.de").write_bytes(b"")
  with pytest.raises(ValueError, match=r"test.de: is empty"):
    load()


def _pairs(count, seed=0, longest=30):
  rng = np.random.default_rng(seed)

  def sentence():
    words = rng.integers(3, 90, rng.integers(0, longest))
    return np.array([*words, text.END], np.int32)

  return text.Pairs(
      [sentence() for _ in range(count)], [sentence() for _ in range(count)]
  )


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_every_sentence_is_in_one_batch_and_shapes_are_few(rng):
  pairs = _pairs(101)
  lengths = text.bucket_lengths(pairs, 3)
  batches = list(text.batches(pairs, lengths, 128, rng))
  assert len({batch.source.shape for batch in batches}) == len(lengths) <= 3
  seen = []
  for batch in batches:
    assert batch.source.shape == batch.target_in.shape == batch.target_out.shape
    assert batch.source.size <= 128
    for row, (number, weight) in enumerate(
        zip(batch.number, batch.weights, strict=True)
    ):
      assert weight == (number >= 0)
      if weight:
        seen.append(number)
        source, target = pairs.source[number], pairs.target[number]
        assert [*source] == [n for n in batch.source[row] if n != text.PAD]
        assert [*target] == [n for n in batch.target_out[row] if n != text.PAD]
        began = [n for n in batch.target_in[row] if n != text.PAD]
        assert began == [text.START, *target[:-1]]
  assert sorted(seen) == list(range(101))


def test_the_order_goes_by_the_generator():
  pairs = _pairs(60)

  def numbers(rng):
    lengths = text.bucket_lengths(pairs)
    return [[*batch.number] for batch in text.batches(pairs, lengths, 64, rng)]

  first = numbers(np.random.default_rng(1))
  assert first == numbers(np.random.default_rng(1))
  assert first != numbers(np.random.default_rng(2))


def test_batches_are_filled_up_to_a_multiple_of_the_devices():
  pairs, lengths = _pairs(60), (16, 32)
  rows = {16: 7, 32: 3}
  plain = list(text.batches(pairs, lengths, 112))
  filled = list(text.batches(pairs, lengths, 112, multiple=4))
  for one, other in zip(plain, filled, strict=True):
    count, length = one.source.shape
    assert count == rows[length]
    assert other.source.shape == (count + 1, length)
    assert [*one.number, -1] == [*other.number]
    assert other.weights[-1] == 0


def test_buckets_hold_about_as_many_sentences_each():
  pairs = _pairs(4000, longest=200)
  lengths = text.bucket_lengths(pairs, 4)
  longest = [max(map(len, pair)) for pair in zip(*pairs, strict=True)]
  counts = np.bincount(np.searchsorted(lengths, longest))
  assert len(counts) == 4
  assert counts.min() > 800
  assert all(length % 8 == 0 for length in lengths)


def test_bad_buckets_are_errors():
  pairs = _pairs(20)
  with pytest.raises(ValueError, match=r"sentence \d+ has \d+ subwords, but .* 8"):
    list(text.batches(pairs, [8], 64))
  with pytest.raises(ValueError, match="subwords=16: a batch must hold a row of 32"):
    list(text.batches(pairs, [32], 16))
  with pytest.raises(ValueError, match="buckets=0"):
    text.bucket_lengths(pairs, 0)
  with pytest.raises(ValueError, match="no sentences"):
    list(text.batches(text.Pairs([], []), [8], 64))


def test_the_loss_is_the_smoothed_cross_entropy_of_what_counts():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, 7))
  target = np.array([[3, 4, 2, 0], [5, 2, 0, 0], [2, 0, 0, 0]])
  weights = np.array([1.0, 1.0, 0.0])
  total, count = translation.token_loss(logits, target, weights, smoothing=0.1)
  logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = 0.0
  for row, place in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
    label = np.full(7, 0.1 / 7)
    label[target[row, place]] += 0.9
    expected -= label @ logs[row, place]
  assert count == 5
  np.testing.assert_allclose(total, expected, rtol=1e-5)


WORDS = 5  # pad, start, end and two words
LONGEST = 4


@pytest.fixture(scope="module")
def translator():
  model = models.build("transformer", WORDS, depth=1, width=8, hidden=8, heads=2)
  source = jnp.array([[3, 4, 3, 2], [4, 4, 2, 0], [3, 2, 0, 0]])

  @jax.jit
  def initial(key):
    params = model.init(key, source, source, False)["params"]
    # Away from its small start, lest all translations be as likely.
    return jax.tree.map(lambda leaf: 2 * leaf, params)

  return model, initial(jax.random.key(3)), source


def _log_probability(model, params, source, translations):
  """[n] of whole translations [n, t], padded after END, of one source [s]."""
  sources = jnp.stack([source] * len(translations))
  begun = jnp.pad(translations, ((0, 0), (1, 0)), constant_values=text.START)[:, :-1]
  logits = model.apply({"params": params}, sources, begun, False)
  # Neither padding nor a start symbol is ever chosen.
  logits = logits.at[..., jnp.array([text.PAD, text.START])].set(-jnp.inf)
  logs = jax.nn.log_softmax(logits)
  logs = jnp.take_along_axis(logs, translations[..., None], -1)[..., 0]
  return jnp.sum(jnp.where(translations != text.PAD, logs, 0), 1)


def _all_translations():
  """Each one of at most LONGEST subwords with END."""
  rows = [
      [*words, text.END] + [text.PAD] * (LONGEST - 1 - len(words))
      for length in range(LONGEST)
      for words in itertools.product(range(3, WORDS), repeat=length)
  ]
  return jnp.array(rows)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_translations(translator, length_penalty):
  model, params, source = translator
  found, scores = jax.jit(
      lambda source: translation.beam_search(
          model,
          params,
          source,
          beam=20,
          max_length=LONGEST,
          length_penalty=length_penalty,
      )
  )(source)
  candidates = _all_translations()
  lengths = jnp.sum(candidates != text.PAD, 1)
  for row in range(len(source)):
    logs = _log_probability(model, params, source[row], candidates)
    expected = logs / lengths**length_penalty
    best = int(jnp.argmax(expected))
    np.testing.assert_array_equal(found[row], candidates[best])
    np.testing.assert_allclose(scores[row], expected[best], rtol=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
def test_scores_are_the_whole_models(translator, beam):
  """What the decoder keeps from step to step follows its beam."""
  model, params, source = translator
  length = 7
  found, scores = jax.jit(
      lambda source: translation.beam_search(
          model, params, source, beam=beam, max_length=length
      )
  )(source)
  for row in range(len(source)):
    logs = _log_probability(model, params, source[row], found[row : row + 1])
    words = jnp.sum(found[row] != text.PAD)
    np.testing.assert_allclose(scores[row], logs[0] / words, rtol=1e-4)


def test_every_sentence_is_translated_in_order(vocabulary):
  model = models.build(
      "transformer", len(vocabulary), depth=1, width=8, hidden=8, heads=2
  )
  sentences = ["Ein Hund", "", "Zwei Männer – im Büro", "Hund", "Männer läuft. Ein"]
  dummy = jnp.ones((1, 4), jnp.int32)
  params = jax.jit(lambda key: model.init(key, dummy, dummy, False))(
      jax.random.key(0)
  )["params"]

  def translate(sentences):
    return translation.translate(
        model, params, vocabulary, sentences, beam=2, subwords=64, progress=seen.append
    )

  seen = []
  together = translate(sentences)
  assert sum(seen) == len(sentences) == len(together)
  assert len(set(together)) > 1
  assert translate(sentences[::-1]) == together[::-1]


def test_bleu_is_that_of_the_corpus():
  references = ["the cat sat on the mat .", "a dog runs"]
  perfect = translation.bleu(references, references)
  assert perfect.score == pytest.approx(100)
  assert "tok:13a" in perfect.signature
  # 5 of 6 words, 4 of 5, 3 of 4 and 2 of 3 in a row, and one word too few of 7.
  cut = translation.bleu(["the cat sat on the mat"], ["the cat sat on the mat !"])
  expected = 100 * np.exp(1 - 7 / 6)  # all n-grams are right, it is too short
  assert cut.score == pytest.approx(expected, abs=0.01)
  with pytest.raises(ValueError, match="1 translations and 2 references"):
    translation.bleu(["a"], references)
