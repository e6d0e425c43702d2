# ruff: noqa: E731  (losses of one line read best as lambdas)
"""Slices of the loss surface: positions, values, directions, the ball, plots."""

import functools
import math

import jax
import jax.numpy as jnp
import matplotlib as mpl
from matplotlib import pyplot
import numpy as np
import pytest

import asam_jax
from asam_jax import Geometry
from asam_jax import landscape
from asam_jax import sharpness
from tests.sharpness import cases

# Equal widths: what runs without jit is compiled for every shape of a leaf.
WIDTHS = (4, 4, 4)
KINDS = ("adaptive", "random", "filter", "gradient", "eigenvector")


def network(seed=0):
  """(params, batch, loss)."""
  params, batch = cases.network(seed, WIDTHS)
  return params, batch, functools.partial(network_loss, batch=batch)


@jax.jit
def network_loss(params, batch):
  return cases.network_loss(batch)(params)


def distance(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return np.sqrt(sum(np.sum(np.square(x - y)) for x, y in pairs))


@functools.partial(jax.jit, static_argnums=2)
def length_of(epsilon, params, p):
  return Geometry(p=p).norm(epsilon, params)


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_have_unit_length(kind, p):
  params, _, loss = network()
  d = landscape.direction(kind, params, geometry=Geometry(p=p), loss=loss, steps=8)
  np.testing.assert_allclose(length_of(d, params, p), 1, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 300), ("float32", 1e25)])
def test_large_filters_have_a_direction(dtype, size):
  params = {"kernel": jnp.full((8, 4), size, dtype), "bias": jnp.zeros(4, dtype)}
  d = landscape.direction("filter", params)
  assert d["kernel"].dtype == dtype
  np.testing.assert_allclose(length_of(d, params, 2), 1, rtol=2e-3)


def test_gradient_direction_is_the_ascent():
  params, _, loss = network()
  d = landscape.direction("gradient", params, loss=loss)
  tx = asam_jax.ascent(rho=1.0)
  epsilon, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
  for a, b in zip(jax.tree.leaves(d), jax.tree.leaves(epsilon), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_eigenvector_direction_has_the_curvature():
  params, _, loss = network()
  values = jax.jit(lambda w: sharpness.hessian_eigenvalues(loss, w, 2).values)(params)
  product_with = jax.jit(lambda d: jax.jvp(jax.grad(loss), (params,), (d,))[1])
  for index in (0, 1):
    d = landscape.direction("eigenvector", params, loss=loss, index=index)
    curvature = sum(np.vdot(a, b) for a, b in zip(
        jax.tree.leaves(d), jax.tree.leaves(product_with(d)), strict=True))
    np.testing.assert_allclose(curvature, values[index], rtol=0.02)


def test_filter_direction_has_the_filters_proportions():
  rng = np.random.default_rng(0)
  kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)) * np.arange(1, 5), jnp.float32)
  d = landscape.direction("filter", {"kernel": kernel, "bias": jnp.ones(4)})
  lengths = lambda x: np.linalg.norm(np.asarray(x).reshape(-1, 4), axis=0)
  ratio = lengths(d["kernel"]) / lengths(kernel)
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
  np.testing.assert_array_equal(d["bias"], 0)


def test_filter_direction_leaves_out_what_is_not_perturbed():
  params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
  geometry = Geometry(perturb={"a": True, "b": False})
  d = landscape.direction("filter", params, geometry=geometry)
  np.testing.assert_array_equal(d["b"], 0)
  assert np.abs(d["a"]).min() > 0


def test_adaptive_direction_follows_the_weights():
  w = jnp.array([100.0, 1.0])
  draw = lambda kind: np.abs(np.stack([
      landscape.direction(kind, w, geometry=Geometry(0.0), key=jax.random.key(i))
      for i in range(20)]))
  adaptive, plain = draw("adaptive"), draw("random")
  assert np.median(adaptive[:, 0] / adaptive[:, 1]) > 20
  assert np.median(plain[:, 0] / plain[:, 1]) < 5


def test_perturb_keeps_leaves_fixed():
  params, _, _ = network()
  for kind in ("adaptive", "random", "filter"):
    geometry = Geometry(perturb=asam_jax.is_not_bias)
    d = landscape.direction(kind, params, geometry=geometry)
    assert all((layer["bias"] == 0).all() for layer in d)


def test_line_is_the_loss_on_the_line():
  params, _, loss = network()
  d = landscape.direction("adaptive", params)
  result = landscape.line(loss, params, d, rho=0.3, extent=1.5, points=7)
  np.testing.assert_allclose(result.x, np.linspace(-1.5, 1.5, 7), rtol=1e-6)
  w, e = jax.device_get((params, d))
  expected = [loss(jax.tree.map(lambda w, e, x=x: w + 0.3 * x * e, w, e))
              for x in np.asarray(result.x)]
  np.testing.assert_allclose(result.values, expected, rtol=1e-5)


