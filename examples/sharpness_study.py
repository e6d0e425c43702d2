"""Does adaptive sharpness rank networks by their generalization gap?

Three stages, each from the files of the one before, all by default in
runs/sharpness_study:

  python -m examples.sharpness_study train    # 625 networks, 2 min on 2 cores
  python -m examples.sharpness_study measure  # networks.jsonl, measures.jsonl, 5 min
  python -m examples.sharpness_study report   # tables.md and scatter.png from these

The page sharpness_study.md says what came out; its records are in
results/sharpness_study, of which "report --results results/sharpness_study" makes its
tables and its picture again.
"""

import argparse
from collections.abc import Sequence
import io
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm

import asam_jax
from asam_jax import sharpness
from examples import options
from examples import records
from examples import sharpness_networks as networks
from examples import sharpness_report

# (normalization, p) and the radii to choose from.
MEASURES = {
    "sharpness, p=2": ("none", 2, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "adaptive, p=2": ("elementwise", 2, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "sharpness, p=inf": ("none", np.inf, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "adaptive, p=inf": ("elementwise", np.inf, (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)),
}


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("stage", choices=("train", "measure", "report"),
      help="train the networks, measure their sharpness, or make tables and picture")
  add("--epochs", type=count, default=150,
      help="number of passes over the training set")
  add("--seed", type=options.number(int, 0, 2**31 - 1), default=0,
      help="draws initial weights, batches and dropout")
  add("--least-accuracy", type=options.number(float, 0, 1), default=0.99,
      help="fraction of the training set that a network must get right to be measured")
  add("--steps", type=count, default=20,
      help="number of iterations of Auto-PGD, which looks for the worst case")
  add("--restarts", type=options.number(int, 0), default=0,
      help="number of further starts of Auto-PGD from random points of the ball")
  add("--chunk", type=count, default=32,
      help="number of networks measured at once; bounds the memory, changes no number")
  add("--cache", type=pathlib.Path, metavar="FOLDER",
      default=pathlib.Path("runs/sharpness_study"),
      help="folder for the trained weights, a file for each batch size")
  options.add_results(parser, "sharpness_study",
                      "networks.jsonl, measures.jsonl, tables.md and scatter.png")
  return parser


def training_config(args: argparse.Namespace, batch_size: int) -> dict[str, Any]:
  """What decides the weights of the networks of one batch size."""
  grid = {name: list(values) for name, values in networks.GRID.items()}
  return {"epochs": args.epochs, "seed": args.seed,
          "grid": {**grid, "batch_size": [batch_size]}}


def config_of(args: argparse.Namespace) -> dict[str, Any]:
  """What decides the numbers; the radii and the grid are in the lines."""
  return {"epochs": args.epochs, "seed": args.seed,
          "least_accuracy": args.least_accuracy, "steps": args.steps,
          "restarts": args.restarts}


def train(args: argparse.Namespace) -> None:
  """Trains the batch sizes of which the cache has no weights of this configuration."""
  for batch_size in tqdm.tqdm(networks.GRID["batch_size"], desc="batch sizes"):
    path = args.cache / f"{batch_size}.npz"
    config = training_config(args, batch_size)
    if path.exists() and cached_config(path) == records.key(config):
      tqdm.tqdm.write(f"{path} has these networks already")
      continue
    start = time.perf_counter()
    params = networks.train(batch_size, networks.settings(), args.epochs, args.seed)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    buffer = io.BytesIO()
    np.savez(buffer, *leaves, config=records.key(config),
             seconds=time.perf_counter() - start)
    records.replace(path, buffer.getvalue())


def cached_config(path: pathlib.Path) -> str:
  """The key of the configuration that the weights in a file were trained with."""
  with np.load(path) as file:
    return str(file["config"]) if "config" in file.files else ""


def load(args: argparse.Namespace):
  """The settings of all networks, and their stacked parameters."""
  treedef = jax.tree.structure(networks.init(jax.random.key(0)))
  rows, stacks = [], []
  for batch_size in networks.GRID["batch_size"]:
    path = args.cache / f"{batch_size}.npz"
    wanted = records.key(training_config(args, batch_size))
    if not path.exists():
      raise SystemExit(f"no file {path}; run the stage train first, with the same"
                       " --cache.")
    if (found := cached_config(path)) != wanted:
      raise SystemExit(f"{path} was trained with {found or 'an unknown configuration'},"
                       f" not with {wanted}. Run the stage train with these options.")
    with np.load(path) as file:
      stacks.append([file[name] for name in file.files if name.startswith("arr_")])
    rows += [
        {"batch_size": batch_size, **setting._asdict()}
        for setting in networks.settings()
    ]
  leaves = [np.concatenate(column) for column in zip(*stacks, strict=True)]
  return rows, jax.tree.unflatten(treedef, leaves)


def measure(args: argparse.Namespace) -> None:
  """Writes networks.jsonl and measures.jsonl, both once all is measured."""
  rows, params = load(args)
  train_set, test_set = networks.digits()
  train_loss, train_accuracy = networks.evaluate(params, train_set)
  test_loss, test_accuracy = networks.evaluate(params, test_set)
  config = config_of(args)
  common = {"config": config, **records.environment()}
  for i, row in enumerate(rows):
    row.update(
        train_loss=float(train_loss[i]), train_accuracy=float(train_accuracy[i]),
        test_loss=float(test_loss[i]), test_accuracy=float(test_accuracy[i]), **common)
  kept = [i for i, a in enumerate(train_accuracy) if a >= args.least_accuracy]
  if not kept:
    raise SystemExit(f"no network has the --least-accuracy {args.least_accuracy}; the"
                     f" best has {float(np.max(train_accuracy)):.4f}.")
  params = jax.tree.map(lambda x: x[np.array(kept)], params)

  lines = []
  for name, (normalization, p, radii) in MEASURES.items():

    def one(params, rho, normalization=normalization, p=p):
      # eta = 0 and every leaf normalized: the measure of the definition, which is
      # exactly invariant to rescaling.
      geometry = asam_jax.Geometry(
          0.0, p, normalization, normalize=lambda path, leaf: True)
      return sharpness.worst_case(
          lambda w: networks.cross_entropy(w, train_set), params, rho,
          geometry=geometry, steps=args.steps, restarts=args.restarts).value

    batched = jax.jit(jax.vmap(one, (0, None)))
    for rho in tqdm.tqdm(radii, desc=name):
      values = in_chunks(lambda c, rho=rho, f=batched: f(c, rho), params, args.chunk)
      lines.append({
          "measure": name, "rho": rho, "config": config, "networks": kept,
          "values": [float(f"{v:.6g}") for v in values]})
  records.write(args.results / "networks.jsonl", rows)
  records.write(args.results / "measures.jsonl", lines)


def in_chunks(function, stacked, size: int) -> np.ndarray:
  """Applies a function of stacked networks to ``size`` of them at a time."""
  count = len(jax.tree.leaves(stacked)[0])
  parts = []
  for start in range(0, count, size):
    index = np.minimum(np.arange(start, start + size), count - 1)  # one shape for all
    parts.append(np.asarray(function(jax.tree.map(lambda x, i=index: x[i], stacked))))
  return np.concatenate(parts)[:count]


def main(argv: Sequence[str] | None = None) -> None:
  args = parser().parse_args(argv)
  if args.stage == "train":
    train(args)
  elif args.stage == "measure":
    measure(args)
  else:
    sharpness_report.report(args.results)


if __name__ == "__main__":
  main()
