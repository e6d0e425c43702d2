"""The frontier's table and plot, from the lines of its results."""

from collections.abc import Sequence
import pathlib
from typing import Any, NamedTuple

import frontier_methods as methods
import matplotlib
from matplotlib import lines as mlines
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("Agg")

# Okabe and Ito's colours, by what the method does with the second gradient.
FAMILIES = {
    "base": ("#000000", "s", ("sgd", "asam", "sam")),
    "one gradient": ("#D55E00", "o", methods.ONE_GRADIENT),
    "fewer second gradients": (
        "#0072B2", "^", ("every_2", "random_half", "last_half", "looksam", "ae_sam")
    ),
    "cheaper second gradient": ("#009E73", "D", ("part",)),
    "other second gradient": (
        "#CC79A7", "v", ("vasso", "friendly", "gsam", "weighted", "iterated")
    ),
}


class Row(NamedTuple):
  """One method on one task, with its cost relative to SGD's."""

  method: str
  rho: float
  mean: float  # test accuracy in percent
  error: float  # its standard error over the seeds
  runs: int
  share: float  # of ASAM's gain over SGD
  flops: float
  time: float


def rows_of(results: Sequence[dict[str, Any]], network: str, noise: float) -> list[Row]:
  """The methods that were run on a task, in the order of METHODS."""
  accuracies = {
      row["method"]: row
      for row in results
      if row["kind"] == "accuracy"
      and (row["network"], row["noise"]) == (network, noise)
  }
  costs = {
      row["method"]: row
      for row in results
      if row["kind"] == "cost" and row["network"] == network
  }
  means = {name: 100 * np.mean(row["accuracy"]) for name, row in accuracies.items()}
  gain = means.get("asam", np.nan) - means.get("sgd", np.nan)
  rows = []
  for name in methods.METHODS:
    if name not in accuracies:
      continue
    run, cost = accuracies[name], costs.get(name)
    taken = run["ascents"]

    def average(pair, taken=taken):
      return (1 - taken) * pair[0] + taken * pair[1]

    accuracy = 100 * np.array(run["accuracy"])
    rows.append(
        Row(
            name,
            run["rho"],
            float(accuracy.mean()),
            float(accuracy.std(ddof=1) / np.sqrt(len(accuracy))),
            len(accuracy),
            float((means[name] - means.get("sgd", np.nan)) / gain),
            average(cost["flops"]) if cost else np.nan,
            average([quartiles[1] for quartiles in cost["time"]]) if cost else np.nan,
        )
    )
  return rows


