"""What each method buys and what it costs: accuracy over SGD against the step.

Trains every method of frontier_methods.py on the digits task, chooses its radius on
a validation split (with noisy labels, never on the test half), measures compiled
FLOPs and time of its step beside SGD's, and makes a table and plots of both, in
runs/frontier. All outcomes are lines of JSON with their whole configuration: what an
interrupted run has finished is not run again by the same command.

    python -m examples.frontier         # everything; it says first how long it takes
    python -m examples.frontier --methods sgd asam momentum --noises 0.4
    python -m examples.frontier --report --results results/frontier  # ours, redrawn
"""

import argparse
from collections.abc import Sequence
import math
from typing import Any

import numpy as np
import tqdm

from examples import digits
from examples import frontier_costs as costs
from examples import frontier_methods as methods
from examples import frontier_report as report
from examples import frontier_training as training
from examples import options
from examples import records

RECORDS = "frontier.jsonl"  # in the folder --results

# For the forecast of how long a run takes on two idle cores of a server: milliseconds
# of a gradient in training at batch size 64, and of one of the steps that are timed,
# where nothing is fused; seconds to compile a method's training, or a step.
TRAINING_MS = {"mlp": 0.5, "cnn": 1.0}
STEP_MS = {"mlp": 1.2, "cnn": 1.4, "mlp_2m": 13, "mlp_2m_256": 22, "resnet20": 1900}
COMPILE_SECONDS = 8.0


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  names = list(methods.METHODS)
  add("--methods", nargs="+", choices=names, default=names, metavar="METHOD",
      help="methods to train, of those of the default")
  add("--networks", nargs="+", choices=list(digits.NETWORKS),
      default=list(digits.NETWORKS), help="networks to train")
  add("--noises", nargs="+", default=[0.4, 0.0], metavar="NOISE",
      type=options.number(float, 0, 1, below=True),
      help="fractions of the training labels that are made wrong, one task each")
  add("--rhos", nargs="+", default=[0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0],
      type=options.number(float, 0, math.inf, below=True), metavar="RHO",
      help="radii to choose from; relative to the weights where the method has T_w,"
      " else in their own unit")
  add("--tuning-seeds", type=count, default=2, help="number of runs for each radius")
  add("--seeds", type=count, default=10,
      help="number of runs with the radius chosen; fewer than two have no error bars")
  add("--epochs", type=count, default=40,
      help="number of passes over the training half")
  add("--batch-size", type=count, default=64, help="number of examples in a step")
  add("--lr", type=options.number(float, 0, math.inf, above=True, below=True),
      default=0.1, help="first learning rate; falls to 0 along a cosine")
  add("--cost-networks", nargs="*", choices=list(costs.NETWORKS),
      default=list(costs.NETWORKS), help="networks to measure the cost of a step on")
  add("--cost-rounds", type=options.number(int, 0), default=30,
      help="number of steps of each method to time; 0: measure no costs")
  options.add_results(parser, "frontier", "the outcomes, the table and the plots")
  add("--report", action="store_true",
      help="train nothing: table and plots from the outcomes that are there, of the"
      " configuration that the other options name")
  return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The options' values, checked together."""
  reader = parser()
  args = reader.parse_args(argv)
  for name in ("methods", "networks", "noises", "rhos", "cost_networks"):
    setattr(args, name, options.distinct(getattr(args, name)))
  sizes = training.sizes()
  if args.batch_size > sizes.tuning:
    reader.error(f"--batch-size {args.batch_size}: the radii are tuned on"
                 f" {sizes.tuning} examples; take a smaller batch")
  if args.report and not (args.results / RECORDS).is_file():
    reader.error(f"--report: no file {args.results / RECORDS}; run without --report"
                 " first, or name the folder by --results")
  return args


def configs(args: argparse.Namespace) -> list[dict[str, Any]]:
  """The whole configuration of each outcome that the options ask for."""
  return [
      {
          "kind": "accuracy",
          "method": name,
          "network": network,
          "noise": noise,
          "epochs": args.epochs,
          "batch_size": args.batch_size,
          "lr": args.lr,
          "rhos": args.rhos if methods.METHODS[name].has_radius else [0.0],
          "tuning_seeds": args.tuning_seeds,
          "seeds": args.seeds,
      }
      for noise in args.noises
      for network in args.networks
      for name in args.methods
  ]


def cost_configs(args: argparse.Namespace) -> list[dict[str, Any]]:
  """The same of the measured steps, which one run measures side by side."""
  if not args.cost_rounds:
    return []
  found = []
  for network in args.cost_networks:
    names = args.methods if network in args.networks else list(costs.LARGE)
    found.append({
        "kind": "cost",
        "network": network,
        "methods": names,
        "batch_size": costs.NETWORKS[network].batch_size or args.batch_size,
        "rounds": args.cost_rounds,
    })
  return found


