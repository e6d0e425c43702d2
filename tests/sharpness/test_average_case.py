# ruff: noqa: E731  (losses of one line read best as lambdas)
"""Average-case sharpness against exact means of quadratics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import sharpness
from tests import problems
from tests.sharpness import cases


@pytest.mark.parametrize(
    ("distribution", "p", "second_moment"),
    [
        ("normal", 2, 1.0),
        ("uniform", math.inf, 1 / 3),
        ("uniform", 2, 1 / (6 + 2)),  # of one coordinate in the 6-ball
        ("uniform", 1, 2 / ((6 + 1) * (6 + 2))),  # in the cross-polytope
    ],
)
@pytest.mark.parametrize("antithetic", [True, False])
def test_mean_on_a_quadratic(distribution, p, second_moment, antithetic):
  with problems.enable_x64(True):
    loss, w, _, hessian = cases.quadratic(1, 6, definite=True)
    t = problems.oracle_factor(w["w"], 0.05, "elementwise")
    expected = 0.4**2 * second_moment * np.sum(np.diag(hessian) * t**2) / 2
    result = sharpness.average_case(
        loss, w, 0.4, geometry=Geometry(0.05, p), distribution=distribution,
        samples=4000, antithetic=antithetic)
    assert abs(result.value - expected) < 4 * result.standard_error
    if antithetic:  # without it the slope drowns the uniform ones
      assert result.standard_error < 0.05 * expected
    assert result.draws.shape == (2000 if antithetic else 4000,)


def test_standard_error_is_the_spread_of_repetitions():
  loss, w, _, _ = cases.quadratic(2, 6, definite=True)
  w = jax.tree.map(lambda x: x.astype(jnp.float32), w)
  estimate = lambda key: sharpness.average_case(loss, w, 0.4, samples=32, key=key)
  results = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 500))
  np.testing.assert_allclose(
      np.mean(results.standard_error**2), np.var(results.value), rtol=0.2)


def test_antithetic_pairs_cancel_a_slope():
  loss = lambda w: jnp.sum(3 * w)
  result = sharpness.average_case(loss, jnp.ones(5), 0.5)
  np.testing.assert_allclose(result.value, 0, atol=1e-5)


def test_small_rho_gives_the_trace():
  with problems.enable_x64(True):
    params, batch = cases.network(0, dtype=np.float64)
    loss = cases.network_loss(batch)
    rho = 1e-5  # below the distance to the nearest kink of the ReLUs
    mean, trace = jax.jit(lambda w: (
        sharpness.average_case(loss, w, rho, geometry=Geometry(0.0), samples=2000),
        sharpness.hessian_trace(loss, w, geometry=Geometry(0.0), samples=1000),
    ))(params)
    slack = 4 * math.hypot(2 / rho**2 * mean.standard_error, trace.standard_error)
    np.testing.assert_allclose(2 * mean.value / rho**2, trace.value, atol=slack)
    assert slack < 0.5 * abs(trace.value)  # the comparison says something
