"""Figures 1 and 3 of the paper: ``python -m examples.paper.figures``.

Figure 1: rescaling a ReLU network's weights moves ASAM's region along and leaves SAM's
as it is. Figure 3: what that does to the paths of the two on |w1 ReLU(w2) - 0.04|. Both
are computed by the library.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import lines
import numpy as np
import optax
import tyro

import asam_jax
from examples import style

SCALE = (3.0, 1 / 3)  # A
RADIUS = 0.5
STARTS = {"left": (0.2, 0.05), "right": (0.3, 0.1 / 3)}
STEPS = 120
DPI = 200
OPTIMIZERS = {
    "sam": asam_jax.sam(optax.sgd(0.05), rho=0.05),
    "asam": asam_jax.adaptive_sam(optax.sgd(0.05), rho=0.05, eta=0.0),
}


def rescaled_loss(w: Any) -> Any:
  """A loss of two weights in a row, unchanged when w becomes A w."""
  return (w[0] * w[1] - 3.0) ** 2


def toy_loss(w: Any) -> Any:
  """Figure 3's."""
  return jnp.abs(w[0] * jax.nn.relu(w[1]) - 0.04)


def region(center: Any, adaptive: bool, points: int = 200) -> np.ndarray:
  """The boundary of the perturbed weights, [points, 2].

  Each point is where the ascent goes for a gradient in one direction.
  """
  w = jnp.asarray(center)
  normalization = "elementwise" if adaptive else "none"
  tx = asam_jax.ascent(RADIUS, 0.0, normalization=normalization)
  angles = np.linspace(0, 2 * np.pi, points)
  directions = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1))
  state = tx.init(w)
  epsilon: Any = jax.vmap(lambda g: tx.update(g, state, w)[0])(directions)
  return np.asarray(w + epsilon)


def rise(center: Any, adaptive: bool) -> float:
  """By how much the loss rises at the worst point of the region."""
  boundary = region(center, adaptive, 2000)
  return float(max(map(rescaled_loss, boundary)) - rescaled_loss(np.asarray(center)))


def trajectory(method: str, start: Sequence[float], steps: int = STEPS) -> np.ndarray:
  """Figure 3's path of a method, [steps + 1, 2]."""
  tx = OPTIMIZERS[method]

  def step(carry, _):
    w, state = carry
    grad_fn = jax.grad(toy_loss)
    updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
    w = optax.apply_updates(w, updates)
    return (w, state), w

  w = jnp.asarray(start)
  _, path = jax.jit(
      lambda w: jax.lax.scan(step, (w, tx.init(w)), length=steps)
  )(w)
  return np.concatenate([np.asarray(start)[None], path])


def creep(method: str, start: Sequence[float], steps: int = 20) -> float:
  """How far a path goes after it has crossed the valley.

  Between the means of so many steps after the crossing and of the last, for it swings
  from one side to the other; 0 if it does not come to the valley.
  """
  path = trajectory(method, start)
  crossed = path[:, 0] * np.maximum(path[:, 1], 0) > 0.04
  if not crossed.any():
    return 0.0
  first = int(np.argmax(crossed))
  return float(np.linalg.norm(
      path[first : first + steps].mean(0) - path[-steps:].mean(0)
  ))


