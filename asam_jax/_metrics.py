"""What a step says about itself: losses, norms, the radius that was reached."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

from asam_jax import _ascent
from asam_jax import _checks
from asam_jax import _normalization as _n
from asam_jax._norm import norm


class AscentInfo(NamedTuple):
  """What the two passes of a step say; all scalars.

  :func:`asam_jax.value_and_grad` returns it with ``with_info=True``, and
  :func:`asam_jax.adaptive_sam` keeps it in its state with ``with_info=True``. No
  entry costs a pass through the model. Under ``jit``, entries of
  ``value_and_grad`` that are not used are not computed.

  Attributes:
    value: the loss L(w).
    perturbed_value: the loss L(w + epsilon).
    gap: L(w + epsilon) - L(w), the sharpness that one ascent step finds.
    sharpness: rho ||T_w g||_q, the gap to first order.
    gradient_norm: ||g||_2 of the gradient at w.
    normalized_gradient_norm: ||T_w g||_q, over the perturbed leaves.
    cosine: of the angle between the gradients at w and at w + epsilon; 0 if one of
      them is zero. For this the gradient at w is kept during the second pass, one
      copy of the parameters.
    radius: ||T_w^{-1} ((w + epsilon) - w)||_p, the radius after rounding to the
      dtypes of the parameters. It is rho unless they are too coarse.
    kept_share: <g, (w + epsilon) - w> / sharpness, what rounding leaves of the
      perturbation along the gradient. It is 1 unless the parameters are too coarse;
      clearly below 1, see :func:`asam_jax.stochastic_rounding`. (The radius may be
      near rho all the same, for rounding adds noise to what it leaves.)
    nonfinite_steps: the number of steps so far in which one of the two gradients
      had a NaN or an inf, those that :func:`asam_jax.skip_nonfinite` skips, int32.
      ``value_and_grad`` has no state and counts its own step only.
  """

  value: jax.Array
  perturbed_value: jax.Array
  gap: jax.Array
  sharpness: jax.Array
  gradient_norm: jax.Array
  normalized_gradient_norm: jax.Array
  cosine: jax.Array
  radius: jax.Array
  kept_share: jax.Array
  nonfinite_steps: jax.Array


class Geometry(NamedTuple):
  """The arguments of :func:`asam_jax.ascent` that a radius is measured with."""

  eta: Any
  p: float
  normalization: _n.Normalization
  normalize: _n.LeafSelection | None
  perturb: _n.LeafSelection | None

  def rules(self, params: optax.Params) -> list[_n.LeafRule]:
    return _n.leaf_rules(params, self.normalization, self.normalize, self.perturb)


class Passes(NamedTuple):
  """What the two passes gave."""

  value: Any
  grads: Any
  params: Any
  perturbed_value: Any
  perturbed_grads: Any
  point: Any


def recorded(link: Any, geometry: Geometry) -> optax.GradientTransformationExtraArgs:
  """A ``perturbed_gradient`` of a plain ascent that fills ``info`` in its state."""

  def init_fn(params):
    zero = jnp.zeros((), _ascent.sum_dtype(geometry.rules(params)))
    info = AscentInfo(*[zero] * len(AscentInfo._fields))
    info = info._replace(nonfinite_steps=jnp.zeros((), jnp.int32))
    return link.init(params)._replace(info=info)

  def update_fn(updates, state, params=None, *, grad_fn=None, value_fn=None,
                value=None, **extra_args):
    if grad_fn is not None:
      both = lambda point: (jnp.nan, grad_fn(point))  # noqa: E731
    elif value_fn is not None:
      both = jax.value_and_grad(value_fn)
    else:
      return link.update(updates, state, params, **extra_args)  # raises
    seen = []

    def watched(point):  # called once, in the trace of this update
      perturbed_value, grads = both(point)
      seen.append((perturbed_value, grads, point))
      return grads

    extra_args["grad_fn"] = watched
    perturbed, new_state = link.update(updates, state, params, **extra_args)
    passes = Passes(jnp.nan if value is None else value, updates, params, *seen[0])
    ascent_state = new_state.ascent
    info = measured(geometry, state.ascent.count, ascent_state.sharpness, passes)
    info = info._replace(
        nonfinite_steps=state.info.nonfinite_steps + info.nonfinite_steps
    )
    info = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), info, state.info)
    return perturbed, new_state._replace(info=info)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measured(
    geometry: Geometry, count: Any, sharpness: jax.Array, passes: Passes
) -> AscentInfo:
  """The info of one step; schedules are read at ``count``."""
  rules = geometry.rules(passes.params)
  eta = geometry.eta(count) if callable(geometry.eta) else geometry.eta
  # At rho = 1 the sharpness is the norm, and this holds for rho = 0 as well.
  _, normalized = _ascent.perturbation(
      passes.grads, passes.params, rules, 1.0, eta, geometry.p
  )
  moves = _moves(rules, passes.point)
  finite = all_finite((passes.grads, passes.perturbed_grads))
  return AscentInfo(
      value=passes.value,
      perturbed_value=passes.perturbed_value,
      gap=passes.perturbed_value - passes.value,
      sharpness=sharpness,
      gradient_norm=norm(_floats(passes.grads), 2),
      normalized_gradient_norm=normalized,
      cosine=_cosine(_floats(passes.grads), _floats(passes.perturbed_grads)),
      radius=_radius(rules, moves, eta, geometry.p),
      kept_share=_kept_share(rules, moves, passes.grads, sharpness),
      nonfinite_steps=jnp.where(finite, 0, 1).astype(jnp.int32),
  )


def all_finite(tree: Any) -> jax.Array:
  """Whether no float in the tree is NaN or inf."""
  leaves = _floats(tree)
  return jnp.stack([jnp.array(True), *(jnp.all(jnp.isfinite(x)) for x in leaves)]).all()


def _moves(rules: Sequence[_n.LeafRule], point: optax.Params) -> list[jax.Array]:
  """(w + epsilon) - w, as the dtypes of the parameters can hold it."""
  dtype = _ascent.sum_dtype(rules)
  return [
      _as_stored(there, dtype) - jnp.asarray(rule.leaf, dtype)
      if rule.perturbed
      else jnp.zeros((), dtype)
      for rule, there in zip(rules, jtu.tree_leaves(point), strict=True)
  ]


def _radius(
    rules: Sequence[_n.LeafRule], moves: list[jax.Array], eta: Any, p: float
) -> jax.Array:
  """||T^{-1} move||_p; a weight that T fixes and that stays counts 0."""
  dtype = _ascent.sum_dtype(rules)
  eta = jnp.asarray(eta, dtype)
  scaled = []
  for rule, move in zip(rules, moves, strict=True):
    if rule.perturbed:
      t = rule.operator(jnp.asarray(rule.leaf, dtype), eta)
      scaled.append(move / jnp.where(move == 0, 1, t))
  return norm(scaled, p).astype(dtype)


def _kept_share(
    rules: Sequence[_n.LeafRule],
    moves: list[jax.Array],
    grads: optax.Updates,
    sharpness: jax.Array,
) -> jax.Array:
  unit = jnp.where(sharpness == 0, 1, sharpness)
  kept = [
      jnp.sum(jnp.asarray(g, move.dtype) / unit * move)
      for rule, move, g in zip(rules, moves, jtu.tree_leaves(grads), strict=True)
      if rule.perturbed
  ]
  return jnp.where(sharpness == 0, 1, sum(kept, start=jnp.zeros_like(unit)))


def _as_stored(x: Any, dtype: Any) -> jax.Array:
  """In a wider dtype, rounded to its own: XLA drops a mere cast back and forth."""
  x = jnp.asarray(x)
  own = jnp.finfo(x.dtype)
  return lax.reduce_precision(x.astype(dtype), own.nexp, own.nmant)


def _cosine(xs: list[jax.Array], ys: list[jax.Array]) -> jax.Array:
  lengths = [norm(xs, 2), norm(ys, 2)]
  u, v = (jnp.where(length == 0, 1, length) for length in lengths)
  products = [jnp.sum((x / u) * (y / v)) for x, y in zip(xs, ys, strict=True)]
  return sum(products, start=jnp.zeros((), lengths[0].dtype))


def _floats(tree: Any) -> list[jax.Array]:
  """The float leaves in float32 at least; float0 and the like are left out."""
  leaves = [
      jnp.asarray(x)
      for x in jtu.tree_leaves(tree)
      if jnp.issubdtype(_checks.dtype_of(x), jnp.floating)
  ]
  return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]
