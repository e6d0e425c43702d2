# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""Average-case sharpness: the mean rise of the loss under random perturbations."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from asam_jax import _arguments
from asam_jax import _coordinates
from asam_jax._coordinates import Coordinates
from asam_jax._geometry import Geometry


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
    *,
    geometry: Geometry = Geometry(),
    distribution: str = "normal",
    samples: int = 32,
    antithetic: bool = True,
    key: PRNGKeyArray | None = None,
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
      One that is traced and turns out to be negative or NaN makes the value NaN.
    geometry: T_w, the leaves that get it, those that are perturbed, and, for
      ``"uniform"``, the ball's exponent p: 1, 2 or inf (``"normal"`` has none); see
      :class:`asam_jax.Geometry`. ``Geometry(normalization="none")`` for plain
      sharpness.
    distribution: ``"normal"`` or ``"uniform"``.
    samples: the number of perturbations, at least 2 independent terms.
    antithetic: whether they come in pairs; then samples is even and at least 4.
    key: the random key; ``jax.random.key(0)`` if not given.

  Returns:
    An :class:`AverageCase`.

  Raises:
    ValueError: for an unknown distribution, a p without a ball, a negative or
      infinite rho, a wrong number of samples, a T that does not broadcast to its
      leaf, or nothing to perturb.
    TypeError: if rho is not one real number, samples no int, geometry no
      ``Geometry``, or key no random key; if the loss is not a function or not a real
      scalar, or a perturbed leaf is not float.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> from asam_jax import sharpness
    >>> loss = lambda w: 0.5 * jnp.sum(w**2)  # mean rise: rho^2 |w|^2 / 2
    >>> result = sharpness.average_case(
    ...     loss, jnp.full(100, 2.0), rho=0.1, geometry=asam_jax.Geometry(eta=0.0),
    ...     samples=64)
    >>> print(f"{result.value:.1f} +- {result.standard_error:.1f}")
    2.0 +- 0.1

  References:
    Andriushchenko et al., `A modern look at the relationship between sharpness and
    generalization <https://arxiv.org/abs/2302.07011>`_, 2023
  """
  loss = _arguments.loss(loss)
  key = _arguments.random_key(key)
  coordinates = Coordinates.build(params, geometry)
  rho, p = coordinates.radius(rho), geometry.p
  _arguments.one_of("distribution", distribution, ("normal", "uniform"))
  if distribution == "uniform" and not _coordinates.has_closed_form(p):
    raise ValueError(f"p={p!r} must be 1, 2 or inf for a uniform distribution.")
  _arguments.flag("antithetic", antithetic)
  samples = _arguments.count("samples", samples, 4 if antithetic else 2)
  if antithetic and samples % 2:
    raise ValueError(f"samples={samples} must be even, for antithetic=True pairs them.")

  at = coordinates.pull_back(loss)
  clean = at(coordinates.zeros())

  def draw(key):
    if distribution == "uniform":
      delta = _coordinates.uniform(coordinates, key, rho, p)
    else:
      delta = [rho * d for d in coordinates.normal(key)]
    value = at(delta)
    if antithetic:
      value = (value + at([-d for d in delta])) / 2
    return value - clean

  # One draw after another: memory is that of one perturbation.
  draws = lax.map(draw, jax.random.split(key, samples // 2 if antithetic else samples))
  return AverageCase(jnp.mean(draws), standard_error(draws), draws)


def standard_error(draws: Array) -> Array:
  return jnp.std(draws, axis=0, ddof=1) / math.sqrt(draws.shape[0])