def figure_1(path: pathlib.Path) -> None:
  """The two regions at w and at A w, with the loss' contours."""
  w = np.ones(2)
  x, y = np.meshgrid(np.linspace(0, 5, 300), np.linspace(-0.3, 2, 300))
  levels = (0.5, 1, 2, 3, 4, 6, 8, 10, 12)
  with style.picture(
      path, 1, 2, size=(9, 2.9), dpi=DPI, sharey=True
  ) as (figure, axes):
    for axis, method in zip(axes[0], ("sam", "asam"), strict=True):
      look = style.of(method)
      axis.contour(x, y, rescaled_loss((x, y)), levels, colors="0.8", linewidths=0.8)
      for center, name in ((w, "w"), (w * SCALE, "Aw")):
        boundary = region(center, method == "asam")
        axis.fill(*boundary.T, color=look.color, alpha=0.2, linewidth=0)
        axis.plot(*boundary.T, color=look.color)
        axis.plot(*center, "o", color="black", markersize=4)
        axis.annotate(
            f"{name}: +{rise(center, method == 'asam'):.2f}",
            (center[0], boundary[:, 1].max()), (0, 4), textcoords="offset points",
            ha="center",
        )
      axis.set_title(look.label)
      axis.set_xlabel("$w_1$")
      axis.grid(visible=False)
      axis.set_aspect("equal")
    axes[0, 0].set_ylabel("$w_2$")
    style.explain(
        figure,
        f"A = diag(3, 1/3), ρ = {RADIUS}. Contours: (w₁w₂ − 3)², the same at w and Aw."
        " Numbers: its largest rise in the region.",
    )


def figure_3(path: pathlib.Path) -> None:
  """The paths from two starts that are rescalings of each other."""
  x, y = np.meshgrid(np.linspace(0.15, 0.4, 300), np.linspace(-0.02, 0.24, 300))
  with style.picture(
      path, 1, 2, size=(9, 4.3), dpi=DPI, sharey=True
  ) as (figure, axes):
    for axis, method in zip(axes[0], ("sam", "asam"), strict=True):
      look = style.of(method)
      loss = np.abs(x * np.maximum(y, 0) - 0.04)
      axis.contour(x, y, loss, 12, colors="0.8", linewidths=0.8)
      valley = np.linspace(0.168, 0.4, 100)
      axis.plot(valley, 0.04 / valley, color="0.5", linestyle=":")
      for start in STARTS.values():
        points = trajectory(method, start)
        axis.plot(*points.T, ".-", color=look.color, markersize=4, linewidth=0.8)
        axis.plot(*start, "o", color="black", markersize=5)
        axis.annotate(
            f"start ({start[0]:g}, {start[1]:.3g})", start, (6, -10),
            textcoords="offset points", fontsize=8,
        )
        axis.plot(*points[-1], "*", color=look.color, markersize=11,
                  markeredgecolor="black", markeredgewidth=0.7)
      axis.set_title(f"{look.label}, ρ = 0.05")
      axis.set_xlabel("$w_1$")
      axis.set_xticks([0.15, 0.2, 0.25, 0.3, 0.35])
      axis.grid(visible=False)
    axes[0, 0].set_ylabel("$w_2$")
    figure.legend(handles=_signs(), loc="outside upper center", ncols=5)
    style.explain(
        figure,
        f"|w₁ ReLU(w₂) − 0.04|: {STEPS} steps of 0.05. The starts are rescalings of"
        " each other.",
    )


def _signs() -> list[lines.Line2D]:
  """What the legend of figure 3 has, in no method's colour."""
  signs = {
      "start": {"marker": "o", "linestyle": "none", "color": "black"},
      "step": {"marker": ".", "linewidth": 0.8, "color": "0.5"},
      "last step": {"marker": "*", "markersize": 11, "linestyle": "none",
                    "color": "0.5", "markeredgecolor": "black"},
      "loss 0": {"linestyle": ":", "color": "0.5"},
      "equal loss": {"linewidth": 0.8, "color": "0.8"},
  }
  return [lines.Line2D([], [], label=name, **look) for name, look in signs.items()]


@dataclasses.dataclass(frozen=True)
class Arguments:
  folder: pathlib.Path = pathlib.Path("runs/paper/pictures")
  """Folder of the two pictures."""


def main(argv: Sequence[str] | None = None) -> None:
  folder = tyro.cli(
      Arguments, args=argv, prog="python -m examples.paper.figures",
      description=__doc__,
  ).folder
  figure_1(folder / "figure_1.png")
  figure_3(folder / "figure_3.png")
  print(folder / "figure_1.png", folder / "figure_3.png")


if __name__ == "__main__":
  main()
