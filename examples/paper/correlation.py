"""Sharpness against the generalization gap: ``python -m examples.paper.correlation``.

  python -m examples.paper.run correlation --data PATH --seeds 0 --keep-checkpoints True
  python -m examples.paper.correlation --data PATH

The first trains 625 WRN-28-2, which takes a GPU some weeks; the second measures those
that are there and prints the paper's table. ``examples.sharpness_study`` is the same
study on digits, in minutes.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

import asam_jax
from asam_jax import sharpness
from examples import records as rows
from examples import sharpness_report
from examples.paper import checkpoints
from examples.paper import image_task
from examples.paper import loop
from examples.paper import optimizers
from examples.paper import results
from examples.paper.config import Config
from examples.paper.config import folder_of
from examples.paper.config import from_json
from examples.paper.config import Options

# (normalization, p, radius): the radii that the paper chose.
MEASURES = {
    "sharpness, p=2": ("none", 2, 1e-5),
    "adaptive, p=2": ("elementwise", 2, 0.5),
    "sharpness, p=inf": ("none", float("inf"), 5e-4),
    "adaptive, p=inf": ("elementwise", float("inf"), 5e-3),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
  data: pathlib.Path | None = None
  """Folder or archive of CIFAR-10."""
  results: pathlib.Path = pathlib.Path("runs/paper/results")
  """Folder of the JSON lines; has correlation.jsonl."""
  least_accuracy: float = 0.99
  """Networks that get less of the training images right are left out."""
  images: int = 1024
  """Training images that the sharpness is measured on."""
  batch: int = 128
  """Images of which each has a worst case of its own; the mean is taken."""
  steps: int = 20
  """Iterations of Auto-PGD."""


def trained(config: Config, options: Options) -> tuple[Any, Any, Any]:
  """(task, parameters, other variables) of a finished run whose checkpoint was kept."""
  task = image_task.ImageTask(config, options)
  recipe = optimizers.make(config, config.epochs * task.steps)
  state = loop.initial_state(task, recipe, config.seed)
  folder = folder_of(config, options)
  with checkpoints.Keeper(folder, options) as keeper:
    state, history = keeper.restore(state)
  if not history:
    raise FileNotFoundError(
        f"{folder}: has no checkpoint; train with --keep-checkpoints True."
    )
  return task, loop.clean_params(recipe, state), state.variables


def mean_sharpness(
    task: Any, params: Any, variables: Any, arguments: Arguments
) -> dict[str, float]:
  """Each measure, the mean over batches of training images, in evaluation mode."""
  images, labels = (x[: arguments.images] for x in task.data)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def one(normalization, p, rho, images, labels):
    def loss(params):
      logits = task.logits(params, variables, images)
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    geometry = asam_jax.Geometry(
        0.0, p, normalization, normalize=lambda path, leaf: True
    )
    return sharpness.worst_case(
        loss, params, rho, geometry=geometry, steps=arguments.steps, restarts=0
    ).value

  starts = range(0, len(labels), arguments.batch)
  parts = [(images[i : i + arguments.batch], labels[i : i + arguments.batch])
           for i in starts]
  return {
      name: float(np.mean([one(normalization, p, rho, *part) for part in parts]))
      for name, (normalization, p, rho) in MEASURES.items()
  }


def measured(record: dict[str, Any], arguments: Arguments) -> dict[str, Any]:
  """What the table needs to know of one network; no sharpness if it is left out."""
  config = from_json(record["config"])
  options = Options(data=arguments.data, keep_checkpoints=True)
  task, params, variables = trained(config, options)
  accuracy = task.judge_training(params, variables)
  row = {
      **{axis: getattr(config, axis) for axis in sharpness_report.AXES},
      "train_accuracy": accuracy,
      "test_accuracy": results.accuracy(record),
  }
  if accuracy >= arguments.least_accuracy:
    row["sharpness"] = mean_sharpness(task, params, variables, arguments)
  return row


def table(kept: list[dict[str, Any]]) -> str:
  """The paper's table, its figures beside ours."""
  measures = {
      name: {radius: np.array([row["sharpness"][name] for row in kept])}
      for name, (_, _, radius) in MEASURES.items()
  }
  everyone = np.arange(len(kept))
  ours, _ = sharpness_report.main_table(kept, measures, everyone, everyone)
  return f"{ours}\n\nPublished:\n\n{sharpness_report.published()}"


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m examples.paper.correlation",
      description=__doc__,
  )
  found = results.read(results.path_of(arguments.results, "correlation"))
  if not found:
    sys.exit(f"error: no correlation.jsonl in {arguments.results}; train first.")
  path = results.measures_path(arguments.results)
  seen = []
  for record in tqdm.tqdm(found, desc="networks"):
    seen.append(measured(record, arguments))
    rows.write(path, seen)
  kept = [row for row in seen if "sharpness" in row]
  print(f"{len(kept)} of {len(seen)} networks have the least training accuracy.")
  if len(kept) > 2:
    print(table(kept))


if __name__ == "__main__":
  main()