def tune_and_test(config: dict[str, Any]) -> dict[str, Any]:
  """Chooses rho on the validation split, then trains on the whole half."""
  halves = digits.load_halves()
  name, network, noise = config["method"], config["network"], config["noise"]
  shared = training.Config(config["epochs"], config["batch_size"], config["lr"])
  rhos = config["rhos"]
  # Other seeds than the final runs have, so that these are all new.
  tuning = [1000 + seed for seed in range(config["tuning_seeds"])]
  pairs = [(seed, rho) for rho in rhos for seed in tuning]
  seeds, radii = [list(column) for column in zip(*pairs, strict=True)]
  runs = digits.validation_runs(halves, seeds, noise, training.HELD_OUT)
  outcome = training.train(name, network, runs, seeds, radii, shared)
  validation = outcome.accuracy.reshape(len(rhos), len(tuning))
  best = rhos[int(np.argmax(validation.mean(1)))]

  seeds = list(range(config["seeds"]))
  runs = digits.final_runs(halves, seeds, noise)
  outcome = training.train(name, network, runs, seeds, [best] * len(seeds), shared)
  return {
      "config": config,
      "validation": validation.astype(float).round(5).tolist(),
      "rho": best,
      "accuracy": outcome.accuracy.astype(float).round(5).tolist(),
      "ascents": float(outcome.ascents.mean()),
      **records.environment(("jax", "optax", "flax")),
  }


def gradients(config: dict[str, Any]) -> int:
  """Gradients that an outcome takes, those of the tuning included; at most."""
  sizes, size = training.sizes(), config["batch_size"]
  steps = len(config["rhos"]) * config["tuning_seeds"] * (sizes.tuning // size)
  steps += config["seeds"] * (sizes.final // size)
  method = methods.METHODS[config["method"]]
  return steps * config["epochs"] * method.epochs * method.gradients


def forecast(
    outcomes: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]
) -> float:
  """About how many seconds these trainings and costs take on two idle cores."""
  seconds = 0.0
  for config in outcomes:
    ms = TRAINING_MS[config["network"]] * config["batch_size"] / 64
    seconds += COMPILE_SECONDS + 1e-3 * ms * gradients(config)
  for config in steps:
    names = ["sgd", *config["methods"]]
    taken = sum(methods.METHODS[name].gradients for name in names)
    # Each is run twice a round, the first time to fill the caches.
    ms = STEP_MS[config["network"]] * taken * 2 * config["rounds"]
    seconds += COMPILE_SECONDS * len(names) + 1e-3 * ms
  return seconds


def missing(
    wanted: Sequence[dict[str, Any]], rows: Sequence[records.Row]
) -> list[dict[str, Any]]:
  """The configurations that no row has."""
  return [config for config in wanted if records.find(rows, config) is None]


def train_all(args: argparse.Namespace) -> None:
  """Trains and measures what the file has no outcome of yet."""
  path = args.results / RECORDS
  rows = records.read(path)
  wanted = configs(args)
  todo, steps = missing(wanted, rows), missing(cost_configs(args), rows)
  found = len(wanted) - len(todo)
  print(
      f"{len(todo)} outcomes to train and the steps of {len(steps)} networks to time:"
      f" about {math.ceil(forecast(todo, steps) / 60)} min on 2 idle cores. The bars"
      " say how long it takes here."
      + (f" {found} outcomes of the same configuration are in {path}; remove it to"
         " have them trained again." if found else ""),
      flush=True,
  )
  total = sum(map(gradients, todo))
  with tqdm.tqdm(total=total, unit="grad", unit_scale=True, disable=None) as bar:
    for config in todo:
      bar.set_description(f"{config['network']} {config['method']}")
      records.append(path, tune_and_test(config))
      bar.update(gradients(config))
  where = records.environment(("jax", "optax", "flax"))
  for config in steps:
    records.append(path, *({**row, **where} for row in costs.measure(config)))


def main(argv: Sequence[str] | None = None) -> str:
  """Runs what is missing, writes the table and the plots, and returns the table."""
  args = parse(argv)
  if not args.report:
    train_all(args)
  path = args.results / RECORDS
  rows, wanted = records.read(path), configs(args)
  outcomes = [row for config in wanted if (row := records.find(rows, config))]
  if not outcomes:
    raise SystemExit(
        f"{path} has no outcome of this configuration. It has these:\n"
        f"{report.settings(rows)}\nRepeat the options that they were made with."
    )
  steps = [row for row in rows if row["config"]["kind"] == "cost"]
  table = report.write(outcomes, steps, args.results)
  print(table)
  print(f"Written: {args.results}/frontier.md and pictures. {len(outcomes)} of"
        f" {len(wanted)} outcomes are there.")
  return table


if __name__ == "__main__":
  main()
