"""A network that compiles in a moment, in place of those of the paper."""

import dataclasses

from flax import linen as nn
import pytest

from examples.paper import configs
from examples.paper import image_task
from examples.paper import logs
from examples.paper.config import Options


class Tiny(nn.Module):
  """A convolution, batch norm and dropout."""

  classes: int = 10
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Conv(4, (3, 3), strides=4)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
    return nn.Dense(self.classes)(x)


CONFIG = dataclasses.replace(
    configs.FAKE, name="tiny", examples=64, batch_size=16, epochs=3, dropout=0.2
)


def options(folder, **fields):
  """Nothing on the screen, everything in the folder."""
  return Options(
      folder=folder / "run", results=folder / "results", progress=False, **fields
  )


def build(config, classes):
  return Tiny(classes, config.dropout)


@pytest.fixture
def tiny(monkeypatch):
  """The configurations' networks are tiny ones."""
  monkeypatch.setattr(image_task, "build", build)
  monkeypatch.setattr(logs, "hardware", lambda: "a test's machine")
