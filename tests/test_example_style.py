"""Pictures: one colour for each method, told apart by everyone, and named points."""

import ast
import importlib
import itertools
import math
import pathlib
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the examples need the extra 'examples'")

from matplotlib import colors

from examples import labels
from examples import records
from examples import style
from examples import summary

ROOT = pathlib.Path(__file__).parent.parent

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SEEN = {
    "all colours": np.eye(3),
    "protanopia": np.array([
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]),
    "deuteranopia": np.array([
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]),
}


def lab(color, sight):
  """CIELAB of a colour, as somebody sees it."""
  rgb = np.array(colors.to_rgb(color))
  linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
  linear = np.clip(sight @ linear, 0, 1)
  to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                     [0.0193, 0.1192, 0.9505]])
  xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
  f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
  return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SEEN)
def test_methods_are_told_apart(sight):
  looks = {
      name: (lab(look.color, SEEN[sight]), look.marker)
      for name, look in style.METHODS.items()
  }
  for (a, one), (b, other) in itertools.combinations(looks.items(), 2):
    distance = np.linalg.norm(one[0] - other[0])
    assert distance > 9 or one[1] != other[1], (a, b, distance)
  # The lines of the quickstart and of the curves have no markers.
  for a, b in itertools.combinations(("sgd", "sam", "asam"), 2):
    assert np.linalg.norm(looks[a][0] - looks[b][0]) > 25, (a, b)


def test_each_method_has_its_own_look():
  for field in ("color", "label"):
    values = [getattr(look, field) for look in style.METHODS.values()]
    assert len(set(values)) == len(values)


def test_the_frontier_has_a_style_for_every_method():
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  from examples import frontier_methods

  assert set(frontier_methods.METHODS) <= set(style.METHODS)
  assert style.of("ASAM") == style.of("adaptive_sam") == style.METHODS["asam"]
  with pytest.raises(ValueError, match="method='adam' has no style; there are sgd"):
    style.of("adam")


def test_no_picture_has_colours_of_its_own():
  """No other module of the examples names a colour for a line, or uses pyplot."""
  for path in sorted((ROOT / "examples").rglob("*.py")):
    # A notebook shows its pictures by pyplot, in its own few colours.
    if path.name == "style.py" or path.parent.name == "notebooks":
      continue
    text = path.read_text()
    assert "pyplot" not in text, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        assert not re.fullmatch(r"#[0-9A-Fa-f]{6}|C\d", node.value), path


def quickstart():
  report = importlib.import_module("examples.quickstart_report")
  return report.draw, records.read(ROOT / "results/quickstart/results.jsonl")


def frontier():
  report = importlib.import_module("examples.frontier_report")
  rows = records.read(ROOT / "results/frontier/frontier.jsonl")
  kinds = [[row for row in rows if row["config"]["kind"] == kind]
           for kind in ("accuracy", "cost")]
  tasks = {("mlp", noise): report.rows_of(*kinds, "mlp", noise) for noise in (0.4, 0.0)}
  return lambda tasks, path: report.plot(tasks, "flops", path), tasks


def curves():
  report = importlib.import_module("examples.sharpness_training_report")
  rows = records.read(ROOT / "results/sharpness_training/log.jsonl")
  return report.plot_curves, rows


def slices():
  report = importlib.import_module("examples.sharpness_training_report")
  rows = records.read(ROOT / "results/sharpness_training/slices.json")
  return report.plot_slices, rows[0]


def scatter():
  report = importlib.import_module("examples.sharpness_report")
  _, kept, measures = report.read(ROOT / "results/sharpness_study")
  radii = {name: next(iter(by_rho)) for name, by_rho in measures.items()}
  return lambda _, path: report.scatter(kept, measures, radii, path), None


