"""The perturbation where numbers are zero, small, large, narrow or not numbers."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asam_jax
from tests import problems
from tests.test_ascent import EXPONENTS
from tests.test_ascent import OPERATORS
from tests.test_ascent import random_tree

TINY = float(jnp.finfo(jnp.float32).tiny)
HUGE = float(jnp.finfo(jnp.float32).max)


def perturbation(w, g, p, normalization="elementwise", eta=0.0, rho=0.5):
  """(epsilon, state) of one array, in float64 NumPy."""
  tx = asam_jax.ascent(rho, eta, p, normalization=normalization)
  w, g = jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32)
  epsilon, state = jax.jit(tx.update)(g, tx.init(w), w)
  return np.asarray(epsilon, np.float64), state


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("p", EXPONENTS)
def test_error_within_usual_magnitudes(p, operator):
  """|w| and |g| of 1e-4 to 1e2, sorts of trees that training has."""
  tx = asam_jax.ascent(0.5, 0.01, p, normalization=operator)
  update = jax.jit(tx.update)
  rng = np.random.default_rng(0)
  for _ in range(25):
    signs = rng.choice([-1, 1], (2, 3, 3, 2, 4))
    spread = rng.uniform(0, 3)  # from one magnitude for all to all magnitudes
    middle = rng.uniform(-4 + spread, 2 - spread, (2, 1, 1, 1, 1))
    exponents = middle + rng.uniform(-spread, spread, signs.shape)
    w, g = (signs * 10.0**exponents).astype(np.float32)
    t = problems.oracle_factor(w, 0.01, operator)
    (expected,), sharpness = problems.oracle_perturbation([g], [t], 0.5, p)
    epsilon, state = update(g, tx.init(w), w)
    np.testing.assert_allclose(epsilon, expected, rtol=8e-6, atol=1e-37)
    np.testing.assert_allclose(state.sharpness, sharpness, rtol=8e-6)
    radius = problems.oracle_norm([np.asarray(epsilon, np.float64) / t], p)
    assert radius <= 0.5 * (1 + 2e-6)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_zero_gradient_gives_zero(p, operator):
  params, grads = random_tree(6)
  grads = jax.tree.map(jnp.zeros_like, grads)
  tx = asam_jax.ascent(0.5, 0.0, p, normalization=operator)
  epsilon, state = tx.update(grads, tx.init(params), params)
  chex.assert_trees_all_equal(epsilon, grads)
  assert state.sharpness == 0


@pytest.mark.parametrize("p", EXPONENTS)
def test_a_zero_gradient_has_zero_derivatives(p):
  params, grads = random_tree(6)
  zeros = jax.tree.map(jnp.zeros_like, grads)
  tx = asam_jax.ascent(0.5, p=p)
  epsilon_of = lambda g, w: tx.update(g, tx.init(w), w)[0]  # noqa: E731
  epsilon, tangent = jax.jvp(epsilon_of, (zeros, params), (grads, grads))
  chex.assert_trees_all_equal(tangent, zeros)
  _, pull = jax.vjp(epsilon_of, zeros, params)
  chex.assert_trees_all_equal(pull(epsilon), (zeros, zeros))
  chex.assert_trees_all_equal(pull(params), (zeros, zeros))


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_zero_weights(p, operator):
  params = {"w": jnp.zeros((3, 3, 2, 2)), "v": jnp.array([0.0, 2.0])}
  grads = {"w": jnp.ones((3, 3, 2, 2)), "v": jnp.array([3.0, 1.0])}
  for eta in (0.0, 0.01):
    tx = asam_jax.ascent(0.5, eta, p, normalization=operator)
    epsilon, _ = tx.update(grads, tx.init(params), params)
    ts = [
        problems.oracle_factor(w, eta, operator) for w in (params["v"], params["w"])
    ]
    expected, _ = problems.oracle_perturbation(
        [grads["v"], grads["w"]], ts, 0.5, p
    )
    np.testing.assert_allclose(epsilon["v"], expected[0], rtol=1e-4)
    np.testing.assert_allclose(epsilon["w"], expected[1], rtol=1e-4)


@pytest.mark.parametrize("p", EXPONENTS)
def test_radius_at_any_magnitude_of_the_gradient(p):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=200), jnp.float32)
  direction = rng.uniform(0.1, 1, 200)
  t = problems.oracle_factor(w, 0.01, "elementwise")
  tx = asam_jax.ascent(0.5, 0.01, p)
  update = jax.jit(tx.update)
  exponents = [-30, -25, -20, -12, 12, 20, 25, 30] + [-36, 37] * (p == 2)
  for exponent in exponents:
    g = jnp.asarray(direction * 10.0**exponent, jnp.float32)
    epsilon, state = update(g, tx.init(w), w)
    (expected,), _ = problems.oracle_perturbation([g], [t], 0.5, p)
    np.testing.assert_allclose(epsilon, expected, rtol=1e-4)
    radius = problems.oracle_norm([np.asarray(epsilon, np.float64) / t], p)
    np.testing.assert_allclose(radius, 0.5, rtol=1e-4)
    assert not np.isnan(state.sharpness)


def test_norms_beyond_the_range_of_float32():
  # Each number is in range, the norm of ten thousand of them is not.
  w, g = np.ones(10_000, np.float32), np.full(10_000, 3e38, np.float32)
  tx = asam_jax.ascent(0.5, 0.0)
  epsilon, _ = jax.jit(tx.update)(g, tx.init(w), w)
  np.testing.assert_allclose(epsilon, np.full(10_000, 0.005), rtol=1e-5)


# T g can leave the range of float32 where T and g do not.
BEYOND = [
    (1e22, 1e22),
    (1e30, 1e10),
    (1e10, 1e30),
    (3e38, 1e-3),
    (1e33, 1e-14),
    (1e33, 1e-30),
    (1e36, 1e-35),
    (1e-20, 1e-20),
    (1e-30, 1e-10),
    (1e-8, 1e-36),
    (1e-36, 1e-4),
    (1e-36, 1e36),
]


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("normalization", ["elementwise", "layerwise"])
def test_products_beyond_the_range(p, normalization):
  rng = np.random.default_rng(0)
  tx = asam_jax.ascent(0.5, 0.0, p, normalization=normalization)
  update = jax.jit(tx.update)
  for size_w, size_g in BEYOND:
    w = (size_w * rng.uniform(0.2, 1, 50)).astype(np.float32)
    g = (size_g * rng.uniform(0.2, 1, 50)).astype(np.float32)
    if normalization == "layerwise" and size_w > 1e37:
      continue  # the norm itself is beyond
    t = problems.oracle_factor(w, 0.0, normalization)
    (expected,), sharpness = problems.oracle_perturbation([g], [t], 0.5, p)
    epsilon, state = update(g, tx.init(w), w)
    epsilon = np.asarray(epsilon, np.float64)
    # Numbers below the smallest normal one may be flushed to zero.
    np.testing.assert_allclose(epsilon, expected, rtol=2e-5, atol=2 * TINY)
    assert (epsilon != 0).any()
    if 1e3 * TINY < sharpness < HUGE:
      np.testing.assert_allclose(state.sharpness, sharpness, rtol=2e-5)
    elif sharpness > HUGE:
      assert state.sharpness == state.dual_norm == math.inf


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_where_the_range_ends(p):
  w, g = np.array([[1.0, 2.0], [0.6, 0.4]])
  (expected,), _ = problems.oracle_perturbation([g], [w], 0.5, p)
  for size_w, size_g in ((1e-20, 1e-20), (1e25, 1e24)):
    epsilon, _ = perturbation(size_w * w, size_g * g, p)
    np.testing.assert_allclose(epsilon / size_w, expected, rtol=2e-5)
  # Below 1e-48 a gradient counts as zero, above 1e51 as infinite.
  epsilon, state = perturbation(1e-25 * w, 1e-25 * g, p)
  assert (epsilon == 0).all()
  assert state.dual_norm == 0
  epsilon, state = perturbation(1e26 * w, 1e26 * g, p)
  assert np.isnan(epsilon).all()
  assert np.isnan(state.dual_norm)


@pytest.mark.parametrize("p", EXPONENTS)
def test_radius_zero_under_a_norm_beyond_the_range(p):
  epsilon, state = perturbation([1e22, 1e22], [1e22, 1e22], p, rho=0.0)
  assert (epsilon == 0).all()
  assert state.sharpness == 0
  assert state.dual_norm == math.inf


def test_many_small_entries_count_beside_a_large_one():
  # At sizes where the squares of the small ones would be flushed to zero.
  for largest in (2.0**-56, 2.0**-40, 2.0**-34, 2.0**40):
    g = np.r_[largest, np.full(100_000, largest / 2**8)]
    epsilon, state = perturbation(np.ones(g.size), g, 2, "none")
    norm = np.linalg.norm(g)
    np.testing.assert_allclose(state.dual_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(epsilon, 0.5 * g / norm, rtol=1e-5)


def test_held_weight_under_a_huge_gradient():
  # The scale that 1e-12 gets is too much for 1e30, which T = 0 takes out.
  epsilon, _ = perturbation([0.0, 1.0, 2.0], [1e30, 3e-12, 2e-12], 2)
  np.testing.assert_allclose(epsilon, [0, 0.3, 0.8], rtol=1e-5)


@pytest.mark.parametrize("masked", [1e30, float(jnp.finfo(jnp.float32).max)])
def test_huge_weights_beside_vanishing_gradients(masked):
  # A constant such as a mask's -1e30 has no gradient, and 2^80 times it is inf.
  w, scales = jnp.array([-masked, 1.0, -2.0]), (1e-10, 1e-15, 1e-30, 0.0)
  tx = asam_jax.ascent(0.5, 0.01)
  update = jax.jit(tx.update)
  for size in scales:
    g = size * jnp.array([0.0, 3.0, 1.0])
    epsilon, state = update(g, tx.init(w), w)
    t = problems.oracle_factor(w, 0.01, "elementwise")
    (expected,), _ = problems.oracle_perturbation([g], [t], 0.5, 2)
    np.testing.assert_allclose(epsilon, expected, rtol=1e-5)
    assert np.isfinite(state.sharpness)


def test_float64_range_and_precision():
  with problems.enable_x64(True):
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 50))
    t = problems.oracle_factor(w, 0.01, "elementwise")
    for p in EXPONENTS:
      tx = asam_jax.ascent(0.5, 0.01, p)
      update = jax.jit(tx.update)
      for magnitude in (1e-300, 1e-160, 1.0, 1e160, 1e300):
        epsilon, state = update(
            jnp.asarray(magnitude * g), tx.init(jnp.asarray(w)), jnp.asarray(w)
        )
        (expected,), _ = problems.oracle_perturbation([g], [t], 0.5, p)
        assert epsilon.dtype == state.sharpness.dtype == jnp.float64
        np.testing.assert_allclose(epsilon, expected, rtol=1e-11)


def test_mixed_single_and_double_precision():
  with problems.enable_x64(True):
    params = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
    tx = asam_jax.ascent(0.6, 0.0)
    update = jax.jit(tx.update)
    for magnitude in (2.0**-100, 1.0, 2.0**100):
      grads = jax.tree.map(lambda w, m=magnitude: m * w, params)
      epsilon, state = update(grads, tx.init(params), params)
      assert epsilon["a"].dtype == jnp.float32
      assert epsilon["b"].dtype == state.sharpness.dtype == jnp.float64
      np.testing.assert_allclose(epsilon["a"], 0.6 / math.sqrt(6), rtol=1e-6)
      np.testing.assert_allclose(epsilon["b"], 0.6 / math.sqrt(6), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("normalization", ["elementwise", "none"])
def test_a_million_half_precision_weights(dtype, normalization):
  # A float16 sum of a million ones is inf, and the perturbation would be zero.
  w = np.ones(1_000_000, dtype)
  tx = asam_jax.ascent(1.0, 0.0, normalization=normalization)
  update = jax.jit(tx.update)
  for magnitude in (1e-4, 1.0, 300.0):
    g = np.full_like(w, magnitude)
    epsilon, _ = update(g, tx.init(w), w)
    assert epsilon.dtype == dtype
    np.testing.assert_allclose(np.asarray(epsilon, np.float32), 1e-3, rtol=5e-3)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_stay_visible(p, bad):
  params = {"a": jnp.ones(3), "b": jnp.ones(2)}
  grads = {"a": jnp.array([1.0, bad, 2.0]), "b": jnp.ones(2)}
  tx = asam_jax.ascent(0.5, 0.01, p)
  epsilon, _ = tx.update(grads, tx.init(params), params)
  assert jnp.isnan(epsilon["a"][1])


@pytest.mark.parametrize("p", [p for p in EXPONENTS if p < math.inf])
def test_bad_numbers_reach_every_leaf(p):
  # A norm of inf must not turn the finite leaves into an unperturbed base step. At
  # p = inf there is no norm, and each weight has its own.
  params = {"a": jnp.ones(3), "b": jnp.ones(2)}
  for bad in (math.nan, math.inf):
    grads = {"a": jnp.array([1.0, bad, 2.0]), "b": jnp.ones(2)}
    tx = asam_jax.ascent(0.5, p=p)
    epsilon, state = tx.update(grads, tx.init(params), params)
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(epsilon))
    assert not jnp.isfinite(state.sharpness)
    held = tx.update(grads, tx.init(params), jax.tree.map(jnp.zeros_like, params))
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(held[0]))
