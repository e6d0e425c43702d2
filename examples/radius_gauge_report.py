"""The gauge's table and picture, from the lines of its records."""

from collections.abc import Sequence
import pathlib
from typing import Any

from matplotlib import ticker
import numpy as np

from examples import digits
from examples import records
from examples import style
from examples import summary

TABLE, PICTURE = "gauge.md", "gauge.png"
GOOD = 0.8  # the share of the best radius's gain over SGD that makes one right
# A collapsed run's accuracy: below twice that of guessing.
CHANCE = 2 / digits.CLASSES
PANELS = {
    "accuracy": "test accuracy (%)",
    "value": "training loss L(w)",
    "cosine": "cosine of the two gradients",
    "linearity": "linearity: gap / predicted gap",
    "rise": "rise: √L(w + ε̂) − √L(w)",
}


def name_of(config: dict[str, Any]) -> str:
  """A task in words."""
  noise = f"{100 * config['noise']:g} % wrong labels" if config["noise"] else "clean"
  return f"{config['network'].upper()}, {noise}"


def late(row: records.Row, entry: str) -> np.ndarray:
  """The median over the last quarter of the epochs, [radius, seed]."""
  values = np.array(row[entry], np.float64)
  return np.median(values[..., -max(1, values.shape[-1] // 4):], axis=-1)


def final(row: records.Row) -> np.ndarray:
  """Test accuracy after the last epoch in percent, [radius, seed]."""
  return 100 * np.array(row["accuracy"], np.float64)[..., -1]


def shares(row: records.Row) -> np.ndarray:
  """Of the best radius's gain over SGD, by radius; NaN where SGD was not run."""
  rhos, means = row["config"]["rhos"], final(row).mean(1)
  if 0.0 not in rhos:
    return np.full(len(rhos), np.nan)
  plain = means[rhos.index(0.0)]
  gain = means.max() - plain
  return (means - plain) / gain if gain > 0 else np.full(len(rhos), np.nan)


def told_by_accuracy(row: records.Row) -> list[str]:
  """What the test accuracy says of each radius."""
  means, rhos = final(row).mean(1), row["config"]["rhos"]
  best = rhos[int(np.argmax(means))]
  found = []
  for rho, mean, share in zip(rhos, means, shares(row), strict=True):
    if mean < 100 * CHANCE:
      found.append("collapsed")
    elif share >= GOOD:
      found.append("about right")
    else:
      found.append("too small" if rho < best else "too large")
  return found


def table(rows: Sequence[records.Row]) -> str:
  """Markdown: a table a task, and how often the verdict is what accuracy says."""
  parts = []
  for row in rows:
    parts.append(f"## {name_of(row['config'])}\n\n{_task_table(row)}")
  for network in dict.fromkeys(row["config"]["network"] for row in rows):
    same = [row for row in rows if row["config"]["network"] == network]
    parts.append(f"## Verdicts on the {network.upper()}\n\n{_agreement(same)}")
  return "\n\n".join(parts) + "\n"


def _task_table(row: records.Row) -> str:
  header = ["rho", "test accuracy (%)", "of the best gain", "cosine", "linearity",
            "rise", "loss", "told by accuracy", "verdicts"]
  columns = [late(row, entry).mean(1) for entry in ("cosine", "linearity", "rise",
                                                    "value")]
  lines = []
  for i, rho in enumerate(row["config"]["rhos"]):
    verdicts = row["verdict"][i]
    counted = [f"{verdicts.count(v)} {v}" for v in style.RADII if v in verdicts]
    lines.append([
        f"{rho:g}",
        summary.show(*summary.mean_and_error(final(row)[i]), digits=1),
        "below 0" if shares(row)[i] < 0
        else summary.optional(100 * shares(row)[i], ".0f", " %"),
        *(f"{column[i]:.{digits_}f}" for column, digits_ in zip(
            columns, (2, 2, 3, 3), strict=True)),
        told_by_accuracy(row)[i],
        ", ".join(counted),
    ])
  return summary.markdown(header, lines)


def _agreement(rows: Sequence[records.Row]) -> str:
  """The runs by what accuracy says and by the verdict."""
  counts = {true: dict.fromkeys(style.RADII, 0) for true in style.RADII}
  for row in rows:
    for rho, true, verdicts in zip(
        row["config"]["rhos"], told_by_accuracy(row), row["verdict"], strict=True):
      for verdict in verdicts if rho else ():
        counts[true][verdict] += 1
  total = sum(sum(line.values()) for line in counts.values())
  right = sum(counts[v][v] for v in style.RADII)
  header = ["told by accuracy", *(f"verdict: {v}" for v in style.RADII)]
  lines = [[true, *line.values()] for true, line in counts.items()]
  return f"{summary.markdown(header, lines)}\n\nThe same in {right} of {total} runs."


def draw(rows: Sequence[records.Row], shown: Sequence[float], path: pathlib.Path):
  """Four runs of the first task by epoch, and the cliff of all tasks by radius."""
  first = rows[0]
  with style.picture(path, 2, 3, size=(12, 6.8)) as (figure, axes):
    for axis, (entry, label) in zip(axes.flat, PANELS.items(), strict=False):
      _curves(axis, first, entry, shown)
      axis.set_xlabel("epoch")
      axis.set_ylabel(label)
    axes[0, 0].set_title(f"{name_of(first['config'])}: four radii")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 2].legend(handles, labels, loc="best")
    axes[0, 2].axhspan(0.70, 0.93, color="0.9", zorder=0)
    axes[0, 2].set_ylim(-0.05, 1.05)
    for axis in axes[1, :2]:
      axis.set_yscale("log")
      axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
      axis.yaxis.set_minor_locator(ticker.NullLocator())
    _cliff(axes[1, 2], rows)
    seeds = first["config"]["seeds"]
    style.explain(
        figure, f"ASAM, T = |w| + 0.01 but for biases. Thin: {seeds} seeds; thick:"
        " their mean. The grey band is where a cosine is about right.")


def _curves(axis: Any, row: records.Row, entry: str, shown: Sequence[float]) -> None:
  scale = 100 if entry == "accuracy" else 1
  for rho in shown:
    i = row["config"]["rhos"].index(rho)
    curves = scale * np.array(row[entry][i], np.float64)
    look = style.RADII[told_by_accuracy(row)[i]]
    epochs = np.arange(1, curves.shape[1] + 1)
    axis.plot(epochs, curves.T, color=look.color, alpha=0.25, linewidth=0.8)
    axis.plot(epochs, curves.mean(0), color=look.color,
              label=f"ρ = {rho:g}: {look.label}")


def _cliff(axis: Any, rows: Sequence[records.Row]) -> None:
  """Test accuracy against the radius, each task in its own line."""
  lines = ("-", "--", "-.", ":")
  for row, line in zip(rows, lines, strict=False):
    rhos = np.array(row["config"]["rhos"])
    kept = rhos > 0
    means = final(row).mean(1)[kept]
    axis.plot(rhos[kept], means, linestyle=line, color="0.35", linewidth=1.2,
              label=name_of(row["config"]), zorder=1)
    for rho, mean, told in zip(
        rhos[kept], means, np.array(told_by_accuracy(row))[kept], strict=True):
      look = style.RADII[told]
      axis.plot(rho, mean, look.marker, color=look.color, markersize=5.5)
  axis.set_xscale("log", base=2)
  axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
  axis.set_xlabel("radius ρ")
  axis.set_ylabel("test accuracy (%)")
  axis.set_title("The cliff")
  axis.legend(loc="lower left", fontsize=6.8, handlelength=2.2)
