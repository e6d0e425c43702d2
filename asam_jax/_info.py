"""What a step says about itself: losses, norms, the radius that was reached."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _geometry as _g
from asam_jax import _mesh
from asam_jax import _shards
from asam_jax import _trees
from asam_jax._geometry import Geometry


class AscentInfo(NamedTuple):
  """What the two passes of a step say; all scalars.

  :func:`asam_jax.value_and_grad` returns it with ``with_info=True``, and
  :func:`asam_jax.adaptive_sam` keeps it in its state with ``with_info=True``. No
  entry costs a pass through the model. Under ``jit``, entries of
  ``value_and_grad`` that are not used are not computed. With ``axis_name``, each entry
  is the mean over the devices, and the same on all of them.

  Attributes:
    value: the loss L(w).
    perturbed_value: the loss L(w + epsilon).
    gap: L(w + epsilon) - L(w), the sharpness that one ascent step finds.
    predicted_gap: rho ||T_w g||_q, the gap to first order: the ``sharpness`` of
      :class:`asam_jax.AscentState`.
    linearity: gap / predicted_gap: 1 where the loss is linear as far as w + epsilon,
      and the further from it the more it bends on the way. 1, its limit, where the
      predicted gap is 0: for a zero gradient, or rho = 0. Below a rho at which the gap
      is lost in the rounding of the losses it is noise.
    rise: sqrt(L(w + epsilon)) - sqrt(L(w)), the rise of the loss in a unit that goes
      down more slowly than the loss does over training. Of a loss below 0, the signed
      root sign(L) sqrt(abs(L)) is taken in its place.
    gradient_norm: ||g||_2 of the gradient at w; 0 below 1e-22 and inf above 1e19, for
      its squares are summed in float32.
    normalized_gradient_norm: ||T_w g||_q, over the perturbed leaves.
    cosine: of the angle between the gradients at w and at w + epsilon; 0 if one of
      them is zero. Both are averaged where all devices share an ascent. For this the
      gradient at w is kept during the second pass, one copy of the parameters.
    radius: ||T_w^{-1} ((w + epsilon) - w)||_p, the radius after rounding to the
      dtypes of the parameters. It is rho unless they are too coarse, and 0 for a zero
      gradient.
    kept_share: <g, (w + epsilon) - w> / predicted_gap, what rounding leaves of the
      perturbation along the gradient. It is 1 unless the parameters are too coarse;
      clearly below 1, see :func:`asam_jax.stochastic_rounding`. (The radius may be
      near rho all the same, for rounding adds noise to what it leaves.)
    nonfinite_steps: the number of steps so far in which one of the two gradients
      had a NaN or an inf (or a norm above 1e19), int32. :func:`asam_jax.skip_nonfinite`
      skips those with a NaN or an inf.
      ``value_and_grad`` has no state and counts its own step only.
  """

  value: jax.Array
  perturbed_value: jax.Array
  gap: jax.Array
  predicted_gap: jax.Array
  linearity: jax.Array
  rise: jax.Array
  gradient_norm: jax.Array
  normalized_gradient_norm: jax.Array
  cosine: jax.Array
  radius: jax.Array
  kept_share: jax.Array
  nonfinite_steps: jax.Array


def empty(geometry: Geometry, params: Any) -> AscentInfo:
  """The info before the first step."""
  zero = jnp.zeros((), _g.perturbed_dtype(geometry.rules(params)))
  info = AscentInfo(*[zero] * len(AscentInfo._fields))
  return info._replace(nonfinite_steps=jnp.zeros((), jnp.int32))


def next_info(last: AscentInfo, info: AscentInfo) -> AscentInfo:
  """The info with the steps counted so far, in the dtypes of the last one."""
  info = finished(info)
  info = info._replace(nonfinite_steps=last.nonfinite_steps + info.nonfinite_steps)
  return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), info, last)


def finished(info: AscentInfo) -> AscentInfo:
  """The info with a count in place of the share of devices that were not finite."""
  return info._replace(
      nonfinite_steps=(info.nonfinite_steps > 0).astype(jnp.int32)
  )


def measured(
    geometry: Geometry, passes: Any, plain: bool, axis_name: Any = None
) -> AscentInfo:
  """The info of one step; ``plain`` if epsilon is the closed form in this geometry.

  It is this device's own, but for the cosine of a common ascent; all entries are
  floats, so that their mean can be taken.
  """
  _check_losses(passes.clean.value, passes.perturbed.value)
  ascent = ascent_state(passes.ascent)
  sharpness, dual_norm = ascent.sharpness, ascent.dual_norm
  clean, perturbed = passes.clean.grads, passes.perturbed.grads
  # One plain sum each: every further pass over a gradient would be a twentieth of all
  # that a small network's step reads.
  shards = _shards.shards_of(geometry.param_specs, geometry.rules(passes.params))
  dot = shards.dot if shards else _trees.dot
  length, other = (jnp.sqrt(dot(g, g)) for g in (clean, perturbed))
  if plain and not _is_coarse(geometry, passes.params):  # nothing is lost to rounding
    moved = dual_norm != 0
    radius = jnp.where(moved, sharpness / jnp.where(moved, dual_norm, 1), 0)
    kept_share = jnp.ones_like(radius)
  else:
    moves = _moves(geometry, passes.params, passes.point)
    radius = geometry.norm(moves, passes.params)
    kept_share = _ratio(dot(clean, moves), sharpness, where_zero=1)
  value, perturbed_value = passes.clean.value, passes.perturbed.value
  gap = perturbed_value - value
  return AscentInfo(
      value=value,
      perturbed_value=perturbed_value,
      gap=gap,
      predicted_gap=sharpness,
      linearity=_ratio(gap, sharpness, where_zero=1),
      rise=_trees.root(perturbed_value) - _trees.root(value),
      gradient_norm=length,
      normalized_gradient_norm=dual_norm,
      cosine=_cosine(dot, passes, length, other, axis_name),
      radius=radius,
      kept_share=kept_share,
      nonfinite_steps=jnp.where(jnp.isfinite(length + other), 0, 1).astype(
          length.dtype
      ),
  )


def _cosine(
    dot: Any, passes: Any, length: Any, other: Any, axis_name: Any
) -> jax.Array:
  """Of the clean and the perturbed gradient, both averaged or both a device's own."""
  clean = passes.clean.grads
  own = _ratio(_ratio(dot(clean, passes.perturbed.grads), length), other)
  if axis_name is None:
    return own
  averaged = jnp.sqrt(dot(passes.grads, passes.grads))
  common = _ratio(_ratio(dot(clean, passes.grads), length), averaged)
  if passes.common:
    return common
  # Where nothing checks it, an averaged gradient may come in.
  return jnp.where(_mesh.same(length, axis_name), common, own)


