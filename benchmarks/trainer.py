"""What the paper's trainer adds to its step: ``python -m benchmarks.trainer``.

In one process and in turns, for plain SGD and for ASAM on CIFAR-10's shape:

- bare: the step on a batch that is on the device already, normalized and never changed;
- synthetic: the trainer's epoch on images that are noise;
- real: the trainer's epoch on CIFAR-10 (with ``--data``).

It prints the median time of a step with its quartiles and the ratios within a round,
and writes a JSON line for each.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import timing
from examples import records
from examples.paper import clock
from examples.paper import configs
from examples.paper import image_task
from examples.paper import loop
from examples.paper import optimizers
from examples.paper import programs
from examples.paper.config import Options


@dataclasses.dataclass(frozen=True)
class Arguments:
  data: pathlib.Path | None = None
  """Folder or archive of CIFAR-10; without it, only synthetic images."""
  model: str = "resnet8"
  """Name of the network."""
  batch_size: int = 128
  """Images in a step."""
  steps: int = 10
  """Steps in a sample."""
  rounds: int = 15
  """Samples of each case."""
  output: pathlib.Path = pathlib.Path("runs/benchmarks/trainer.jsonl")
  """File of the JSON lines."""


class Case:
  """A way to spend ``steps`` steps; keeps its state from sample to sample."""

  def __init__(self, arguments: Arguments, method: str, dataset: Any, bare: bool):
    config = dataclasses.replace(
        configs.FAKE, dataset=dataset, model=arguments.model, method=method,
        rho=0.5 if method == "asam" else 0.0, batch_size=arguments.batch_size,
        examples=arguments.batch_size * arguments.steps,
    )
    options = Options(data=arguments.data)
    task: Any = image_task.ImageTask(config, options)
    if bare:
      task = Bare(task)
    recipe = optimizers.make(config, 1000)
    step = functools.partial(loop.train_step, task, recipe)
    self.program = programs.Program(
        step, task, recipe.ascend, config, options, clock.Clock()
    )
    self.state = self.program.place(loop.initial_state(task, recipe, 0))
    self.epoch = 0

  def run(self) -> Any:
    """The steps of one epoch."""
    for _, state in self.program.epoch(self.state, self.epoch, 0):
      self.state = state
    self.epoch += 1
    return self.state


class Bare:
  """A task whose batch is there already, cropped and normalized."""

  def __init__(self, task: image_task.ImageTask):
    self._task = task
    self.steps, self.stackable, self.size = task.steps, task.stackable, task.size
    first = task.batches(0)[0]
    self.data = jax.jit(task.prepare)(task.data, first, jax.random.key(0))
    self.init, self.forward, self.loss = task.init, task.forward, task.loss

  def batches(self, epoch: int, done: int = 0) -> Any:
    return self._task.batches(epoch, done)

  def prepare(self, data: Any, batch: Any, key: Any) -> Any:
    del batch, key
    return data


def rows(times: dict[str, np.ndarray], arguments: Arguments) -> list[dict[str, Any]]:
  """A row for each case: milliseconds a step, and its ratio to the bare step."""
  made = []
  for name, values in times.items():
    method = name.split()[0]
    ratios = values / times[f"{method} bare"]
    made.append({
        "case": name,
        "milliseconds": timing.quartiles(1e3 * values / arguments.steps),
        "to_bare": timing.quartiles(ratios),
        "config": {k: str(v) if isinstance(v, pathlib.Path) else v
                   for k, v in dataclasses.asdict(arguments).items()
                   if k not in ("output", "data")},
        **records.environment(("jax", "optax", "flax")),
    })
    if name.endswith("real"):
      made[-1]["to_synthetic"] = timing.quartiles(values / times[f"{method} synthetic"])
  return made


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m benchmarks.trainer", description=__doc__
  )
  cases: dict[str, Callable[[], float]] = {}
  for method in ("plain", "asam"):
    kinds = [("bare", "fake", True), ("synthetic", "fake", False)]
    if arguments.data is not None:
      kinds.append(("real", "cifar10", False))
    for kind, dataset, bare in kinds:
      case = Case(arguments, method, dataset, bare)
      cases[f"{method} {kind}"] = functools.partial(timing.seconds, case.run)
  made = rows(timing.interleaved(cases, arguments.rounds), arguments)
  for row in made:
    low, middle, high = row["milliseconds"]
    line = f"{row['case']:16} {middle:8.1f} ms [{low:.1f}, {high:.1f}]"
    for kind in ("bare", "synthetic"):
      if f"to_{kind}" in row:
        line += f", {timing.show(row[f'to_{kind}'], 3)} of {kind}"
    print(line)
  records.write(arguments.output, made)


if __name__ == "__main__":
  main()
