"""Radius rules: what sets rho from what the two passes of a step say."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _trees
from asam_jax._geometry import LeafSelection


class Observed(NamedTuple):
  """What a rule may look at after the second pass.

  Attributes:
    params: the parameters w.
    clean: the gradient at w that the ascent followed.
    perturbed: the gradient at w + epsilon. Both are a device's own under an
      ``axis_name``; what a rule makes of them is averaged over the devices.
    value: the loss L(w), or None where it was not told.
    perturbed_value: the loss L(w + epsilon), likewise.
    dual_norm: ||T_w g||_q of the ascent.
  """

  params: Any
  clean: Any
  perturbed: Any
  value: Any
  perturbed_value: Any
  dual_norm: jax.Array


class RadiusRule(NamedTuple):
  """Sets the radius of every step; goes where a number may: ``rho=auto_radius()``.

  Attributes:
    init: ``dtype -> state``, a pytree of scalars of that dtype; ``init()`` for
      float32.
    radius: ``(state, count, dual_norm) -> rho`` of this step. ``count`` is the number
      of steps taken (None in a function door), ``dual_norm`` is ||T_w g||_q.
    update: ``(state, observed) -> state`` after the second pass, or None if the
      state never changes.
  """

  init: Callable[..., Any]
  radius: Callable[[Any, Any, jax.Array], jax.Array]
  update: Callable[[Any, Observed], Any] | None = None


Radius: TypeAlias = optax.ScalarOrSchedule | RadiusRule


class AutoRadiusState(NamedTuple):
  """State of :func:`auto_radius` and :func:`rise_radius`.

  Attributes:
    rho: the radius of the next step, a scalar; 0 before the first.
    room: how many times ``start`` the first-order gap may be at the next step, a
      scalar: 100 before the first, and e^rate times as much after each.
  """

  rho: jax.Array
  room: Any = math.inf


def auto_radius(
    cosine: float = 0.8,
    *,
    rate: float = 0.05,
    start: float = 0.05,
    rho_max: float = 1e4,
    over: LeafSelection | None = None,
) -> RadiusRule:
  r"""A radius that keeps the two gradients at a given angle.

  .. math::

    c_t = \cos\big(\nabla L(w_t), \nabla L(w_t + \hat\epsilon_t)\big), \qquad
    \rho_{t+1} = \rho_t \exp\Big(k \, \mathrm{clip}
      \Big(\frac{c_t - c}{1 - c}, -1, 1\Big)\Big)

  A radius is too small where the two gradients are nearly the same, and too large
  where they have little to do with each other. Their cosine has no unit, and knows
  neither the scale of the weights nor T_w, so that one target serves networks whose
  best radii are far apart. The first step is a plain one; the second has the radius
  whose first-order gap :math:`\rho \|T_w g\|_q` is ``start``, and from there rho grows
  by at most a factor :math:`e^k` a step: a full radius at initialization may never
  leave the plateau. Nor is the gap more than :math:`100\,e^{kt}` times ``start`` at the
  first steps t, as it would be behind a batch whose gradient all but vanishes.

  Where it holds (on digits; the site's page on the radius has the table): without
  batch norm at p = 2, with SGD and AdamW, the default does as well as a radius that was
  tuned, but for a transformer on clean labels with T = 1. With batch norm and wrong
  labels it is too timid at p = 2, and a target of 0.7 or, in a short training, a rate
  of 0.2 does better. At p = inf a transformer wants 0.9 or a fixed radius. Where the
  plain optimizer does not come to learn its training set, as in short training with
  augmentation, the default holds learning back and costs accuracy, far more than ASAM
  gains, and a translator after four epochs nearly all of it: there the radius that
  tuning finds turns the gradient by some degrees only (cosine 0.98 to 0.99). Raise the
  target, or take a fixed radius. All this is of batches of 64 and more: of a small
  batch the perturbation follows the noise, and at 16 examples even 0.9 was too low.

  Cost: none that counts; memory: one copy of the parameters during the second pass,
  for the gradient at w is kept until then. With ``over`` it is the share of the
  leaves that are chosen. Where a gradient's norm is below 1e-22 or above 1e19, whose
  squares leave float32's range, rho stays as it is.

  Args:
    cosine: the target c, in (0, 1). A lower one regularizes more.
    rate: k, > 0, the largest change of log rho in a step.
    start: the first-order gap of the second step, > 0, in the unit of the loss: some
      hundredths of what the loss is at the start, so that 0.05 suits a cross-entropy.
    rho_max: where rho stops, > 0: where the loss is linear, no radius turns the
      gradient.
    over: the leaves over which the cosine is taken, at least one: a pytree of bools or
      a predicate ``(path, leaf) -> bool``; by default all.

  Returns:
    A :class:`RadiusRule` for the argument ``rho`` of whatever takes two gradients.
    ``optax.tree_utils.tree_get(state, "rho")`` is the radius of the next step.

  Raises:
    ValueError: if cosine is outside (0, 1), or rate, start or rho_max is not > 0; in
      ``update``, if ``over`` chooses no leaf.
    TypeError: if one of them is no number.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> loss = lambda w: jnp.sum(w**4)
    >>> tx = asam_jax.adaptive_sam(optax.sgd(1e-3), rho=asam_jax.auto_radius(0.9))
    >>> w = jnp.array([1.0, 2.0])
    >>> state = tx.init(w)
    >>> @jax.jit
    ... def step(w, state):
    ...   grads = jax.grad(loss)(w)
    ...   updates, state = tx.update(grads, state, w, grad_fn=jax.grad(loss))
    ...   return optax.apply_updates(w, updates), state
    >>> for _ in range(50):
    ...   w, state = step(w, state)
    >>> rho = optax.tree_utils.tree_get(state, "rho")
  """
  _fraction("cosine", cosine)

  def signal(observed: Observed) -> jax.Array:
    clean, perturbed = observed.clean, observed.perturbed
    if over is not None:
      leaves = _arguments.leaves(observed.params, over=over)
      if not any(chosen for *_, chosen in leaves):
        raise ValueError(
            f"over={over!r} chooses no leaf, so that there is no angle; choose one at"
            " least, or give over=None for all."
        )
      clean, perturbed = (
          [x for x, (*_, c) in zip(jax.tree.leaves(g), leaves, strict=True) if c]
          for g in (clean, perturbed)
      )
    dot = _trees.dot(clean, perturbed)
    lengths = _trees.root(_trees.dot(clean, clean)) * _trees.root(
        _trees.dot(perturbed, perturbed))
    # Of a zero gradient there is no angle, and so no change; nor of one with NaN.
    reached = jnp.where(lengths > 0, dot / jnp.where(lengths > 0, lengths, 1), cosine)
    return (reached - cosine) / (1 - cosine)

  return _controlled(signal, rate, start, rho_max)


def rise_radius(
    rise: float = 0.17,
    *,
    rate: float = 0.05,
    start: float = 0.05,
    rho_max: float = 1e4,
) -> RadiusRule:
  r"""A radius that keeps the rise of the square root of the loss.

  .. math::

    r_t = \sqrt{L(w_t + \hat\epsilon_t)} - \sqrt{L(w_t)}, \qquad
    \rho_{t+1} = \rho_t \exp\Big(k \, \mathrm{clip}
      \Big(\frac{r - r_t}{r}, -1, 1\Big)\Big)

  It needs no memory, but the losses: ``update(grads, state, params, value=loss,
  value_fn=value_fn)``; function doors know them. Of a loss below 0 the signed root is
  taken, sign(L) sqrt(abs(L)). Its target depends on the network more than
  :func:`auto_radius`'s does: with batch norm it is about three times as large.

  Cost: none; memory: none.

  Args:
    rise: the target r, > 0, in the unit of the square root of the loss.
    rate: as for :func:`auto_radius`.
    start: likewise.
    rho_max: likewise.

  Returns:
    A :class:`RadiusRule`.

  Raises:
    ValueError: if rise, rate, start or rho_max is not > 0; in ``update``, without
      the losses.
    TypeError: if one of them is no number.

  Examples:
    >>> import optax
    >>> import asam_jax
    >>> tx = asam_jax.adaptive_sam(optax.sgd(0.1), rho=asam_jax.rise_radius())
  """
  _arguments.positive("rise", rise)

  def signal(observed: Observed) -> jax.Array:
    if observed.value is None or observed.perturbed_value is None:
      raise ValueError(
          "rise_radius needs the losses of both passes: call update(grads, state,"
          " params, value=loss, value_fn=value_fn) with the loss at params and"
          " value_fn(params) -> loss, or take auto_radius, which needs none."
      )
    losses = observed.value, observed.perturbed_value
    before, after = (_trees.root(_trees.f32(loss)) for loss in losses)
    return (rise - (after - before)) / rise

  return _controlled(signal, rate, start, rho_max)


def loss_budget(
    sigma: optax.ScalarOrSchedule, rho_max: float = math.inf
) -> RadiusRule:
  r"""The radius at which the loss rises by a given amount to first order: LE-SAM.

  .. math::

    \rho_t = \min\Big(\frac{\sigma_t}{\|T_w g_t\|_q}, \rho_{\max}\Big)

  In the paper T = 1 (``adaptive_sam(..., normalization="none")`` or ``sam``), and sigma
  falls to zero along a cosine in the last part of training. Where the gradient gets
  small the radius gets large, so that ``rho_max`` matters.

  Cost: none; memory: none. Under an ``axis_name`` without ``average_ascent``, all
  devices use the mean of their norms: one more exchange, of a scalar.

  Args:
    sigma: the budget, >= 0, in the unit of the loss: a number, a traced scalar or a
      schedule of the step count (in a function door, which has none, its value).
    rho_max: the largest radius, > 0.

  Returns:
    A :class:`RadiusRule`.

  Raises:
    ValueError: if sigma is negative or not finite, or rho_max is not > 0.
    TypeError: if one of them is no number, or sigma is a schedule in a function door.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = asam_jax.sam(optax.sgd(0.1), rho=asam_jax.loss_budget(0.5, rho_max=1.0))
    >>> w = jnp.array([3.0, 4.0])
    >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(optax.tree_utils.tree_get(state, "sharpness"))
    0.5

  References:
    Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial
    Perturbation of Sharpness-Aware Minimization
    <https://arxiv.org/abs/2605.10183>`_, 2026
  """
  budget = _arguments.scalar_or_schedule("sigma", sigma)
  if not (_is_number(rho_max) and rho_max == math.inf):
    _arguments.positive("rho_max", rho_max)

  def radius(state, count, dual_norm):
    del state
    if callable(budget) and count is None:
      raise TypeError(
          "sigma is a schedule, but a function transformation has no step count; pass"
          " its value: loss_budget(schedule(step))."
      )
    amount = jnp.asarray(budget(count) if callable(budget) else budget, dual_norm.dtype)  # pyright: ignore
    ratio = amount / jnp.where(dual_norm == 0, 1, dual_norm)
    return jnp.minimum(jnp.where(dual_norm == 0, 0, ratio), rho_max)

  return RadiusRule(lambda dtype=jnp.float32: (), radius)


def this_step(
    rule: RadiusRule,
    state: Any,
    dual_norm: jax.Array,
    radius_rules: list[RadiusRule] | None = None,
    over_devices: Any = None,
    **extra_args: Any,
) -> jax.Array:
  """The radius in an ascent, which says in ``radius_rules`` what it follows.

  ``over_devices`` is the mean over devices that ascend on their own.
  """
  del extra_args
  if radius_rules is not None:
    radius_rules.append(rule)
  elif rule.update is not None:
    raise ValueError(_NEEDS_BOTH)
  shared = over_devices(dual_norm) if over_devices else dual_norm
  return jnp.asarray(rule.radius(state.radius, state.count, shared), dual_norm.dtype)


def after_both(
    rules: list[RadiusRule], ascent_state: Any, params: Any, clean: Any, perturbed: Any
) -> Any:
  """The ascent chain's state with the rule's next one; the passes are a step's two."""
  looking = [rule for rule in rules if rule.update is not None]
  if not looking:
    return ascent_state
  rule = looking[0]  # several ascents of one chain say it again
  if any(other is not rule for other in rules):
    raise ValueError(
        "the ascent chain has several radius rules, but there is one second gradient"
        " for them to look at; give rho a rule once, and a number elsewhere."
    )

  def updated(node):
    if not _has_rule(node):
      return node
    observed = Observed(
        params, clean.grads, perturbed.grads, clean.value, perturbed.value,
        node.dual_norm,
    )
    return node._replace(radius=rule.update(node.radius, observed))  # pyright: ignore

  return jax.tree.map(updated, ascent_state, is_leaf=_has_rule)


def rule_of(rho: Any) -> RadiusRule | None:
  """The rule, if rho is one; raises if it is what makes one."""
  if any(rho is maker for maker in (auto_radius, rise_radius, loss_budget)):
    raise TypeError(
        f"rho={rho.__name__} is the function that makes a rule; call it:"
        f" rho={rho.__name__}({'0.1' if rho is loss_budget else ''})."
    )
  return rho if isinstance(rho, RadiusRule) else None


def refuse(ascent_state: Any) -> None:
  """Raises if an ascent in the state of an ascent chain follows a rule."""
  if any(map(_has_rule, jax.tree.leaves(ascent_state, is_leaf=_has_rule))):
    raise ValueError(_NEEDS_BOTH)


def _has_rule(node: Any) -> bool:
  """Whether it is the state of an ascent that follows a rule."""
  return hasattr(node, "dual_norm") and node.radius is not None


_NEEDS_BOTH = (
    "rho is a radius rule, which looks at the gradients at w and at w + epsilon, but"
    " here there are not both: give it to adaptive_sam, or to what takes two gradients"
    " a step, as in perturbed_gradient(ascent(rho=auto_radius())). Methods with one"
    " gradient a step need a number."
)


def _controlled(
    signal: Callable[[Observed], jax.Array], rate: Any, start: Any, rho_max: Any
) -> RadiusRule:
  """The rule that follows a signal: above 0 rho grows, below it shrinks."""
  for name, value in (("rate", rate), ("start", start), ("rho_max", rho_max)):
    _arguments.positive(name, value)

  def init(dtype=jnp.float32):
    return AutoRadiusState(jnp.zeros((), dtype), jnp.full((), 100, dtype))

  def at_gap(gap, norm):
    return gap / jnp.where(norm > 0, norm, 1)

  def radius(state, count, dual_norm):
    del count
    # One batch whose gradient all but vanishes makes the first radius huge.
    most = at_gap(state.room * start, dual_norm)
    return jnp.where((dual_norm > 0) & (most < state.rho), most, state.rho)

  def update(state, observed):
    norm = observed.dual_norm
    used = radius(state, None, norm)
    factor = jnp.exp(rate * jnp.clip(signal(observed), -1, 1))
    first = jnp.where(norm > 0, at_gap(start, norm), 0)
    rho = jnp.where(used > 0, used * factor, first)
    # What is not finite says nothing, and must not stay.
    rho = jnp.where(jnp.isfinite(rho), jnp.minimum(rho, rho_max), state.rho)
    room = jnp.where(used > 0, state.room * jnp.exp(rate), state.room)
    new = AutoRadiusState(rho, room)
    return jax.tree.map(lambda x, old: x.astype(jnp.result_type(old)), new, state)

  return RadiusRule(init, radius, update)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fraction(argument: str, value: Any) -> None:
  if _arguments.is_concrete(_arguments.scalar(argument, value, high=1)):
    _arguments.positive(argument, value)