def ascent_state(state: Any) -> _ascent.AscentState:
  """The state of the one ascent in the state of an ascent chain."""
  is_ascent = lambda node: isinstance(node, _ascent.AscentState)  # noqa: E731
  found = [x for x in jtu.tree_leaves(state, is_leaf=is_ascent) if is_ascent(x)]
  if len(found) != 1:
    raise ValueError(
        f"the ascent chain has {len(found)} asam_jax.ascent in it; an AscentInfo needs"
        " exactly one, to tell its sharpness."
    )
  return found[0]


def _check_losses(value: Any, perturbed_value: Any) -> None:
  if value is None or perturbed_value is None:
    raise ValueError(
        "an AscentInfo has the losses of both passes: call update(grads, state, params,"
        " value=loss, value_fn=value_fn) with the loss at params and"
        " value_fn(params) -> loss. grad_fn alone does not tell the loss."
    )
  _arguments.real("value", value)


def _is_coarse(geometry: Geometry, params: Any) -> bool:
  """Whether a perturbed leaf has fewer than 32 bits."""
  return any(
      jnp.finfo(_arguments.dtype_of(rule.leaf)).bits < 32
      for rule in geometry.rules(params)
      if rule.perturbed
  )


def _moves(geometry: Geometry, params: Any, point: Any) -> Any:
  """(w + epsilon) - w, as the dtypes of the parameters can hold it."""
  rules = geometry.rules(params)
  dtype = _g.perturbed_dtype(rules)
  moves = [
      _as_stored(there, dtype) - jnp.asarray(rule.leaf, dtype)
      if rule.perturbed
      else jnp.zeros_like(rule.leaf)
      for rule, there in zip(rules, jtu.tree_leaves(point), strict=True)
  ]
  return jtu.tree_unflatten(jtu.tree_structure(params), moves)


def _as_stored(x: Any, dtype: Any) -> jax.Array:
  """In a wider dtype, rounded to its own: XLA drops a mere cast back and forth."""
  x = jnp.asarray(x)
  own = jnp.finfo(x.dtype)
  return lax.reduce_precision(x.astype(dtype), own.nexp, own.nmant)


def _ratio(x: jax.Array, y: jax.Array, where_zero: float = 0) -> jax.Array:
  return jnp.where(y == 0, where_zero, x / jnp.where(y == 0, 1, y))
