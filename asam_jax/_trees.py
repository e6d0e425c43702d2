"""Arithmetic on pytrees, over all their leaves, in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp

from asam_jax import _shards
from asam_jax._arguments import dtype_of
from asam_jax._arguments import is_float


def f32(x: Any) -> jax.Array:
  """In float32 at least: half precision neither sums nor squares safely."""
  return jnp.asarray(x, jnp.promote_types(dtype_of(x), jnp.float32))


def sum_dtype(leaves: Sequence[Any]) -> Any:
  """Float32, or float64 if a leaf is."""
  dtypes = [w.dtype if hasattr(w, "dtype") else jnp.float32 for w in leaves]
  # NumPy's float64 leaves are float32 in JAX unless 64 bits are enabled.
  return jnp.result_type(jnp.float32, *map(jax.dtypes.canonicalize_dtype, dtypes))


def floats(tree: Any) -> list[jax.Array]:
  """The float leaves in float32 at least; float0 and integers are left out."""
  return [f32(x) for x in jtu.tree_leaves(tree) if is_float(x)]


def map_floats(fun: Any, tree: Any, *rest: Any) -> Any:
  """``jax.tree.map`` over the float leaves; other leaves stay those of ``tree``."""
  return jax.tree.map(lambda x, *xs: fun(x, *xs) if is_float(x) else x, tree, *rest)


def norm(tree: Any, p: float = 2) -> jax.Array:
  """||x||_p over all leaves; relative to the largest entry, so it can't overflow."""
  leaves = [x for x in floats(tree) if x.size]
  if not leaves:
    return jnp.zeros(())
  peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
  if math.isinf(p):
    return peak
  usable = jnp.isfinite(peak) & (peak > 0)
  unit = jnp.where(usable, peak, 1)
  total = total_of([jnp.abs(x / unit) ** p for x in leaves])
  return jnp.where(usable, unit * total ** (1 / p), peak)


def root(x: Any) -> jax.Array:
  """The signed root sign(x) sqrt(|x|), without the infinite slope at zero."""
  x = jnp.asarray(x)
  return jnp.sign(x) * jnp.sqrt(jnp.where(x == 0, 1, jnp.abs(x)))


def root_of_squares(w: jax.Array, axes: Any, shards: Any = ()) -> jax.Array:
  """||w||_2 along the axes, with slope 0 where it is zero in place of NaN.

  It is taken relative to the largest entry, for squares leave the range early. The
  result does not depend on that unit, nor do its derivatives. ``shards`` are the mesh
  axes that split w along these axes.
  """
  keepdims = axes is not None
  peak = jnp.max(jnp.abs(w), axis=axes, keepdims=keepdims, initial=0)
  if shards:
    peak = _shards.largest(peak, shards)
  unit = lax.stop_gradient(jnp.where(peak == 0, 1, peak))
  squares = jnp.sum(jnp.square(w / unit), axis=axes, keepdims=keepdims)
  if shards:
    squares = lax.psum(squares, shards)
  root = jnp.sqrt(jnp.where(squares == 0, 1, squares))
  return jnp.where(squares == 0, 0, unit * root)


def total_of(leaves: Sequence[jax.Array]) -> jax.Array:
  """The sum of all entries of all leaves, of which there is at least one."""
  first, *others = [jnp.sum(leaf) for leaf in leaves]
  return sum(others, start=first)


def dot(tree: Any, other: Any) -> jax.Array:
  """<x, y> over the float leaves."""
  pairs = zip(floats(tree), floats(other), strict=True)
  return sum((jnp.sum(x * y) for x, y in pairs), start=jnp.zeros(()))


def moved(tree: Any, amount: Any, direction: Any) -> Any:
  """The sum x + amount d, in the dtypes of x."""

  def move(x, d):
    return (x + amount * d).astype(dtype_of(x))

  return map_floats(move, tree, direction)


def unit_vector(tree: Any) -> Any:
  """X / ||x||_2 over the whole tree; zero for zero."""
  length = norm(tree)
  length = jnp.where(length == 0, 1, length)
  return map_floats(lambda x: f32(x) / length, tree)


def orthogonal_part(tree: Any, along: Any) -> Any:
  """What is left of x without its component along another tree."""
  unit = unit_vector(along)
  product = dot(tree, unit)
  return map_floats(lambda x, u: f32(x) - product * u, tree, unit)


def cosine(tree: Any, other: Any) -> jax.Array:
  """The cosine of the angle between two trees; 0 if one of them is zero."""
  return dot(unit_vector(tree), unit_vector(other))


def all_finite(tree: Any) -> jax.Array:
  """Whether no float in the tree is NaN or inf."""
  finite = [jnp.all(jnp.isfinite(x)) for x in floats(tree)]
  return jnp.stack([jnp.array(True), *finite]).all()


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(x: jax.Array, exponent: float) -> jax.Array:
  """The power of x >= 0; its derivatives at 0 are 0, where they may be inf."""
  if exponent > 0:
    return x**exponent
  return jnp.where(x == 0, 0, jnp.where(x == 0, 1, x) ** exponent)


@power.defjvp
def _power_jvp(exponent, primals, tangents):
  (x,), (dx,) = primals, tangents
  return power(x, exponent), exponent * power(x, exponent - 1) * dx
