# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""The Hessian in the adaptive geometry: eigenvalues and trace of T H T.

Hessian-vector products in delta are products with T H T, so nothing here knows
about T. Lanczos is our own because the networks it is for make the Krylov space
end early: with weights at zero T H T has low rank, and matfree's tridiagonalization
(0.6.3) then divides rounding errors by each other and returns eigenvalues that the
matrix does not have. Here such a break is seen and answered by a new direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import flatten_util
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from asam_jax import _arguments
from asam_jax import _trees
from asam_jax._coordinates import Coordinates
from asam_jax._geometry import Geometry
from asam_jax.sharpness import _average_case


class Eigenpairs(NamedTuple):
  """What :func:`hessian_eigenvalues` found.

  Attributes:
    values: the largest eigenvalues of T H T, descending, ``[k]``.
    directions: the perturbations epsilon = T v of the unit eigenvectors v, a pytree
      like params with a leading axis of length k. Each has
      ``||T^{-1} epsilon||_2 = 1``.
    residuals: ``||T H T v - value v||_2`` by Lanczos' own account, ``[k]``: each
      value is within its residual of an eigenvalue (up to rounding).
  """

  values: Float[Array, " k"]
  directions: Any
  residuals: Float[Array, " k"]


class TraceEstimate(NamedTuple):
  """What :func:`hessian_trace` estimated.

  Attributes:
    value: the mean over the probes, a scalar.
    standard_error: the standard error of that mean, a scalar.
    draws: one unbiased estimate per probe, ``[samples]``.
  """

  value: Float[Array, ""]
  standard_error: Float[Array, ""]
  draws: Float[Array, " samples"]


def hessian_eigenvalues(
    loss: Callable[[Any], Any],
    params: Any,
    k: int = 1,
    *,
    geometry: Geometry = Geometry(),
    steps: int = 32,
    key: PRNGKeyArray | None = None,
) -> Eigenpairs:
  r"""The largest eigenvalues of the Hessian in the adaptive geometry.

  .. math:: T_w \nabla^2 L(w)\, T_w\, v = \lambda v

  (the algebraically largest ones), or of the Hessian itself where T = 1. At a minimum
  :math:`\rho^2 \lambda_1 / 2` is the worst-case sharpness of p = 2 for small rho. By
  Lanczos' method with full reorthogonalization: ``steps`` Hessian-vector products, and
  memory for ``steps`` copies of the weights.

  Args:
    loss: ``loss(params) -> scalar``, twice differentiable almost everywhere.
    params: the weights w, a pytree of real float arrays.
    k: the number of eigenvalues, at most ``steps``.
    geometry: T_w, the leaves that get it, and (``perturb``) those whose block of
      the Hessian is taken; see :class:`asam_jax.Geometry`. Its p plays no part.
      ``Geometry(normalization="none")`` for the plain Hessian.
    steps: the size of the Krylov space; no more than there are weights are used.
      Look at the residuals, and take more if they are not small.
    key: for the start; ``jax.random.key(0)`` if not given.

  Returns:
    An :class:`Eigenpairs`.

  Raises:
    ValueError: if k or steps is below 1, k exceeds steps or the number of weights,
      a T does not broadcast to its leaf, or there is nothing to perturb.
    TypeError: if a count is no int, geometry no ``Geometry``, or key no random key;
      if the loss is not a function or not a real scalar, or a perturbed leaf is not
      float.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> from asam_jax import sharpness
    >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)
    >>> w = jnp.array([3.0, 0.5])
    >>> plain = sharpness.hessian_eigenvalues(
    ...     loss, w, k=2, geometry=asam_jax.Geometry(normalization="none"))
    >>> print([f"{value:.3f}" for value in plain.values])
    ['4.000', '1.000']
    >>> adaptive = sharpness.hessian_eigenvalues(
    ...     loss, w, geometry=asam_jax.Geometry(eta=0.0))
    >>> print(f"{adaptive.values[0]:.3f}")
    9.000

  References:
    Golub and Van Loan, *Matrix Computations*, 4th ed., section 10.1
  """
  loss = _arguments.loss(loss)
  key = _arguments.random_key(key)
  k = _arguments.count("k", k, 1)
  coordinates = Coordinates.build(params, geometry)
  steps = min(_arguments.count("steps", steps, 1), coordinates.size)
  if k > steps:
    raise ValueError(
        f"k={k} exceeds the size of the Krylov space, {steps}; raise steps, or ask"
        f" for no more eigenvalues than the {coordinates.size} weights have."
    )
  product = _hessian_product(loss, coordinates)
  flat, unravel = flatten_util.ravel_pytree(coordinates.zeros())

  def flat_product(v):
    return flatten_util.ravel_pytree(product(unravel(v)))[0]

  basis, diagonal, off_diagonal = _lanczos(flat_product, flat, steps, key)
  tridiagonal = (
      jnp.diag(diagonal)
      + jnp.diag(off_diagonal[:-1], 1)
      + jnp.diag(off_diagonal[:-1], -1)
  )
  values, vectors = jnp.linalg.eigh(tridiagonal)
  values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
  epsilons = jax.vmap(lambda v: coordinates.epsilon(unravel(v @ basis)))(vectors.T)
  residuals = jnp.abs(off_diagonal[-1] * vectors[-1])
  return Eigenpairs(values, epsilons, residuals)


