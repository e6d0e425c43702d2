"""The pictures of the results, from the records alone."""

import collections
from collections.abc import Callable, Iterator, Sequence
import functools
import pathlib
from typing import Any, NamedTuple

from matplotlib import colors
import numpy as np

from examples import style
from examples.paper import comparison
from examples.paper import configs
from examples.paper import figures
from examples.paper import groups
from examples.paper import published
from examples.paper import small

# All are ASAM, so its colour is that of the paper's choice alone.
_SCHEMES = {
    "elementwise-2": (style.of("asam").color, "s"),
    "elementwise-2-bias": (style.of("sam").color, "o"),
    "elementwise-inf": (style.of("momentum").color, "^"),
    "filterwise-2": (style.of("gsam").color, "D"),
}


def draw_all(
    records: Sequence[dict[str, Any]], folder: pathlib.Path
) -> dict[str, pathlib.Path]:
  """The pictures by the table they belong to; those without runs are left out."""
  drawn = {}
  tables = dict.fromkeys(record["table"] for record in records)
  for table in tables:
    found = groups.in_order(
        groups.group(r for r in records if r["table"] == table), small.PLAN
    )
    draw = _drawer(table)
    if draw and len(found) > 1:
      drawn[table] = folder / f"{table}.png"
      draw(found, drawn[table])
  for name, draw in (("figure_1", figures.figure_1), ("figure_3", figures.figure_3)):
    drawn[name] = folder / f"{name}.png"
    draw(drawn[name])
  return drawn


def _drawer(table: str) -> Callable[[list[groups.Group], pathlib.Path], None] | None:
  """What draws a table; None for those that are not on the page."""
  rows = {t.name: t for t in comparison.TABLES if t.name in _BY_ROW}
  if table.startswith("normalization"):
    return draw_normalization
  if table in rows:
    return functools.partial(draw_rows, rows[table])
  known = {t.name for t in comparison.TABLES} | {e.config.table for e in small.PLAN}
  return draw_methods if table in known else None


# Tables of many networks or noise levels, where curves by epoch would be too many.
_BY_ROW = ("cifar10", "cifar100", "noise")
# Height of a line of text at the edge, as a part of the axis.
_NAME = 0.07


# Of a method's first row, its second, and those after it.
_LINES = ("-", ":", "-.")


class _Look(NamedTuple):
  """How a group is drawn; one colour for each method, paler if it comes again."""

  name: str
  method: str
  line: str

  @property
  def fill(self) -> str:
    pale = {"-": 0.0, "-.": 0.6}.get(self.line, 1.0)
    red, green, blue = (
        (1 - pale) * part + pale for part in colors.to_rgb(style.of(self.method).color)
    )
    return colors.to_hex((red, green, blue))

  @property
  def options(self) -> dict[str, Any]:
    """For a point."""
    return {"markerfacecolor": self.fill, "label": self.name}


def _looks(found: Sequence[groups.Group]) -> Iterator[_Look]:
  least = min(g.config.epochs for g in found)
  seen = collections.Counter()
  for group in found:
    method = groups.style_of(group.config)
    line = _LINES[min(seen[method], len(_LINES) - 1)]
    if group.config.epochs > least:
      line = "--"
    seen[method] += 1
    name = groups.label(group.config, least).replace("T_w", "$T_w$")
    yield _Look(name, method, line)


def draw_methods(found: list[groups.Group], path: pathlib.Path) -> None:
  """Accuracy by epoch (left) and, the range of most methods, against cost (right)."""
  looks = list(_looks(found))
  bleu = found[0].bleu() is not None
  with style.picture(
      path, 1, 2, size=(10, 4.2), dpi=figures.DPI, width_ratios=[1, 1.15]
  ) as (figure, axes):
    curves, costs = axes[0]
    for group, look in zip(found, looks, strict=True):
      _curve(curves, group, look)
    curves.set_xlabel("epoch")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_ylabel(f"{'token' if bleu else 'test'} accuracy (%)")
    curves.set_title("by epoch")
    below = _against_cost(costs, found, looks)
    costs.set_ylabel("BLEU on the test set" if bleu else "test accuracy (%)")
    costs.set_title("after the last epoch, against cost")
    figure.legend(*costs.get_legend_handles_labels(), loc="outside right center")
    runs = sorted(len(g.runs) for g in found)
    text = style.bars_mean(runs[0], "bars and bands", runs[-1])
    text += " A bar may be shorter than its marker." if runs[-1] > 1 else ""
    text += "\nRight: methods of one cost stand side by side"
    text += "; dashed: the base." if _base(found) else "."
    if below:
      text += " ↓: below the axis, by the value beside it."
    style.explain(figure, text)