@pytest.mark.parametrize(
    "made", [quickstart, frontier, curves, slices, scatter], ids=lambda f: f.__name__
)
def test_pictures_have_labels_and_the_colours_of_the_methods(made, drawings, tmp_path):
  pytest.importorskip("sklearn", reason="the examples need the extra 'examples'")
  draw, data = made()
  draw(data, tmp_path / "x.png")
  (figure,) = drawings
  assert (tmp_path / "x.png").stat().st_size > 10_000
  assert figure.get_supxlabel()  # what bars and points are
  panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
  for axis in panels:
    assert axis.get_xlabel()
    shared = not axis.yaxis.get_tick_params()["labelleft"]
    assert axis.get_ylabel() or shared
  # A unit, or the ratio that has none.
  texts = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
  assert all(re.search(r"\(%\)|nats|points|/ ρ|‖Δw‖|scale", text) for text in texts)
  looks = {look.label: look.color for look in style.METHODS.values()}
  lines = [line for axis in panels for line in axis.get_lines()]
  named = [line for line in lines if line.get_label() in looks]
  for line in named:
    assert line.get_color() == looks[line.get_label()]
  if made is frontier:
    names = [{text.get_text() for text in axis.texts} for axis in panels]
    from examples import frontier_methods

    # In place, SGD too.
    assert names == [{style.of(x).label for x in frontier_methods.METHODS}] * 2
    assert figure.legends == []
  elif made is not scatter:
    assert {"SGD", "SAM", "ASAM"} <= {line.get_label() for line in named}
  if made is curves:
    first_order = [a for a in panels if a.get_title().startswith("first order")]
    assert [len(axis.get_lines()) for axis in first_order] == [1, 1]  # a radius each


def test_bars_are_explained(tmp_path):
  figures = []
  with style.picture(tmp_path / "a" / "x.png", 1, 1, size=(4, 3)) as (figure, axes):
    style.error_bars(axes[0, 0], 1.0, 2.0, 0.5, "asam")
    style.explain(figure, style.bars_mean(5))
    figures.append(figure)
  assert (tmp_path / "a" / "x.png").read_bytes().startswith(b"\x89PNG")
  assert "5 seeds; bars: ± one standard error" in figures[0].get_supxlabel()


@pytest.mark.parametrize(
    ("runs", "words"),
    [(1, "One run of each: no bars"), (2, "a rough guess"), (10, "Mean of 10 seeds")],
)
def test_what_bars_mean_for_few_runs(runs, words):
  assert words in style.bars_mean(runs)
  assert "Mean of 2 to 3 seeds" in style.bars_mean(2, most=3)
  assert "nan" not in style.bars_mean(runs)


def test_summaries():
  assert summary.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / math.sqrt(3)))
  assert summary.show(*summary.mean_and_error([90.0, 92.0]), digits=1) == "91.0 ± 1.0"
  assert summary.show(*summary.mean_and_error([90.04]), digits=1) == "90.0"
  assert summary.optional(math.nan, ".0f", " %") == "-"
  assert summary.optional(12.6, ".0f", " %") == "13 %"
  assert summary.markdown(["a", "b"], [[1, 2]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_names_keep_clear_of_each_other_and_of_the_points(tmp_path):
  rng = np.random.default_rng(0)
  points = [
      labels.Point(x, y, 0.02, f"method {i}", "#0072B2")
      for i, (x, y) in enumerate(0.3 * rng.uniform(size=(12, 2)))
  ]
  with style.picture(tmp_path / "x.png", 1, 1, size=(6, 5)) as (figure, axes):
    axis = axes[0, 0]
    axis.set(xlim=(-0.5, 1), ylim=(-0.5, 1))
    figure.draw_without_rendering()
    labels.name_points(axis, points)
    figure.draw_without_rendering()
    names = [text for text in axis.texts if text.get_text()]
    assert [text.get_text() for text in names] != []
    assert {text.get_text() for text in names} == {point.name for point in points}
    boxes = [text.get_window_extent().shrunk(0.98, 0.9) for text in names]
    for one, other in itertools.combinations(boxes, 2):
      assert not one.overlaps(other)
    for point in points:
      at = axis.transData.transform((point.x, point.y))
      assert not any(box.contains(*at) for box in boxes)


def test_no_room_for_a_name(tmp_path):
  with style.picture(tmp_path / "x.png", 1, 1, size=(1, 1)) as (figure, axes):
    figure.draw_without_rendering()
    point = labels.Point(0.5, 0.5, 0, "a long name " * 9, "#0072B2")
    with pytest.raises(ValueError, match="no room for the name 'a long"):
      labels.name_points(axes[0, 0], [point])


def test_accuracies_are_spread_by_the_error(tmp_path):
  with style.picture(tmp_path / "x.png", 1, 1, size=(4, 4)) as (figure, axes):
    axis = axes[0, 0]
    style.scale_by_error(axis)
    axis.set_ylim(80, 99.5)
    figure.draw_without_rendering()
    heights = axis.transData.transform([(0, y) for y in (90, 99, 80, 98)])[:, 1]
    assert heights[1] - heights[0] == pytest.approx(heights[3] - heights[2], rel=1e-3)
    ticks = axis.get_yticks()
    assert {80, 90} <= set(ticks)
    assert len(ticks) >= 5
