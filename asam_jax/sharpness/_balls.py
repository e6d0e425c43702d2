"""Balls ||delta||_p <= rho: projections, uniform draws, the steepest direction."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from asam_jax import _trees
from asam_jax._coordinates import Coordinates
from asam_jax._coordinates import Delta
from asam_jax._coordinates import perturbation
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
  return _project_onto_diamond(delta, rho)


def _project_onto_diamond(delta: Delta, rho: Any) -> Delta:
  """For p = 1: every entry moves towards 0 by the same t, and no further than 0.

  t solves sum(max(|d| - t, 0)) = rho. By Newton's method, which ends at the exact root
  since the sum is convex and piecewise linear in t. It needs sums alone, where sorting
  the entries would gather leaves that are sharded.
  """
  rho = jnp.asarray(rho, delta[0].dtype)
  inside = _trees.norm(delta, 1) <= rho
  sizes = [jnp.abs(d) for d in delta]

  def newton(t, sizes):
    larger = [a > t for a in sizes]
    count = sum(jnp.sum(mask).astype(rho.dtype) for mask in larger)
    total = _trees.total_of([a * mask for a, mask in zip(sizes, larger, strict=True)])
    # None is larger where rounding took t to the top, as it does for tiny radii.
    return jnp.where(count > 0, (total - rho) / jnp.maximum(count, 1), t), count

  def step(carry):
    t, count, _ = carry
    closer, fewer = newton(t, lax.stop_gradient(sizes))
    return closer, fewer, fewer < count

  start = (*newton(jnp.array(-1, rho.dtype), lax.stop_gradient(sizes)), True)
  t, *_ = lax.while_loop(lambda carry: carry[2], step, lax.stop_gradient(start))
  t, _ = newton(t, sizes)  # once more, for the slope
  return [
      jnp.where(inside, d, jnp.sign(d) * jnp.maximum(a - t, 0))
      for d, a in zip(delta, sizes, strict=True)
  ]


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
  return perturbation(grads, grads, plain, length)
