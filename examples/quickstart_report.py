"""The table and the picture of the quickstart, from its results alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from examples import style
from examples import summary


def table(records: Sequence[dict[str, Any]]) -> str:
  """The results as a Markdown table."""
  rows = []
  for record in records:
    scores = summary.mean_and_error(100 * np.array(record["test_accuracy"]))
    rho = "-" if record["rho"] is None else f"{record['rho']:g}"
    rows.append([
        record["network"].upper(), record["method"].upper(), rho,
        summary.show(*scores, digits=1), f"{record['seconds']:.1f}",
    ])
  header = ["network", "method", "rho", "test accuracy (%)", "seconds"]
  return summary.markdown(header, rows)


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
  networks = list(dict.fromkeys(record["network"] for record in records))
  seeds = len(records[0]["seeds"])
  with style.picture(
      path, len(networks), 2, size=(9, 3.2 * len(networks) + 0.5), sharey="row",
      width_ratios=[2.2, 1],
  ) as (figure, axes):
    for row, network in zip(axes, networks, strict=True):
      chosen = [record for record in records if record["network"] == network]
      _draw_curves(row[0], network, chosen)
      _draw_finals(row[1], chosen)
      _set_limits(row[0], chosen)
    axes[0][0].legend(loc="best")
    for left, right in axes:
      left.set_xlabel("epoch")
      right.set_xlabel("method and its radius ρ")
    noise = records[0]["config"]["noise"]
    figure.suptitle(f"Digits with {100 * noise:g} % wrong training labels")
    style.explain(figure, style.bars_mean(seeds, "bands and bars")
                  + " Points: single runs. Numbers: the means (%).")


def _draw_curves(axis, network: str, records) -> None:
  for record in records:
    look = style.of(record["method"])
    runs = 100 * np.array(record["test_accuracy_by_epoch"])
    mean, error = np.array([summary.mean_and_error(epoch) for epoch in runs]).T
    axis.plot(record["epochs"], mean, color=look.color, label=look.label)
    axis.fill_between(record["epochs"], mean - error, mean + error, color=look.color,
                      alpha=0.25, linewidth=0)
  axis.set_title(f"{network.upper()} during training")
  axis.set_ylabel("test accuracy (%)")


def _draw_finals(axis, records) -> None:
  for position, record in enumerate(records):
    runs = 100 * np.array(record["test_accuracy"])
    mean, error = summary.mean_and_error(runs)
    spread = position + np.linspace(-0.15, 0.15, len(runs))
    color = style.of(record["method"]).color
    axis.plot(spread, runs, "o", color=color, alpha=0.5, markersize=4, linewidth=0)
    style.error_bars(axis, position, mean, error, record["method"], marker="_",
                     markersize=20, capsize=5, color="black")
    axis.annotate(f"{mean:.1f}", (position, min(runs)), (0, -6), va="top",
                  textcoords="offset points", ha="center")
  labels = [style.of(r["method"]).label
            + ("" if r["rho"] is None else f"\nρ = {r['rho']:g}") for r in records]
  axis.set_xticks(range(len(records)), labels)
  axis.set_xlim(-0.5, len(records) - 0.5)
  axis.set_title("after the last epoch")


def _set_limits(axis, records) -> None:
  # Room for the numbers; the first epochs, far below, would flatten the rest.
  low = 100 * min(min(r["test_accuracy"]) for r in records)
  high = 100 * max(np.max(r["test_accuracy_by_epoch"]) for r in records)
  margin = 0.25 * (high - low) + 2
  axis.set_ylim(low - margin, min(100.5, high + 0.4 * margin))
