"""The frontier's table and plot, from the lines of its results."""

from collections.abc import Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from examples import frontier_methods as methods
from examples import labels
from examples import records
from examples import style
from examples import summary

Task = tuple[str, float]  # network, and the fraction of wrong labels


class Row(NamedTuple):
  """One method on one task, with its cost relative to SGD's; NaN: not known."""

  method: str
  rho: float
  mean: float  # test accuracy in percent
  error: float  # its standard error over the seeds
  runs: int
  share: float  # of ASAM's gain over SGD
  flops: float
  time: float


def rows_of(
    outcomes: Sequence[records.Row],
    steps: Sequence[records.Row],
    network: str,
    noise: float,
) -> list[Row]:
  """The methods that were run on a task, in the order of METHODS."""
  task = (network, noise)
  runs = {row["config"]["method"]: row for row in outcomes if task_of(row) == task}
  costs = {row["method"]: row for row in steps if row["config"]["network"] == network}
  scores = {
      name: summary.mean_and_error(100 * np.array(row["accuracy"]))
      for name, row in runs.items()
  }
  nothing = (np.nan, np.nan)
  base = scores.get("sgd", nothing)[0]
  gain = scores.get("asam", nothing)[0] - base
  rows = []
  for name in methods.METHODS:
    if name not in runs:
      continue
    # Of a run over SGD's: so many epochs more are so many times the cost.
    flops, time = (
        methods.METHODS[name].epochs * cost
        for cost in _step(costs.get(name), runs[name]["ascents"])
    )
    mean, error = scores[name]
    # Where ASAM gains nothing, there are no shares of it.
    share = (mean - base) / gain if gain > 0 else np.nan
    count = len(runs[name]["accuracy"])
    rows.append(
        Row(name, runs[name]["rho"], mean, error, count, share, flops, time)
    )
  return rows


def task_of(row: records.Row) -> Task:
  return row["config"]["network"], row["config"]["noise"]


def _step(cost: records.Row | None, ascents: float) -> tuple[float, float]:
  """FLOPs and time of an average step, of which a share takes an ascent."""
  if cost is None:
    return np.nan, np.nan
  average = lambda pair: (1 - ascents) * pair[0] + ascents * pair[1]  # noqa: E731
  return average(cost["flops"]), average([quartiles[1] for quartiles in cost["time"]])


def table(rows: Sequence[Row]) -> str:
  """Markdown."""
  header = ["method", "rho", "test accuracy (%)", "runs", "of ASAM's gain", "FLOPs",
            "time", "copies"]
  return summary.markdown(header, [
      [
          methods.METHODS[row.method].label,
          "auto" if row.method == "auto" else f"{row.rho:g}",
          summary.show(row.mean, row.error, digits=2),
          row.runs,
          summary.optional(100 * row.share, ".0f", " %"),
          summary.optional(row.flops, ".2f"),
          summary.optional(row.time, ".2f"),
          f"+{methods.METHODS[row.method].memory}",
      ]
      for row in rows
  ])


def rho_table(outcomes: Sequence[records.Row], task: Task) -> str:
  """Validation accuracy against rho: the usable range of each method."""
  rows = [
      row
      for row in outcomes
      if task_of(row) == task and len(row["config"]["rhos"]) > 1
  ]
  if not rows:
    return ""
  return summary.markdown(["rho", *(f"{rho:g}" for rho in rows[0]["config"]["rhos"])], [
      [
          methods.METHODS[row["config"]["method"]].label,
          *(f"{mean:.1f}" for mean in 100 * np.mean(row["validation"], axis=1)),
      ]
      for row in rows
  ])


def cost_table(steps: Sequence[records.Row]) -> str:
  """What a step costs, on the networks that are only measured as well."""
  latest = {(row["config"]["network"], row["method"]): row for row in steps}
  rows = []
  for row in latest.values():
    config, name = row["config"], methods.METHODS[row["method"]].label
    pairs = zip(row["flops"], row["time"], ("", " (with ascent)"), strict=True)
    for flops, time, label in pairs:
      if label and (flops, time) == (row["flops"][0], row["time"][0]):
        continue
      rows.append([
          config["network"], config["batch_size"], f"{row['sgd_ms']:.1f}",
          f"{name}{label}", f"{flops:.3f}",
          f"{time[1]:.2f} [{time[0]:.2f}, {time[2]:.2f}]", config["rounds"],
      ])
  header = ["network", "batch", "SGD (ms)", "method", "FLOPs",
            "time, median [quartiles]", "rounds"]
  return summary.markdown(header, rows)