def table(rows: Sequence[Row]) -> str:
  """Markdown."""
  lines = [
      "| method | rho | test accuracy (%) | runs | of ASAM's gain | FLOPs | time |"
      " copies |",
      "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    method = methods.METHODS[row.method]
    lines.append(
        f"| {method.label} | {row.rho:g} | {row.mean:.2f} ± {row.error:.2f} |"
        f" {row.runs} | {100 * row.share:.0f} % | {row.flops:.2f} | {row.time:.2f} |"
        f" +{method.memory} |"
    )
  return "\n".join(lines)


def rho_table(results: Sequence[dict[str, Any]], network: str, noise: float) -> str:
  """Validation accuracy against rho: the usable range of each method."""
  rows = [
      row
      for row in results
      if row["kind"] == "accuracy"
      and (row["network"], row["noise"]) == (network, noise)
      and len(row["rhos"]) > 1
  ]
  if not rows:
    return ""
  rhos = rows[0]["rhos"]
  lines = [
      "| rho | " + " | ".join(f"{rho:g}" for rho in rhos) + " |",
      "|---" * (len(rhos) + 1) + "|",
  ]
  for row in rows:
    if row["rhos"] == rhos:
      means = 100 * np.mean(row["validation"], axis=1)
      cells = " | ".join(f"{mean:.1f}" for mean in means)
      lines.append(f"| {methods.METHODS[row['method']].label} | {cells} |")
  return "\n".join(lines)


def plot(tasks: dict[tuple[str, float], list[Row]], path: pathlib.Path) -> None:
  """A column a task: the share of ASAM's gain against FLOPs and time of a step.

  SGD is at (1, 0 %) and below what is shown, to leave room for the others.
  """
  figure, axes = plt.subplots(
      2, len(tasks), figsize=(4.2 * len(tasks) + 2.6, 7.6), squeeze=False,
      layout="constrained", sharey="col",
  )
  for column, ((network, noise), rows) in zip(axes.T, tasks.items(), strict=True):
    base = next(row.mean for row in rows if row.method == "sgd")
    gain = next((row.mean - base for row in rows if row.method == "asam"), np.nan)
    others = [row for row in rows if row.method != "sgd"]
    for axis, cost in zip(column, ("flops", "time"), strict=True):
      _panel(axis, others, cost, gain)
    column[0].set_title(
        f"{network.upper()}, {100 * noise:.0f} % wrong labels\n"
        f"SGD {base:.1f} %, ASAM {base + gain:.1f} %", fontsize=10,
    )
    column[0].set_xlabel("compiled FLOPs of a step / SGD's")
    column[1].set_xlabel("time of a step / SGD's")
  for axis in axes[:, 0]:
    axis.set_ylabel("accuracy gained over SGD (% of ASAM's gain)")
  _legend(figure)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def _panel(axis: Any, rows: Sequence[Row], cost: str, gain: float) -> None:
  numbers = {name: i for i, name in enumerate(methods.METHODS)}
  styles = {
      name: (color, marker)
      for color, marker, names in FAMILIES.values()
      for name in names
  }
  offsets = ((5, 4), (5, -11), (-13, 4), (-13, -11))  # neighbours take turns
  rows = sorted(rows, key=lambda row: (round(getattr(row, cost), 1), row.share))
  for i, row in enumerate(rows):
    color, marker = styles[row.method]
    x, y = getattr(row, cost), 100 * row.share
    axis.errorbar(
        x, y, 100 * row.error / gain, color=color, marker=marker, markersize=6,
        linewidth=0.8, alpha=0.9,
    )
    axis.annotate(
        str(numbers[row.method]), (x, y), offsets[i % 4], textcoords="offset points",
        color=color, fontsize=9,
    )
  axis.axhline(100, color="0.6", linewidth=0.8, linestyle="--")
  axis.set_xlim(left=0.88)
  axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any) -> None:
  numbers = {name: i for i, name in enumerate(methods.METHODS)}
  handles = []
  for family, (color, marker, names) in FAMILIES.items():
    title = f"$\\bf{{{_bold(family)}}}$"
    handles.append(mlines.Line2D([], [], color="none", label=title))
    handles += [
        mlines.Line2D([], [], color=color, marker=marker, linestyle="none",
                   label=f"{numbers[name]}  {methods.METHODS[name].label}")
        for name in names
    ]
  figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False,
                handletextpad=0.3)


def _bold(text: str) -> str:
  return text.replace(" ", r"\ ")


def cost_table(results: Sequence[dict[str, Any]]) -> str:
  """What a step costs on the networks that are only measured, not trained."""
  rows = [row for row in results if row["kind"] == "cost"]
  lines = [
      "| network | batch | SGD (ms) | method | FLOPs | time, median [quartiles] |",
      "|---|---|---|---|---|---|",
  ]
  latest = {(row["network"], row["method"]): row for row in rows}
  for row in latest.values():
    for flops, time, label in zip(
        row["flops"], row["time"], ("", " (with ascent)"), strict=True
    ):
      if label and (flops, time) == (row["flops"][0], row["time"][0]):
        continue
      lines.append(
          f"| {row['network']} | {row['batch_size']} | {row['sgd_ms']:.1f} |"
          f" {methods.METHODS[row['method']].label}{label} | {flops:.3f} |"
          f" {time[1]:.2f} [{time[0]:.2f}, {time[2]:.2f}] |"
      )
  return "\n".join(lines)


def write(results: Sequence[dict[str, Any]], folder: pathlib.Path) -> str:
  """Writes frontier.md and frontier.png, and returns the former."""
  keys = {
      (row["network"], row["noise"]): None
      for row in results
      if row["kind"] == "accuracy" and row["method"] == "sgd"
  }
  tasks = {key: rows_of(results, *key) for key in keys}
  parts = ["# The frontier", "Made by `python examples/frontier.py`; see there."]
  for (network, noise), rows in tasks.items():
    parts += [
        f"## {network}, {100 * noise:.0f} % wrong labels",
        table(rows),
        "Validation accuracy (%, wrong labels included) against rho:",
        rho_table(results, network, noise),
    ]
  if any(row["kind"] == "cost" for row in results):
    parts += ["## Steps", cost_table(results)]
  text = "\n\n".join(part for part in parts if part) + "\n"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "frontier.md").write_text(text)
  if tasks:
    plot(tasks, folder / "frontier.png")
  return text
