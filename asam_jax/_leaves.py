"""The perturbed leaves, and the passes over them."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
import numpy as np

from asam_jax import _geometry as _g


@functools.partial(
    jtu.register_dataclass,
    data_fields=["ws", "gs", "kept", "eta"],
    meta_fields=["operators"],
)
@dataclasses.dataclass(frozen=True)
class Leaves:
  """The perturbed leaves: weights, gradients, and how to get T from a weight.

  T and T g are not stored. Memory traffic, not arithmetic, is what this costs, so
  each pass computes them afresh, and barriers keep XLA from merging the passes.
  Only a T that is smaller than its leaf (a norm per filter) is kept.
  """

  ws: list[jax.Array]
  gs: list[jax.Array]
  kept: list[jax.Array | None]
  eta: jax.Array
  operators: tuple[_g.Operator, ...]

  @classmethod
  def build(cls, rules, gs, eta, dtype) -> "Leaves":
    # One dtype for all, float32 at least: half precision neither sums nor squares
    # safely.
    ws = [jnp.asarray(rule.leaf, dtype) for rule in rules]
    gs = [jnp.asarray(g, dtype) for g in gs]
    eta = jnp.asarray(eta, dtype)
    kept = []
    for rule, w in zip(rules, ws, strict=True):
      smaller = _factor_size(rule, w, eta) < w.size
      keep = smaller and rule.operator is not _g.none  # XLA drops a factor of 1
      kept.append(jnp.asarray(rule.operator(w, eta), dtype) if keep else None)
    return cls(ws, gs, kept, eta, tuple(rule.operator for rule in rules))

  def map(
      self,
      fun: Callable[..., jax.Array],
      *values: jax.Array,
      scale: Any = None,
      after_loop: bool = False,
  ) -> list[jax.Array]:
    """One pass: ``fun(w, g, t, *values)`` for each leaf, with t = scale T.

    Each leaf has a barrier of its own, with its own eta and values. One barrier for
    all of them would let XLA:CPU share the broadcast of a scalar among leaves, and
    so write it to memory at a leaf's size. ``after_loop`` says that the other passes
    are in a loop: w and g then need no barrier to keep the passes apart, and without
    one XLA finds better places for the arrays around them.
    """
    results = []
    for w, g, kept, operator in zip(
        self.ws, self.gs, self.kept, self.operators, strict=True
    ):
      eta, s, own = self.eta, scale, values
      if after_loop:
        eta, s, own = _barrier((eta, s, own))
      else:
        w, g, eta, s, own = _barrier((w, g, eta, s, own))
      results.append(fun(w, g, _factor(operator, w, eta, kept, s), *own))
    return results


@jax.custom_jvp
def _barrier(values: Any) -> Any:
  return lax.optimization_barrier(values)


@_barrier.defjvp
def _barrier_jvp(primals, tangents):
  # JAX 0.12 can't transpose a barrier of which some tangents are constants.
  return _barrier(*primals), tangents[0]


def _factor(operator: _g.Operator, w: jax.Array, eta: jax.Array, kept: Any, scale: Any):
  """T, or scale T such that the scale takes no operation per weight, where it can."""
  if scale is None:
    return operator(w, eta) if kept is None else kept
  if operator is _g.elementwise:
    return jnp.abs(w) * scale + eta * scale  # one multiply-add for one addition
  return (operator(w, eta) if kept is None else kept) * scale


def _factor_size(rule: _g.LeafRule, w: jax.Array, eta: jax.Array) -> int:
  """The number of entries of T for one leaf, checked to broadcast to it."""
  shape = jax.eval_shape(rule.operator, w, eta).shape
  try:
    fits = np.broadcast_shapes(shape, w.shape) == w.shape
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(
        f"normalization={rule.operator!r} gives T of shape {shape} for the leaf"
        f" {jtu.keystr(rule.path)} of shape {w.shape}; T must broadcast to the"
        " leaf's shape."
    )
  return math.prod(shape)
