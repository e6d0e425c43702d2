"""Parallel text: files, subwords, and batches of few shapes."""

from collections.abc import Iterator, Sequence
import gzip
import pathlib
from typing import NamedTuple
import zlib

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

PAD, START, END = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")


class Parallel(NamedTuple):
  """Sentences and their translations, in the order of the files."""

  source: list[str]
  target: list[str]


class Corpus(NamedTuple):
  """The three parts of a corpus."""

  train: Parallel
  validation: Parallel
  test: Parallel


class Pairs(NamedTuple):
  """Sentences as subwords: int32 arrays that end with ``END``."""

  source: list[np.ndarray]
  target: list[np.ndarray]


class Batch(NamedTuple):
  """Sentences of one bucket; rows of weight 0 only fill the batch up."""

  source: np.ndarray  # int32 [n, length]
  target_in: np.ndarray  # int32 [n, length], begins with START
  target_out: np.ndarray  # int32 [n, length], ends with END
  weights: np.ndarray  # float32 [n], 1 or 0
  number: np.ndarray  # int32 [n], the sentence's; -1 where the weight is 0


def load_corpus(
    folder: str | pathlib.Path,
    source: str = "de",
    target: str = "en",
    *,
    train: str = "train",
    validation: str = "val",
    test: str = "test_2016_flickr",
) -> Corpus:
  """Reads files ``<part>.<language>`` or ``<part>.<language>.gz``, a sentence a line.

  The default names are Multi30k's; IWSLT'14's usual ones are "train", "valid" and
  "test".

  Args:
    folder: where the files lie.
    source: the language to translate from, as the files' names end.
    target: the language to translate into.
    train: the part to train on.
    validation: the part to choose settings on.
    test: the part to be judged on.

  Raises:
    FileNotFoundError: a file is not there.
    ValueError: a file is damaged, empty or no UTF-8, or the two files of a part have
      different numbers of lines.
  """
  folder = pathlib.Path(folder).expanduser()
  parts = [
      read_parallel(*(_find(folder, f"{part}.{side}") for side in (source, target)))
      for part in (train, validation, test)
  ]
  return Corpus(*parts)


def read_parallel(source: pathlib.Path, target: pathlib.Path) -> Parallel:
  """Reads two files whose lines translate one another."""
  lines = Parallel(_lines(source), _lines(target))
  if len(lines.source) != len(lines.target):
    raise ValueError(
        f"{source} has {len(lines.source)} lines, {target} has {len(lines.target)}: a"
        " sentence must stand in the same line of both."
    )
  return lines


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
  for path in (folder / name, folder / f"{name}.gz"):
    if path.is_file():
      return path
  raise FileNotFoundError(
      f"{folder / name}: no such file, nor with .gz. A corpus is a folder of files"
      " <part>.<language>, one sentence a line; name the parts and languages it has."
  )


def _lines(path: pathlib.Path) -> list[str]:
  try:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise ValueError(
        f"{path}: cannot be read ({error}). It must be whole, and UTF-8."
    ) from error
  # Not splitlines(): the characters that it splits at also stand within sentences.
  lines = [line.strip() for line in text.split("\n")]
  if lines[-1] == "":
    lines.pop()
  if not lines:
    raise ValueError(f"{path}: is empty, but a sentence a line is expected.")
  return lines


class Vocabulary:
  """Subwords of both languages together, by byte-pair encoding.

  It works on bytes: there is no sentence that it cannot encode and give back.

  Example:
    >>> vocabulary = Vocabulary.train(["ein Hund", "a dog"], size=300)
    >>> vocabulary.decode(vocabulary.encode("ein Hund läuft"))
    'ein Hund läuft'
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self.tokenizer = tokenizer

  @classmethod
  def train(cls, sentences: Sequence[str], size: int) -> "Vocabulary":
    """Learns at most ``size`` subwords; the same ones from the same sentences.

    Raises:
      ValueError: for a size that does not hold the 256 bytes and the special symbols.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + len(SPECIAL):
      raise ValueError(
          f"size={size}: must be at least {len(alphabet) + len(SPECIAL)}, for each byte"
          f" and {', '.join(SPECIAL)}."
      )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return cls(tokenizer)

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Vocabulary":
    """Reads what ``save`` wrote."""
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(
          f"{path}: no such file. A run keeps its vocabulary beside its checkpoints."
      )
    try:
      tokenizer = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as error:  # what the library raises has no type of its own
      raise ValueError(f"{path}: is no vocabulary ({error}).") from error
    if [tokenizer.token_to_id(symbol) for symbol in SPECIAL] != [PAD, START, END]:
      raise ValueError(f"{path}: {', '.join(SPECIAL)} must have the numbers 0, 1, 2.")
    return cls(tokenizer)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes the vocabulary as JSON."""
    self.tokenizer.save(str(path))

  def __len__(self) -> int:
    return self.tokenizer.get_vocab_size()

  def encode(self, sentence: str) -> np.ndarray:
    """The subwords' numbers, int32, with ``END`` after them."""
    return self.encode_all([sentence])[0]

  def encode_all(self, sentences: Sequence[str]) -> list[np.ndarray]:
    """Likewise, of many."""
    encoded = self.tokenizer.encode_batch(list(sentences), add_special_tokens=False)
    return [np.array([*sentence.ids, END], np.int32) for sentence in encoded]

  def decode(self, numbers: Sequence[int] | np.ndarray) -> str:
    """The sentence of subwords up to the first ``END``."""
    numbers = [int(number) for number in numbers]
    if END in numbers:
      numbers = numbers[: numbers.index(END)]
    return self.tokenizer.decode(numbers, skip_special_tokens=True).strip()


