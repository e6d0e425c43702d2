# ruff: noqa: E731  (losses of one line read best as lambdas)
"""Eigenvalues and trace against dense Hessians, and the limit of small rho."""

import functools

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import sharpness
from tests import problems
from tests.sharpness import cases


def dense(loss, params, eta, normalization):
  """T H T in float64, leaf by leaf from the oracle's T."""
  unravel = flatten_util.ravel_pytree(params)[1]
  hessian = np.asarray(jax.jit(jax.hessian(lambda x: loss(unravel(x))))(flat(params)))
  t = flat(jax.tree.map(
      lambda w: problems.oracle_factor(w, eta, normalization), params))
  return t[:, None] * hessian * t


def flat(tree):
  """ravel_pytree in NumPy."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def dense_network(normalization, eta):
  params, batch = small_network()
  return dense(cases.network_loss(batch), params, eta, normalization)


def small_network():
  return cases.network(0, dtype=np.float64)


@pytest.mark.parametrize("normalization", ["none", "elementwise"])
def test_against_a_dense_hessian(normalization):
  with problems.enable_x64(True):
    params, batch = small_network()
    loss = cases.network_loss(batch)
    matrix = dense_network(normalization, 0.05)
    expected, _ = np.linalg.eigh(matrix)
    geometry = Geometry(
        0.05, normalization=normalization, normalize=cases.every_leaf)
    result, trace = jax.jit(lambda params: (
        sharpness.hessian_eigenvalues(loss, params, 4, geometry=geometry, steps=60),
        sharpness.hessian_trace(loss, params, geometry=geometry, samples=400),
    ))(params)
    np.testing.assert_allclose(result.values, expected[::-1][:4], rtol=1e-6)
    assert result.residuals.max() < 1e-3 * expected[-1]

    # The directions are T v: unit in the adaptive norm, and eigenvectors.
    t = jax.tree.map(
        lambda w: problems.oracle_factor(w, 0.05, normalization), params)
    for i in range(4):
      v = flat(jax.tree.map(
          lambda e, t, i=i: np.asarray(e)[i] / t, result.directions, t))
      np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-8)
      np.testing.assert_allclose(
          matrix @ v, result.values[i] * v, atol=1e-4 * expected[-1])

    assert abs(trace.value - np.trace(matrix)) < 4 * trace.standard_error
    assert trace.standard_error < 0.2 * np.trace(matrix)


def test_residuals_tell_an_unconverged_value():
  with problems.enable_x64(True):
    params, batch = small_network()
    loss = cases.network_loss(batch)
    expected = np.linalg.eigvalsh(dense_network("none", 0.05))
    result = jax.jit(lambda params: sharpness.hessian_eigenvalues(
        loss, params, steps=4, geometry=Geometry(normalization="none")))(params)
    nearest = np.min(np.abs(expected - result.values[0]))
    assert 1e-6 < nearest <= result.residuals[0] * (1 + 1e-9)


# One program for all spectra.
@jax.jit
def leading_three(spectrum):
  loss = lambda w: jnp.sum(spectrum * w**2) / 2
  return sharpness.hessian_eigenvalues(
      loss, jnp.ones(8), 3, steps=8, geometry=Geometry(normalization="none")).values


@pytest.mark.parametrize("values", [
    [5.0, 3.0, 0, 0, 0, 0, 0, 0],  # the Krylov space ends after three
    [2.0] * 8,  # and after one
    [0.0] * 8,
    [-1.0, -2.0, -3.0, -4.0, -4.0, -4.0, -4.0, -4.0],
])
def test_krylov_space_that_ends_early(values):
  np.testing.assert_allclose(
      leading_three(jnp.array(values)), np.sort(values)[::-1][:3], atol=1e-5)


def test_zero_weights_have_no_curvature_in_the_adaptive_geometry():
  loss = lambda w: jnp.sum(jnp.array([1.0, 100.0, 4.0]) * w**2) / 2
  result = jax.jit(lambda w: sharpness.hessian_eigenvalues(
      loss, w, 3, geometry=Geometry(0.0)))(jnp.array([1.0, 0.0, 2.0]))
  np.testing.assert_allclose(result.values, [16, 1, 0], atol=1e-5)
  assert (result.directions[:2, 1] == 0).all()


def test_small_rho_limit_of_one_step_worst_case_and_eigenvalue():
  with problems.enable_x64(True):
    params, batch = small_network()
    loss = cases.network_loss(batch)
    grads = jax.jit(jax.grad(loss))(params)

    def tilted(w, slope):  # the loss less a linear function
      return loss(w) - sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, w)))

    @jax.jit
    def at(rho, slope, w):
      measures = (
          sharpness.worst_case(
              lambda w: tilted(w, slope), w, rho, geometry=Geometry(0.0), **options)
          for options in ({"steps": 200, "restarts": 2}, {"method": "one_step"}))
      return [measure.value for measure in measures]

    first_order = lambda rho: rho * np.linalg.norm(
        flat(params_normalized(params)) * flat(grads))
    # At a point with a slope: all agree with rho ||T g|| to first order.
    errors = []
    for rho in (1e-2, 1e-3):
      searched, single = at(rho, jax.tree.map(np.zeros_like, params), params)
      np.testing.assert_allclose(searched, single, rtol=30 * rho)
      errors.append(abs(single / first_order(rho) - 1))
    assert errors[1] < 0.15 * errors[0]  # and the difference is of order rho

    # With the slope taken off: rho^2 lambda_1 / 2, for the search; the one step
    # cannot leave, for it has no gradient to follow.
    found, single = at(1e-3, grads, params)
    top = jax.jit(lambda w: sharpness.hessian_eigenvalues(
        lambda w: tilted(w, grads), w, geometry=Geometry(0.0), steps=60).values[0])(
            params)
    np.testing.assert_allclose(found, 1e-3**2 * top / 2, rtol=1e-2)
    assert abs(single) < 1e-10


def params_normalized(params):
  """T of the default selection: |w| for kernels, 1 for biases."""
  return [{"kernel": np.abs(layer["kernel"]), "bias": np.ones_like(layer["bias"])}
          for layer in params]


def test_works_under_jit_in_half_precision():
  params, batch = cases.network(0)
  half, _ = cases.network(0, dtype=jnp.bfloat16)
  run = jax.jit(lambda w: sharpness.hessian_eigenvalues(
      cases.network_loss(batch), w, geometry=Geometry(0.05)).values)
  np.testing.assert_allclose(run(half), run(params), rtol=0.15)


def test_at_most_as_many_eigenvalues_as_there_are_weights_and_steps():
  find = functools.partial(sharpness.hessian_eigenvalues, jnp.sum, jnp.ones(2))
  with pytest.raises(ValueError, match=r"k=3.*2 weights"):
    find(3)
  with pytest.raises(ValueError, match=r"k=2.*raise steps"):
    find(2, steps=1)
