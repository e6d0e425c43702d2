"""The trainer takes images from folders, and goes on in the middle of an epoch."""

import dataclasses

import numpy as np
from PIL import Image
import pytest

from examples.paper import configs
from examples.paper import imagenet_task
from examples.paper import loop
from examples.paper.config import ConfigError
from tests.paper.test_resume import comparable
from tests.paper.test_resume import stop_before_step
from tests.paper.test_resume import StoppedError
from tests.paper.tiny import options
from tests.paper.tiny import tiny  # noqa: F401

replace = dataclasses.replace
CONFIG = replace(
    configs.NAMED["imagenet-resnet50-asam"], batch_size=4, epochs=2, rho=0.1
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Three classes of four images to train on, and seven to test on in all."""
  monkeypatch.setattr(imagenet_task, "SIZE", 32)
  rng = np.random.default_rng(0)
  for part, counts in (("train", (4, 4, 4)), ("val", (2, 2, 3))):
    for label, count in enumerate(counts):
      place = tmp_path / "data" / part / f"class{label}"
      place.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
  return tmp_path


@pytest.mark.usefixtures("tiny")
def test_a_stopped_run_ends_as_one_that_was_not(folder, monkeypatch):
  data = folder / "data"
  alone = loop.run(CONFIG, options(folder / "alone", data=data)).record
  last = alone["history"][-1]
  assert alone["steps"] == 6
  # All seven test images, in batches of four.
  assert round(7 * last["accuracy"]) == pytest.approx(7 * last["accuracy"])
  assert last["top_5"] == 1.0  # there are three classes
  here = options(folder / "here", data=data, checkpoint_steps=1)
  with monkeypatch.context() as patch:
    stop_before_step(patch, 4)
    with pytest.raises(StoppedError):
      loop.run(CONFIG, here)
  assert comparable(loop.run(CONFIG, here).record) == comparable(alone)


@pytest.mark.usefixtures("tiny")
def test_bad_folders_and_fields_are_refused(folder):
  with pytest.raises(ConfigError, match="no such folder"):
    loop.run(CONFIG, options(folder, data=folder))
  with pytest.raises(ConfigError, match="validation and noise are not for"):
    loop.run(replace(CONFIG, noise=0.2), options(folder, data=folder / "data"))