def _curve(axis: Any, group: groups.Group, look: _Look) -> None:
  epochs, values = group.curve()
  means = [v.mean for v in values]
  # What is late begins as the base does: broad beneath the thin, so that both show.
  width, order = {"plain": (1.0, 3), "late": (4.0, 1)}.get(
      group.config.method, (1.6, 2)
  )
  drawn = style.of(look.method)
  axis.plot(
      epochs, means, color=drawn.color, marker=drawn.marker, markersize=3.5 + width,
      linestyle=look.line, markerfacecolor=look.fill, linewidth=width, zorder=order,
      alpha=0.5 if width > 2 else 1,
  )
  if len(group.runs) > 1:
    low, high = ([v.mean + s * v.error for v in values] for s in (-1, 1))
    axis.fill_between(epochs, low, high, color=drawn.color, alpha=0.15, linewidth=0)


def _score(group: groups.Group) -> groups.Value:
  return group.bleu() or group.last()


def _base(found: Sequence[groups.Group]) -> groups.Group | None:
  """The base optimizer at the least number of epochs."""
  plain = (group for group in found if group.config.method == "plain")
  return min(plain, key=lambda group: group.config.epochs, default=None)


def _against_cost(
    axis: Any, found: Sequence[groups.Group], looks: Sequence[_Look]
) -> list[float]:
  """Points beside each other where costs are equal; returns what is below the axis."""
  low, base = _lowest([_score(g).mean for g in found]), _base(found)
  if base:  # what the others are compared with
    low = min(low, _score(base).mean)
  below = sorted(v for g in found if (v := _score(g).mean) < low)
  costs = [g.gradients() for g in found]
  width = max(costs) - min(costs) or max(costs)
  axis.set_xlim(min(costs) - 0.15 * width, max(costs) + 0.15 * width)
  axis.set_xticks(sorted(set(costs)))
  axis.set_xlabel("passes over the training set")
  for i, (group, look) in enumerate(zip(found, looks, strict=True)):
    value = _score(group)
    equal = [j for j, cost in enumerate(costs) if cost == costs[i]]
    x = costs[i] + 0.05 * width * (equal.index(i) - (len(equal) - 1) / 2)
    if value.mean < low:
      _at_the_edge(axis, x, below.index(value.mean), value, look)
    else:
      style.error_bars(axis, x, *value, look.method, **look.options)
  if base:
    axis.axhline(_score(base).mean, color=style.of("sgd").color, linestyle="--",
                 linewidth=0.8, alpha=0.6, zorder=0)
  _room_below(axis, len(below))
  return below


def _at_the_edge(
    axis: Any, x: float, place: int, value: groups.Value, look: _Look
) -> None:
  """A point that is below the axis, and how far."""
  height, transform = 0.03 + _NAME * place, axis.get_xaxis_transform()
  style.error_bars(
      axis, x, height, np.nan, look.method, transform=transform, **look.options
  )
  right = x > sum(axis.get_xlim()) / 2  # the name goes where there is room
  axis.annotate(
      f"↓ {value}", (x, height), (-6 if right else 6, 0), xycoords=transform,
      textcoords="offset points", va="center", ha="right" if right else "left",
      fontsize=8.5,
  )


def _lowest(scores: Sequence[float]) -> float:
  """What is lower than this would take the room from the others' differences."""
  means = np.asarray(scores)
  middle = np.median(means)
  return float(middle - max(2.0, 4 * np.median(np.abs(means - middle))))


