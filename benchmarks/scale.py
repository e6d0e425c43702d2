"""Predicts the time of a step on 1 to 1024 chips, as a table and a picture.

    python -m benchmarks.pod --results runs/pod.jsonl
    python -m benchmarks.scale --costs runs/pod.jsonl

or, as for what is under ``results/scale``:

    python -m benchmarks.scale --costs results/pod/*.jsonl --folder results/scale

From the compiled programs of ``benchmarks.pod`` and the published speed of the chip: no
time is measured. Says what is assumed, and for SGD, ASAM with one perturbation for all
chips, ASAM with one per chip and Momentum-SAM how long a step takes, how that compares
with SGD, and how much of the speed of one chip is left (scaling efficiency).

    python -m benchmarks.scale --check --devices 4

compares the model's ratios with measured ones, on CPU devices of this machine whose
speed is measured first. Nothing else should run then.
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import sys
from typing import Any

from benchmarks.pod import scaling
from examples import options
from examples import records
from examples import style

SIZES = [2**i for i in range(11)]
IN_TABLE = (1, 4, 16, 64, 256, 1024)
METHODS = ("SGD", "adaptive_sam", "adaptive_sam, per device", "momentum_sam")
TITLES = {"mlp": "MLP", "resnet": "ResNet-50", "transformer": "transformer"}


def parser() -> argparse.ArgumentParser:
  """The options."""
  parser = options.parser(__doc__)
  add = parser.add_argument
  count = options.number(int, 1)
  costs, folder = pathlib.Path("runs/pod.jsonl"), pathlib.Path("runs/scale")
  add("--costs", type=pathlib.Path, nargs="+", default=[costs], metavar="FILE",
      help="what python -m benchmarks.pod wrote: the costs of a step on a pod")
  add("--folder", type=pathlib.Path, default=folder,
      help="folder for rows, table and picture")
  add("--check", action="store_true",
      help="compare the model with this machine's CPU devices")
  add("--devices", type=count, default=4, help="number of devices in the check")
  add("--repeats", type=count, default=21, help="number of timings in the check")
  return parser


def read(paths: Sequence[pathlib.Path]) -> dict[str, list[dict[str, Any]]]:
  """The rows of each network; of the transformer's, those of the whole one."""
  rows = []
  for path in paths:
    if not path.exists():
      raise FileNotFoundError(
          f"--costs {path} does not exist: python -m benchmarks.pod --results {path}"
      )
    rows += [json.loads(line) for line in path.read_text().splitlines()]
  parts: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    whole = "layers" not in row or "extrapolated_from" in row
    if row.get("method") in METHODS and whole:
      parts.setdefault(row["part"], []).append(row)
  return parts


def table(rows: Sequence[dict[str, Any]], notes: str) -> str:
  """The predictions for one network, in Markdown."""
  header = ["method", "chips", "compute ms", "exchange ms", "step ms (exposed)"]
  header += ["/ SGD exposed", "/ SGD hidden", "efficiency exposed", "hidden"]
  lines = [header, ["---", *["---:"] * (len(header) - 1)]]
  for row in rows:
    if row["chips"] not in IN_TABLE:
      continue
    ratios = [row["ratio_exposed"], row["ratio_hidden"]]
    lines.append([
        row["method"],
        str(row["chips"]),
        *(
            f"{1e3 * row[name]:.3f}"
            for name in ("compute_seconds", "exchange_seconds", "seconds_exposed")
        ),
        *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
        *(f"{row[f'efficiency_{kind}']:.1%}" for kind in ("exposed", "hidden")),
    ])
  body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
  return f"{rows[0]['part']}{notes}\n\n{body}"


def notes_of(rows: Sequence[dict[str, Any]]) -> str:
  """Which programs the predictions stand on."""
  compiled = sorted({row["chips"] for row in rows})
  text = f": compiled for {', '.join(map(str, compiled))} chips of {rows[0]['chip']}"
  if "extrapolated_from" in rows[0]:
    fewer, more = rows[0]["extrapolated_from"]
    text += f"; {rows[0]['layers']} layers EXTRAPOLATED from {fewer} and {more}"
  return text


def plot(parts: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
  """Two pictures a network: time over SGD's, and efficiency, against chips."""
  from matplotlib import figure

  picture = figure.Figure(figsize=(9, 3.4 * len(parts)), layout="constrained")
  grid = picture.subplots(len(parts), 2, squeeze=False)
  for axes, (part, rows) in zip(grid, parts.items(), strict=True):
    for method in METHODS:
      name, _, variant = method.partition(",")
      look = style.of(name)
      colour, face = look.color, "white" if variant else look.color
      chosen = [row for row in rows if row["method"] == method]
      if not chosen:
        continue
      chips = [row["chips"] for row in chosen]
      for axis, quantity in zip(axes, ("ratio", "efficiency"), strict=True):
        low, high = (
            [row[f"{quantity}_{kind}"] for row in chosen]
            for kind in ("exposed", "hidden")
        )
        if None in low:
          continue
        axis.plot(chips, low, look.marker, linestyle="-", color=colour, label=method,
                  markersize=4, markerfacecolor=face)
        axis.plot(chips, high, "--", color=colour, linewidth=1)
    for axis, label in zip(axes, ("step time / SGD's", "efficiency"), strict=True):
      axis.set(xscale="log", xlabel="chips", ylabel=label, ylim=(0, None))
      axis.set_title(TITLES.get(part, part))
      axis.set_xticks(SIZES, [str(size) for size in SIZES])
      axis.minorticks_off()
  grid[0, 0].legend(fontsize=8, title="solid: exposed, dashed: hidden")
  picture.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Predicts, prints, draws and writes; returns the rows."""
  args = parser().parse_args(arguments)
  args.folder.mkdir(parents=True, exist_ok=True)
  if args.check:
    flags = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    from benchmarks.pod import check  # starts JAX, with these devices

    results = check.measure(args.devices, args.repeats)
    text, name = check.table(results), "check"
  else:
    chip, name = scaling.V5E, "scale"
    assumptions = scaling.ASSUMPTIONS.format(
        slice_=chip.slice_, network=chip.network / 1e9
    )
    parts, results, tables = {}, [], []
    for part, rows in read(args.costs).items():
      parts[part] = scaling.predictions(rows, SIZES, chip)
      tables.append(table(parts[part], notes_of(rows)))
      results += parts[part]
    given = " ".join(map(str, sys.argv[1:] if arguments is None else arguments))
    heading = f"Predicted, not measured, by `python -m benchmarks.scale {given}` for"
    text = "\n\n".join([f"{heading}\n`{chip}`", assumptions, *tables])
    plot(parts, args.folder / "scale.png")
  print(text)
  records.replace(args.folder / f"{name}.md", f"{text}\n")
  records.write(args.folder / f"{name}.jsonl", results)
  print(f"\nwritten to {args.folder}")
  return results


if __name__ == "__main__":
  main()