def settings(rows: Sequence[records.Row]) -> str:
  """The options that the outcomes of a file were made with, a line for each."""
  lines = {}
  for row in rows:
    config = row["config"]
    if config["kind"] == "accuracy" and config["method"] != "sgd":
      names = ("epochs", "batch_size", "lr", "rhos", "tuning_seeds", "seeds")
      lines[" ".join(
          f"--{name.replace('_', '-')}"
          f" {' '.join(map(str, np.atleast_1d(config[name]).tolist()))}"
          for name in names)] = None
  return "\n".join(lines) or "none"


def plot(tasks: dict[Task, list[Row]], cost: str, path: pathlib.Path) -> None:
  """Test accuracy against the cost of a step, with SGD: a panel a task.

  Args:
    tasks: the rows of each task.
    cost: ``"flops"`` or ``"time"``.
    path: of the picture.
  """
  what = {"flops": "compiled FLOPs of a step", "time": "time of a step, median"}[cost]
  noises = list(dict.fromkeys(noise for _, noise in tasks))
  networks = list(dict.fromkeys(network for network, _ in tasks))
  shape = len(noises), len(networks)
  with style.picture(
      path, *shape, size=(6.4 * shape[1], 5.0 * shape[0] + 0.3)
  ) as (figure, axes):
    for i, noise in enumerate(noises):
      for j, network in enumerate(networks):
        axis, rows = axes[i, j], tasks.get((network, noise), [])
        _panel(axis, rows, cost)
        axis.set_title(f"{network.upper()}, {100 * noise:g} % wrong training labels")
        axis.set_xlabel(f"{what} / SGD's")
        axis.set_ylabel("test accuracy (%), spread as the log of the error")
    runs = max(row.runs for rows in tasks.values() for row in rows)
    style.explain(figure, style.bars_mean(runs)
                  + " Dashed: SGD and ASAM. Circles: one gradient a step; squares:"
                  " two; triangles: two in some steps; others: another second one.")
    figure.draw_without_rendering()  # the names need to know where the points are
    for axis, rows in zip(
        axes.flat, [tasks.get((network, noise), []) for noise in noises
                    for network in networks], strict=True
    ):
      labels.name_points(axis, [
          labels.Point(getattr(row, cost), row.mean, np.nan_to_num(row.error),
                       style.of(row.method).label, style.of(row.method).color)
          for row in rows if np.isfinite(getattr(row, cost))
      ])


def _panel(axis: Any, rows: Sequence[Row], cost: str) -> None:
  for row in rows:
    if row.method in ("sgd", "asam"):
      axis.axhline(row.mean, color=style.of(row.method).color, linewidth=0.8,
                   linestyle="--", alpha=0.6, zorder=0)
    if np.isfinite(getattr(row, cost)):
      style.error_bars(axis, getattr(row, cost), row.mean, row.error, row.method)
  style.scale_by_error(axis)
  axis.margins(x=0.3, y=0.06)  # room for the names


def write(
    outcomes: Sequence[records.Row], steps: Sequence[records.Row], folder: pathlib.Path
) -> str:
  """Writes frontier.md, frontier.png and frontier_time.png; returns the first."""
  keys = list(dict.fromkeys(task_of(row) for row in outcomes))
  tasks = {key: rows_of(outcomes, steps, *key) for key in keys}
  parts = ["# The frontier",
           "Made by `python -m examples.frontier`; see its `--help`. Of the test"
           " accuracies: mean ± standard error of the mean over the runs."]
  for (network, noise), rows in tasks.items():
    parts += [f"## {network.upper()}, {100 * noise:g} % wrong labels", table(rows)]
    if radii := rho_table(outcomes, (network, noise)):
      parts += ["Validation accuracy (%, wrong labels included) against rho:", radii]
  if steps:
    parts += ["## Steps", cost_table(steps)]
  text = "\n\n".join(parts) + "\n"
  records.replace(folder / "frontier.md", text)
  if any(np.isfinite(row.flops) for rows in tasks.values() for row in rows):
    plot(tasks, "flops", folder / "frontier.png")
    plot(tasks, "time", folder / "frontier_time.png")
  return text
