"""Names beside the points of a picture, without a legend and without overlap."""

from collections.abc import Iterator, Sequence
import math
from typing import Any, NamedTuple

from matplotlib import colors
from matplotlib import patheffects
from matplotlib import transforms
import numpy as np

DISTANCES = (9, 13, 18, 24, 32, 42, 54, 68, 84, 102)  # of a name, in printer's points
DIRECTIONS = 24
MARKER = 5  # half its size
HALO = patheffects.withStroke(linewidth=2, foreground="white")
LEADER_FROM = 12  # names further away than this get a line to their point


class Point(NamedTuple):
  """A point in the axes' data and what it is called; the error is half its bar."""

  x: float
  y: float
  error: float
  name: str
  color: str


class _Place(NamedTuple):
  """Where a name could go."""

  box: transforms.Bbox
  line: np.ndarray  # from the point to the name
  distance: float


def name_points(axis: Any, points: Sequence[Point], size: float = 8.5) -> None:
  """Writes each name at the nearest free place around its point.

  Args:
    axis: axes whose limits and place in the figure are final: draw it before, by
      ``figure.draw_without_rendering()``.
    points: what is named; all of it is kept free of names.
    size: of the letters, in points.
  """
  figure = axis.figure
  scale = figure.dpi / 72  # pixels in a printer's point
  renderer = figure.canvas.get_renderer()
  where = axis.transData.transform([(point.x, point.y) for point in points])
  taken = [_box(axis, point, scale) for point in points]
  lines: list[np.ndarray] = []
  frame = axis.get_window_extent()
  # Those with many neighbours have the fewest places to go to, so they choose first.
  gaps = np.linalg.norm(where[:, None] - where[None], axis=-1)
  order = np.argsort(-np.sum(gaps < 60 * scale, axis=1), kind="stable")
  for i in order:
    point = points[i]
    text = axis.text(0, 0, point.name, size=size, color=_darker(point.color),
                     va="bottom", ha="left", in_layout=False, path_effects=[HALO])
    extent = text.get_window_extent(renderer)
    others = [box for j, box in enumerate(taken) if j != i]
    best = None
    for place in _places(where[i], extent.width, extent.height, scale):
      if not _inside(place.box, frame):
        continue
      cost = place.distance + _penalty(place, taken, others, lines)
      if best is None or cost < best[0]:
        best = (cost, place)
      if cost == place.distance:
        break  # free, and the rest is further away
    if best is None:
      raise ValueError(f"no room for the name {point.name!r} in the axes.")
    place = best[1]
    pixels = axis.transData.inverted()
    text.set_position(pixels.transform((place.box.x0, place.box.y0)))
    taken.append(place.box)
    if place.distance > LEADER_FROM:
      lines.append(place.line)
      axis.plot(*pixels.transform(place.line).T, color=point.color, linewidth=0.7,
                alpha=0.7, zorder=1, scalex=False, scaley=False)


def _darker(color: str) -> Any:
  """Enough of a contrast to white for letters."""
  return tuple(0.65 * part for part in colors.to_rgb(color))


def _inside(box: transforms.Bbox, frame: transforms.Bbox) -> bool:
  return (frame.x0 <= box.x0 and box.x1 <= frame.x1
          and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def _penalty(place: _Place, taken, others, lines) -> float:
  """How much a name there is in the way; 0 where it is not."""
  covered = sum(place.box.overlaps(box) for box in taken)
  crossed = sum(_crosses(place.line, line) for line in lines)
  crossed += sum(_passes(place.line, box) for box in others)
  crossed += sum(_passes(line, place.box) for line in lines)
  return 1e4 * covered + 300 * crossed


def _box(axis: Any, point: Point, scale: float) -> transforms.Bbox:
  """What a marker and its error bar cover."""
  low, high = axis.transData.transform(
      [(point.x, point.y - point.error), (point.x, point.y + point.error)])
  half = MARKER * scale
  return transforms.Bbox([
      (low[0] - half, min(low[1], (low[1] + high[1]) / 2 - half)),
      (high[0] + half, max(high[1], (low[1] + high[1]) / 2 + half)),
  ])


def _places(
    at: np.ndarray, width: float, height: float, scale: float
) -> Iterator[_Place]:
  """Where a name can go around a point, the nearest first."""
  for distance in DISTANCES:
    for k in range(DIRECTIONS):
      angle = 2 * math.pi * k / DIRECTIONS
      x = at[0] + distance * scale * math.cos(angle)
      y = at[1] + distance * scale * math.sin(angle)
      left = x if math.cos(angle) > -1e-9 else x - width
      bottom = y - height / 2
      box = transforms.Bbox([(left, bottom), (left + width, bottom + height)])
      yield _Place(box, np.array([at, (x, y)]), distance)


def _passes(line: np.ndarray, box: transforms.Bbox) -> bool:
  """Whether a segment passes through a box."""
  x, y = np.linspace(line[0], line[1], 24)[1:-1].T
  inside = (box.x0 < x) & (x < box.x1) & (box.y0 < y) & (y < box.y1)
  return bool(inside.any())


def _crosses(one: np.ndarray, other: np.ndarray) -> bool:
  """Whether two segments cross."""

  def side(line, point):
    (ax, ay), (bx, by), (x, y) = line[0], line[1], point
    return np.sign((bx - ax) * (y - ay) - (by - ay) * (x - ax))

  return bool(
      side(one, other[0]) != side(one, other[1])
      and side(other, one[0]) != side(other, one[1])
  )
