"""Defaults and options that a method hands on: each changes what it should."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from asam_jax import landscape
from asam_jax import nnx
from asam_jax import sharpness

W = {"kernel": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "bias": jnp.array([0.5, 0.2])}
ROWS = jnp.array([[[1.0, 2.0]], [[3.0, -1.0]], [[0.5, 0.5]], [[2.0, 2.0]]])
AS_IS = optax.identity()


def loss(w, rows=ROWS[0]):
  return jnp.mean((rows @ w["kernel"] + w["bias"]) ** 2)


def point(tx, grads):
  """Where the second gradient is taken."""
  return tx.update(grads, tx.init(W), W, grad_fn=lambda w: w)[0]


@pytest.mark.parametrize("options", [
    {}, {"rho": 0.3}, {"p": 1}, {"p": float("inf")}, {"perturb": asam_jax.is_not_bias},
], ids=lambda options: "-".join(options) or "defaults")
def test_sam_is_its_closed_form(options):
  grads = jax.grad(loss)(W)
  got = point(asam_jax.sam(AS_IS, **options), grads)
  rho, p = options.get("rho", 0.05), options.get("p", 2)
  flat = [np.asarray(grads["bias"], float).ravel(),
          np.asarray(grads["kernel"], float).ravel()]
  if "perturb" in options:
    flat[0] = 0 * flat[0]
  g = np.concatenate(flat)
  epsilon = {
      2: rho * g / np.linalg.norm(g), float("inf"): rho * np.sign(g),
      1: rho * np.sign(g) * (np.abs(g) == np.abs(g).max()),
  }[p]
  expected = {"bias": W["bias"] + epsilon[:2],
              "kernel": W["kernel"] + epsilon[2:].reshape(2, 2)}
  chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_defaults_of_adaptive_sam():
  grads = jax.grad(loss)(W)
  got = point(asam_jax.adaptive_sam(AS_IS), grads)
  t = {"kernel": jnp.abs(W["kernel"]) + 0.01, "bias": jnp.ones(2)}
  norm = jnp.sqrt(sum(jnp.sum((t[k] * grads[k]) ** 2) for k in W))
  expected = {k: W[k] + 0.5 * t[k] ** 2 * grads[k] / norm for k in W}
  chex.assert_trees_all_close(got, expected, rtol=1e-6)


# The rest of the defaults; None and False are "not asked for" everywhere.
DEFAULTS = {
    asam_jax.above_average: {"threshold": 0, "decay": 0.9},
    asam_jax.describe: {"geometry": None},
    asam_jax.ae_sam: {"threshold": 0, "decay": 0.9},
    asam_jax.filterwise: {"filter_axis": -1},
    asam_jax.friendly_sam: {"sigma": 1, "decay": 0.9},
    asam_jax.gsam: {"alpha": 0.4},
    asam_jax.looksam: {"k": 5, "alpha": 0.7},
    asam_jax.microbatched: {"argnums": 1},
    nnx.microbatched: {"argnums": 1},
    asam_jax.momentum_sam: {"decay": 0.9},
    asam_jax.sam: {"rho": 0.05},
    asam_jax.sometimes: {"reuse": 0},
    asam_jax.subtract_ema: {"decay": 0.9, "sigma": 1},
    asam_jax.vasso: {"decay": 0.6},
    asam_jax.auto_radius: {"cosine": 0.8, "rate": 0.05, "start": 0.05, "rho_max": 1e4},
    asam_jax.rise_radius: {"rise": 0.17, "rate": 0.05, "start": 0.05, "rho_max": 1e4},
    asam_jax.loss_budget: {"rho_max": float("inf")},
    sharpness.average_case: {
        "distribution": "normal", "samples": 32, "antithetic": True},
    sharpness.hessian_eigenvalues: {"k": 1, "steps": 32},
    sharpness.hessian_trace: {"samples": 32},
    sharpness.m_sharpness: {"m": 128, "measure": sharpness.worst_case},
    sharpness.rank_correlation: {"level": 0.95, "resamples": 1000, "seed": 0},
    sharpness.worst_case: {"method": "apgd", "steps": 20, "restarts": 1},
    landscape.direction: {"index": 0, "steps": 32, "filter_axis": -1},
    landscape.line: {"extent": 2, "points": 41},
    landscape.plane: {"margin": 0.25, "points": 41},
    landscape.surface: {"extent": 2, "points": 41},
    landscape.plot_surface: {"levels": 20},
    landscape.plot_plane: {"levels": 20, "labels": ("1", "2", "3")},
}
GEOMETRY = {"eta": 0.01, "p": 2, "normalization": "elementwise"}
COMMON = GEOMETRY | {"rho": 0.5, "argnums": 0, "geometry": asam_jax.Geometry()}


def public_functions():
  for module in (asam_jax, nnx, sharpness, landscape):
    for name in module.__all__:
      value = getattr(module, name)
      if inspect.isfunction(value):
        yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("function", [*public_functions()])
def test_defaults_are_those_written_down(function):
  for parameter in inspect.signature(function).parameters.values():
    default = parameter.default
    if default is parameter.empty:
      continue
    expected = (COMMON | DEFAULTS.get(function, {})).get(parameter.name)
    assert default == expected or (expected is None and default is False), parameter


def test_defaults_of_a_geometry():
  fields = dataclasses.fields(asam_jax.Geometry)
  assert {f.name: f.default for f in fields if f.default is not None} == GEOMETRY


# Per-device ascent, averaged descent, on devices that vmap plays.

METHODS = {
    "adaptive_sam": asam_jax.adaptive_sam, "sam": asam_jax.sam,
    "looksam": asam_jax.looksam, "ae_sam": asam_jax.ae_sam,
    "friendly_sam": asam_jax.friendly_sam, "vasso": asam_jax.vasso,
}


@pytest.mark.parametrize("name", METHODS)
def test_an_axis_averages_the_second_gradient(name):
  # Reused directions and combinations use the local clean gradient; here none is used.
  options = {"looksam": {"alpha": 0.0}}.get(name, {})

  def step(rows, axis_name=None):
    grad_fn = lambda w: jax.grad(loss)(w, rows)  # noqa: E731
    tx = METHODS[name](AS_IS, 0.2, axis_name=axis_name, **options)
    return tx.update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)[0]

  averaged = jax.vmap(lambda rows: step(rows, "data"), axis_name="data")(ROWS)
  local = [step(rows) for rows in ROWS]
  mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *local)
  assert np.abs(local[0]["kernel"] - mean["kernel"]).max() > 0.1
  for i in range(len(ROWS)):
    chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], averaged), mean, rtol=1e-5)


def test_gsam_averages_the_second_gradient_alone():
  def step(rows):
    grad_fn = lambda w: jax.grad(loss)(w, rows)  # noqa: E731
    tx = asam_jax.gsam(AS_IS, 0.2, alpha=0.0, axis_name="data")
    return tx.update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)[0]

  got = jax.vmap(step, axis_name="data")(ROWS)
  chex.assert_trees_all_close(got["kernel"][0], got["kernel"][1], rtol=1e-6)


def test_devices_with_finite_gradients_skip_no_step():
  def step(rows, skipping):
    grad_fn = lambda w: jax.grad(loss)(w, rows)  # noqa: E731
    link = asam_jax.perturbed_gradient(asam_jax.ascent(0.2), axis_name="data")
    tx = optax.chain(link, optax.sgd(0.1))
    if skipping:
      tx = asam_jax.skip_nonfinite(optax.sgd(0.1), link, axis_name="data")
    updates, state = tx.update(grad_fn(W), tx.init(W), W, grad_fn=grad_fn)
    return updates, state.skipped if skipping else jnp.array(0)

  run = lambda skipping: jax.vmap(  # noqa: E731
      lambda rows: step(rows, skipping), axis_name="data")(ROWS)
  (got, skipped), (expected, _) = run(True), run(False)
  np.testing.assert_array_equal(skipped, 0)
  chex.assert_trees_all_close(got, expected, rtol=1e-6)
  assert jnp.abs(got["kernel"]).min() > 0


@pytest.mark.parametrize("make", [
    lambda **options: asam_jax.carried(AS_IS, asam_jax.ascent(
        0.1, perturb={"steps": False, "w": True}), **options),
    lambda **options: asam_jax.momentum_sam(
        AS_IS, 0.1, perturb={"steps": False, "w": True}, **options),
], ids=["carried", "momentum_sam"])
def test_a_wider_dtype_is_for_floats_alone(make):
  params = {"steps": jnp.array(3, jnp.int32), "w": jnp.ones(2, jnp.bfloat16)}
  grads = {"steps": jnp.array(0, jnp.int32), "w": jnp.ones(2, jnp.bfloat16)}
  tx = make(dtype=jnp.float32)
  updates, state = tx.update(grads, tx.init(params), params)
  assert state.params["w"].dtype == updates["w"].dtype == jnp.float32
  assert state.params["steps"].dtype == updates["steps"].dtype == jnp.int32
  assert state.params["steps"] == 3
  assert updates["steps"] == 0


@pytest.mark.parametrize(
    ("p", "passes", "after_the_loop"),
    [(1, 1, 1), (2, 1, 1), (3, 2, 1), (float("inf"), 1, 0)],
)
def test_every_pass_but_the_last_has_a_barrier_for_each_leaf(p, passes, after_the_loop):
  # Without it XLA writes T g to memory between the passes; and without the one after
  # the loop that keeps squares in range, it holds more around the last pass.
  tx = asam_jax.ascent(p=p)
  text = jax.jit(tx.update).lower(W, tx.init(W), W).as_text()
  assert text.count("optimization_barrier") == passes * len(W) + after_the_loop
