"""SGD, SAM and ASAM on digits with wrong labels: who learns the digits anyway?

Trains an MLP and a small CNN on half of scikit-learn's digits with 40 % of the
labels wrong, and tests on the other half. All methods get the same epochs, batches,
learning rate schedule and weight decay; SAM and ASAM take two gradients a step. The
radius rho of each is the best of a grid by accuracy on noisy labels that are held
out of the training half; the test half is looked at for the result alone.

  python -m examples.quickstart            # about a minute on two cores
  python -m examples.quickstart --epochs 5 --seeds 2

Both write to runs/quickstart.
"""

import argparse
from collections.abc import Callable, Sequence
import math
import time
from typing import Any

import numpy as np
import optax
import tqdm

import asam_jax
from examples import digits
from examples import options
from examples import quickstart_report
from examples import records

METHODS = ("sgd", "sam", "asam")
RECORDS, PICTURE = "results.jsonl", "quickstart.png"  # in the folder --results


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  count = options.number(int, 1)
  positive = options.number(float, 0, math.inf, above=True, below=True)
  finite = options.number(float, 0, math.inf, below=True)
  what = parser.add_argument_group("what is compared")
  what.add_argument("--networks", nargs="+", choices=digits.NETWORKS,
                    default=list(digits.NETWORKS), help="networks to train")
  what.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS),
                    help="optimizers to train with")
  what.add_argument("--seeds", type=options.number(int, 2), default=5,
                    help="number of runs of each, for the standard error")
  what.add_argument("--seed", type=options.number(int, 0, 2**31 - 1), default=0,
                    help="the first seed; a seed draws the wrong labels, the"
                    " initial weights and the batches")
  what.add_argument("--noise", type=options.number(float, 0, 1), default=0.4,
                    help="fraction of the training labels that is made wrong")

  budget = parser.add_argument_group("training, the same for all methods")
  budget.add_argument("--epochs", type=count, default=60,
                      help="number of passes over the training half")
  budget.add_argument("--batch-size", type=count, default=64,
                      help="number of examples in a step")
  budget.add_argument("--lr", type=positive, default=0.05,
                      help="first learning rate; falls to 0 along a cosine")
  budget.add_argument("--momentum", type=options.number(float, 0, 1), default=0.9,
                      help="SGD's momentum, a fraction")
  budget.add_argument("--weight-decay", type=finite, default=5e-4,
                      help="added to the gradient as this times the weights")

  ascent = parser.add_argument_group("the perturbation")
  ascent.add_argument("--rhos-sam", type=positive, nargs="+", metavar="RHO",
                      default=[0.1, 0.2, 0.5, 1.0],
                      help="SAM's radii to choose from, in the weights' own unit")
  ascent.add_argument("--rhos-asam", type=positive, nargs="+", metavar="RHO",
                      default=[0.5, 1.0, 2.0, 4.0],
                      help="ASAM's, relative to the weights; one value is taken as"
                      " it is, without a sweep")
  ascent.add_argument("--sweep-seeds", type=count, default=1,
                      help="number of runs for each radius of the sweep")
  ascent.add_argument("--validation", type=options.number(float, 0.01, 0.9),
                      default=0.25,
                      help="fraction of the training half that the sweep holds out")
  ascent.add_argument("--p", type=options.number(float, 1), default=2.0,
                      help="the norm's exponent, 1 to inf, of SAM and ASAM")
  ascent.add_argument("--eta", type=finite, default=0.01,
                      help="ASAM's stabilizer, added to the normalization operator")
  ascent.add_argument("--normalization", default="elementwise",
                      choices=["elementwise", "filterwise", "layerwise"],
                      help="ASAM's normalization operator")

  out = parser.add_argument_group("output")
  options.add_results(out, "quickstart", "results.jsonl and quickstart.png")
  out.add_argument("--redraw", action="store_true",
                   help="train nothing: table and picture from the results.jsonl"
                   " that is there")
  return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The options' values, checked together."""
  reader = parser()
  args = reader.parse_args(argv)
  for name in ("networks", "methods", "rhos_sam", "rhos_asam"):
    setattr(args, name, options.distinct(getattr(args, name)))
  if args.redraw and not (args.results / RECORDS).is_file():
    reader.error(f"--redraw: no file {args.results / RECORDS}; run without --redraw"
                 " first, or name the folder by --results")
  size = len(digits.load_halves().train_labels)
  smallest = size - round(args.validation * size)
  if args.batch_size > smallest:
    reader.error(f"--batch-size {args.batch_size}: the sweep trains on {smallest}"
                 " examples; take a smaller batch")
  return args