def _room_below(axis: Any, count: int) -> None:
  """Room at the lower edge for so many names."""
  low, high = axis.get_ylim()
  share = _NAME * count
  axis.set_ylim(low - (high - low) * share / (1 - share), high)


def draw_rows(
    table: comparison.Table, found: list[groups.Group], path: pathlib.Path
) -> None:
  """A table of the paper: accuracy by row (left), and what is gained (right)."""
  noise = table.name == "noise"
  ours, theirs = table.ours(found), table.theirs()
  names = [published.network(row) for row in table.rows]
  with style.picture(path, 1, 2, size=(10, 4.2), dpi=figures.DPI) as (figure, axes):
    scores, gains = axes[0]
    gains.axhline(0, color=style.of("sgd").color, linestyle="--", linewidth=0.8)
    for i, look in enumerate(("sgd", "sam", "asam")):
      x = np.arange(len(names)) + (0.06 if noise else 0.2) * (i - 1)
      for values, mine in ((theirs, False), (ours, True)):
        at = x + (0.0 if noise else 0.05 if mine else -0.05)
        _row_points(scores, at, values[i], look, table.labels()[i], noise, mine)
        if i:
          gained = list(map(groups.difference, values[i], values[0]))
          _row_points(gains, at, gained, look, "", noise, mine)
    for axis in axes[0]:
      turned = {} if noise else {"rotation": 40, "ha": "right"}
      axis.set_xticks(range(len(names)), names, rotation_mode="anchor", **turned)
      axis.set_xlabel("wrong labels" if noise else "network")
    scores.set_ylabel("test accuracy (%)")
    gains.set_ylabel(f"points above {table.base}")
    figure.legend(*scores.get_legend_handles_labels(), loc="outside right center")
    runs = sorted(len(g.runs) for g in found)
    style.explain(
        figure,
        style.bars_mean(runs[0], "bars", runs[-1])
        + "\nHollow: published. Right: bars of the difference of two means.",
    )


def _row_points(
    axis: Any, x: Any, values: Sequence[groups.Value | None], look: str, label: str,
    connected: bool, mine: bool,
) -> None:
  """A method's values in each row; published ones hollow, the means alone."""
  known = [(at, *v) for at, v in zip(x, values, strict=True) if v]
  drawn, line = style.of(look), "-" if mine else ":"
  at, means, errors = np.transpose(known) if known else np.empty((3, 0))
  axis.errorbar(
      at, means, errors if mine else None, color=drawn.color, marker=drawn.marker,
      linestyle=line if connected else "none", markersize=6 if mine else 5, capsize=2,
      markerfacecolor=drawn.color if mine else "white", elinewidth=1.0,
      label=label if mine else f"{label}, published",
  )


def draw_normalization(found: list[groups.Group], path: pathlib.Path) -> None:
  """Accuracy against the radius, a curve for each scheme."""
  with style.picture(
      path, 1, 2, size=(9, 3.8), dpi=figures.DPI, sharey=True
  ) as (figure, axes):
    for scheme, (color, marker) in _SCHEMES.items():
      points = sorted(
          (g.config.rho, g.last()) for g in found
          if comparison.scheme_of(g.config) == scheme
      )
      if not points:
        continue
      axis = axes[0, 1 if scheme.endswith("inf") else 0]
      axis.errorbar(
          [rho for rho, _ in points], [v.mean for _, v in points],
          [v.error for _, v in points] if len(found[0].runs) > 1 else None,
          color=color, marker=marker, markersize=5, capsize=2,
          label=comparison.SCHEMES[scheme],
      )
    panels = (("p = 2", "elementwise-2"), ("p = ∞", "elementwise-inf"))
    for axis, (title, scheme) in zip(axes[0], panels, strict=True):
      radii = configs.SCHEMES[scheme][1]
      axis.set_xscale("log")
      axis.set_xticks(radii, [f"{rho:g}" for rho in radii])
      axis.minorticks_off()
      axis.set_xlabel("radius ρ")
      axis.set_title(title)
      axis.legend(loc="best")
    axes[0, 0].set_ylabel("test accuracy (%)")
    style.explain(figure, style.bars_mean(min(len(g.runs) for g in found)))
