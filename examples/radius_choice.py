"""How fast should ``auto_radius`` turn, where should it start, and what should it hold?

Rate, start and target are tried together on the two MLPs of the radius study, on its
validation split, in short and in long trainings: no test half and no other network is
looked at, so that all other cells of the study can judge what is chosen here.

    python -m examples.radius_choice

A setting's score is how far it stays behind the best setting of a cell, in points, on
the mean of the cells. The labels that it is judged on are right: a default is chosen
once, and a task that is made for it may say which labels are.
"""

import argparse
from collections.abc import Sequence
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import tqdm

import asam_jax
from examples import digits
from examples import options
from examples import radius_networks
from examples import radius_report
from examples import radius_study
from examples import records

NETWORKS = ("mlp", "batch_norm_mlp")
SETTINGS = tuple(itertools.product((0.05, 0.1, 0.2), (0.05, 0.5), (0.75, 0.8, 0.85)))
RECORDS = "choice.jsonl"


def train(
    cell: radius_study.Cell, seeds: Sequence[int], epochs: int, batch_size: int
) -> records.Row:
  """Last-epoch accuracies on the validation split, [settings, seeds]."""
  halves = digits.load_halves()
  runs, right = (
      digits.validation_runs(halves, seeds, noise, radius_study.HELD_OUT)
      for noise in (cell.noise, 0.0)
  )
  runs = runs._replace(eval_labels=right.eval_labels)
  steps = runs.train_images.shape[1] // batch_size * epochs
  base_tx = radius_study.base_optimizer(cell.network, steps)
  rates, starts, targets = jnp.array(SETTINGS).T

  def optimizer(number):
    setting = jnp.asarray(number, jnp.int32)
    rule = asam_jax.auto_radius(
        targets[setting], rate=rates[setting], start=starts[setting]
    )
    return asam_jax.adaptive_sam(
        base_tx, rule, p=cell.p, normalization=cell.normalization
    )

  repeated = digits.Runs(*(np.concatenate([x] * len(SETTINGS)) for x in runs))
  outcome = digits.train(
      radius_networks.NETWORKS[cell.network](), optimizer, repeated,
      list(seeds) * len(SETTINGS), np.repeat(range(len(SETTINGS)), len(seeds)).tolist(),
      epochs=epochs, batch_size=batch_size, eval_every=epochs,
  )
  accuracy = outcome.accuracy[-1].reshape(len(SETTINGS), len(seeds))
  return {"accuracy": accuracy.tolist()}


def report(rows: Sequence[records.Row]) -> str:
  """A line for each setting, the best first."""
  scores = np.array([100 * np.mean(row["accuracy"], 1) for row in rows])
  behind = scores.max(1, keepdims=True) - scores
  lines = ["| rate | start | target | behind the best, mean | at most, in |",
           "| ---: | ---: | ---: | ---: | --- |"]
  for i in np.argsort(behind.mean(0)):
    rate, start, target = SETTINGS[i]
    worst = int(np.argmax(behind[:, i]))
    where = radius_report.title(radius_report.cell_of(rows[worst]))
    lines.append(f"| {rate:g} | {start:g} | {target:g} | {behind[:, i].mean():.2f} |"
                 f" {behind[worst, i]:.1f}, {where},"
                 f" {rows[worst]['config']['epochs']} epochs |")
  return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--networks", nargs="+", choices=list(radius_networks.NETWORKS),
      default=list(NETWORKS), help="networks to train")
  add("--seeds", type=count, default=4, help="number of runs of each setting")
  add("--epochs", type=count, nargs="+", default=[25, 50],
      help="numbers of passes over the training half, each by itself")
  add("--batch-size", type=count, default=64, help="number of examples in a step")
  options.add_results(parser, "radius", "the outcomes and the table")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Trains what is missing, and reports."""
  args = parser().parse_args(argv)
  path, seeds, done = args.results / RECORDS, range(100, 100 + args.seeds), []
  cells = radius_study.cells(args.networks)
  for cell, epochs in tqdm.tqdm([(c, e) for c in cells for e in args.epochs]):
    config = {**cell.config(), "settings": SETTINGS, "seeds": list(seeds),
              "epochs": epochs, "batch_size": args.batch_size}
    outcome = functools.partial(train, cell, seeds, epochs, args.batch_size)
    done.append(records.once(path, config, outcome))
  text = report(done)
  records.replace(args.results / "choice.md", text)
  print(text)


if __name__ == "__main__":
  main()
