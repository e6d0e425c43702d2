"""Can a radius set itself? ``auto_radius`` against a sweep of fixed radii.

Each cell of the study is a network with its optimizer, a share of wrong labels, an
operator T_w and a norm, on the digits. For each cell seven fixed radii (ten for the
transformer, which wants small ones) and three targets of the cosine are tried on a
validation split (whose labels are as noisy), and then trained anew on other seeds and
judged on the test half. The default target was chosen on the cells of the plain MLP,
which are therefore no evidence; all others are.

    python -m examples.radius_study                       # all cells
    python -m examples.radius_study --networks mlp        # some
    python -m examples.radius_study --rate 0.2            # a faster rule
    python -m examples.radius_study --report --results results/radius  # ours, redrawn

Outcomes are lines of JSON with their whole configuration: what an interrupted run has
finished is not run again by the same command.
"""

import argparse
from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import optax
import tqdm

import asam_jax
from examples import digits
from examples import options
from examples import radius_networks
from examples import radius_report
from examples import records

RECORDS = "radius.jsonl"
TARGETS = (0.7, 0.8, 0.9)
RATE, START = 0.05, 0.05  # of the rule: its defaults
HELD_OUT = 0.2  # the share of the training half that radii and targets are chosen on
# Seven radii by factors of two, around what is good for each T_w and norm.
FIRST_RADIUS = {
    ("elementwise", 2): 0.25, ("filterwise", 2): 0.025, ("none", 2): 0.05,
    ("elementwise", math.inf): 0.005,
}


class Cell(NamedTuple):
  """One task, on which a sweep and the rule are compared."""

  network: str
  noise: float
  normalization: str
  p: float

  @property
  def radii(self) -> list[float]:
    first = FIRST_RADIUS[self.normalization, self.p]
    return [first * 2**k for k in range(7)]

  @property
  def smaller_radii(self) -> list[float]:
    """Below them, for the network whose best ones lie there."""
    if self.network != "transformer":
      return []
    return [self.radii[0] / 2**k for k in (3, 2, 1)]

  def config(self) -> dict[str, Any]:
    return {**self._asdict(), "p": str(self.p)}


def cells(networks: Sequence[str]) -> list[Cell]:
  """All cells of these networks; filters are for convolutions alone."""
  found = []
  for network in networks:
    for noise in (0.4, 0.0):
      for normalization, p in FIRST_RADIUS:
        if normalization == "filterwise" and network != "cnn":
          continue
        found.append(Cell(network, noise, normalization, p))
  return found


def base_optimizer(network: str, steps: int) -> optax.GradientTransformation:
  """AdamW for attention, SGD with momentum for the others; both along a cosine."""
  if network == "transformer":
    return optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)
  return optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)


def optimizer(cell: Cell, rule: str, steps: int, rate: float) -> Any:
  """``number -> optimizer``; the number is a radius or a target, as the rule says."""
  base_tx = base_optimizer(cell.network, steps)

  def make(number):
    rho = {"plain": 0.0, "fixed": number, "auto": None}[rule]
    if rho is None:  # digits.train asks for a state with the number 0
      target = 0.8 if isinstance(number, float) and number == 0 else number
      rho = asam_jax.auto_radius(target, rate=rate, start=START)
    if rule == "plain":
      return optax.with_extra_args_support(base_tx)
    return asam_jax.adaptive_sam(
        base_tx, rho, p=cell.p, normalization=cell.normalization
    )

  return make


def train(
    cell: Cell, rule: str, numbers: Sequence[float], seeds: Sequence[int],
    epochs: int, batch_size: int, validation: bool, rate: float,
) -> records.Row:
  """Last-epoch accuracies, [numbers, seeds]."""
  halves = digits.load_halves()
  if validation:
    runs = digits.validation_runs(halves, seeds, cell.noise, HELD_OUT)
  else:
    runs = digits.final_runs(halves, seeds, cell.noise)
  steps = runs.train_images.shape[1] // batch_size * epochs
  repeated = digits.Runs(*(np.concatenate([x] * len(numbers)) for x in runs))
  outcome = digits.train(
      radius_networks.NETWORKS[cell.network](),
      optimizer(cell, rule, steps, rate), repeated,
      list(seeds) * len(numbers), np.repeat(numbers, len(seeds)).tolist(),
      epochs=epochs, batch_size=batch_size, eval_every=epochs,
  )
  accuracy = outcome.accuracy[-1].reshape(len(numbers), len(seeds))
  return {"accuracy": accuracy.tolist()}


def study(args: argparse.Namespace) -> None:
  """Runs what the records lack."""
  path = args.results / RECORDS
  tuning, final = range(100, 100 + args.tuning_seeds), range(args.seeds)
  jobs = []
  for cell in cells(args.networks):
    for rule, numbers in (
        ("plain", [0.0]), ("fixed", cell.radii), ("fixed", cell.smaller_radii),
        ("auto", list(TARGETS)),
    ):
      jobs += [(cell, rule, numbers, seeds, validation)
               for seeds, validation in ((final, False), (tuning, True))
               if numbers and (rule != "plain" or not validation)]
  for cell, rule, numbers, seeds, validation in tqdm.tqdm(jobs, disable=args.quiet):
    config = {
        **cell.config(), "rule": rule, "numbers": numbers, "seeds": list(seeds),
        "epochs": args.epochs, "batch_size": args.batch_size, "validation": validation,
        **({"rate": args.rate, "start": START} if rule == "auto" else {}),
    }
    records.once(path, config, functools.partial(
        train, cell, rule, numbers, seeds, args.epochs, args.batch_size, validation,
        args.rate,
    ))


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  names = list(radius_networks.NETWORKS)
  add("--networks", nargs="+", choices=names, default=names,
      help="networks to train")
  add("--seeds", type=count, default=5,
      help="number of runs of each radius that are judged")
  add("--tuning-seeds", type=count, default=3,
      help="number of runs of each radius on the validation split")
  add("--epochs", type=count, default=50,
      help="number of passes over the training half")
  add("--batch-size", type=count, default=64, help="number of examples in a step")
  add("--rate", type=options.number(float, 0, math.inf, above=True, below=True),
      default=RATE, help="the rule's rate")
  add("--quiet", action="store_true", help="no progress bar")
  options.add_results(parser, "radius", "the outcomes, the table and the plot")
  add("--report", action="store_true", help="train nothing: table and plot alone")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Trains what is missing, and reports."""
  args = parser().parse_args(argv)
  if not args.report:
    study(args)
  rows = records.read(args.results / RECORDS)
  print(radius_report.write(args.results, rows, args.rate))


if __name__ == "__main__":
  main()