def hessian_trace(
    loss: Callable[[Any], Any],
    params: Any,
    *,
    geometry: Geometry = Geometry(),
    samples: int = 32,
    key: PRNGKeyArray | None = None,
) -> TraceEstimate:
  r"""The trace of the Hessian in the adaptive geometry, estimated.

  .. math:: \mathrm{tr}(T_w \nabla^2 L(w)\, T_w)
    = \mathbb{E}_z\, z^\top T_w \nabla^2 L(w)\, T_w z

  with independent signs z (Hutchinson). For a smooth loss and small rho the normal
  average-case sharpness is :math:`\rho^2/2` times it. ReLU networks reach that limit
  only once rho is below the distance to the nearest kink: the Hessian does not see
  kinks, and the average does. It costs ``samples`` Hessian-vector products.

  Args:
    loss: ``loss(params) -> scalar``, twice differentiable almost everywhere.
    params: the weights w, a pytree of real float arrays.
    geometry: T_w, the leaves that get it, and (``perturb``) those whose block of
      the Hessian is taken; see :class:`asam_jax.Geometry`. Its p plays no part.
      ``Geometry(normalization="none")`` for the plain Hessian.
    samples: the number of probes, at least 2.
    key: for the probes; ``jax.random.key(0)`` if not given.

  Returns:
    A :class:`TraceEstimate`.

  Raises:
    ValueError: if samples is below 2, a T does not broadcast to its leaf, or there
      is nothing to perturb.
    TypeError: as :func:`hessian_eigenvalues` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> from asam_jax import sharpness
    >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)
    >>> w = jnp.array([3.0, 0.5])
    >>> geometry = asam_jax.Geometry(eta=0.0)
    >>> trace = sharpness.hessian_trace(loss, w, geometry=geometry)
    >>> print(trace.value)  # exact, for T H T is diagonal
    10.0

  References:
    Hutchinson, *A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines*, 1990
  """
  loss = _arguments.loss(loss)
  key = _arguments.random_key(key)
  samples = _arguments.count("samples", samples, 2)
  coordinates = Coordinates.build(params, geometry)
  product = _hessian_product(loss, coordinates)

  def draw(key):
    probe = coordinates.signs(key)
    return _trees.dot(probe, product(probe)).astype(coordinates.dtype)

  draws = lax.map(draw, jax.random.split(key, samples))
  return TraceEstimate(jnp.mean(draws), _average_case.standard_error(draws), draws)


def _hessian_product(loss, coordinates: Coordinates):
  """The map v -> T H T v, forward over reverse, with one linearization for all v."""
  gradient = jax.grad(coordinates.pull_back(loss))
  return jax.linearize(gradient, coordinates.zeros())[1]


def _lanczos(product, like, steps: int, key: PRNGKeyArray):
  """(basis [steps, n], diagonal [steps], off-diagonal [steps])."""
  keys = jax.random.split(key, steps + 1)
  first = jax.random.normal(keys[0], like.shape, like.dtype)
  basis = jnp.zeros((steps, like.size), like.dtype)
  tolerance = 10 * jnp.finfo(like.dtype).eps

  def deflate(v, basis):
    for _ in range(2):  # once leaves errors, twice is enough
      v = v - (basis @ v) @ basis
    return v

  def step(carry, inputs):
    basis, vector, largest = carry
    index, key = inputs
    basis = basis.at[index].set(vector)
    image = product(vector)
    diagonal = vector @ image
    rest = deflate(image, basis)
    length = jnp.linalg.norm(rest)
    largest = jnp.maximum(largest, jnp.linalg.norm(image))
    # An invariant subspace is complete: go on in a direction outside of it, which
    # the tridiagonal matrix does not couple to.
    broken = length <= tolerance * largest
    fresh = deflate(jax.random.normal(key, like.shape, like.dtype), basis)
    off_diagonal = jnp.where(broken, 0, length)
    following = jnp.where(broken, fresh, rest)
    unit = jnp.maximum(jnp.linalg.norm(following), jnp.finfo(like.dtype).tiny)
    return (basis, following / unit, largest), (diagonal, off_diagonal)

  carry = (basis, first / jnp.linalg.norm(first), jnp.zeros((), like.dtype))
  (basis, _, _), (diagonal, off_diagonal) = lax.scan(
      step, carry, (jnp.arange(steps), keys[1:])
  )
  return basis, diagonal, off_diagonal