def test_surface_axes_and_rows():
  # Far apart slopes tell x from y.
  loss = lambda w: w[0] + 10 * w[1]
  ds = [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
  result = landscape.surface(
      loss, jnp.zeros(2), ds, 0.5, geometry=Geometry(1.0), extent=2, points=5
  )
  x, y = np.meshgrid(result.x, result.y)
  np.testing.assert_allclose(result.values, 0.5 * (x + 10 * y), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_ball_is_the_boundary(p):
  params, _, _ = network()
  geometry = Geometry(p=p)
  ds = [landscape.direction(kind, params, geometry=geometry, key=jax.random.key(i))
        for i, kind in enumerate(("adaptive", "random"))]
  # Far from orthogonal: the outline must not assume that.
  ds[1] = jax.tree.map(np.add, *ds)
  result = landscape.surface(lambda w: w[0]["bias"].sum(), params, ds, 0.3,
                             geometry=geometry, points=2)
  for x, y in np.asarray(result.ball)[::40]:
    e = jax.tree.map(lambda a, b, x=x, y=y: 0.3 * (x * a + y * b), *jax.device_get(ds))
    np.testing.assert_allclose(length_of(e, params, p), 0.3, rtol=1e-4)
  np.testing.assert_allclose(result.ball[0], result.ball[-1], atol=1e-5)


def test_plane_goes_through_its_points():
  points = [network(seed)[0] for seed in range(3)]
  _, _, loss = network()
  result = landscape.plane(loss, points, margin=0.0, points=3)
  corners = np.asarray(result.corners)
  for i, j in [(0, 1), (0, 2), (1, 2)]:
    apart = np.linalg.norm(corners[i] - corners[j])
    np.testing.assert_allclose(apart, distance(points[i], points[j]), rtol=1e-5)
  np.testing.assert_allclose(result.values[0, 0], loss(points[0]), rtol=1e-4)
  np.testing.assert_allclose(result.values[0, -1], loss(points[1]), rtol=1e-4)
  middle = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, *points[:2])
  np.testing.assert_allclose(result.values[0, 1], loss(middle), rtol=1e-4)


def test_plane_reaches_the_third_point():
  corners = [jnp.zeros(3), jnp.array([2.0, 0.0, 0.0]), jnp.array([2.0, 3.0, 4.0])]
  result = landscape.plane(lambda w: w @ jnp.array([1.0, 10.0, 100.0]), corners,
                           margin=0.0, points=2)
  np.testing.assert_allclose(result.corners[2], [2, 5], rtol=1e-6)
  np.testing.assert_allclose(result.values, [[0, 2], [430, 432]], atol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: landscape.direction("up", w), ValueError, "kind='up'"),
        (lambda w: landscape.direction("gradient", w), ValueError, "loss=None"),
        (lambda w: landscape.direction("gradient", w, loss=lambda w: 0 * w.sum()),
         ValueError, "zero gradient"),
        (lambda w: landscape.direction("random", 0 * w, geometry=Geometry(0.0)),
         ValueError, "eta > 0"),
        (lambda w: landscape.line(jnp.sum, w, w, points=1), ValueError, "points=1"),
        (lambda w: landscape.line(jnp.sum, w, w, extent=0), ValueError, "extent=0"),
        (lambda w: landscape.line(jnp.sum, w, w[:1]), TypeError, "direction"),
        (lambda w: landscape.line(lambda w: w, w, w), TypeError, "shape"),
        (lambda w: landscape.surface(jnp.sum, w, [w]), ValueError, "1 entries"),
        (lambda w: landscape.surface(jnp.sum, w, [w, -w]), ValueError, "parallel"),
        (lambda w: landscape.plane(jnp.sum, [w, w]), ValueError, "2 entries"),
        (lambda w: landscape.plane(jnp.sum, [w, w, w]), ValueError, "equal"),
        (lambda w: landscape.plane(jnp.sum, [w, 2 * w, 3 * w]), ValueError, "line"),
    ],
)
def test_errors(call, error, message):
  with pytest.raises(error, match=message):
    call(jnp.array([1.0, 2.0]))


def test_plots_show_what_was_computed(tmp_path):
  mpl.use("agg")
  loss = lambda w: jnp.sum(w**2)
  w, ds = jnp.array([1.0, 2.0]), [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]
  lines = {"SGD": landscape.line(loss, w, ds[0], points=5)}
  ax = landscape.plot_line(lines)
  np.testing.assert_allclose(ax.lines[0].get_ydata(), lines["SGD"].values)
  assert [t.get_text() for t in ax.get_legend().get_texts()] == ["SGD"]

  surface = landscape.surface(loss, w, ds, points=5)
  ax = landscape.plot_surface(surface)
  np.testing.assert_allclose(ax.lines[0].get_xydata(), surface.ball)
  assert r"\rho" in ax.get_xlabel()
  assert ax.get_aspect() == 1  # or the ball would look like an ellipse
  assert [a.get_ylabel() for a in ax.figure.axes if a is not ax] == ["loss"]

  plane = landscape.plane(loss, [w, *ds], points=5)
  ax = landscape.plot_plane(plane, ("a", "b", "c"))
  assert [t.get_text() for t in ax.texts] == ["a", "b", "c"]
  assert ax.get_aspect() == 1
  ax.figure.savefig(tmp_path / "plane.png")
  pyplot.close("all")
