"""The radius study's table and figure, from the lines of its results."""

from collections.abc import Iterable, Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from examples import records
from examples import style
from examples import summary

SEVEN = 7  # radii of every sweep; smaller ones were added where validation asked for it
CHOSEN_ON = "mlp"  # the default target comes from its cells, which are no evidence
NORMS = {"2": "2", "inf": "∞"}
NAMES = {"mlp": "MLP", "cnn": "CNN", "batch_norm_mlp": "MLP with batch norm",
         "transformer": "transformer"}


Cell = tuple[str, float, str, str]  # network, noise, normalization, p


def title(cell: Cell) -> str:
  """A cell in words."""
  network, noise, normalization, p = cell
  labels = f"{100 * noise:g} % wrong" if noise else "clean"
  name = NAMES.get(network, network)
  return f"{name}, {labels}, {normalization}, p = {NORMS.get(p, p)}"


def cell_of(row: records.Row) -> Cell:
  """The cell of a line of the results."""
  config = row["config"]
  return config["network"], config["noise"], config["normalization"], config["p"]


class Result(NamedTuple):
  """One cell; accuracies in percent, and standard errors over the seeds."""

  cell: Cell
  plain: tuple[float, float]
  radii: list[float]
  fixed: list[tuple[float, float]]
  best: int  # the radius that the validation split chose
  targets: list[float]
  auto: list[tuple[float, float]]
  best_target: int  # likewise
  runs: int

  @property
  def gain(self) -> float:
    """Of the tuned radius over the plain optimizer, in points."""
    return self.fixed[self.best][0] - self.plain[0]

  @property
  def is_large(self) -> bool:
    """Whether that is above twice its error, so that shares of it mean something."""
    return self.gain > 2 * np.hypot(self.fixed[self.best][1], self.plain[1])


# The accuracies of each radius or target, over the seeds.
_Sweep = dict[float, list[float]]


def _scores(sweep: _Sweep) -> list[tuple[float, float]]:
  return [summary.mean_and_error(100 * np.array(sweep[x])) for x in sorted(sweep)]


def _best(tuning: _Sweep, judged: _Sweep) -> int:
  """Which of those that are judged was the best by validation."""
  among = sorted(judged)
  return int(np.argmax([np.mean(tuning.get(number, -np.inf)) for number in among]))


def results(
    rows: Sequence[records.Row], rate: float, most: int | None = None
) -> list[Result]:
  """The cells of which all is there for the rule of this rate, in their order.

  Args:
    rows: the lines of the results.
    rate: of the rule.
    most: so many radii of each cell, the largest ones; None: all.
  """
  latest: dict[Any, _Sweep] = {}
  for row in rows:
    config, cell = row["config"], cell_of(row)
    if config.get("rate", rate) != rate:
      continue
    sweep = latest.setdefault((cell, config["rule"], config["validation"]), {})
    sweep |= zip(config["numbers"], row["accuracy"], strict=True)
  found = []
  for cell in dict.fromkeys(cell for cell, *_ in latest):
    wanted = [(cell, "plain", False), *((cell, rule, validation)
              for rule in ("fixed", "auto") for validation in (False, True))]
    if not all(key in latest for key in wanted):
      continue
    plain, fixed, tuning, auto, tuning_auto = (latest[key] for key in wanted)
    fixed = {rho: fixed[rho] for rho in sorted(fixed)[-(most or len(fixed)):]}
    found.append(Result(
        cell, _scores(plain)[0], sorted(fixed), _scores(fixed),
        _best(tuning, fixed),
        sorted(auto), _scores(auto),
        _best(tuning_auto, auto),
        len(plain[0.0]),
    ))
  return found


def _shown(score: tuple[float, float]) -> str:
  return f"{score[0]:.1f} ± {score[1]:.1f}"


def table(found: Sequence[Result]) -> str:
  """Test accuracies as Markdown."""
  targets = found[0].targets
  header = ["cell", "plain", "tuned ρ", *(f"c = {c:g}" for c in targets)]
  lines = [header, ["---", *["---:"] * (len(header) - 1)]]
  for result in found:
    tuned = f"{_shown(result.fixed[result.best])} ({result.radii[result.best]:g})"
    lines.append([title(result.cell), _shown(result.plain), tuned,
                  *map(_shown, result.auto)])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shares(found: Sequence[Result], index: int | None) -> list[float]:
  """Of the tuned radius's gain, by one target or (None) the one that was chosen."""
  return [
      (one.auto[one.best_target if index is None else index][0] - one.plain[0])
      / one.gain
      for one in found if one.is_large
  ]


