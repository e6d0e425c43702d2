"""What an ASAM step costs: one command, everything side by side in one run.

    python -m benchmarks.step_cost

It prints, as median [first quartile, third quartile] of ratios taken within a round,

- the perturbation alone against the machine's bandwidth: 1.00 is the time of the
  five streams it cannot do without (read w and g, read them again, write epsilon),
  at the speed of a scale in place;
- the step of an MLP and of a small ResNet (group norm, 32 x 32 x 3 normal inputs)
  against the plain step and a hand-written two-gradient step;

with compiled FLOPs and temporary memory, and writes a JSON line for each row.
"""

import argparse
from collections.abc import Sequence
import json
import math
import pathlib
import sys
from typing import Any

from benchmarks import perturbation
from benchmarks import steps
from benchmarks import timing
from examples import options
from examples import records

PARTS = ("perturbation", "mlp", "cnn", "resnet")
OUTPUT = pathlib.Path("runs/benchmarks/step_cost.jsonl")


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  add("--parts", nargs="+", choices=PARTS, default=["perturbation", "mlp", "resnet"],
      help="what to measure: the perturbation alone, or the steps of networks")
  add("--parameters", type=count, default=100_000_000,
      help="number of weights of the perturbation")
  add("--leaves", type=count, nargs="+", default=[5, 500],
      help="numbers of arrays that the weights are in, each measured by itself")
  add("--batch-size", type=count, default=64, help="number of examples in a step")
  add("--width", type=count, default=16,
      help="number of channels of the ResNet's first stage")
  add("--dtype", choices=["float32", "bfloat16"], default="float32",
      help="dtype of the networks' weights, inputs and activations")
  add("--repeats", type=int, default=31,
      help="number of rounds, in each of which every method is measured")
  add("--sample-seconds", default=0.03,
      type=options.number(float, 0, math.inf, above=True, below=True),
      help="duration of one sample of a step, in seconds")
  known = list(steps.steps(lambda params, batch: 0.0))
  add("--methods", nargs="+", choices=known, default=[],
      help="steps to measure; none named: all")
  add("--against", choices=known, help="a step to compare the others with as well")
  add("--output", type=pathlib.Path, default=OUTPUT, metavar="FILE",
      help="file for the JSON lines, replaced if it exists")
  return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """The options' values, checked together."""
  reader = parser()
  values = reader.parse_args(arguments)
  if values.repeats < 1:
    reader.error(f"--repeats {values.repeats}: at least one round is needed")
  return values


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table, the first column to the left."""
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def perturbation_table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows of one number of leaves."""
  first = rows[0]
  title = (
      f"Perturbation of {first['parameters']:,} parameters in {first['leaves']} leaves"
      f" (scale in place: {timing.show(first['bandwidth_gb_per_s'], 1)} GB/s)"
  )
  header = ["method", "time / floor", "ms", "FLOPs / parameter", "temporary / params"]
  body = [
      [
          row["method"],
          timing.show(row["ratio"]),
          f"{1e3 * row['seconds'][1]:.1f}",
          f"{row['flops_per_parameter']:.1f}",
          f"{row['temporary_per_parameter_byte']:.4f}",
      ]
      for row in rows
  ]
  return f"{title}\n\n{table(header, body)}"


def step_table(rows: Sequence[dict[str, Any]]) -> str:
  """The rows of one network."""
  first = rows[0]
  title = (
      f"Step of the {first['part']}, {first['parameters']:,} parameters, batch"
      f" {first['batch_size']}, {first['dtype']}"
  )
  header = [
      "method",
      "time / plain",
      "time / by hand",
      "ms",
      "FLOPs / plain",
      "temporary bytes",
      *([f"time / {first['against']}", "error"] if "against" in first else []),
  ]
  body = [
      [
          row["method"],
          timing.show(row["ratio"], 3),
          timing.show(row["ratio_to_by_hand"], 3),
          f"{1e3 * row['seconds'][1]:.3f}",
          f"{row['flops_ratio']:.4f}",
          f"{row['temporary_bytes']:,}",
          *(
              [timing.show(row["ratio_against"], 4), f"{row['error_against']:.4f}"]
              if "against" in row
              else []
          ),
      ]
      for row in rows
  ]
  return f"{title}\n\n{table(header, body)}"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and writes; returns the rows."""
  values = parse(arguments)
  command = list(sys.argv[1:] if arguments is None else arguments)
  header = {"command": ["benchmarks.step_cost", *command]} | timing.environment()
  print(json.dumps(header))
  results = []
  for part in values.parts:
    if part == "perturbation":
      for leaves in values.leaves:
        rows = perturbation.measure(values.parameters, leaves, values.repeats)
        print(f"\n{perturbation_table(rows)}", flush=True)
        results += rows
    else:
      extra = {"dtype": values.dtype}
      extra |= {"width": values.width} if part == "resnet" else {}
      rows = steps.measure(
          part,
          values.batch_size,
          values.repeats,
          values.sample_seconds,
          values.methods,
          values.against,
          **extra,
      )
      print(f"\n{step_table(rows)}", flush=True)
      results += rows
  records.write(values.output, [header, *results])
  print(f"\nwritten to {values.output}")
  return results


if __name__ == "__main__":
  main()
