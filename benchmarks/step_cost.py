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
import pathlib
import sys
from typing import Any

from benchmarks import perturbation
from benchmarks import steps
from benchmarks import timing

PARTS = ("perturbation", "mlp", "cnn", "resnet")
OUTPUT = pathlib.Path("results/benchmarks/step_cost.jsonl")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """The options."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--parts", nargs="+", choices=PARTS, default=["perturbation", "mlp", "resnet"])
  add("--parameters", type=int, default=100_000_000, help="of the perturbation")
  add("--leaves", type=int, nargs="+", default=[5, 500], help="of the perturbation")
  add("--batch-size", type=int, default=64, help="of the steps")
  add("--width", type=int, default=16, help="of the ResNet's first stage")
  add("--repeats", type=int, default=31, help="rounds, each measures every method")
  add("--sample-seconds", type=float, default=0.03, help="of one sample of a step")
  known = list(steps.steps(lambda params, batch: 0.0))
  add("--methods", nargs="+", choices=known, default=[], help="default: all steps")
  add("--against", choices=known, help="a step to compare the others with as well")
  add("--output", type=pathlib.Path, default=OUTPUT, help="JSON lines, overwritten")
  options = parser.parse_args(arguments)
  if options.repeats < 1:
    parser.error(f"--repeats {options.repeats}: at least one round is needed")
  return options


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
      f" {first['batch_size']}"
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
  options = parse(arguments)
  command = list(sys.argv[1:] if arguments is None else arguments)
  header = {"command": ["benchmarks.step_cost", *command]} | timing.environment()
  print(json.dumps(header))
  results = []
  for part in options.parts:
    if part == "perturbation":
      for leaves in options.leaves:
        rows = perturbation.measure(options.parameters, leaves, options.repeats)
        print(f"\n{perturbation_table(rows)}", flush=True)
        results += rows
    else:
      extra = {"width": options.width} if part == "resnet" else {}
      rows = steps.measure(
          part,
          options.batch_size,
          options.repeats,
          options.sample_seconds,
          options.methods,
          options.against,
          **extra,
      )
      print(f"\n{step_table(rows)}", flush=True)
      results += rows
  options.output.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(row) for row in [header, *results]]
  options.output.write_text("\n".join(lines) + "\n")
  print(f"\nwritten to {options.output}")
  return results


if __name__ == "__main__":
  main()