def verdict(found: Sequence[Result]) -> str:
  """What the rule reaches, as a list."""
  judged = [one for one in found if one.cell[0] != CHOSEN_ON] or list(found)
  lines = []
  for index, target in enumerate(found[0].targets):
    got = shares(judged, index)
    worse = [
        title(one.cell) for one in judged
        if one.auto[index][0] - one.plain[0]
        < -np.hypot(one.auto[index][1], one.plain[1])
    ]
    total = sum(one.auto[index][0] - one.plain[0] for one in judged)
    lines.append(
        f"- c = {target:g}: {100 * np.mean(got) if got else np.nan:.0f} % of the tuned"
        f" radius's gain, mean of the {len(got)} cells where it is above twice its"
        f" error; {100 * total / sum(one.gain for one in judged):.0f} % of the sum of"
        f" gains over all {len(judged)}; worse than plain by more than the error:"
        f" {'; '.join(worse) or 'none'}."
    )
  best = shares(judged, None)
  if best:
    lines.append(
        f"- Best of the three on the validation split: {100 * np.mean(best):.0f} %, the"
        f" least {100 * min(best):.0f} %."
    )
  return "\n".join(lines)


# A colour and a marker for each T_w and norm, the same in every panel.
LOOKS = {
    ("elementwise", "2"): (style.of("asam").color, "s"),
    ("none", "2"): (style.of("sam").color, "o"),
    ("filterwise", "2"): (style.of("gsam").color, "D"),
    ("elementwise", "inf"): (style.of("momentum").color, "^"),
}


def plot(found: Sequence[Result], path: pathlib.Path) -> None:
  """Accuracy against the radius, and against the target; a row for each network."""
  networks = list(dict.fromkeys(one.cell[0] for one in found))
  noises = sorted({one.cell[1] for one in found}, reverse=True)
  columns = [(noise, auto) for noise in noises for auto in (False, True)]
  size = (3.0 * len(columns), 2.4 * len(networks) + 0.8)
  with style.picture(path, len(networks), len(columns), size=size) as (figure, axes):
    for row, network in enumerate(networks):
      for column, (noise, auto) in enumerate(columns):
        here = [one for one in found if one.cell[:2] == (network, noise)]
        axis = axes[row, column]
        _panel(axis, here, auto)
        labels = f"{100 * noise:g} % wrong labels" if noise else "clean labels"
        task = f"{NAMES.get(network, network)}, {labels}"
        axis.set_title("auto_radius" if auto else task)
        if not column:
          axis.set_ylabel("test accuracy (%)")
    handles = {}
    for axis in axes.flat:
      handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside upper center",
                  ncol=3)
    style.explain(figure, style.bars_mean(found[0].runs) + " Points that are"
                  " missing lie below the panel.")


def _middle(one: Result) -> float:
  """Of the seven radii that every network has; the smaller ones come before."""
  return one.radii[-SEVEN:][SEVEN // 2]


def _panel(axis: Any, here: Sequence[Result], auto: bool) -> None:
  """The cells of one task, against the radius or against the target."""
  for one in here:
    color, marker = LOOKS[one.cell[2:]]
    xs = one.targets if auto else np.array(one.radii) / _middle(one)
    mean, error = np.array(one.auto if auto else one.fixed).T
    axis.errorbar(xs, mean, error, color=color, marker=marker, markersize=4, capsize=2,
                  elinewidth=1, label=f"{one.cell[2]}, p = {NORMS[one.cell[3]]}"
                  f" (middle of the sweep: ρ = {_middle(one):g})")
  axis.axhline(here[0].plain[0], color="0.4", linestyle="--", linewidth=1,
               label="plain optimizer")
  axis.set_xlabel("target of the cosine" if auto else "ρ / middle of its sweep")
  if not auto:
    axis.set_xscale("log", base=2)
  low = min(here[0].plain[0], *(m for one in here for m, _ in one.auto))
  top = max(m for one in here for m, _ in [*one.fixed, *one.auto])
  axis.set_ylim(low - 0.3 * (top - low), top + 0.1 * (top - low))


def _distinct(values: Iterable[Any]) -> str:
  return " and ".join(str(value) for value in sorted(set(values)))


def write(folder: pathlib.Path, rows: Sequence[records.Row], rate: float) -> str:
  """Writes ``radius.md`` and ``radius.png`` into the folder; returns the text."""
  found = results(rows, rate)
  if not found:
    return "no cell of the study is complete yet"
  made = [row for row in rows if row["config"].get("rate", rate) == rate]
  config = made[-1]["config"]
  about = (
      f"Test accuracy in % of the last epoch, ± one standard error over"
      f" {found[0].runs} seeds; {config['epochs']} epochs, batch"
      f" {config['batch_size']}; {_distinct(row['device'] for row in made)},"
      f" {_distinct(row['cores'] for row in made)} cores,"
      f" {_distinct(row['date'] for row in made)},"
      f" jax {_distinct(row['versions']['jax'] for row in made)}."
      " c: the target of the cosine."
  )
  parts = [table(found), about, verdict(found)]
  if any(len(one.radii) > SEVEN for one in found):
    parts += ["With seven radii in every cell, the smaller ones left out:",
              verdict(results(rows, rate, SEVEN))]
  text = "\n\n".join(parts) + "\n"
  records.replace(folder / "radius.md", text)
  plot(found, folder / "radius.png")
  return text