def make_optimizer(args, method: str, steps: int) -> Callable:
  """From a radius to the optimizer; SGD has no use for the radius."""

  def optimizer(rho: Any) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(args.lr, steps)
    # Weight decay belongs to the base optimizer: it acts on the descent alone.
    base = optax.chain(
        optax.add_decayed_weights(args.weight_decay),
        optax.sgd(schedule, momentum=args.momentum),
    )
    if method == "sgd":
      return base
    if method == "sam":
      return asam_jax.sam(base, rho, args.p)
    return asam_jax.adaptive_sam(
        base, rho, args.eta, args.p, normalization=args.normalization
    )

  return optimizer


def grid_of(args, method: str) -> list[float]:
  """The radii that the sweep tries; empty for SGD."""
  return {"sgd": [], "sam": args.rhos_sam, "asam": args.rhos_asam}[method]


def run(args, network: str, method: str, runs, seeds, rhos, progress, **more):
  """Trains ``len(seeds)`` networks side by side."""
  steps = args.epochs * (runs.train_images.shape[1] // args.batch_size)
  cost = (1 if method == "sgd" else 2) * len(seeds)
  return digits.train(
      digits.NETWORKS[network](),
      make_optimizer(args, method, steps),
      runs,
      seeds,
      rhos,
      epochs=args.epochs,
      batch_size=args.batch_size,
      progress=lambda steps: progress.update(steps * cost),
      **more,
  )


def choose_radius(args, halves, network: str, method: str, progress):
  """The best radius on the validation split, and every radius' accuracy there."""
  grid = grid_of(args, method)
  if len(grid) < 2:
    return (grid[0] if grid else None), {}, 0.0
  seeds = [args.seed + i for i in range(args.sweep_seeds)]
  pairs = [(seed, rho) for rho in grid for seed in seeds]
  seeds, rhos = zip(*pairs, strict=True)
  runs = digits.validation_runs(halves, seeds, args.noise, args.validation)
  start = time.perf_counter()
  # The whole budget, for a radius that is best early need not be best late.
  training = run(args, network, method, runs, seeds, rhos, progress,
                 eval_every=args.epochs)
  seconds = time.perf_counter() - start
  means = training.accuracy[-1].reshape(len(grid), -1).mean(1)
  best = grid[int(np.argmax(means))]
  return best, dict(zip(map(str, grid), means.round(4).tolist(), strict=True)), seconds


def measure(args, halves, network: str, method: str, progress) -> dict[str, Any]:
  """One line of the results: the sweep, then the runs that count."""
  rho, sweep, sweep_seconds = choose_radius(args, halves, network, method, progress)
  seeds = [args.seed + i for i in range(args.seeds)]
  runs = digits.final_runs(halves, seeds, args.noise)
  training = run(args, network, method, runs, seeds, [rho or 0.0] * len(seeds),
                 progress)
  return {
      "network": network,
      "method": method,
      "rho": rho,
      "seeds": seeds,
      "test_accuracy": training.accuracy[-1].round(5).tolist(),
      "seconds": round(training.seconds, 2),
      "compile_seconds": round(training.compile_seconds, 2),
      "sweep_validation_accuracy": sweep,
      "sweep_seconds": round(sweep_seconds, 2),
      "epochs": training.epochs,
      "test_accuracy_by_epoch": training.accuracy.round(5).tolist(),
      "config": {k: v for k, v in vars(args).items() if k not in
                 ("results", "redraw")},
      **records.environment(("jax", "optax", "flax")),
  }


def gradients(args, size: int) -> int:
  """Gradients that all of the training takes: the length of the progress bar."""
  kept = size - round(args.validation * size)
  total = 0
  for method in args.methods:
    grid = grid_of(args, method)
    swept = len(grid) * args.sweep_seeds if len(grid) > 1 else 0
    steps = args.seeds * (size // args.batch_size)
    steps += swept * (kept // args.batch_size)
    total += (1 if method == "sgd" else 2) * steps * args.epochs
  return total * len(args.networks)


def train_all(args) -> list[dict[str, Any]]:
  """Every network with every method."""
  halves = digits.load_halves()
  rows = []
  total = gradients(args, len(halves.train_labels))
  with tqdm.tqdm(total=total, unit="grad", unit_scale=True) as progress:
    for network in args.networks:
      for method in args.methods:
        progress.set_description(f"{network} {method}")
        rows.append(measure(args, halves, network, method, progress))
  return rows


def main(argv: Sequence[str] | None = None) -> None:
  args = parse_args(argv)
  start = time.perf_counter()
  path, figure = args.results / RECORDS, args.results / PICTURE
  if not args.redraw:
    records.write(path, train_all(args))
  rows = records.read(path)  # what is shown is what was kept
  quickstart_report.draw(rows, figure)
  print(quickstart_report.table(rows))
  print(quickstart_report.remarks(rows))
  print(f"{time.perf_counter() - start:.0f} s. Written: {path} {figure}")


if __name__ == "__main__":
  main()
