"""The pictures and the table of sharpness_training.py, from its records alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from asam_jax import landscape
from examples import records
from examples import style
from examples import summary

METHODS = ("SGD", "SAM", "ASAM")


def table(rows: Sequence[records.Row]) -> str:
  """What holds after the last epoch, as Markdown."""
  measured = rows[0]["config"]["measured"]
  last = {
      row["optimizer"]: row for row in rows if "plain" in row  # the latest stays
  }
  fields = {
      f"worst case, ρ = {measured['plain'][0]:g} (nats)": ("plain", ".4f"),
      f"adaptive worst case, ρ = {measured['adaptive'][0]:g} (nats)": (
          "adaptive", ".3f"),
      "test accuracy (%)": ("test_accuracy", ".1%"),
  }
  body = [
      [label, *(f"{last[name][field]:{form}}".rstrip("%") for name in METHODS)]
      for label, (field, form) in fields.items()
  ]
  epochs = rows[0]["config"]["epochs"]
  return summary.markdown([f"after {epochs} epochs", *METHODS], body)


def plot_curves(rows: Sequence[records.Row], path: pathlib.Path) -> None:
  """Sharpness and accuracy by epoch; a panel holds one measure at one radius."""
  config = rows[0]["config"]
  measured, rho = config["measured"], config["rho"]
  panels = [
      ("worst case", f"plain, ‖ε‖ ≤ {measured['plain'][0]:g}", "plain", METHODS),
      ("adaptive worst case", f"‖T⁻¹ε‖ ≤ {measured['adaptive'][0]:g}", "adaptive",
       METHODS),
      ("first order, SAM's own", f"ρ‖g‖, ρ = {rho['SAM']:g}", "free", ("SAM",)),
      ("first order, ASAM's own", f"ρ‖Tg‖, ρ = {rho['ASAM']:g}", "free", ("ASAM",)),
      ("training loss", "", "train_loss", METHODS),
      ("test accuracy", "", "test_accuracy", METHODS),
  ]
  units = {"test_accuracy": "accuracy (%)", "train_loss": "loss (nats)"}
  with style.picture(path, 2, 3, size=(12, 6.4)) as (figure, axes):
    for axis, (title, what, field, names) in zip(axes.flat, panels, strict=True):
      for name in names:
        chosen = [row for row in rows if row["optimizer"] == name and field in row]
        values = np.array([row[field] for row in chosen])
        if field == "test_accuracy":
          values = 100 * values
        axis.plot([row["epoch"] for row in chosen], values,
                  color=style.of(name).color, label=style.of(name).label)
      axis.set_title(title)
      axis.set_xlabel("epoch")
      axis.set_ylabel(units.get(field, f"rise of the loss (nats),\n{what}"))
      if field != "test_accuracy":
        axis.set_yscale("log")
      axis.legend()
    style.explain(figure, (
        f"One run of each (seed {config['seed']}), so no error bars and no telling what"
        " is chance. Worst cases, by Auto-PGD, and training loss: on 256 training"
        " images.\nFirst order: of the training batches, mean over an epoch; it comes"
        " with the step and costs nothing."))


def plot_slices(drawn: dict[str, Any], path: pathlib.Path) -> None:
  """The loss along lines, on a surface and in a plane."""
  lines = {name: _slice(landscape.Line, line) for name, line in drawn["lines"].items()}
  rho = drawn["config"]["measured"]["adaptive"][0]
  with style.picture(path, 1, 3, size=(13, 4.0)) as (figure, axes):
    left, middle, right = axes[0]
    landscape.plot_line(lines, left)
    for drawn_line, name in zip(left.get_lines(), lines, strict=True):
      drawn_line.set_color(style.of(name).color)
    left.legend()  # in the colours of the methods
    left.set_title("along each one's own gradient")
    left.set_xlabel(f"position / ρ, ρ = {rho:g}; shaded: the adaptive ball")
    landscape.plot_surface(_slice(landscape.Surface, drawn["surface"]), middle)
    middle.set_title("around ASAM's weights; red: the ball")
    middle.set_xlabel("along the gradient / ρ")
    middle.set_ylabel("along the top eigenvector / ρ")
    landscape.plot_plane(_slice(landscape.Plane, drawn["plane"]), METHODS, right)
    right.set_title("the plane of the three")
    right.set_xlabel("distance from SGD towards SAM, ‖Δw‖")
    right.set_ylabel("distance across, ‖Δw‖")
    left.set_ylabel("training loss (nats)")
    for axis in axes[0][1:]:
      axis.grid(False)
    for axis in figure.axes:
      if axis.get_label() == "<colorbar>":
        axis.set_ylabel("training loss (nats)")
    style.explain(figure, "The final weights of one run of each, on 256 training"
                  " images with their wrong labels.")


def _slice(kind: Any, fields: dict[str, Any]) -> Any:
  return kind(**{name: np.array(value) for name, value in fields.items()})
