"""What should a radius follow, and what moves the angle between the two gradients?

On the MLPs of the radius study, on its validation split alone, with the labels that it
is judged on right:

- signals: the cosine of the two gradients, the same after T_w, the rise of the square
  root of the loss, and the last with the first: the more careful of the two in each
  step, or their mean;
- what could move the angle: small and large batches at as many steps, a learning rate
  that stays, one that is restarted.

    python -m examples.radius_signals

A number is the share of the gain of the best of seven fixed radii over the plain
optimizer, or the points in which it is behind where that gain is below one point.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import asam_jax
from examples import digits
from examples import options
from examples import radius_networks
from examples import radius_report
from examples import radius_study
from examples import records
from examples import summary

NETWORKS = ("mlp", "batch_norm_mlp")
RECORDS = "signals.jsonl"
RATE, START, ETA = 0.05, 0.05, 0.01
BATCH, STEPS = 64, 400  # of the study, and about its number of steps


class Setting(NamedTuple):
  """What the radius follows: a fixed radius, or targets of the signals."""

  kind: str
  cosine: float = 0.8
  rise: float = 0.17
  rho: float = 0.0

  def __str__(self) -> str:
    if self.kind in ("rise", "fixed"):
      return f"{self.kind} {self.rise if self.kind == 'rise' else self.rho:g}"
    both = f", rise {self.rise:g}" if self.kind in ("careful", "mean") else ""
    return f"{self.kind}: {self.cosine:g}{both}"


KINDS = ("fixed", "cosine", "cosine after T", "rise", "careful", "mean")
TARGETS = tuple(Setting("cosine", c) for c in radius_study.TARGETS)
SIGNALS = (
    *TARGETS,
    *(Setting("cosine after T", c) for c in radius_study.TARGETS),
    *(Setting("rise", rise=r) for r in (0.1, 0.17, 0.3, 0.5)),
    *(Setting(kind, c, r) for kind in ("careful", "mean")
      for c in (0.7, 0.8) for r in (0.17, 0.5)),
)


def _falling(steps: int) -> optax.Schedule:
  return optax.cosine_decay_schedule(0.1, steps)


def _restarted(steps: int) -> optax.Schedule:
  half = steps // 2
  return optax.join_schedules([_falling(half), _falling(steps - half)], [half])


# Batch size, schedule, and what is tried besides the fixed radii.
Scene = tuple[int, Callable[[int], optax.Schedule], tuple[Setting, ...]]
SCENES: dict[str, Scene] = {
    "as in the study": (BATCH, _falling, SIGNALS),
    "batches of 16": (16, _falling, TARGETS),
    "batches of 256": (256, _falling, TARGETS),
    "constant rate": (BATCH, lambda steps: optax.constant_schedule(0.03), TARGETS),
    "restarted rate": (BATCH, _restarted, TARGETS),
}


def _cosine(one: Any, other: Any) -> jax.Array:
  tree = optax.tree_utils
  lengths = tree.tree_norm(one) * tree.tree_norm(other)
  return jnp.asarray(tree.tree_vdot(one, other)) / jnp.where(lengths > 0, lengths, 1)


def _after_t(observed: asam_jax.Observed, normalization: str) -> jax.Array:
  """The angle in the coordinates in which the perturbation is a ball."""

  def scaled(path, w, g):
    if normalization == "none" or not asam_jax.is_not_bias(path, w):
      return g
    return (jnp.abs(w) + ETA) * g

  scale = jax.tree_util.tree_map_with_path
  return _cosine(*(
      scale(scaled, observed.params, g) for g in (observed.clean, observed.perturbed)
  ))


def rule_of(
    kind: Any, cosine: Any, rise: Any, rho: Any, normalization: str
) -> asam_jax.RadiusRule:
  """The rule of a setting, all of whose fields may be traced; kind is an index."""

  def signal(observed):
    near = lambda c: (c - cosine) / (1 - cosine)  # noqa: E731
    by_angle = near(_cosine(observed.clean, observed.perturbed))
    by_t = near(_after_t(observed, normalization))
    rose = jnp.sqrt(observed.perturbed_value) - jnp.sqrt(observed.value)
    by_rise = (rise - rose) / rise
    clip = lambda x: jnp.clip(x, -1, 1)  # noqa: E731
    by_angle, by_t, by_rise = clip(by_angle), clip(by_t), clip(by_rise)
    choices = (0.0, by_angle, by_t, by_rise, jnp.minimum(by_angle, by_rise),
               (by_angle + by_rise) / 2)
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in choices])[kind]

  def radius(state, count, dual_norm):
    del count, dual_norm
    return jnp.where(kind == KINDS.index("fixed"), rho, state)

  def update(state, observed):
    norm = observed.dual_norm
    first = jnp.where(norm > 0, START / jnp.where(norm > 0, norm, 1), 0)
    later = state * jnp.exp(RATE * signal(observed))
    rho = jnp.where(state > 0, later, first)
    return jnp.where(jnp.isfinite(rho), rho, state)

  return asam_jax.RadiusRule(lambda dtype=jnp.float32: jnp.zeros((), dtype), radius,
                             update)


def settings_of(cell: radius_study.Cell, tried: Sequence[Setting]) -> list[Setting]:
  """The plain optimizer, the fixed radii, and what is tried."""
  fixed = [Setting("fixed", rho=rho) for rho in (0.0, *cell.radii)]
  return [*fixed, *tried]


def train(
    cell: radius_study.Cell, scene: str, seeds: Sequence[int], steps: int
) -> records.Row:
  """Last-epoch accuracies on the validation split, [settings, seeds]."""
  batch_size, schedule, tried = SCENES[scene]
  halves = digits.load_halves()
  runs, right = (
      digits.validation_runs(halves, seeds, noise, radius_study.HELD_OUT)
      for noise in (cell.noise, 0.0)
  )
  runs = runs._replace(eval_labels=right.eval_labels)
  in_epoch = runs.train_images.shape[1] // batch_size
  epochs = max(round(steps / in_epoch), 1)
  settings = settings_of(cell, tried)
  kinds = jnp.array([KINDS.index(one.kind) for one in settings])
  numbers = jnp.array([one[1:] for one in settings])
  base_tx = optax.sgd(schedule(in_epoch * epochs), momentum=0.9)

  def optimizer(number):
    index = jnp.asarray(number, jnp.int32)
    cosine, rise, rho = numbers[index]
    rule = rule_of(kinds[index], cosine, rise, rho, cell.normalization)
    return asam_jax.adaptive_sam(
        base_tx, rule, ETA, cell.p, normalization=cell.normalization
    )

  repeated = digits.Runs(*(np.concatenate([x] * len(settings)) for x in runs))
  outcome = digits.train(
      radius_networks.NETWORKS[cell.network](), optimizer, repeated,
      list(seeds) * len(settings), np.repeat(range(len(settings)), len(seeds)).tolist(),
      epochs=epochs, batch_size=batch_size, eval_every=epochs,
  )
  accuracy = outcome.accuracy[-1].reshape(len(settings), len(seeds))
  return {"accuracy": accuracy.tolist()}


def cells(networks: Sequence[str]) -> list[radius_study.Cell]:
  """Those of the study in the Euclidean norm, with T and without."""
  return [cell for cell in radius_study.cells(networks) if cell.p == 2]


def _row(cell: Any, row: records.Row) -> dict[str, str]:
  """What is shown of a cell, by the setting."""
  names, scores = row["config"]["settings"], 100 * np.mean(row["accuracy"], 1)
  fixed = [i for i, name in enumerate(names) if name.startswith("fixed")]
  plain, best = scores[fixed[0]], max(scores[fixed])
  shown = {"cell": radius_report.title(cell), "plain": f"{plain:.1f}",
           "best fixed": f"{best:.1f} ({names[int(np.argmax(scores[fixed]))][6:]})"}
  for name, score in zip(names, scores, strict=True):
    if name.startswith("fixed"):
      continue
    large = best - plain >= 1
    shown[name] = (f"{100 * (score - plain) / (best - plain):.0f} %" if large
                   else f"{score - best:+.1f}")
  return shown


def report(rows: Sequence[records.Row]) -> str:
  """A table for each scene: the signals as rows where there are many."""
  parts = []
  for scene in SCENES:
    of = [row for row in rows if row["config"]["scene"] == scene]
    shown = [_row(radius_report.cell_of(row), row) for row in of]
    if not shown:
      continue
    heads = [name for name in shown[0] if name != "cell"]
    body = [[name, *(one[name] for one in shown)] for name in heads]
    table = summary.markdown(["", *(one["cell"] for one in shown)], body)
    parts.append(f"**{scene[0].upper()}{scene[1:]}**\n\n{table}")
  return "\n\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add, count = parser.add_argument, options.number(int, 1)
  add("--networks", nargs="+", choices=list(radius_networks.NETWORKS),
      default=list(NETWORKS), help="networks to train")
  add("--scenes", nargs="+", choices=list(SCENES), default=list(SCENES),
      help="batch sizes and schedules")
  add("--seeds", type=count, default=3, help="number of runs of each setting")
  add("--steps", type=count, default=STEPS, help="number of steps of a run, about")
  options.add_results(parser, "radius", "the outcomes and the tables")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Trains what is missing, and reports."""
  args = parser().parse_args(argv)
  path, seeds, done = args.results / RECORDS, range(100, 100 + args.seeds), []
  jobs = [(scene, cell) for scene in args.scenes for cell in cells(args.networks)]
  for scene, cell in tqdm.tqdm(jobs):
    tried = settings_of(cell, SCENES[scene][2])
    config = {**cell.config(), "scene": scene, "settings": [str(x) for x in tried],
              "seeds": list(seeds), "steps": args.steps}
    outcome = functools.partial(train, cell, scene, seeds, args.steps)
    done.append(records.once(path, config, outcome))
  text = report(done)
  records.replace(args.results / "signals.md", text)
  print(text)


if __name__ == "__main__":
  main()
