"""Sharpness over the course of training: SGD, SAM and ASAM on noisy digits.

  python -m examples.sharpness_training           # train, measure, draw
  python -m examples.sharpness_training --redraw  # draw from the recorded lines

The first-order sharpness costs nothing: SAM and ASAM have it in their state, and the
training step returns it. The worst case is measured every few epochs by a function
that is compiled once. There are no callbacks. runs/sharpness_training gets the
records, log.jsonl of the training and slices.json of the loss around the final
weights, and a picture of each.
"""

import argparse
from collections.abc import Sequence
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import asam_jax
from asam_jax import landscape
from asam_jax import sharpness
from examples import digits
from examples import options
from examples import records
from examples import sharpness_training_report as report

NOISE, BATCH, RATE = 0.4, 64, 0.1
RHO = {"SAM": 0.05, "ASAM": 0.5}  # of the optimizers
MEASURED = {  # of the worst-case measures: rho and normalization
    "plain": (0.05, "none"),
    "adaptive": (0.5, "elementwise"),
}


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
  base = optax.sgd(optax.cosine_decay_schedule(RATE, steps), momentum=0.9)
  return {
      # rho = 0 is SGD, bit for bit, with the sharpness of a radius of 0 in its state.
      "SGD": asam_jax.adaptive_sam(base, rho=0.0),
      "SAM": asam_jax.sam(base, RHO["SAM"]),
      "ASAM": asam_jax.adaptive_sam(base, RHO["ASAM"]),
  }


def make_step(tx, loss):
  """A training step that also returns what it knows about sharpness for free."""

  @jax.jit
  def step(params, state, batch):
    grad_fn = jax.grad(lambda w: loss(w, batch))
    grads = grad_fn(params)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    free = optax.tree_utils.tree_get(state, "sharpness")
    return optax.apply_updates(params, updates), state, free

  return step


def make_worst_case(loss, subset):
  """Both worst cases on a fixed subset, compiled once."""

  @jax.jit
  def worst(params):
    return {
        name: sharpness.worst_case(
            lambda w: loss(w, subset), params, rho,
            geometry=asam_jax.Geometry(normalization=kind), steps=10, restarts=0).value
        for name, (rho, kind) in MEASURED.items()
    }

  return worst


def train(seed: int, epochs: int, every: int):
  """The records of the three runs, and their final weights."""
  halves = digits.load_halves()
  labels = digits.flip_labels(halves.train_labels, NOISE, seed)
  images = halves.train_images
  model = digits.MLP()
  loss = lambda w, batch: digits.cross_entropy(model, w, *batch)  # noqa: E731
  subset = (images[:256], labels[:256])
  worst = make_worst_case(loss, subset)
  judge = jax.jit(lambda w: digits.accuracy(
      model, w, halves.test_images, halves.test_labels))
  per_epoch = len(labels) // BATCH
  records, finals = [], {}
  for name, tx in optimizers(per_epoch * epochs).items():
    params = model.init(jax.random.key(seed), images[:1])
    state, step = tx.init(params), make_step(tx, loss)
    rng = np.random.default_rng(seed)
    for epoch in tqdm.trange(epochs + 1, desc=name):
      if epoch % every == 0 or epoch == epochs:
        values = {k: float(v) for k, v in worst(params).items()}
        records.append({
            "optimizer": name, "epoch": epoch, **values,
            "train_loss": float(loss(params, subset)),
            "test_accuracy": float(judge(params))})
      if epoch == epochs:
        break
      frees = []
      order = rng.permutation(len(labels))[: per_epoch * BATCH]
      for index in order.reshape(per_epoch, BATCH):
        params, state, free = step(params, state, (images[index], labels[index]))
        frees.append(free)  # stays on the device: no wait
      if name != "SGD":
        records.append({"optimizer": name, "epoch": epoch + 0.5,
                        "free": float(jnp.mean(jnp.stack(frees)))})
    finals[name] = params
  return records, finals, lambda w: loss(w, subset)


def slices(finals, loss) -> dict[str, Any]:
  """Lines along each one's gradient, ASAM's surface, and the common plane."""
  rho, kind = MEASURED["adaptive"]
  lines = {}
  for name, params in finals.items():
    geometry = asam_jax.Geometry(normalization=kind)
    d = landscape.direction("gradient", params, geometry=geometry, loss=loss)
    lines[name] = landscape.line(loss, params, d, rho, extent=2, points=41)
  ds = [landscape.direction(k, finals["ASAM"], loss=loss)
        for k in ("gradient", "eigenvector")]
  return {
      "lines": {name: as_lists(line) for name, line in lines.items()},
      "surface": as_lists(landscape.surface(
          loss, finals["ASAM"], ds, rho, extent=2, points=25)),
      "plane": as_lists(landscape.plane(loss, list(finals.values()), points=25)),
  }


def as_lists(slice_: Any) -> dict[str, Any]:
  """The arrays of a slice for JSON, to six digits."""
  short = lambda x: np.vectorize(lambda v: float(f"{v:.6g}"))(x).tolist()  # noqa: E731
  return {name: short(np.asarray(x)) for name, x in slice_._asdict().items()}


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--seed", type=options.number(int, 0, 2**31 - 1), default=0,
      help="draws the wrong labels, the initial weights and the batches")
  add("--epochs", type=count, default=100,
      help="number of passes over the training half")
  add("--every", type=count, default=5,
      help="number of epochs between two measures of the worst cases")
  add("--redraw", action="store_true",
      help="train nothing: pictures from the records that are there")
  options.add_results(parser, "sharpness_training", "the records and the pictures")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  reader = parser()
  args = reader.parse_args(argv)
  log, around = args.results / "log.jsonl", args.results / "slices.json"
  if not args.redraw:
    start = time.perf_counter()
    rows, finals, loss = train(args.seed, args.epochs, args.every)
    common = {
        "config": {"seed": args.seed, "epochs": args.epochs, "every": args.every,
                   "noise": NOISE, "batch_size": BATCH, "lr": RATE, "rho": RHO,
                   "measured": MEASURED},
        **records.environment(("jax", "optax", "flax")),
    }
    drawn = slices(finals, loss)
    records.write(log, [{**row, **common} for row in rows])
    records.replace(around, json.dumps({**drawn, **common}) + "\n")
    print(f"{time.perf_counter() - start:.0f} s")
  for path in (log, around):
    if not path.exists():
      reader.error(f"--redraw: no file {path}; run without --redraw first, or name the"
                   " folder by --results")
  rows = records.read(log)
  report.plot_curves(rows, args.results / "curves.png")
  report.plot_slices(json.loads(around.read_text()), args.results / "slices.png")
  print(report.table(rows))
  print(f"Written: pictures and records in {args.results}")


if __name__ == "__main__":
  main()
