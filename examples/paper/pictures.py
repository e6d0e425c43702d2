"""The pictures of the results, from the records alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

from examples import style
from examples.paper import configs
from examples.paper import figures
from examples.paper import groups

# All are ASAM, so its colour is that of the paper's choice alone.
SCHEMES = {
    "elementwise-2": ("elementwise, p = 2", style.of("asam").color, "s"),
    "elementwise-2-bias": (
        "elementwise, p = 2, biases too", style.of("sam").color, "o"
    ),
    "elementwise-inf": ("elementwise, p = ∞", style.of("momentum").color, "^"),
    "filterwise-2": ("filter-wise, p = 2", style.of("gsam").color, "D"),
}


def draw_all(
    records: Sequence[dict[str, Any]], folder: pathlib.Path
) -> dict[str, pathlib.Path]:
  """The pictures by the table they belong to; those without runs are left out."""
  drawn = {}
  tables = dict.fromkeys(record["table"] for record in records)
  for table in tables:
    found = groups.group(r for r in records if r["table"] == table)
    path = folder / f"{table}.png"
    if not found:
      continue
    if table.startswith("normalization"):
      draw_normalization(found, path)
    elif len(found) > 1 and len({g.config.model for g in found}) == 1:
      draw_methods(found, path)
    else:
      continue
    drawn[table] = path
  for name, draw in (("figure_1", figures.figure_1), ("figure_3", figures.figure_3)):
    drawn[name] = folder / f"{name}.png"
    draw(drawn[name])
  return drawn


def draw_methods(found: list[groups.Group], path: pathlib.Path) -> None:
  """Accuracy by epoch (left) and against the number of gradients (right)."""
  least = min(g.config.epochs for g in found)
  with style.picture(
      path, 1, 2, size=(9.5, 3.9), width_ratios=[1.25, 1]
  ) as (figure, axes):
    curves, costs = axes[0]
    names = _names(found, least)
    drawn = set()  # one colour for each method: its other settings have hollow markers
    for group, name in zip(found, names, strict=True):
      method = groups.style_of(group.config)
      look = style.of(method)
      line = "--" if group.config.epochs > least else ":" if method in drawn else "-"
      drawn.add(method)
      _curve(curves, group, look, line)
      value = _score(group)
      style.error_bars(
          costs, group.gradients(), value.mean, value.error, method,
          markerfacecolor=look.color if line == "-" else "white", label=name,
      )
    what = "BLEU on the test set" if found[0].bleu() else "test accuracy (%)"
    curves.set_xlabel("epoch")
    right = "token" if found[0].bleu() else "test"
    curves.set_ylabel(f"{right} accuracy (%)")
    curves.set_title("by epoch")
    costs.set_xlabel("gradients over the training set")
    costs.set_ylabel(what)
    costs.set_title("after the last epoch, against cost")
    costs.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    runs = sorted(len(g.runs) for g in found)
    style.explain(figure, style.bars_mean(runs[0], "bars and bands", runs[-1]))


def _names(found: list[groups.Group], least: int) -> list[str]:
  """Each method's name, with its radius where two would have the same."""
  names = [groups.label(group.config, least) for group in found]
  return [
      f"{name}, ρ = {group.config.rho:g}" if names.count(name) > 1 else name
      for name, group in zip(names, found, strict=True)
  ]


def _score(group: groups.Group) -> groups.Value:
  return group.bleu() or group.last()


def _curve(axis, group: groups.Group, look: style.Style, line: str) -> None:
  epochs, values = group.curve()
  means = [v.mean for v in values]
  axis.plot(
      epochs, means, color=look.color, marker=look.marker, markersize=4,
      linestyle=line, markerfacecolor=look.color if line == "-" else "white",
  )
  if len(group.runs) > 1:
    low, high = ([v.mean + s * v.error for v in values] for s in (-1, 1))
    axis.fill_between(epochs, low, high, color=look.color, alpha=0.15, linewidth=0)


def scheme_of(config: Any) -> str:
  """The name of a normalization scheme; raises for what is none of them."""
  for scheme, (fields, _) in configs.SCHEMES.items():
    plain = {"normalize_bias": False, "p": 2.0, "normalization": "elementwise"}
    if all(getattr(config, k) == v for k, v in (plain | fields).items()):
      return scheme
  raise ValueError(f"{config.name}: none of {', '.join(configs.SCHEMES)}.")


def draw_normalization(found: list[groups.Group], path: pathlib.Path) -> None:
  """Accuracy against the radius, a curve for each scheme."""
  with style.picture(path, 1, 2, size=(9, 3.8), sharey=True) as (figure, axes):
    for scheme, (label, color, marker) in SCHEMES.items():
      points = sorted(
          (g.config.rho, g.last()) for g in found if scheme_of(g.config) == scheme
      )
      if not points:
        continue
      axis = axes[0, 1 if scheme.endswith("inf") else 0]
      axis.errorbar(
          [rho for rho, _ in points], [v.mean for _, v in points],
          [v.error for _, v in points] if len(found[0].runs) > 1 else None,
          color=color, marker=marker, markersize=5, capsize=2, label=label,
      )
    for axis, title in zip(axes[0], ("p = 2", "p = ∞"), strict=True):
      axis.set_xscale("log")
      axis.set_xlabel("radius ρ")
      axis.set_title(title)
      axis.legend(loc="best")
    axes[0, 0].set_ylabel("test accuracy (%)")
    style.explain(figure, style.bars_mean(min(len(g.runs) for g in found)))
