"""The norm of a pytree's leaves, for measures and variants (the ascent has its own)."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp


def norm(leaves: Sequence[jax.Array], p: float) -> jax.Array:
  """||x||_p over all leaves; relative to the largest entry, so it can't overflow."""
  leaves = [x for x in leaves if x.size]
  if not leaves:
    return jnp.zeros(())
  peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
  if math.isinf(p):
    return peak
  usable = jnp.isfinite(peak) & (peak > 0)
  unit = jnp.where(usable, peak, 1)
  total = sum(jnp.sum(jnp.abs(x / unit) ** p) for x in leaves)
  return jnp.where(usable, unit * jnp.asarray(total) ** (1 / p), peak)
