"""Does adaptive sharpness rank networks by their generalization gap?

Three stages, each from the files of the one before:

  python examples/sharpness_study.py train    # 625 networks, into --cache
  python examples/sharpness_study.py measure  # results/sharpness_study/*.jsonl
  python examples/sharpness_study.py report   # tables and figures from these

The page sharpness_study.md says what came out.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import sys
import time

import jax
import numpy as np
import tqdm

import asam_jax
from asam_jax import sharpness
from examples import sharpness_networks as networks
from examples import sharpness_report


@dataclasses.dataclass(frozen=True)
class Config:
  """What decides the numbers."""

  epochs: int = 150
  seed: int = 0
  least_accuracy: float = 0.99  # on the training set; the others are left out
  steps: int = 20  # of Auto-PGD
  restarts: int = 0
  chunk: int = 32  # networks measured at once


# (normalization, p) and the radii to choose from.
MEASURES = {
    "sharpness, p=2": ("none", 2, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "adaptive, p=2": ("elementwise", 2, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "sharpness, p=inf": ("none", np.inf, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "adaptive, p=inf": ("elementwise", np.inf, (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)),
}


def environment() -> dict[str, str]:
  return {
      "python": platform.python_version(), "jax": jax.__version__,
      "asam_jax": asam_jax.__version__, "device": jax.devices()[0].device_kind,
  }


def train(config: Config, cache: pathlib.Path) -> None:
  cache.mkdir(parents=True, exist_ok=True)
  settings = networks.settings()
  for batch_size in tqdm.tqdm(networks.GRID["batch_size"], desc="batch sizes"):
    start = time.perf_counter()
    params = networks.train(batch_size, settings, config.epochs, config.seed)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    seconds = time.perf_counter() - start
    np.savez(cache / f"{batch_size}.npz", *leaves, seconds=seconds)


def load(cache: pathlib.Path):
  """The settings of all networks, and their stacked parameters."""
  treedef = jax.tree.structure(networks.init(jax.random.key(0)))
  rows, stacks = [], []
  for batch_size in networks.GRID["batch_size"]:
    path = cache / f"{batch_size}.npz"
    if not path.exists():
      sys.exit(f"--cache {cache} has no {path.name}; run the stage train first.")
    with np.load(path) as file:
      stacks.append([file[name] for name in file.files if name != "seconds"])
    rows += [
        {"batch_size": batch_size, **setting._asdict()}
        for setting in networks.settings()
    ]
  leaves = [np.concatenate(column) for column in zip(*stacks, strict=True)]
  return rows, jax.tree.unflatten(treedef, leaves)


def measure(config: Config, cache: pathlib.Path, results: pathlib.Path) -> None:
  rows, params = load(cache)
  train_set, test_set = networks.digits()
  train_loss, train_accuracy = networks.evaluate(params, train_set)
  test_loss, test_accuracy = networks.evaluate(params, test_set)
  common = {"seed": config.seed, "epochs": config.epochs, **environment()}
  for i, row in enumerate(rows):
    row.update(
        train_loss=float(train_loss[i]), train_accuracy=float(train_accuracy[i]),
        test_loss=float(test_loss[i]), test_accuracy=float(test_accuracy[i]), **common)
  kept = [i for i, a in enumerate(train_accuracy) if a >= config.least_accuracy]
  params = jax.tree.map(lambda x: x[np.array(kept)], params)
  results.mkdir(parents=True, exist_ok=True)
  write(results / "networks.jsonl", rows)

  lines = []
  for name, (normalization, p, radii) in MEASURES.items():

    def one(params, rho, normalization=normalization, p=p):
      # eta = 0 and every leaf normalized: the measure of the definition, which is
      # exactly invariant to rescaling.
      return sharpness.worst_case(
          lambda w: networks.cross_entropy(w, train_set), params, rho, 0.0, p,
          steps=config.steps, restarts=config.restarts, normalization=normalization,
          normalize=lambda path, leaf: True).value

    batched = jax.jit(jax.vmap(one, (0, None)))
    for rho in tqdm.tqdm(radii, desc=name):
      values = in_chunks(lambda c, rho=rho, f=batched: f(c, rho), params,
                         config.chunk)
      lines.append({"measure": name, "rho": rho, "networks": kept,
                    "values": [float(f"{v:.6g}") for v in values]})
  write(results / "measures.jsonl", lines)


def in_chunks(function, stacked, size: int) -> np.ndarray:
  """Applies a function of stacked networks to ``size`` of them at a time."""
  count = len(jax.tree.leaves(stacked)[0])
  parts = []
  for start in range(0, count, size):
    index = np.minimum(np.arange(start, start + size), count - 1)  # one shape for all
    parts.append(np.asarray(function(jax.tree.map(lambda x, i=index: x[i], stacked))))
  return np.concatenate(parts)[:count]


def write(path: pathlib.Path, rows) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("stage", choices=("train", "measure", "report"))
  parser.add_argument("--cache", type=pathlib.Path, default="data/sharpness_study")
  parser.add_argument("--results", type=pathlib.Path,
                      default="results/sharpness_study")
  for field in dataclasses.fields(Config):
    parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type,
                        default=field.default)
  args = vars(parser.parse_args())
  stage, cache, results = (args.pop(k) for k in ("stage", "cache", "results"))
  config = Config(**args)
  if stage == "train":
    train(config, cache)
  elif stage == "measure":
    measure(config, cache, results)
  else:
    sharpness_report.report(results)


if __name__ == "__main__":
  main()
