"""The table and the picture of the quickstart, from its results alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

import matplotlib
import numpy as np

COLORS = {"sgd": "#D55E00", "sam": "#0072B2", "asam": "#009E73"}  # Okabe and Ito's


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
  """Mean and standard error."""
  return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def table(records: Sequence[dict[str, Any]]) -> str:
  """The results as a Markdown table."""
  lines = [
      "| network | method | rho | test accuracy (%) | seconds |",
      "|---|---|---|---|---|",
  ]
  for record in records:
    mean, error = mean_and_error(100 * np.array(record["test_accuracy"]))
    rho = "-" if record["rho"] is None else f"{record['rho']:g}"
    lines.append(
        f"| {record['network'].upper()} | {record['method'].upper()} | {rho} |"
        f" {mean:.1f} ± {error:.1f} | {record['seconds']:.1f} |"
    )
  return "\n".join(lines)


def remarks(records: Sequence[dict[str, Any]]) -> str:
  """What the table does not say."""
  seeds = len(records[0]["seeds"])
  lines = [
      f"Mean ± standard error of {seeds} seeds after the last epoch; seconds to train"
      " all of them together,",
      "without compilation"
      f" ({sum(r['compile_seconds'] for r in records):.0f} s in all), evaluation, and"
      f" the sweep for rho ({sum(r['sweep_seconds'] for r in records):.0f} s in all,"
      " with its compilation).",
  ]
  for record in records:
    # Best at an end of its grid: there may be a better one beyond.
    grid = sorted(map(float, record["sweep_validation_accuracy"]))
    if grid and record["rho"] in (grid[0], grid[-1]):
      lines.append(
          f"{record['network'].upper()}, {record['method'].upper()}: the best rho,"
          f" {record['rho']:g}, is at the end of its grid; widen"
          f" --rhos-{record['method']}."
      )
  return "\n".join(lines)


def draw(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Learning curves (left) and final accuracies (right), a row for each network."""
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt  # after the choice of the backend

  networks = list(dict.fromkeys(record["network"] for record in records))
  figure, axes = plt.subplots(
      len(networks), 2, figsize=(9, 3.2 * len(networks)), squeeze=False,
      sharey="row", width_ratios=[2.2, 1], layout="constrained",
  )
  for row, network in zip(axes, networks, strict=True):
    chosen = [record for record in records if record["network"] == network]
    _draw_network(row[0], row[1], network, chosen)
  axes[0][0].legend(loc="best", frameon=False)
  axes[-1][0].set_xlabel("epoch")
  config = records[0]["config"]
  figure.suptitle(
      f"Digits with {config['noise']:.0%} wrong training labels,"
      f" {len(records[0]['seeds'])} seeds"
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _draw_network(curves, finals, network: str, records) -> None:
  for position, record in enumerate(records):
    method = record["method"]
    color = COLORS[method]
    runs = 100 * np.array(record["test_accuracy_by_epoch"])
    mean, error = runs.mean(1), runs.std(1, ddof=1) / runs.shape[1] ** 0.5
    curves.plot(record["epochs"], mean, color=color, label=method.upper())
    curves.fill_between(record["epochs"], mean - error, mean + error, color=color,
                        alpha=0.25, linewidth=0)
    spread = position + np.linspace(-0.15, 0.15, runs.shape[1])
    finals.plot(spread, runs[-1], "o", color=color, alpha=0.6, markersize=5)
    finals.errorbar(position, mean[-1], error[-1], fmt="_", color="black",
                    markersize=22, capsize=4)
    finals.annotate(f"{mean[-1]:.1f}", (position, runs[-1].min()), (0, -8),
                    textcoords="offset points", ha="center", va="top")
  labels = [r["method"].upper() + ("" if r["rho"] is None else f"\nρ = {r['rho']:g}")
            for r in records]
  finals.set_xticks(range(len(records)), labels)
  finals.set_xlim(-0.5, len(records) - 0.5)
  finals.set_title(f"{network.upper()}: after the last epoch", fontsize=10)
  curves.set_title(f"{network.upper()}: mean ± standard error", fontsize=10)
  curves.set_ylabel("test accuracy (%)")
  # Room for the numbers; the first epochs, far below, would flatten the rest.
  final = 100 * np.array([r["test_accuracy"] for r in records])
  low, high = final.min(), max(
      100 * np.max(r["test_accuracy_by_epoch"]) for r in records)
  margin = 0.25 * (high - low) + 2
  curves.set_ylim(low - margin, min(100.5, high + 0.4 * margin))
  for axis in (curves, finals):
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
