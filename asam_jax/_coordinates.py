"""Coordinates delta = T_w^{-1} epsilon, in which the adaptive ball is a plain one.

To project onto a plain ball needs no search for a multiplier, a Hessian in delta is
T H T, and a weight with T = 0 is simply a coordinate that the loss does not depend on.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _shards
from asam_jax import _trees
from asam_jax._geometry import Geometry
from asam_jax._geometry import perturbed_dtype

# One array per perturbed leaf, in float32 at least.
Delta: TypeAlias = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """The perturbed leaves of params, and T_w for each, in broadcastable shape."""

  params: Any
  chosen: list[int]
  weights: Delta
  factors: Delta
  dtype: Any

  @classmethod
  def build(cls, params: Any, geometry: Geometry) -> Coordinates:
    _arguments.arrays("params", params)
    _arguments.instance("geometry", geometry, Geometry)
    _shards.refuse("a measure", geometry.param_specs, "what it draws and sums up")
    eta = _arguments.fixed_scalar("eta", geometry.eta)
    rules = geometry.rules(params)
    dtype = perturbed_dtype(rules)
    chosen = [i for i, r in enumerate(rules) if r.perturbed and jnp.size(r.leaf)]
    if not chosen:
      raise ValueError(
          f"perturb={geometry.perturb!r} leaves no parameter to perturb; select at"
          " least one leaf that is not empty."
      )
    weights = [jnp.asarray(rules[i].leaf, dtype) for i in chosen]
    factors = [rules[i].factor(w, eta) for i, w in zip(chosen, weights, strict=True)]
    return cls(params, chosen, weights, factors, dtype)

  @property
  def size(self) -> int:
    """The number of coordinates."""
    return sum(w.size for w in self.weights)

  def zeros(self) -> Delta:
    return [jnp.zeros_like(w) for w in self.weights]

  def normal(self, key: jax.Array) -> Delta:
    """Independent standard normal coordinates."""
    return self.draw(jax.random.normal, key)

  def signs(self, key: jax.Array) -> Delta:
    """Independent coordinates of -1 and 1."""
    return self.draw(jax.random.rademacher, key)

  def cube(self, key: jax.Array) -> Delta:
    """Independent coordinates, uniform in [-1, 1)."""
    return self.draw(functools.partial(jax.random.uniform, minval=-1, maxval=1), key)

  def draw(self, draw: Callable[..., jax.Array], key: jax.Array) -> Delta:
    """Independent coordinates by a function of ``jax.random``."""
    # Leaf by leaf, so that each device draws its part of a sharded leaf; parts of one
    # long draw would have to be sent to where they belong.
    keys = jax.random.split(key, len(self.weights))
    draws = [draw(keys[i], w.shape, self.dtype) for i, w in enumerate(self.weights)]
    # The sum has the weight's layout on a mesh with explicit axes, too.
    return [zero + x for zero, x in zip(self.zeros(), draws, strict=True)]

  def epsilon(self, delta: Delta) -> Any:
    """T delta as a perturbation: the structure and dtypes of params."""
    leaves, treedef = jtu.tree_flatten(self.params)
    result = [jnp.zeros_like(leaf) for leaf in leaves]
    for i, t, d in zip(self.chosen, self.factors, delta, strict=True):
      result[i] = (t * d).astype(result[i].dtype)
    return jtu.tree_unflatten(treedef, result)

  def pull_back(self, loss: Callable[[Any], Any]) -> Callable[[Delta], jax.Array]:
    """``delta -> loss(w + T delta)``, whose Hessian at 0 is T H T."""

    def at(delta: Delta) -> jax.Array:
      point = optax.apply_updates(self.params, self.epsilon(delta))
      return jnp.asarray(loss(point), self.dtype)

    return at

  def radius(self, rho: Any) -> jax.Array:
    """Rho in the dtype of sums; NaN if it is traced and turns out to be no radius."""
    return jnp.asarray(_arguments.fixed_scalar("rho", rho), self.dtype)


def perturbation(
    grads: optax.Updates, params: optax.Params, geometry: Geometry, rho: Any
) -> optax.Updates:
  """The perturbation of one ascent alone, for measures."""
  tx = _ascent.from_geometry(_arguments.fixed_scalar("rho", rho), geometry)
  return tx.update(grads, tx.init(params), params)[0]


# The plain ball ||delta||_p <= rho.


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
