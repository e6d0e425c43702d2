# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""Average-case sharpness: the mean rise of the loss under random perturbations."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from asam_jax import _checks
from asam_jax import _normalization as _n
from asam_jax.sharpness import _geometry as _g


class AverageCase(NamedTuple):
  """What :func:`average_case` estimated.

  Attributes:
    value: the mean of L(w + epsilon) - L(w) over the draws, a scalar.
    standard_error: the standard error of that mean, a scalar.
    draws: the independent terms of the mean: ``[samples]``, or ``[samples / 2]``
      pair means if antithetic.
  """

  value: Float[Array, ""]
  standard_error: Float[Array, ""]
  draws: Float[Array, " terms"]


def average_case(
    loss: Callable[[Any], Any],
    params: Any,
    rho: Any = 0.5,
    eta: Any = 0.01,
    p: float = 2,
    *,
    distribution: str = "normal",
    samples: int = 32,
    antithetic: bool = True,
    key: PRNGKeyArray | None = None,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
) -> AverageCase:
  r"""Average-case (adaptive) sharpness, with its standard error.

  .. math:: \mathbb{E}_\epsilon\, L(w + \epsilon) - L(w), \qquad
    \epsilon \sim N(0, \rho^2 T_w^2)

  or, with ``distribution="uniform"``, :math:`\epsilon` uniform in the ball
  :math:`\|T_w^{-1}\epsilon\|_p \le \rho`. Mind the scale: a normal
  :math:`T_w^{-1}\epsilon` has the length :math:`\rho\sqrt k` for k weights, and a
  uniform one of p = 2 about :math:`\rho`.

  Antithetic samples come as pairs epsilon, -epsilon. Their mean is free of the
  loss's odd part, and so of the gradient, which dominates the noise away from
  minima. It costs samples + 1 evaluations of the loss, no gradient.

  Args:
    loss: ``loss(params) -> scalar``, deterministic (evaluation mode).
    params: the weights w, a pytree of real float arrays.
    rho: the scale, >= 0, in the unit of ``T_w^{-1} w``; a number or traced.
    eta: the stabilizer of T_w, >= 0; likewise.
    p: for ``"uniform"``, the ball's exponent: 1, 2 or inf. ``"normal"`` has none.
    distribution: ``"normal"`` or ``"uniform"``.
    samples: the number of perturbations, at least 2 independent terms.
    antithetic: whether they come in pairs; then samples is even and at least 4.
    key: the random key; ``jax.random.key(0)`` if not given.
    normalization: the operator T_w; ``"none"`` for plain sharpness.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that are perturbed at all; see :func:`asam_jax.ascent`.

  Returns:
    An :class:`AverageCase`.

  Raises:
    ValueError: for an unknown distribution, a p without a ball, a negative rho or
      eta, a wrong number of samples, or nothing to perturb.
    TypeError: if the loss is not a real scalar or a perturbed leaf is not float.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import sharpness
    >>> loss = lambda w: 0.5 * jnp.sum(w**2)  # mean rise: rho^2 |w|^2 / 2
    >>> result = sharpness.average_case(
    ...     loss, jnp.full(100, 2.0), rho=0.1, eta=0.0, samples=64)
    >>> print(f"{result.value:.1f} +- {result.standard_error:.1f}")
    2.0 +- 0.1

  References:
    Andriushchenko et al., `A modern look at the relationship between sharpness and
    generalization <https://arxiv.org/abs/2302.07011>`_, 2023
  """
  _g.number("rho", rho)
  if distribution not in ("normal", "uniform"):
    raise ValueError(
        f'distribution={distribution!r} is unknown; use "normal" or "uniform".'
    )
  if distribution == "uniform":
    _checks.exponent(p)
    if p not in (1, 2) and not math.isinf(p):
      raise ValueError(f"p={p!r} must be 1, 2 or inf for a uniform distribution.")
  _g.count("samples", samples, 4 if antithetic else 2)
  if antithetic and samples % 2:
    raise ValueError(f"samples={samples} must be even, for antithetic=True pairs them.")

  coordinates = _g.Coordinates.build(params, eta, normalization, normalize, perturb)
  rho = jnp.asarray(rho, coordinates.dtype)
  at = coordinates.pull_back(loss)
  clean = at(coordinates.zeros())

  def draw(key):
    if distribution == "uniform":
      delta = _g.uniform_in_ball(coordinates, key, rho, p)
    else:
      delta = [rho * d for d in coordinates.normal(key)]
    value = at(delta)
    if antithetic:
      value = (value + at([-d for d in delta])) / 2
    return value - clean

  key = jax.random.key(0) if key is None else key
  # One draw after another: memory is that of one perturbation.
  draws = lax.map(draw, jax.random.split(key, samples // 2 if antithetic else samples))
  return AverageCase(jnp.mean(draws), standard_error(draws), draws)


def standard_error(draws: Array) -> Array:
  return jnp.std(draws, axis=0, ddof=1) / math.sqrt(draws.shape[0])
