# ruff: noqa: E731  (losses of one line read best as lambdas)
"""Worst-case sharpness against closed forms, random search and its own promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import asam_jax
from asam_jax import _coordinates
from asam_jax import Geometry
from asam_jax import sharpness
from asam_jax._coordinates import Coordinates
from asam_jax.sharpness import _worst_case
from tests import problems
from tests.sharpness import cases

SEARCHES = ("apgd", "pga")


@pytest.mark.parametrize(
    ("method", "definite", "normalization"),
    [("apgd", True, "none"), ("apgd", False, "elementwise"),
     ("pga", True, "elementwise"), ("pga", False, "none")])
def test_quadratic_in_a_ball(method, definite, normalization):
  with problems.enable_x64(True):
    loss, w, slope, hessian = cases.quadratic(1, 6, definite)
    t = problems.oracle_factor(w["w"], 0.05, normalization)
    expected = cases.max_in_ball(t * slope, t[:, None] * hessian * t, 0.7)
    result = jax.jit(lambda w: sharpness.worst_case(
        loss, w, 0.7, geometry=Geometry(0.05, normalization=normalization),
        method=method, steps=100, restarts=3))(w)
    np.testing.assert_allclose(result.value, expected, rtol=1e-4)
    assert result.value <= expected * (1 + 1e-9)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize(
    ("p", "oracle"), [(math.inf, cases.max_in_box), (1, cases.max_in_diamond)])
def test_quadratic_in_a_box_and_a_diamond(method, p, oracle):
  with problems.enable_x64(True):
    loss, w, slope, hessian = cases.quadratic(2, 5, definite=True)
    t = problems.oracle_factor(w["w"], 0.0, "elementwise")
    expected = oracle(t * slope, t[:, None] * hessian * t, 0.8)
    result = jax.jit(lambda w: sharpness.worst_case(
        loss, w, 0.8, geometry=Geometry(0.0, p), method=method, steps=50,
        restarts=20))(w)
    np.testing.assert_allclose(result.value, expected, rtol=1e-6)


def test_random_starts_leave_a_minimum():
  with problems.enable_x64(True):
    _, w, _, hessian = cases.quadratic(3, 6, definite=True)
    center = w["w"]
    loss = lambda x: (x["w"] - center) @ hessian @ (x["w"] - center) / 2
    stuck = jax.jit(lambda w: sharpness.worst_case(
        loss, w, 0.3, geometry=Geometry(0.0), restarts=0))(w)
    assert stuck.value == 0
    found = jax.jit(lambda w: sharpness.worst_case(
        loss, w, 0.3, geometry=Geometry(0.0), steps=100, restarts=1))(w)
    t = np.abs(np.asarray(center))
    top = np.linalg.eigvalsh(t[:, None] * hessian * t)[-1]
    np.testing.assert_allclose(found.value, 0.3**2 * top / 2, rtol=1e-4)


# One compiled search serves many networks and tests.
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def compiled_measure(params, batch, rho, p, method, steps, restarts):
  return sharpness.worst_case(
      cases.network_loss(batch), params, rho, geometry=Geometry(0.0, p),
      method=method, steps=steps, restarts=restarts)


def measure(params, batch, rho, p=2, method="apgd", steps=20, restarts=1):
  # All by position: jit compiles anew for a default that one call spells out.
  return compiled_measure(params, batch, rho, p, method, steps, restarts)


@functools.partial(jax.jit, static_argnums=2)
def length_of(epsilon, params, p):
  return Geometry(0.0, p).norm(epsilon, params)


@jax.jit
def network_loss(params, batch):
  return cases.network_loss(batch)(params)


def stacked(trees):
  return jax.tree.map(lambda *xs: np.stack(xs), *trees)


@pytest.mark.parametrize(
    ("p", "method"),
    [(1, "apgd"), (2, "apgd"), (math.inf, "apgd"), (2, "pga"), (math.inf, "pga")])
def test_bounds_on_networks(p, method):
  rho = {1: 1.0, 2: 0.5, math.inf: 0.1}[p]
  for seed in range(4):
    params, batch = cases.network(seed)
    result = measure(params, batch, rho, p, method)
    single = measure(params, batch, rho, p, "one_step")
    assert result.value >= single.value
    length = length_of(result.perturbation, params, p)
    assert length <= rho * (1 + 1e-5)
    moved = jax.tree.map(np.add, params, result.perturbation)
    rise = network_loss(moved, batch) - network_loss(params, batch)
    np.testing.assert_allclose(result.value, rise, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [2, math.inf])
def test_against_long_random_restarts(p):
  rho = {2: 0.5, math.inf: 0.1}[p]
  networks = [cases.network(seed) for seed in range(4)]
  found = np.array([measure(*network, rho, p).value for network in networks])
  # All at once: thousands of small steps take the time that their dispatch takes.
  long = jax.jit(jax.vmap(lambda w, b: measure(
      w, b, rho, p, steps=100, restarts=20).value))(*stacked(networks))
  shares = found / np.asarray(long)
  # 0.9996 to 1.0000 (p = 2) and 0.994 to 1.0000 (p = inf) when written.
  assert min(shares) > 0.98, shares
  assert max(shares) < 1 + 1e-4, shares


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_one_step_is_the_optimizers_perturbation(p):
  # Equal widths, for each shape is compiled; the loss jitted, the rest is not.
  params, batch = cases.network(0, widths=(4, 4, 4))
  loss = functools.partial(network_loss, batch=batch)
  result = sharpness.worst_case(
      loss, params, 0.3, geometry=Geometry(0.02, p), method="one_step")
  tx = asam_jax.ascent(0.3, 0.02, p)
  epsilon, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
  for ours, theirs in zip(
      jax.tree.leaves(result.perturbation), jax.tree.leaves(epsilon), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_allclose(
      result.value, loss(jax.tree.map(np.add, params, epsilon)) - loss(params),
      rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_zero_weights_stay_and_the_radius_holds(p):
  params, batch = cases.network(0)
  kernel = np.array(params[0]["kernel"])
  kernel[:2] = 0
  params[0]["kernel"] = jnp.array(kernel)
  result = measure(params, batch, 0.4, p)
  np.testing.assert_array_equal(result.perturbation[0]["kernel"][:2], 0)
  assert np.isfinite(result.trace).all()
  length = length_of(result.perturbation, params, p)
  np.testing.assert_allclose(length, 0.4, rtol=1e-4)  # the maximum is on the boundary


def test_trace_holds_every_iterate():
  params, batch = cases.network(0, widths=(5, 4, 3))
  result = measure(params, batch, 0.5, steps=7, restarts=2)
  assert result.trace.shape == (3, 8)
  assert result.trace[0, 0] == 0  # row 0 starts at w
  assert (result.trace[1:, 0] != 0).all()
  np.testing.assert_allclose(result.value, result.trace.max(), rtol=1e-5)


def test_selection_leaves_the_others_alone():
  params, batch = cases.network(0)
  chosen = jax.tree_util.tree_map_with_path(
      lambda path, leaf: "bias" not in jax.tree_util.keystr(path), params)
  result = jax.jit(lambda w: sharpness.worst_case(
      cases.network_loss(batch), w, geometry=Geometry(perturb=chosen), method="pga",
      restarts=0))(params)
  assert all((layer["bias"] == 0).all() for layer in result.perturbation)
  assert all((layer["kernel"] != 0).any() for layer in result.perturbation)


@pytest.mark.parametrize("rho", [0.0, 1e-25])
def test_tiny_radius(rho):
  params, batch = cases.network(0)
  result = measure(params, batch, rho)
  assert 0 <= result.value < 1e-6  # rounding
  assert np.isfinite(result.trace).all()


def test_vmap_agrees_with_one_by_one():
  pairs = [cases.network(seed) for seed in range(3)]
  values = jax.vmap(lambda w, b: measure(w, b, 0.5).value)(*stacked(pairs))
  single = [measure(w, b, 0.5).value for w, b in pairs]
  np.testing.assert_allclose(values, np.stack(single), rtol=1e-3)


def test_half_precision_keeps_its_dtype():
  _, batch = cases.network(0)
  params, _ = cases.network(0, dtype=jnp.bfloat16)
  result = measure(params, batch, 0.5)
  dtypes = {x.dtype for x in jax.tree.leaves(result.perturbation)}
  assert dtypes == {jnp.dtype(jnp.bfloat16)}
  assert result.value.dtype == jnp.float32
  wide = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  expected = measure(wide, batch, 0.5).value
  np.testing.assert_allclose(result.value, expected, rtol=0.1)


@pytest.mark.parametrize("method", SEARCHES)
def test_single_precision_where_double_is_enabled(method):
  with problems.enable_x64(True):
    w = jnp.ones(2, jnp.float32)
    result = jax.jit(lambda w: sharpness.worst_case(
        lambda w: jnp.sum(w**2), w, 0.5, method=method))(w)
    assert result.value.dtype == result.perturbation.dtype == jnp.float32


def test_nan_on_the_way_is_never_the_best():
  # The loss has no value beyond 1.5, and the one step lands there.
  loss = lambda w: jnp.where(w > 1.5, jnp.nan, w)
  result = jax.jit(lambda w: sharpness.worst_case(
      loss, w, 1.0, geometry=Geometry(0.0), restarts=4))(jnp.array(1.0))
  assert 0 < result.value <= 0.5


def test_checkpoints_of_auto_pgd():
  # 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 of 100.
  assert _worst_case.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
  assert _worst_case.checkpoints(1) == []


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_projection_is_the_nearest_point(p):
  rng = np.random.default_rng(0)
  point = [jnp.array(rng.normal(size=(2, 2))), jnp.array(rng.normal(size=3))]
  flat = np.concatenate([np.ravel(x) for x in point])
  norm = lambda x: np.linalg.norm(x, p)
  projected = _coordinates.project(point, 1.0, p)
  found = np.concatenate([np.ravel(x) for x in projected])
  assert norm(found) <= 1 + 1e-6
  # In twice the variables, x = a - b with a, b >= 0, each ball is smooth.
  n = len(flat)
  limits = {
      1: lambda z: 1 - z.sum(),
      2: lambda z: 1 - np.sum((z[:n] - z[n:]) ** 2),
      math.inf: lambda z: 1 - (z[:n] + z[n:]),
  }
  best = optimize.minimize(
      lambda z: np.sum((z[:n] - z[n:] - flat) ** 2), np.full(2 * n, 0.05),
      constraints={"type": "ineq", "fun": limits[p]}, bounds=[(0, None)] * 2 * n,
      method="SLSQP", options={"ftol": 1e-12, "maxiter": 500})
  np.testing.assert_allclose(found, best.x[:n] - best.x[n:], atol=1e-4)
  inside = [x / 10 for x in point]
  for a, b in zip(_coordinates.project(inside, 1.0, p), inside, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_slope_of_the_projection(p):
  with problems.enable_x64(True):
    rng = np.random.default_rng(1)
    x, direction, weights = rng.normal(size=(3, 6))
    at = lambda x: weights @ _coordinates.project([x], 1.0, p)[0]
    slope = jax.jit(jax.grad(at))(x) @ direction
    h = 1e-6
    run = jax.jit(at)
    expected = (run(x + h * direction) - run(x - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize("point", [[1.0, 1.0, -1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("rho", [0.0, 1.5])
def test_projection_onto_a_diamond_with_ties(point, rho):
  found = _coordinates.project([jnp.array(point)], rho, 1)[0]
  length = np.abs(point).sum()
  expected = np.array(point) * min(1, rho / max(length, 1e-9))  # ties shrink alike
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_uniform_draws_fill_the_ball(p):
  coordinates = Coordinates.build(jnp.ones(3), Geometry(normalization="none"))
  draw = lambda k: _coordinates.uniform(coordinates, k, 2.0, p)[0]
  points = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
  lengths = np.linalg.norm(np.asarray(points), ord=p, axis=1)
  # P(length <= r) = (r / 2)^3 for any norm; the quartiles of 4000 draws.
  np.testing.assert_allclose(
      np.quantile(lengths, [0.25, 0.5, 0.75]),
      2 * np.cbrt([0.25, 0.5, 0.75]), rtol=0.03)
  assert lengths.max() <= 2 * (1 + 1e-6)
  np.testing.assert_allclose(np.asarray(points).mean(0), 0, atol=0.08)


def test_integers_that_are_not_perturbed_stay():
  params = {"w": jnp.array([1.0, 2.0]), "steps": jnp.array(3)}
  loss = lambda params: jnp.sum(params["w"] ** 2)
  geometry = Geometry(perturb=lambda path, leaf: leaf.ndim > 0)
  result = sharpness.worst_case(loss, params, geometry=geometry, restarts=0, steps=2)
  assert result.value > 0
  assert result.perturbation["steps"] == 0
  assert result.perturbation["steps"].dtype == params["steps"].dtype


def test_the_norm():
  w = {"kernel": jnp.array([2.0, 0.0, -4.0]), "bias": jnp.array([1.0])}
  e = {"kernel": jnp.array([1.0, 0.0, 1.0]), "bias": jnp.array([0.5])}
  for p in (1, 2, 3, math.inf):
    length = Geometry(0.0, p).norm(e, w)
    np.testing.assert_allclose(length, np.linalg.norm([0.5, 0.25, 0.5], p), rtol=1e-6)
  moved = {"kernel": jnp.array([0.0, 1.0, 0.0]), "bias": jnp.zeros(1)}
  assert Geometry(0.0).norm(moved, w) == jnp.inf
