"""Plots of the slices. Matplotlib is imported by the first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from asam_jax import _arguments
from asam_jax.landscape import _slices


def plot_line(lines: Mapping[str, _slices.Line], ax: Any = None) -> Any:
  r"""Draws losses along directions, x in units of rho and the ball shaded.

  Args:
    lines: for each label, a :class:`Line`.
    ax: the Matplotlib axes to draw into; new ones if not given.

  Returns:
    The Matplotlib axes.

  Raises:
    TypeError: if an argument is not of the type above.

  Examples:
    >>> import jax.numpy as jnp
    >>> import matplotlib; matplotlib.use("agg")
    >>> from asam_jax import landscape
    >>> line = landscape.line(lambda w: jnp.sum(w**2), jnp.ones(1), jnp.ones(1))
    >>> ax = landscape.plot_line({"SGD": line})
    >>> print(ax.get_xlabel())
    position / $\rho$
  """
  _arguments.instance("lines", lines, Mapping)
  for label, line in lines.items():
    _arguments.instance(f"lines[{label!r}]", line, _slices.Line)
  ax = _axes(ax)
  ax.axvspan(-1, 1, color="0.92", zorder=0)
  for label, line in lines.items():
    ax.plot(line.x, line.values, label=label, linewidth=1.5)
  ax.set_xlabel(r"position / $\rho$")
  ax.set_ylabel("loss")
  ax.margins(x=0)
  ax.legend(frameon=False)
  return ax


def plot_surface(surface: _slices.Surface, ax: Any = None, levels: int = 20) -> Any:
  """Draws contours of the loss in units of rho, and the ball around w.

  Args:
    surface: a :class:`Surface`.
    ax: the Matplotlib axes to draw into; new ones if not given.
    levels: the number of contour levels.

  Returns:
    The Matplotlib axes.

  Raises:
    TypeError: if an argument is not of the type above.
    ValueError: if levels is below 1.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import matplotlib; matplotlib.use("agg")
    >>> from asam_jax import landscape
    >>> w = jnp.array([1.0, 2.0])
    >>> ds = [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
    >>> result = landscape.surface(lambda w: jnp.sum(w**2), w, ds, points=9)
    >>> ax = landscape.plot_surface(result)
  """
  _arguments.instance("surface", surface, _slices.Surface)
  _arguments.count("levels", levels)
  ax = _axes(ax)
  _contours(ax, surface, levels)
  ax.plot(*np.asarray(surface.ball).T, color="crimson", linewidth=1.5)
  ax.plot(0, 0, "o", color="crimson", markersize=4)
  ax.set_xlabel(r"$\epsilon_1 / \rho$")
  ax.set_ylabel(r"$\epsilon_2 / \rho$")
  ax.set_aspect("equal")
  ax.set_xlim(surface.x[0], surface.x[-1])
  ax.set_ylim(surface.y[0], surface.y[-1])
  return ax


def plot_plane(
    plane: _slices.Plane,
    labels: tuple[str, str, str] = ("1", "2", "3"),
    ax: Any = None,
    levels: int = 20,
) -> Any:
  """Draws contours of the loss in the plane of three checkpoints.

  Args:
    plane: a :class:`Plane`.
    labels: the names of the checkpoints.
    ax: the Matplotlib axes to draw into; new ones if not given.
    levels: the number of contour levels.

  Returns:
    The Matplotlib axes.

  Raises:
    TypeError: if an argument is not of the type above.
    ValueError: if levels is below 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> import matplotlib; matplotlib.use("agg")
    >>> from asam_jax import landscape
    >>> corners = [jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
    >>> plane = landscape.plane(lambda w: jnp.sum(w**2), corners, points=9)
    >>> ax = landscape.plot_plane(plane, ("SGD", "SAM", "ASAM"))
  """
  _arguments.instance("plane", plane, _slices.Plane)
  _arguments.count("levels", levels)
  if not isinstance(labels, (tuple, list)) or len(labels) != 3:
    raise TypeError(f"labels={labels!r} must be three names, one per checkpoint.")
  ax = _axes(ax)
  _contours(ax, plane, levels)
  for (x, y), label in zip(np.asarray(plane.corners), labels, strict=True):
    ax.plot(x, y, "o", color="crimson", markersize=5)
    ax.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none",
                      "alpha": 0.8})
  ax.set_xlabel("distance")
  ax.set_ylabel("distance")
  ax.set_aspect("equal")
  return ax


def _contours(ax, result, levels: int) -> None:
  values = np.asarray(result.values)
  drawn = ax.contourf(result.x, result.y, values, levels=levels, cmap="viridis")
  bar = ax.figure.colorbar(drawn, ax=ax, shrink=0.85)
  bar.set_label("loss")


def _axes(ax: Any) -> Any:
  if ax is not None:
    if not hasattr(ax, "contourf"):
      raise TypeError(f"ax={ax!r} must be the axes of a Matplotlib figure.")
    return ax
  from matplotlib import pyplot  # only those who draw need it

  return pyplot.subplots(figsize=(4, 3.2), layout="constrained")[1]
