"""Is my radius right? What a run says of itself at radii from too small to collapsed.

Trains the digits networks with ASAM at a range of radii, notes in every epoch what the
two passes of a step say (cosine, linearity, rise), and sets it beside the test
accuracy, which no run knows of itself. It draws four of the runs and the cliff, and
prints how often ``asam_jax.radius_verdict`` is right about a run.

    python -m examples.radius_gauge          # about two minutes on two idle cores
    python -m examples.radius_gauge --report --results results/radius_gauge  # redrawn

Both write to runs/radius_gauge unless told otherwise.
"""

import argparse
from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import asam_jax
from examples import digits
from examples import frontier_methods
from examples import options
from examples import radius_gauge_report as report
from examples import records

RECORDS = "gauge.jsonl"  # in the folder --results
ENTRIES = ("value", "cosine", "linearity", "rise")  # of the info, kept by epoch


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--networks", nargs="+", choices=list(digits.NETWORKS),
      default=list(digits.NETWORKS), help="networks to train")
  add("--noises", nargs="+", default=[0.4, 0.0], metavar="NOISE",
      type=options.number(float, 0, 1, below=True),
      help="fractions of the training labels that are made wrong, one task each")
  add("--rhos", nargs="+", metavar="RHO",
      type=options.number(float, 0, math.inf, below=True),
      default=[0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
      help="radii to train with; 0 is plain SGD, which the others are compared with")
  add("--shown", nargs="+", metavar="RHO",
      type=options.number(float, 0, math.inf, below=True),
      default=[0.125, 2.0, 4.0, 16.0],
      help="radii of the first task whose curves are drawn")
  add("--seeds", type=count, default=3, help="number of runs of each")
  add("--epochs", type=count, default=40,
      help="number of passes over the training half")
  add("--batch-size", type=count, default=64, help="number of examples in a step")
  add("--lr", type=options.number(float, 0, math.inf, above=True, below=True),
      default=0.1, help="first learning rate; falls to 0 along a cosine")
  options.add_results(parser, "radius_gauge", "the records, the table and the picture")
  add("--report", action="store_true",
      help="train nothing: table and picture from the records that are there")
  return parser


def configs(args: argparse.Namespace) -> list[dict[str, Any]]:
  """The whole configuration of each task that the options ask for."""
  return [
      {
          "network": network, "noise": noise, "rhos": options.distinct(args.rhos),
          "seeds": args.seeds, "epochs": args.epochs, "batch_size": args.batch_size,
          "lr": args.lr,
      }
      for network in options.distinct(args.networks)
      for noise in options.distinct(args.noises)
  ]


def train(config: dict[str, Any]) -> dict[str, Any]:
  """The row of one task: by radius and seed, the accuracy and the info by epoch."""
  model = digits.NETWORKS[config["network"]]()
  pairs = [(rho, seed) for rho in config["rhos"] for seed in range(config["seeds"])]
  rhos, seeds = (list(column) for column in zip(*pairs, strict=True))
  runs = digits.final_runs(digits.load_halves(), seeds, config["noise"])
  size = runs.train_images.shape[1]
  steps = size // config["batch_size"]
  orders = np.stack([
      [rng.permutation(size)[: steps * config["batch_size"]].reshape(steps, -1)
       for _ in range(config["epochs"])]
      for rng in (np.random.default_rng([seed, 2]) for seed in seeds)
  ])
  base = frontier_methods.base_optimizer(config["lr"], steps * config["epochs"])

  def one(args):
    run, seed, rho, order = args

    def step(carry, batch):
      params, state = carry
      loss = functools.partial(
          digits.cross_entropy, model, images=run.train_images[batch],
          labels=run.train_labels[batch])
      _, grads, info = asam_jax.value_and_grad(loss, rho=rho, with_info=True)(params)
      updates, state = base.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), info

    def epoch(carry, batches):
      carry, infos = jax.lax.scan(step, carry, batches)
      right = digits.accuracy(model, carry[0], run.eval_images, run.eval_labels)
      medians = [jnp.median(getattr(infos, entry)) for entry in ENTRIES]
      return carry, (right, medians, infos)

    params = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))
    return jax.lax.scan(epoch, (params, base.init(params)), order)[1]

  accuracy, medians, infos = jax.jit(lambda args: jax.lax.map(one, args))(
      (runs, jnp.asarray(seeds), jnp.asarray(rhos, jnp.float32), orders))
  shape = (len(config["rhos"]), config["seeds"], config["epochs"])
  by_run = lambda x: np.asarray(x, np.float64).reshape(shape).round(5).tolist()  # noqa: E731
  infos = jax.device_get(infos)
  verdicts = [
      asam_jax.radius_verdict(
          jax.tree.map(lambda x, i=i: x[i], infos), chance=math.log(digits.CLASSES))
      for i in range(len(pairs))
  ]
  return {
      "config": config,
      "accuracy": by_run(accuracy),
      **{name: by_run(x) for name, x in zip(ENTRIES, medians, strict=True)},
      "verdict": np.array([v.verdict for v in verdicts]).reshape(shape[:2]).tolist(),
      **records.environment(("jax", "optax", "flax")),
  }


def main(argv: Sequence[str] | None = None) -> str:
  """Trains what is missing, draws, and returns the table."""
  reader = parser()
  args = reader.parse_args(argv)
  if unknown := set(args.shown) - set(args.rhos):
    reader.error(f"--shown {min(unknown):g}: is not among --rhos")
  path, wanted = args.results / RECORDS, configs(args)
  if args.report and not path.is_file():
    reader.error(f"--report: no file {path}; run without --report first, or name the"
                 " folder by --results")
  rows = records.read(path)
  todo = [c for c in wanted if records.find(rows, c) is None and not args.report]
  for config in tqdm.tqdm(todo, unit="task", disable=None):
    records.append(path, train(config))
  rows = records.read(path)
  found = [row for config in wanted if (row := records.find(rows, config))]
  if not found:
    raise SystemExit(f"{path} has no records of this configuration; run it without"
                     " --report.")
  table = report.table(found)
  records.replace(args.results / report.TABLE, table)
  report.draw(found, args.shown, args.results / report.PICTURE)
  print(table)
  print(f"Written: {args.results}/{report.TABLE} and {report.PICTURE}.")
  return table


if __name__ == "__main__":
  main()
