"""Tables and figures of the sharpness study, from its JSON lines alone."""

import pathlib

from matplotlib import colors
import numpy as np

from asam_jax import sharpness
from examples import records
from examples import style

AXES = ("batch_size", "learning_rate", "weight_decay", "dropout")
ROWS = ("tau", *AXES, "mean")
NAMES = {
    "tau": "Kendall τ", "batch_size": "ψ batch size", "learning_rate":
    "ψ learning rate", "weight_decay": "ψ weight decay", "dropout": "ψ dropout",
    "mean": "Ψ mean",
}
# Kwon et al. 2021, as quoted; † not checked against the paper's own table.
PUBLISHED = {
    "sharpness, p=2": (0.174, 0.667, 0.563, -0.297, 0.102, 0.259),
    "adaptive, p=2": (0.636, 0.696, 0.577, 0.534, -0.092, 0.429),
    "sharpness, p=inf": (0.257, 0.777, 0.797, -0.469, 0.161, 0.316),
    "adaptive, p=inf": (0.616, 0.817, 0.806, 0.656, 0.225, 0.626),
}

# What the radius of a measure is taken in.
UNITS = {"sharpness": "within ‖ε‖ ≤ ρ", "adaptive": "within ‖ε/|w|‖ ≤ ρ"}


def read(results: pathlib.Path):
  """How many networks there are, those that were measured, {measure: {rho: values}}.

  Args:
    results: the folder of networks.jsonl and measures.jsonl.
  """
  paths = [results / name for name in ("networks.jsonl", "measures.jsonl")]
  for path in paths:
    if not path.exists():
      raise SystemExit(f"no file {path}; run the stage measure first, or name the"
                       " folder by --results.")
  rows, lines = map(records.read, paths)
  configs = {records.key(row["config"]) for row in (*rows, *lines)}
  if len(configs) > 1:  # a run was interrupted between the two files
    raise SystemExit(f"{paths[0]} and {paths[1]} are of different configurations:"
                     f" {', '.join(sorted(configs))}. Run the stage measure again.")
  kept = [rows[i] for i in lines[0]["networks"]]
  measures: dict[str, dict[float, np.ndarray]] = {}
  for line in lines:
    values = np.array(line["values"])
    measures.setdefault(line["measure"], {})[line["rho"]] = values
  return len(rows), kept, measures


def gaps(kept) -> np.ndarray:
  """The generalization gap: test error minus training error."""
  return np.array([r["train_accuracy"] - r["test_accuracy"] for r in kept])


def correlate(values, gap, settings, chosen=None, resamples=1000):
  chosen = np.arange(len(gap)) if chosen is None else chosen
  return sharpness.rank_correlation(
      values[chosen], gap[chosen], {k: v[chosen] for k, v in settings.items()},
      resamples=resamples)


def tau_of(values, gap, chosen) -> float:
  return sharpness.rank_correlation(
      values[chosen], gap[chosen], resamples=1).tau.value


def best_rho(by_rho, gap, chosen) -> float:
  """The radius of the largest tau, as the paper chose it."""
  return max(by_rho, key=lambda rho: tau_of(by_rho[rho], gap, chosen))


def cells(result) -> list[str]:
  estimates = [result.tau, *(result.psi[a] for a in AXES), result.mean_psi]
  return [f"{e.value:+.3f} [{e.low:+.2f}, {e.high:+.2f}]" for e in estimates]


def markdown(columns: dict[str, list[str]], rows) -> str:
  head = "| | " + " | ".join(columns) + " |"
  rule = "|---" * (len(columns) + 1) + "|"
  body = ["| " + " | ".join([row, *(column[i] for column in columns.values())]) + " |"
          for i, row in enumerate(rows)]
  return "\n".join([head, rule, *body])


def main_table(kept, measures, chosen_for_rho, chosen_for_tau) -> tuple[str, dict]:
  """The paper's table: rho from one set of networks, coefficients from another."""
  gap = gaps(kept)
  settings = {a: np.array([row[a] for row in kept]) for a in AXES}
  columns, radii = {}, {}
  for name, by_rho in measures.items():
    radii[name] = best_rho(by_rho, gap, chosen_for_rho)
    result = correlate(by_rho[radii[name]], gap, settings, chosen_for_tau)
    columns[f"{name}, ρ={radii[name]:g}"] = cells(result)
  return markdown(columns, [NAMES[row] for row in ROWS]), radii


