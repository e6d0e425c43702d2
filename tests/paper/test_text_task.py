"""The trainer translates: steps, BLEU, and a resume that ends the same."""

import dataclasses

import chex
import numpy as np
import pytest

from examples.paper import image_task
from examples.paper import loop
from examples.paper import models
from examples.paper import small
from examples.paper import text_task
from examples.paper.config import ConfigError
from tests.paper.test_resume import comparable
from tests.paper.test_resume import stop_before_step
from tests.paper.test_resume import StoppedError
from tests.paper.tiny import options

replace = dataclasses.replace
CONFIG = replace(
    small.TRANSLATION, epochs=2, vocabulary=400, subwords=64, warmup=2, eval_every=1,
    beam=2, method="asam", rho=0.2,
)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
  """Numbers in words, from one language into another."""
  words = [("eins", "one"), ("zwei", "two"), ("drei", "three"), ("vier", "four")]
  rng = np.random.default_rng(0)
  for part, count in (("train", 24), ("val", 5), ("test_2016_flickr", 7)):
    rows = [rng.integers(0, 4, rng.integers(1, 5)) for _ in range(count)]
    for side, ending in enumerate(("de", "en")):
      lines = [" ".join(words[i][side] for i in row) for row in rows]
      (tmp_path / f"{part}.{ending}").write_text("\n".join(lines) + "\n", "utf-8")
  build = lambda config, size: models.build(  # noqa: E731
      "transformer", size, depth=1, width=16, hidden=16, heads=2, dropout=0.1
  )
  monkeypatch.setattr(image_task, "build", build)
  return tmp_path


def test_a_stopped_translator_ends_as_one_that_was_not(corpus, monkeypatch):
  alone = loop.run(CONFIG, options(corpus / "alone", data=corpus)).record
  assert 0 <= alone["history"][-1]["bleu"] <= 100
  assert "bleu" not in alone["history"][0]
  assert alone["examples"] == 24
  here = options(corpus / "here", data=corpus, checkpoint_steps=2)
  with monkeypatch.context() as patch:
    stop_before_step(patch, 5)
    with pytest.raises(StoppedError):
      loop.run(CONFIG, here)
  assert comparable(loop.run(CONFIG, here).record) == comparable(alone)


def test_batches_are_a_function_of_seed_and_epoch(corpus):
  task = text_task.TextTask(CONFIG, options(corpus, data=corpus))
  whole = list(task.batches(3))
  assert len(whole) == task.steps
  for one, other in zip(whole[2:], task.batches(3, done=2), strict=True):
    np.testing.assert_array_equal(one[0], other[0])
  assert sum(batch[3].sum() for batch in whole) == 24


def test_rows_that_do_not_divide_among_the_devices_are_filled_up(corpus):
  # Adam would make steps out of the rounding of gradients that are zero.
  config = replace(CONFIG, base="sgd", subwords=40, epochs=1, warmup=0)
  task = text_task.TextTask(config, options(corpus, data=corpus))
  assert {len(batch[0]) for batch in task.batches(0)} == {5}
  alone, both = (
      loop.run(config, options(corpus / str(n), data=corpus, devices=n))
      for n in (1, 2)
  )
  # The same sentences in each step, and the same dropout: the same run.
  assert both.record["devices"] == 2
  assert both.record["steps"] == alone.record["steps"]
  chex.assert_trees_all_close(both.state, alone.state, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("fields", "message"), [
    ({"subwords": 7}, "subwords=7: a batch must hold a sentence"),
    ({"vocabulary": 120}, "vocabulary=120: size=120"),
    ({"examples": 99}, "examples=99 with longest=100: there are 24"),
    ({"source": "fr"}, "train.fr"),
])
def test_bad_input_is_refused(fields, message, corpus):
  with pytest.raises(ConfigError) as caught:
    loop.run(replace(CONFIG, **fields), options(corpus, data=corpus))
  assert message in str(caught.value)
