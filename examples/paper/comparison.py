"""The tables of the paper, with its figures and what runs here have of each."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from examples import sharpness_report
from examples import summary
from examples.paper import configs
from examples.paper import groups
from examples.paper import published

METHODS = ("plain", "sam", "asam")

# Scheme: how it is called.
SCHEMES = {
    "elementwise-2": "elementwise, p = 2",
    "elementwise-2-bias": "elementwise, p = 2, biases too",
    "elementwise-inf": "elementwise, p = ∞",
    "filterwise-2": "filter-wise, p = 2",
}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of methods.

  Attributes:
    name: that its records have.
    title: its heading.
    rows: the published figures of the base optimizer, SAM and ASAM.
    score: what a group has in a row; None where it belongs to another.
    base: the paper's base optimizer.
    checked: whether the figures were compared with the paper's own text.
    note: what else is to be known.
  """

  name: str
  title: str
  rows: Mapping[str, tuple[str, str, str]]
  score: Callable[[groups.Group, str], groups.Value | None]
  base: str = "SGD"
  checked: bool = False
  note: str = ""

  def ours(
      self, trained: Sequence[groups.Group]
  ) -> list[list[groups.Value | None]]:
    """What the groups have, [method][row]; None if nothing was trained for it."""
    return [
        [self._cell([g for g in trained if g.config.method == method], row)
         for row in self.rows]
        for method in METHODS
    ]

  def _cell(self, trained: Sequence[groups.Group], row: str) -> groups.Value | None:
    scores = (self.score(group, row) for group in trained)
    return next((score for score in scores if score), None)

  def theirs(self) -> list[list[groups.Value]]:
    """The published figures as numbers, [method][row]."""
    return [
        [published.value(cells[i]) for cells in self.rows.values()]
        for i in range(len(METHODS))
    ]

  def labels(self) -> list[str]:
    """Names of the methods."""
    return [self.base, "SAM", "ASAM"]


def found(records: Sequence[Mapping[str, Any]]) -> list[groups.Group]:
  """All groups, those that were judged on a validation set last."""
  rows = list(map(dict, records))
  return groups.group(rows) + groups.group(rows, swept=True)


def level(config: Any) -> str:
  """The part of the labels that is wrong."""
  return f"{config.noise:.0%}".replace("%", " %")


def _of_row(name: Callable[[Any], str]) -> Callable[..., groups.Value | None]:
  """Test accuracy of a group in the row that its configuration names."""
  return lambda group, row: (
      group.last() if name(group.config) == row and not group.config.validation
      else None
  )


def _top(group: groups.Group, row: str) -> groups.Value | None:
  return group.last() if row == "top-1" else group.top_5()


def _bleu(group: groups.Group, row: str) -> groups.Value | None:
  validated = group.config.validation > 0
  return group.bleu() if validated == (row == "validation") else None


TABLES = (
    Table("cifar10", "CIFAR-10", published.CIFAR10, _of_row(lambda c: c.model)),
    Table("cifar100", "CIFAR-100", published.CIFAR100, _of_row(lambda c: c.model)),
    Table("imagenet", "ImageNet, ResNet-50", published.IMAGENET, _top),
    Table(
        "iwslt14", "IWSLT'14 DE-EN, Transformer, BLEU", published.IWSLT14, _bleu,
        base="Adam", checked=True,
        note="The base is AdamW here: its weight decay is decoupled, as in fairseq's"
        " Adam. BLEU on the validation set takes a run with `--validation 1`.",
    ),
    Table(
        "noise", "CIFAR-10 with symmetric label noise, ResNet-32", published.NOISE,
        _of_row(level), checked=True,
    ),
)


def scheme_of(config: Any) -> str:
  """The name of a normalization scheme; raises for what is none of them."""
  for scheme, (fields, _) in configs.SCHEMES.items():
    plain = {"normalize_bias": False, "p": 2.0, "normalization": "elementwise"}
    if all(getattr(config, k) == v for k, v in (plain | fields).items()):
      return scheme
  raise ValueError(f"{config.name}: none of {', '.join(configs.SCHEMES)}.")


def table_text(table: Table, records: Sequence[Mapping[str, Any]]) -> str:
  """Published and own figures side by side."""
  mark = "" if table.checked else f" {published.DAGGER}"
  by_row = zip(*table.ours(found(records)), strict=True)
  body = []
  for (row, values), ours in zip(table.rows.items(), by_row, strict=True):
    cells = [published.network(row)]
    for value, own in zip(values, ours, strict=True):
      cells += [value + mark, str(own or "–")]
    body.append(cells)
  header = [""]
  for label in table.labels():
    header += [f"{label}, published", "here"]
  return summary.markdown(header, body)


def normalization_text(trained: Sequence[groups.Group]) -> str:
  """A row for each scheme, a column for each place in the grid of radii."""
  body = []
  for scheme, label in SCHEMES.items():
    by_radius = {
        g.config.rho: g.last() for g in trained if scheme_of(g.config) == scheme
    }
    cells = [f"{by_radius.get(rho, '–')} (ρ = {rho:g})"
             for rho in configs.SCHEMES[scheme][1]]
    body.append([label, *cells])
  count = max(len(radii) for _, radii in configs.SCHEMES.values())
  return summary.markdown(["scheme", *(f"radius {i + 1}" for i in range(count))], body)


def published_normalization() -> str:
  """What is known of the paper's figure, a column for each radius."""
  radii = sorted({rho for row in published.NORMALIZATION.values() for rho in row})
  body = [
      [SCHEMES[scheme], *(row.get(rho, "–") for rho in radii)]
      for scheme, row in published.NORMALIZATION.items()
  ]
  return summary.markdown(["test error (%)", *(f"ρ = {rho:g}" for rho in radii)], body)


def correlation_text(kept: Sequence[Mapping[str, Any]]) -> str:
  """The paper's rank correlations, ours beside them where there are networks.

  Args:
    kept: rows of ``examples.paper.correlation`` that have their sharpness.
  """
  header, columns = [""], []
  for measure, values in sharpness_report.PUBLISHED.items():
    header += [f"{measure.replace('inf', '∞')}, published", "here"]
    columns += [[f"{v:+.3f} {published.DAGGER}" for v in values], _ours(kept, measure)]
  names = [sharpness_report.NAMES[row] for row in sharpness_report.ROWS]
  return summary.markdown(header, list(zip(names, *columns, strict=True)))


def _ours(kept: Sequence[Mapping[str, Any]], measure: str) -> list[str]:
  """A measure's coefficients; two networks have none to speak of."""
  if len(kept) < 3:
    return ["–"] * len(sharpness_report.ROWS)
  axes = sharpness_report.AXES
  result = sharpness_report.correlate(
      np.array([row["sharpness"][measure] for row in kept]),
      sharpness_report.gaps(kept),
      {axis: np.array([row[axis] for row in kept]) for axis in axes},
      resamples=1,
  )
  values = [result.tau, *(result.psi[axis] for axis in axes), result.mean_psi]
  return ["–" if math.isnan(v.value) else f"{v.value:+.3f}" for v in values]
