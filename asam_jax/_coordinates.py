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
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _shards
from asam_jax._geometry import Geometry
from asam_jax._geometry import sum_dtype

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
    dtype = sum_dtype(rules)
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
    rho = jnp.asarray(_arguments.fixed_scalar("rho", rho), self.dtype)
    return jnp.where((rho >= 0) & (rho < math.inf), rho, jnp.nan)


def perturbation(
    grads: optax.Updates, params: optax.Params, geometry: Geometry, rho: Any
) -> optax.Updates:
  """The perturbation of one ascent alone, for measures."""
  tx = _ascent.from_geometry(_arguments.fixed_scalar("rho", rho), geometry)
  return tx.update(grads, tx.init(params), params)[0]
