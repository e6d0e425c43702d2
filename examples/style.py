"""The look of all pictures: a colour and a marker per method, fonts, and error bars.

Matplotlib is used without pyplot: no backend is chosen and nothing stays open.

    with style.picture(path, 1, 2, size=(9, 3.2)) as (figure, axes):
      axes[0, 0].plot(epochs, accuracy, color=style.of("asam").color, label="ASAM")
      style.error_bars(axes[0, 1], 0, mean, error, "asam")
      style.explain(figure, style.bars_mean(seeds))
"""

from collections.abc import Iterator
import contextlib
import io
import pathlib
from typing import Any, NamedTuple

import matplotlib
from matplotlib import ticker
from matplotlib.backends import backend_agg
import matplotlib.figure
import numpy as np

from examples import records


class Style(NamedTuple):
  """How a method is drawn."""

  label: str
  color: str
  marker: str


# Colours of Okabe and Ito and of Tol, which those who see two primary colours tell
# apart. Where two are close to them, or to anyone, the markers differ: circles and
# squares need one gradient or two in each step, triangles skip some, the rest change
# the second gradient.
METHODS: dict[str, Style] = {
    "sgd": Style("SGD", "#404040", "o"),
    "sgd_double": Style("SGD, 2 × epochs", "#7A7A7A", "P"),
    "sgd_best": Style("SGD, best epoch", "#9A9A9A", "X"),
    "sam": Style("SAM", "#0072B2", "s"),
    "asam": Style("ASAM", "#D55E00", "s"),
    "auto": Style("ASAM, auto radius", "#8C564B", "s"),
    "momentum": Style("Momentum-ASAM", "#009E73", "o"),
    "momentum_plain": Style("Momentum-SAM", "#56B4E9", "o"),
    "stale": Style("stale ASAM", "#E69F00", "o"),
    "every_2": Style("every 2nd step", "#332288", "^"),
    "random_half": Style("random half", "#88CCEE", "^"),
    "last_half": Style("last half", "#AA4499", "^"),
    "last_fifth": Style("last fifth", "#7A306C", "<"),
    "looksam": Style("LookSAM", "#117733", "v"),
    "ae_sam": Style("AE-SAM", "#CC6677", "v"),
    "part": Style("ascent on 1/4 batch", "#999933", "P"),
    "vasso": Style("VaSSO", "#882255", "D"),
    "friendly": Style("Friendly SAM", "#44AA99", "D"),
    "gsam": Style("GSAM", "#CC79A7", "p"),
    "weighted": Style("weighted mean", "#A08A00", "X"),
    "stable": Style("StableSAM", "#4B8B3B", "p"),
    "functional": Style("Functional SAM", "#1B7F9E", "D"),
    "iterated": Style("2 ascent steps", "#6A3D9A", "X"),
    "m_sharpness": Style("m-sharpness", "#B15928", "^"),
    "rise": Style("rise of the loss", "#5E7FB1", "v"),
    "loss_budget": Style("LE-SAM", "#B8860B", "p"),
}

# Runs by their radius, told apart by lightness too.
RADII: dict[str, Style] = {
    "too small": Style("too small", "#56B4E9", "o"),
    "about right": Style("about right", "#009E73", "s"),
    "too large": Style("too large", "#D55E00", "^"),
    "collapsed": Style("collapsed", "#404040", "X"),
}

# Other names of the same methods: those of the library's functions.
ALIASES = {
    "adaptive_sam": "asam",
    "momentum_sam": "momentum",
    "friendly_sam": "friendly",
    "carried": "stale",
}

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so it is everywhere
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "lines.linewidth": 1.6,
}


def of(method: str) -> Style:
  """The style of a method, by its name in any case."""
  name = method.lower()
  name = ALIASES.get(name, name)
  if name not in METHODS:
    known = ", ".join([*METHODS, *ALIASES])
    raise ValueError(f"method={method!r} has no style; there are {known}.")
  return METHODS[name]


@contextlib.contextmanager
def picture(
    path: pathlib.Path, rows: int, columns: int, *, size: tuple[float, float],
    dpi: int = 130, **options
) -> Iterator[tuple[matplotlib.figure.Figure, Any]]:
  """A figure and its axes [rows, columns], saved when the block is left.

  Args:
    path: the PNG, replaced as a whole.
    rows: of axes.
    columns: of axes.
    size: width and height in inches.
    dpi: dots of the PNG in an inch.
    **options: for ``Figure.subplots``.

  Yields:
    The figure and the array of its axes.
  """
  with matplotlib.rc_context(SETTINGS):
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    backend_agg.FigureCanvasAgg(figure)
    yield figure, figure.subplots(rows, columns, squeeze=False, **options)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
  records.replace(path, buffer.getvalue())


def error_bars(axis: Any, x: Any, y: Any, error: float, method: str, **options) -> None:
  """A method's marker with its error bar; without the bar if the error is NaN."""
  style = of(method)
  drawn = None if np.isnan(error) else error
  axis.errorbar(x, y, drawn, **{
      "color": style.color, "marker": style.marker, "markersize": 6,
      "linestyle": "none", "elinewidth": 1.0, "capsize": 2, **options})


def bars_mean(runs: int, what: str = "bars", most: int = 0) -> str:
  """What the error bars are, in words; of ``runs`` seeds, or up to ``most``."""
  if max(runs, most) < 2:
    return f"One run of each: no {what}, and no telling what is chance."
  few = ", a rough guess from so few" if runs < 4 else ""
  seeds = f"{runs} to {most}" if most > runs else f"{runs}"
  return f"Mean of {seeds} seeds; {what}: ± one standard error of that mean{few}."


def scale_by_error(axis: Any) -> None:
  """Accuracies in percent, spread as the logarithm of the error is.

  90, 99 and 99.9 % are equally far apart, so that one picture shows both who is far
  behind and who is ahead by a little.
  """
  axis.set_yscale("function", functions=(_spread, lambda z: 100 - 10 ** -np.array(z)))
  axis.yaxis.set_major_locator(_RoundAccuracies())


def _spread(accuracy: Any) -> Any:
  return -np.log10(np.maximum(100 - np.asarray(accuracy), 1e-3))


class _RoundAccuracies(ticker.Locator):
  """Ticks on that scale: round numbers, the rounder first, none too close."""

  def __call__(self) -> Any:
    assert self.axis is not None
    return self.tick_values(*sorted(self.axis.get_view_interval()))

  def tick_values(self, vmin: float, vmax: float) -> Any:
    apart = (_spread(vmax) - _spread(vmin)) / 14
    ticks: list[float] = []
    for step in (10, 5, 2, 1, 0.5, 0.2, 0.1):
      for value in np.arange(np.ceil(vmin / step), np.floor(vmax / step) + 1) * step:
        if all(abs(_spread(value) - _spread(tick)) >= apart for tick in ticks):
          ticks.append(float(value))
    return sorted(ticks)


def explain(figure: Any, text: str) -> None:
  """A line beneath the panels."""
  figure.supxlabel(text, fontsize=8.5, color="0.25")
