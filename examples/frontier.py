"""What each method buys and what it costs: accuracy over SGD against the step.

Trains every method of frontier_methods.py on the digits task, chooses its radius on
a validation split (with noisy labels, never on the test half), measures compiled
FLOPs and time of its step beside SGD's, and makes a table and a plot of both. All
outcomes are lines of JSON; what is in the file already is not run again.

    python examples/frontier.py                    # everything; about an hour
    python examples/frontier.py --methods sgd asam momentum --noises 0.4
    python examples/frontier.py --report           # table and plot from the file
"""

import argparse
from collections.abc import Sequence
import datetime
import json
import pathlib
import platform
from typing import Any

import digits
import frontier_costs as costs
import frontier_methods as methods
import frontier_report as report
import frontier_training as training
import jax
import numpy as np
import optax
import tqdm

import asam_jax


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  names = list(methods.METHODS)
  add("--methods", nargs="+", choices=names, default=names, metavar="METHOD",
      help=f"of: {', '.join(names)}")
  add("--networks", nargs="+", choices=list(digits.NETWORKS),
      default=list(digits.NETWORKS))
  add("--noises", nargs="+", type=_share, default=[0.4, 0.0],
      help="shares of wrong training labels")
  add("--rhos", nargs="+", type=float, help="radii to choose from",
      default=[0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
  add("--tuning-seeds", type=int, default=2, help="runs for each radius")
  add("--seeds", type=int, default=10, help="runs with the radius chosen")
  add("--epochs", type=int, default=40)
  add("--batch-size", type=int, default=64)
  add("--lr", type=float, default=0.1)
  add("--cost-networks", nargs="*", choices=list(costs.NETWORKS),
      default=list(costs.NETWORKS), help="networks to measure the cost of a step on")
  add("--cost-rounds", type=int, default=30, help="steps of each to time; 0: none")
  add("--results", type=pathlib.Path, default=pathlib.Path("results/frontier"))
  add("--report", action="store_true", help="only make the table and the plot")
  args = parser.parse_args(argv)
  if min(args.seeds, args.tuning_seeds, args.epochs, args.batch_size) < 1:
    parser.error("--seeds, --tuning-seeds, --epochs and --batch-size start at 1")
  return args


def _share(text: str) -> float:
  value = float(text)
  if not 0 <= value < 1:
    raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
  return value


def environment() -> dict[str, Any]:
  """Where and with what the numbers were made."""
  return {
      "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
      "device": jax.devices()[0].device_kind,
      "machine": platform.machine(),
      "versions": {
          "asam_jax": asam_jax.__version__,
          "jax": jax.__version__,
          "optax": optax.__version__,
          "python": platform.python_version(),
      },
  }


def tune_and_test(
    name: str, network: str, noise: float, args: argparse.Namespace
) -> dict[str, Any]:
  """Chooses rho on the validation split, then trains on the whole half."""
  halves = digits.load_halves()
  config = training.Config(args.epochs, args.batch_size, args.lr)
  rhos = args.rhos if name != "sgd" else [0.0]
  # Other seeds than the final runs have, so that these are all new.
  tuning = [1000 + seed for seed in range(args.tuning_seeds)]
  pairs = [(seed, rho) for rho in rhos for seed in tuning]
  seeds, radii = [list(column) for column in zip(*pairs, strict=True)]
  runs = digits.validation_runs(halves, seeds, noise, 0.2)
  outcome = training.train(name, network, runs, seeds, radii, config)
  validation = outcome.accuracy.reshape(len(rhos), len(tuning))
  best = rhos[int(np.argmax(validation.mean(1)))]

  seeds = list(range(args.seeds))
  runs = digits.final_runs(halves, seeds, noise)
  outcome = training.train(name, network, runs, seeds, [best] * len(seeds), config)
  return {
      "kind": "accuracy",
      "method": name,
      "network": network,
      "noise": noise,
      "config": config._asdict(),
      "rhos": rhos,
      "validation": validation.round(5).tolist(),
      "rho": best,
      "accuracy": outcome.accuracy.round(5).tolist(),
      "ascents": float(outcome.ascents.mean()),
      **environment(),
  }


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a") as file:
    file.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> str:
  """Runs what is missing, writes the table and the plot, and returns the table."""
  args = parse(argv)
  path = args.results / "frontier.jsonl"
  if not args.report:
    done = {
        (row["network"], row["noise"], row["method"])
        for row in read(path)
        if row["kind"] == "accuracy"
    }
    todo = [
        (network, noise, name)
        for noise in args.noises
        for network in args.networks
        for name in args.methods
        if (network, noise, name) not in done
    ]
    for network, noise, name in tqdm.tqdm(todo, disable=None):
      append(path, tune_and_test(name, network, noise, args))
    if args.cost_rounds:
      for network in args.cost_networks:
        names = args.methods if network in args.networks else costs.LARGE
        rows = costs.measure(network, names, args.batch_size, args.cost_rounds)
        for row in rows:
          append(path, {**row, **environment()})
  table = report.write(read(path), args.results)
  print(table)
  return table


if __name__ == "__main__":
  main()