def differences(kept, measures, radii, chosen, resamples=1000, seed=0) -> str:
  """Tau of adaptive minus plain sharpness, paired bootstrap over networks."""
  gap = gaps(kept)[chosen]
  rng = np.random.default_rng(seed)
  columns = {}
  for p in ("p=2", "p=inf"):
    pair = [measures[f"{kind}, {p}"][radii[f"{kind}, {p}"]][chosen]
            for kind in ("adaptive", "sharpness")]
    picks = rng.integers(len(gap), size=(resamples + 1, len(gap)))
    picks[0] = np.arange(len(gap))  # no resampling: the value itself
    value, *draws = [tau_of(pair[0], gap, i) - tau_of(pair[1], gap, i) for i in picks]
    low, high = np.quantile(draws, [0.025, 0.975])
    columns[p] = [f"{value:+.3f} [{low:+.2f}, {high:+.2f}]"]
  return markdown(columns, ["τ(adaptive) - τ(plain)"])


def every_rho(kept, measures) -> str:
  gap = gaps(kept)
  everyone = np.arange(len(gap))
  return "\n\n".join(
      markdown({f"ρ={rho:g}": [f"{tau_of(values, gap, everyone):+.3f}"]
                for rho, values in by_rho.items()}, [name])
      for name, by_rho in measures.items())


def published() -> str:
  columns = {f"{name}†": [f"{value:+.3f}" for value in column]
             for name, column in PUBLISHED.items()}
  return markdown(columns, [NAMES[row] for row in ROWS])


def scatter(kept, measures, radii, path: pathlib.Path) -> None:
  """The gap against each measure, coloured by two of the hyper-parameters."""
  gap = 100 * gaps(kept)
  shades = {
      "learning rate": np.array([row["learning_rate"] for row in kept]),
      "weight decay": np.array([row["weight_decay"] for row in kept]),
  }
  with style.picture(path, 2, 4, size=(12.5, 6.2), sharey=True) as (figure, axes):
    for column, (name, rho) in zip(axes.T, radii.items(), strict=True):
      values, unit = measures[name][rho], UNITS[name.split(",")[0]]
      tau = tau_of(values, gap, np.arange(len(gap)))
      title = f"{name.replace('inf', '∞')}, ρ = {rho:g}\nKendall τ = {tau:.3f}"
      column[0].set_title(title)
      for axis, shade in zip(column, shades.values(), strict=True):
        axis.scatter(values, gap, c=shade, s=8, linewidths=0, alpha=0.8,
                     norm=colors.LogNorm(), cmap="viridis")
        axis.set_xscale("log")
        axis.set_xlabel(f"worst rise of the loss (nats),\n{unit}")
    for row, name in zip(axes, shades, strict=True):
      row[0].set_ylabel("generalization gap\n(percentage points)")
      figure.colorbar(row[-1].collections[0], ax=row, label=f"{name} (log scale)")
    style.explain(figure, f"A point: one of {len(gap)} networks, each trained once; the"
                  " sampling error of a gap is 0.5 points.")


def report(results: pathlib.Path) -> None:
  """Writes tables.md and scatter.png."""
  count, kept, measures = read(results)
  everyone = np.arange(len(kept))
  order = np.random.default_rng(0).permutation(len(kept))
  half, other = np.array_split(order, 2)
  same, radii = main_table(kept, measures, everyone, everyone)
  apart, held_radii = main_table(kept, measures, half, other)
  gap = gaps(kept)
  text = "\n\n".join([
      "# Tables of the sharpness study",
      f"{len(kept)} of {count} networks have the required training accuracy. Their"
      f" gap is {100 * gap.min():.1f} to {100 * gap.max():.1f} % (mean"
      f" {100 * gap.mean():.1f}, standard deviation {100 * gap.std():.1f}).",
      "Kept by hyper-parameter: " + "; ".join(
          f"{a}: " + ", ".join(
              f"{v:g}: {sum(r[a] == v for r in kept)}"
              for v in sorted({r[a] for r in kept})) for a in AXES) + ".",
      "## ρ chosen on the same networks (as in the paper; optimistic)", same,
      differences(kept, measures, radii, everyone),
      "## ρ chosen on one half of the networks, coefficients from the other", apart,
      differences(kept, measures, held_radii, other),
      "## τ at every ρ", every_rho(kept, measures),
      "## Published (WRN-28-2, CIFAR-10)†", published(),
      "† not checked against the paper's own table.",
  ])
  records.replace(results / "tables.md", text + "\n")
  scatter(kept, measures, radii, results / "scatter.png")
  print(text)
