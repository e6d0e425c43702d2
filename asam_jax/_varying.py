"""The mesh axes that arrays vary over under shard_map, in every JAX since 0.5."""

from typing import Any

import jax
from jax import lax
from jax import tree_util as jtu


def vary_as(tree: Any, like: Any) -> Any:
  """Gives constants the mesh axes that ``like`` varies over, under shard_map."""
  if not hasattr(jax, "typeof"):
    return tree
  axes = frozenset[str]().union(*map(_varying_axes, jtu.tree_leaves(like)))
  if not axes:
    return tree
  if hasattr(lax, "pcast"):
    return lax.pcast(tree, tuple(axes), to="varying")
  return getattr(lax, "pvary")(tree, tuple(axes))  # noqa: B009  (JAX before 0.8)


def _varying_axes(x: Any) -> frozenset[str]:
  # JAX 0.6 to 0.9 say `vma`, later ones `mat.varying`, older ones neither.
  kind = jax.typeof(x)
  kind = getattr(kind, "mat", kind)
  return getattr(kind, "varying", getattr(kind, "vma", frozenset()))