def encode(vocabulary: Vocabulary, text: Parallel) -> Pairs:
  """Both sides of a text as subwords."""
  return Pairs(*(vocabulary.encode_all(side) for side in text))


def bucket_lengths(pairs: Pairs, buckets: int = 4) -> tuple[int, ...]:
  """Lengths for so many buckets, at most, of about as many sentences each.

  Multiples of 8; no sentence is longer than the last one.

  Args:
    pairs: the sentences; of each, the longer side counts.
    buckets: their number, at least 1. Each is compiled once.
  """
  if buckets < 1:
    raise ValueError(f"buckets={buckets}: must be at least 1.")
  longest = np.sort(_longest(pairs))
  places = [len(longest) * (i + 1) // buckets - 1 for i in range(buckets)]
  return tuple(sorted({int(-(-longest[max(place, 0)] // 8) * 8) for place in places}))


def batches(
    pairs: Pairs,
    lengths: Sequence[int],
    subwords: int,
    rng: np.random.Generator | None = None,
    multiple: int = 1,
) -> Iterator[Batch]:
  """Every sentence once, in batches of one shape for each length.

  Args:
    pairs: the sentences.
    lengths: of the buckets, ascending; each sentence goes into the first that holds
      both of its sides.
    subwords: of a batch's source or target, padding included; a bucket's batches have
      ``subwords // length`` rows.
    rng: shuffles sentences and batches; None keeps the order within a bucket.
    multiple: the number of devices, say: each batch is filled up with rows of weight 0
      to a multiple of it. The sentences in it are the same.

  Yields:
    Batches. The last one of a bucket is filled up with rows of weight 0.

  Raises:
    ValueError: a sentence is longer than the last length, or a length than a batch.
  """
  lengths = sorted(lengths)
  longest = _longest(pairs)
  if len(longest) == 0:
    raise ValueError("There are no sentences.")
  if longest.max() > lengths[-1]:
    raise ValueError(
        f"sentence {int(longest.argmax())} has {longest.max()} subwords, but the last"
        f" bucket holds {lengths[-1]}. Add a length, or leave such sentences out."
    )
  if subwords < lengths[-1]:
    raise ValueError(f"subwords={subwords}: a batch must hold a row of {lengths[-1]}.")
  order = np.arange(len(longest)) if rng is None else rng.permutation(len(longest))
  bucket = np.searchsorted(lengths, longest[order])
  parts = []
  for number, length in enumerate(lengths):
    members, rows = order[bucket == number], subwords // length
    starts = range(0, len(members), rows)
    parts += [(members[start : start + rows], rows, length) for start in starts]
  if rng is not None:
    parts = [parts[i] for i in rng.permutation(len(parts))]
  for members, rows, length in parts:
    yield _batch(pairs, members, rows + -rows % multiple, length)


def _batch(pairs: Pairs, members: np.ndarray, rows: int, length: int) -> Batch:
  source, target_in, target_out = np.full((3, rows, length), PAD, np.int32)
  # What fills the batch up is a sentence of no words: nothing there is undefined.
  source[:, 0], target_in[:, 0], target_out[:, 0] = END, START, END
  for row, member in enumerate(members):
    words, translation = pairs.source[member], pairs.target[member]
    source[row, : len(words)] = words
    target_in[row, 1 : len(translation)] = translation[:-1]
    target_out[row, : len(translation)] = translation
  weights = (np.arange(rows) < len(members)).astype(np.float32)
  number = np.full(rows, -1, np.int32)
  number[: len(members)] = members
  return Batch(source, target_in, target_out, weights, number)


def _longest(pairs: Pairs) -> np.ndarray:
  """[n] the length of each pair's longer side."""
  return np.array(
      [max(len(a), len(b)) for a, b in zip(*pairs, strict=True)], dtype=np.int64
  )
