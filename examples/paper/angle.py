"""How far a radius turns the gradient: ``python -m examples.paper.angle``.

    python -m examples.paper.angle --data PATH --rho 0.25
    python -m examples.paper.angle --data PATH --labels PATH --wrong --rho 1

trains a row of the small tables (``examples/paper/small.py``) without 5,000 held-out
images, and notes each epoch's mean of the angle's cosine between the gradients at w and
at w + epsilon, and of the first-order gap. A line is added to ``angle.jsonl``. With
``--cosine`` the radius sets itself, and with ``--report`` the lines are printed.
"""

from collections.abc import Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from examples import records
from examples import summary
from examples.paper import checks
from examples.paper import logs
from examples.paper import loop
from examples.paper import optimizers
from examples.paper import small
from examples.paper import tasks
from examples.paper.config import Config
from examples.paper.config import Options

EVERY = 12  # epochs between two lines
HELD_OUT = 5000  # training images to judge on


@dataclasses.dataclass(frozen=True)
class Arguments:
  data: pathlib.Path | None = None
  """Folder or archive of CIFAR-10."""
  labels: pathlib.Path | None = None
  """Folder of CIFAR-10N's labels."""
  wrong: bool = False
  """Train on the worst human labels, of which 40 % are wrong."""
  rho: float = 0.0
  """ASAM's radius."""
  cosine: float = 0.0
  """Target of the radius that sets itself; 0: rho is the radius."""
  epochs: int = 60
  """Passes over the training images."""
  seed: int = 0
  """Draws the weights, the batches and the crops."""
  results: pathlib.Path = pathlib.Path("runs/paper/results")
  """Folder of the JSON lines."""
  report: bool = False
  """Train nothing, and print what is there."""


def config_of(arguments: Arguments) -> Config:
  """The row that is trained."""
  row = small.WORSE if arguments.wrong else small.FEW
  chosen: dict[str, Any] = {"method": "asam", "rho": arguments.rho}
  if arguments.cosine:
    chosen = {"method": "auto", "cosine": arguments.cosine}
  return dataclasses.replace(
      row, name=f"{row.name}-angle", table="angle", validation=HELD_OUT,
      epochs=arguments.epochs, eval_every=EVERY, seed=arguments.seed, **chosen,
  )


class Watched(NamedTuple):
  """An optimizer's state, and [cosine, radius, first-order gap] summed over steps."""

  inner: Any
  said: jax.Array


def watched(tx: optax.GradientTransformationExtraArgs) -> Any:
  """The optimizer, whose state tells what the gradients of its passes say."""

  def init(params):
    return Watched(tx.init(params), jnp.zeros(3))

  def update(updates, state, params=None, *, grad_fn=None, **extra_args):
    assert grad_fn is not None
    clean, seen = updates, []

    def noted(point):
      seen.append(grad_fn(point))
      return seen[-1]

    updates, inner = tx.update(
        clean, state.inner, params, grad_fn=noted, **extra_args
    )
    (perturbed,) = seen
    tree = optax.tree_utils
    lengths = jnp.sqrt(
        tree.tree_vdot(clean, clean) * tree.tree_vdot(perturbed, perturbed)
    )
    gap, norm = (tree.tree_get(inner, name) for name in ("sharpness", "dual_norm"))
    cosine = tree.tree_vdot(clean, perturbed) / lengths
    return updates, Watched(inner, state.said + jnp.stack([cosine, gap / norm, gap]))

  return optax.GradientTransformationExtraArgs(init, update)


def history(config: Config, options: Options) -> list[dict[str, Any]]:
  """A line for each dozen of epochs, of that epoch alone."""
  task = tasks.make(config, options)
  recipe = optimizers.make(config, task.steps * config.epochs)
  recipe = recipe._replace(tx=watched(recipe.tx))
  step = jax.jit(
      functools.partial(loop.train_step, task, recipe, None), donate_argnums=0
  )
  state, lines = loop.initial_state(task, recipe, config.seed), []
  for epoch in range(1, config.epochs + 1):
    for batch in task.batches(epoch - 1):
      state = step(state, task.data, batch, np.uint32(config.seed))
    if epoch % EVERY == 0 or epoch in (1, config.epochs):
      said = np.asarray(state.opt_state.said) / task.steps
      line = dict(zip(("cosine", "rho", "gap"), said.tolist(), strict=True))
      line |= {"epoch": epoch, "train_accuracy": state.sums.means()[1]}
      judged = task.evaluate(state.params, state.variables, False)
      lines.append(line | {"accuracy": judged["accuracy"]})
      print(lines[-1], flush=True)
    state = state._replace(
        sums=tasks.Sums.zero(), opt_state=state.opt_state._replace(said=jnp.zeros(3))
    )
  return lines


def table(rows: list[dict[str, Any]]) -> str:
  """The radius, and what it does in the first and in the last epoch."""
  lines = []
  for row in rows:
    config, (first, *_, last) = row["config"], row["history"]
    labels = "40 % wrong" if config["human_labels"] else "right"
    rule = f"target {config['cosine']:g}" if config["method"] == "auto" else ""
    lines.append((
        labels, rule or f"{config['rho']:g}", f"{first['cosine']:.3f}",
        f"{last['cosine']:.3f}", f"{last['rho']:.2f}",
        f"{100 * last['train_accuracy']:.1f}", f"{100 * last['accuracy']:.1f}",
    ))
  heads = ("labels", "ρ", "cosine, first epoch", "last epoch", "ρ there",
           "training accuracy", "validation accuracy")
  return summary.markdown(heads, lines)


def main(argv: Sequence[str] | None = None) -> None:
  arguments = tyro.cli(
      Arguments, args=argv, prog="python -m examples.paper.angle", description=__doc__
  )
  path = arguments.results / "angle.jsonl"
  if not arguments.report:
    config = config_of(arguments)
    checked = Options(data=arguments.data, labels=arguments.labels)
    checks.check(config, checked)
    found = {"history": history(config, checked)}
    records.append(path, logs.heading(config) | found)
  print(table(records.read(path)))


if __name__ == "__main__":
  main()
