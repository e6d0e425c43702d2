"""Balls ||delta||_p <= rho: projections, uniform draws, the steepest direction."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from asam_jax import _ascent
from asam_jax import _trees
from asam_jax._coordinates import Coordinates
from asam_jax._coordinates import Delta
from asam_jax._geometry import Geometry


def has_closed_form(p: float) -> bool:
  """Whether the ball of exponent ``p`` has a projection and a uniform draw here."""
  return p in (1, 2) or math.isinf(p)


def project(delta: Delta, rho: Any, p: float) -> Delta:
  """The Euclidean projection onto the ball ||delta||_p <= rho, p in {1, 2, inf}."""
  if math.isinf(p):
    return [jnp.clip(d, -rho, rho) for d in delta]
  if p == 2:
    length = _trees.norm(delta, 2)
    factor = jnp.where(length > rho, rho / jnp.where(length > rho, length, 1), 1)
    return [d * factor for d in delta]
  return optax.projections.projection_l1_ball(delta, rho)


def uniform(coordinates: Coordinates, key: jax.Array, rho: Any, p: float) -> Delta:
  """A uniform draw from the ball ||delta||_p <= rho, p in {1, 2, inf}."""
  if math.isinf(p):
    return [rho * d for d in coordinates.cube(key)]
  key, radius_key = jax.random.split(key)
  draws = coordinates.draw(jax.random.normal if p == 2 else jax.random.laplace, key)
  radius = jax.random.uniform(radius_key, (), coordinates.dtype)
  scale = rho * radius ** (1 / coordinates.size) / _trees.norm(draws, p)
  return [d * scale for d in draws]


def steepest(grads: Delta, length: Any, p: float) -> Any:
  """The maximizer of <grads, d> over ||d||_p <= length: the ascent with T = 1."""
  plain = Geometry(eta=0, p=p, normalization="none")
  return _ascent.perturbation(grads, grads, plain, length)
