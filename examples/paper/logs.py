"""The log of a run: JSON lines, a progress bar, and TensorBoard on request."""

import json
import math
import os
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import tqdm

from examples import records
from examples.paper import tasks
from examples.paper.config import as_json
from examples.paper.config import Config
from examples.paper.config import ConfigError
from examples.paper.config import from_json
from examples.paper.config import key_of
from examples.paper.config import Options

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
# Seconds between two looks at the device's sums: each waits for the step before.
_LOOK = 2.0


def claim(folder: pathlib.Path, config: Config) -> None:
  """Makes the folder the run's own; raises if it is another's."""
  path = folder / "config.json"
  if path.exists():
    other = as_json(from_json(json.loads(path.read_text(encoding="utf-8"))))
    differ = sorted(
        field for field, value in as_json(config).items()
        if value != other[field] and field not in ("name", "table")
    )
    if differ:
      raise ConfigError(
          f"folder={folder}: holds another run, which differs in {', '.join(differ)};"
          " choose another folder, or delete this one."
      )
  records.replace(path, json.dumps(as_json(config), indent=1) + "\n")


def hardware() -> str:
  """The device's name and the processor's."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{device.device_kind}"
  count = records.cores()
  return f"{records.processor()}, {count} core{'s' if count > 1 else ''}"


def heading(config: Config) -> dict[str, Any]:
  """What a line of results says of the run before it says how it went."""
  return {
      "key": key_of(config),
      "name": config.name,
      "table": config.table,
      "config": as_json(config),
      "versions": records.versions(_PACKAGES),
      "hardware": hardware(),
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
      "date": records.today(),
      "command": command(),
  }


def command() -> str:
  """How this process was started, from the repository's root."""
  main = getattr(sys.modules["__main__"], "__spec__", None)
  started = ["python", "-m", main.name] if main else ["python", *sys.argv[:1]]
  return shlex.join([*started, *sys.argv[1:]])


class Log:
  """Writes and shows how a run goes.

  Attributes:
    history: a dict for each epoch so far.
  """

  def __init__(self, folder, config: Config, options: Options, total, start, history):
    self.history: list[dict[str, Any]] = list(history)
    self._path = folder / "log.jsonl"
    self._heading = heading(config)
    self._bar = tqdm.tqdm(
        total=total, initial=start, unit="step", desc=config.name,
        disable=not options.progress, dynamic_ncols=True,
    )
    self._looked, self._shown = time.monotonic(), {}
    self._tensorboard: Any = None
    if options.tensorboard:
      import tensorboardX  # wanted by few

      self._tensorboard = tensorboardX.SummaryWriter(
          str(folder / "tensorboard"), purge_step=start
      )
    self._write()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._bar.close()
    if self._tensorboard is not None:
      self._tensorboard.close()

  def step(self, step: int, sums: tasks.Sums) -> None:
    """Moves the bar; at times shows the epoch's loss and accuracy so far."""
    self._bar.update(step - self._bar.n)
    if self._bar.disable or time.monotonic() - self._looked < _LOOK:
      return
    loss, accuracy = sums.means()
    self._shown |= {"loss": f"{loss:.3f}", "train": f"{100 * accuracy:.1f} %"}
    self._bar.set_postfix(self._shown)
    self._looked = time.monotonic()

  def epoch(self, line: dict[str, Any]) -> None:
    """Takes down an epoch."""
    line = {key: value if math.isfinite(value) else str(value) for key, value in
            line.items()}  # JSON has no NaN
    self.history.append(line)
    if "accuracy" in line:
      self._shown["test"] = f"{100 * line['accuracy']:.2f} %"
      self._bar.set_postfix(self._shown)
    self._write()
    if self._tensorboard is not None:
      for name, value in line.items():
        if name not in ("epoch", "step"):
          self._tensorboard.add_scalar(name, value, line["step"])

  def _write(self) -> None:
    lines = [self._heading, *self.history]
    records.write(self._path, lines)
