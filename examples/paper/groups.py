"""Runs that differ in the seed alone, and what is said of them together."""

from collections.abc import Iterable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

from examples import summary
from examples.paper import plans
from examples.paper import results
from examples.paper.config import Config
from examples.paper.config import from_json
from examples.paper.config import key_of

_LABELS = {
    "plain": "",
    "sam": "SAM",
    "asam": "ASAM",
    "auto": "ASAM, auto radius",
    "momentum_sam": "Momentum-SAM",
    "adaptive_momentum_sam": "adaptive Momentum-SAM",
    "stale": "stale-gradient ASAM",
    "ae_sam": "AE-SAM (T_w)",
    "gsam": "GSAM (T_w)",
    "vasso": "VaSSO (T_w)",
    "friendly_sam": "Friendly SAM (T_w)",
    "stable": "StableSAM (T_w)",
    "functional": "Functional SAM (T_w)",
    "rise": "ASAM, radius by the loss's rise",
    "loss_budget": "LE-SAM (T_w)",
}
BASES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


class Value(NamedTuple):
  """A mean over seeds and its standard error, NaN of a single run."""

  mean: float
  error: float

  def __str__(self) -> str:
    return summary.show(self.mean, self.error, digits=2)


def value(numbers: Iterable[float]) -> Value:
  """Mean and standard error."""
  return Value(*summary.mean_and_error(list(numbers)))


def difference(one: Value | None, other: Value | None) -> Value | None:
  """Of two means, as if the runs had nothing in common; None if one is missing."""
  if one is None or other is None:
    return None
  return Value(one.mean - other.mean, math.hypot(one.error, other.error))


@dataclasses.dataclass(frozen=True)
class Group:
  """The runs of one configuration.

  Attributes:
    config: of the first run.
    runs: their records, by seed.
  """

  config: Config
  runs: tuple[dict[str, Any], ...]

  def last(self) -> Value:
    """Accuracy after the last epoch, in percent."""
    return value(100 * results.accuracy(run) for run in self.runs)

  def best(self) -> Value:
    """Accuracy of the best epoch that was looked at, chosen with the test set."""
    return value(100 * results.accuracy(run, best=True) for run in self.runs)

  def training(self) -> Value:
    """Accuracy on the last epoch's own batches, in percent."""
    return value(100 * run["history"][-1]["train_accuracy"] for run in self.runs)

  def bleu(self) -> Value | None:
    """Of the last epoch; None of what is no translator."""
    return self._recorded("bleu", 1)

  def top_5(self) -> Value | None:
    """Accuracy among the five best classes, in percent; None where it is not known."""
    return self._recorded("top_5", 100)

  def _recorded(self, name: str, unit: float) -> Value | None:
    if any(name not in run["history"][-1] for run in self.runs):
      return None
    return value(unit * run["history"][-1][name] for run in self.runs)

  def teraflop(self) -> float:
    """Of a run's training: forward and backward are three times the forward pass.

    An epoch has all of the sentences, each taken for one of median length, but only as
    many images as fill its batches.
    """
    run = self.runs[0]
    seen = run["steps"] * self.config.batch_size
    if self.config.dataset == "parallel":
      seen = run["examples"] * len(run["history"])
    return 6 * run["multiply_adds"] * seen * run["gradients_per_step"] / 1e12

  def minutes(self) -> float:
    """Processor time of a run's training."""
    return value(run["cpu_seconds"] / 60 for run in self.runs).mean

  def gradients(self) -> float:
    """Passes over the data, each perturbed one counted twice."""
    return self.config.epochs * self.runs[0]["gradients_per_step"]

  def curve(self) -> tuple[list[int], list[Value]]:
    """(epochs that were looked at, accuracy in percent)."""
    seen = [
        {line["epoch"]: 100 * line["accuracy"] for line in run["history"]
         if "accuracy" in line}
        for run in self.runs
    ]
    epochs = sorted(set.intersection(*(set(one) for one in seen)))
    return epochs, [value(one[epoch] for one in seen) for epoch in epochs]


def group(records: Iterable[dict[str, Any]], swept: bool = False) -> list[Group]:
  """Groups in the order of their first run; those of sweeps, or all others."""
  found: dict[str, list[tuple[Config, dict[str, Any]]]] = {}
  for record in records:
    config = from_json(record["config"])
    if (config.validation > 0) == swept:
      key = key_of(dataclasses.replace(config, seed=0))
      found.setdefault(key, []).append((config, record))
  groups = []
  for runs in found.values():
    runs.sort(key=lambda run: run[0].seed)
    groups.append(Group(runs[0][0], tuple(record for _, record in runs)))
  return groups


def of_plan(
    records: Sequence[dict[str, Any]], plan: Sequence[plans.Entry]
) -> list[dict[str, Any]]:
  """Without the runs at radii that an earlier state of the plan chose.

  Args:
    records: the finished runs of all tables.
    plan: whose rows have the radius of their sweep; other rows stay as they are, and so
      does a row whose sweep is not done.
  """
  by_key = {record["key"]: record for record in records}
  radii = {entry.config.name: plans.chosen(plan, entry, by_key) for entry in plan}
  return [
      record for record in records
      if record["config"]["validation"]
      or radii.get(record["name"]) in (None, record["config"]["rho"])
  ]


def in_order(
    found: Iterable[Group], plan: Sequence[plans.Entry]
) -> list[Group]:
  """By their place in the plan, after all of its rows if they have none."""
  names = [entry.config.name for entry in plan]
  return sorted(found, key=lambda group: (
      names.index(group.config.name) if group.config.name in names else len(names)
  ))


def label(config: Config, least_epochs: int | None = None) -> str:
  """A method's name in a table; least_epochs: those that the others train for."""
  base, method = BASES[config.base], config.method
  if method == "looksam":
    name = f"LookSAM (T_w), every {config.every}th step"
    if config.reuse != Config.reuse:
      name += f", {config.reuse:g} reused"
  elif method == "late":
    name = f"ASAM in the last {config.last:.0%}".replace("%", " %")
  elif method == "iterated":
    name = f"ASAM with {config.ascent_steps} ascent steps"
  elif method == "weighted":
    name = f"weighted mean (T_w), {config.weight:g}"
  elif method == "m_sharpness":
    name = f"ASAM, m = {config.m}"
  else:
    name = _LABELS[method]
  if method == "auto" and config.cosine != Config.cosine:
    name += f" (cosine {config.cosine:g})"
  if config.base != "sgd" and name:
    name = f"{base} + {name}"
  name = name or base
  if least_epochs and config.epochs > least_epochs:
    name += f", {config.epochs / least_epochs:g} × epochs"
  return name


def style_of(config: Config) -> str:
  """The name that ``examples.style`` has for the method."""
  names = {
      "plain": "sgd", "momentum_sam": "momentum_plain",
      "adaptive_momentum_sam": "momentum",
      "late": "last_half" if config.last >= 0.5 else "last_fifth",
  }
  return names.get(config.method, config.method)
