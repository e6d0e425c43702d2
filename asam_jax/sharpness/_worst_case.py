# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""Worst-case sharpness: the largest rise of the loss in the adaptive ball."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
import optax

from asam_jax import _arguments
from asam_jax import _coordinates
from asam_jax._coordinates import Coordinates
from asam_jax._geometry import Geometry

_METHODS = ("apgd", "pga", "one_step")
# Auto-PGD: the weight of the new step against momentum, and the share of steps
# that must improve for the step size to be kept.
_MOMENTUM, _SUCCESS = 0.75, 0.75


class WorstCase(NamedTuple):
  """What :func:`worst_case` found.

  Attributes:
    value: max L(w + epsilon) - L(w), a scalar >= 0 for the searches.
    perturbation: the epsilon that attains it; the structure and dtypes of params.
    trace: L(w + epsilon) - L(w) at every iterate, ``[1 + restarts, steps + 1]``;
      row 0 starts at w. ``[1, 1]`` for the one-step form.
  """

  value: Float[Array, ""]
  perturbation: Any
  trace: Float[Array, "starts points"]


def worst_case(
    loss: Callable[[Any], Any],
    params: Any,
    rho: Any = 0.5,
    *,
    geometry: Geometry = Geometry(),
    method: str = "apgd",
    steps: int = 20,
    restarts: int = 1,
    key: PRNGKeyArray | None = None,
) -> WorstCase:
  r"""Worst-case (adaptive) sharpness.

  .. math:: \max_{\|T_w^{-1}\epsilon\|_p \le \rho} L(w + \epsilon) - L(w)

  with the T_w, p and selections of the geometry. The searches run in
  :math:`\delta = T_w^{-1}\epsilon`, where the ellipsoid is a plain ball, and keep
  the best point they see; that point is feasible, so the value is a lower bound of
  the maximum. It is never below the one-step value at the same arguments.

  ``loss`` closes over its batch. The function is pure: put it under ``jax.jit``
  together with the loss to log it during training. It costs
  (1 + restarts) * (steps + 1) + 1 gradients.

  With ``Geometry(eta=0, normalize=lambda path, leaf: True)`` the value is the same
  for all rescalings of a ReLU network; with the defaults nearly so. Iterates at which
  the loss is NaN are never the best. A traced rho that turns out to be negative or
  NaN makes the value NaN.

  Args:
    loss: ``loss(params) -> scalar``, deterministic (evaluation mode).
    params: the weights w, a pytree of real float arrays.
    rho: the radius, >= 0, in the unit of ``T_w^{-1} w``; a number or traced.
    geometry: T_w, the leaves that get it, those that are perturbed, and the norm's
      exponent p: 1, 2 or inf, or any in [1, inf] for ``"one_step"``; see
      :class:`asam_jax.Geometry`. ``Geometry(normalization="none")`` for plain
      sharpness.
    method: ``"apgd"``, Auto-PGD: momentum, and where progress stalls a step of half
      the length from the best point (here without momentum); ``"pga"``, projected
      gradient ascent, its step falling from rho to 0; ``"one_step"``, the closed form
      that ASAM takes.
    steps: the number of iterations of a search.
    restarts: the number of random starts in the ball, beside the one at w. At a
      minimum, where the gradient vanishes, only these leave w.
    key: for the random starts; ``jax.random.key(0)`` if not given.

  Returns:
    A :class:`WorstCase`.

  Raises:
    ValueError: for an unknown method, a p without a projection, a negative or
      infinite rho, a count that is too small, a T that does not broadcast to its
      leaf, or nothing to perturb.
    TypeError: if rho is not one real number, a count no int, geometry no
      ``Geometry``, or key no random key; if the loss is not a function or not a real
      scalar, or a perturbed leaf is not float.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> from asam_jax import sharpness
    >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)
    >>> w = jnp.array([1.0, 0.0])
    >>> sphere = asam_jax.Geometry(normalization="none")
    >>> plain = sharpness.worst_case(loss, w, rho=1.0, geometry=sphere)
    >>> print(f"{plain.value:.3f}")
    2.167
    >>> ellipsoid = asam_jax.Geometry(eta=0.0)
    >>> adaptive = sharpness.worst_case(loss, w, rho=1.0, geometry=ellipsoid)
    >>> print(f"{adaptive.value:.4f}", adaptive.perturbation.tolist())
    1.5000 [1.0, 0.0]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021

    Croce and Hein, `Reliable evaluation of adversarial robustness
    <https://arxiv.org/abs/2003.01690>`_, 2020

    Andriushchenko et al., `A modern look at the relationship between sharpness and
    generalization <https://arxiv.org/abs/2302.07011>`_, 2023
  """
  loss = _arguments.loss(loss)
  key = _arguments.random_key(key)
  coordinates = Coordinates.build(params, geometry)
  rho, p = coordinates.radius(rho), geometry.p
  _check(method, p, steps, restarts)
  single = _one_step(loss, coordinates, rho, geometry)
  if method == "one_step":
    return single

  value_and_grad = jax.value_and_grad(coordinates.pull_back(loss))
  schedule = _schedule(steps, method)
  first = 2 * rho if method == "apgd" else rho

  def search(carry, inputs):
    best, clean = carry
    index, key = inputs
    start = [
        jnp.where(index == 0, 0, x)
        for x in _coordinates.uniform(coordinates, key, rho, p)
    ]
    delta, value, values = _search(value_and_grad, start, rho, p, first, schedule)
    # L(w) as this same program computes it, so that no rounding looks like a rise.
    clean = jnp.where(index == 0, values[0], clean)
    value = value - clean
    # NaN at the one step must not hide what a search found.
    better = (value > best[0]) | (jnp.isnan(best[0]) & (value > -jnp.inf))
    best = _select(better, (value, coordinates.epsilon(delta)), best)
    return (best, clean), values - clean

  # One search after another: compiled once, and memory stays that of one.
  keys = jax.random.split(key, 1 + restarts)
  carry = ((single.value, single.perturbation), jnp.zeros_like(rho))
  inputs = (jnp.arange(1 + restarts), keys)
  ((value, epsilon), _), trace = lax.scan(search, carry, inputs)
  return WorstCase(jnp.where(jnp.isnan(rho), jnp.nan, value), epsilon, trace)


def _check(method: Any, p: float, steps: Any, restarts: Any) -> None:
  _arguments.one_of("method", method, _METHODS)
  if method != "one_step" and not _coordinates.has_closed_form(p):
    raise ValueError(
        f"p={p!r}: only the balls of p = 1, 2 and inf have a projection in closed"
        ' form; use one of these, or method="one_step", which takes every p.'
    )
  _arguments.count("steps", steps, 1)
  _arguments.count("restarts", restarts, 0)


def _one_step(loss, coordinates: Coordinates, rho, geometry: Geometry) -> WorstCase:
  params, dtype = coordinates.params, coordinates.dtype
  clean, grads = jax.value_and_grad(loss, allow_int=True)(params)
  epsilon = _coordinates.perturbation(grads, params, geometry, rho)
  moved = optax.apply_updates(params, epsilon)
  value = jnp.asarray(loss(moved), dtype) - jnp.asarray(clean, dtype)
  return WorstCase(value, epsilon, value[None, None])


def checkpoints(steps: int) -> list[int]:
  """The iterations at which Auto-PGD may halve its step."""
  shares = [0.0, 0.22]
  while shares[-1] < 1:
    shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
  # Rounded first: 0.22 * 50 is a little above 11 in floating point.
  at = [math.ceil(round(share * steps, 9)) for share in shares[1:]]
  return sorted({i for i in at if 0 < i < steps})


class _Schedule(NamedTuple):
  """For each point: the steps since the last checkpoint, 0 where there is none."""

  gaps: Int[Array, " points"]
  momentum: bool


def _schedule(steps: int, method: str) -> _Schedule:
  gaps = [0] * (steps + 1)
  if method == "apgd":
    last = 0
    for i in checkpoints(steps):
      gaps[i], last = i - last, i
  return _Schedule(jnp.array(gaps, jnp.int32), method == "apgd")


class _Point(NamedTuple):
  delta: Any
  value: Float[Array, ""]
  grads: Any


class _Progress(NamedTuple):
  """What Auto-PGD remembers to decide on its step."""

  step: Float[Array, ""]
  improved: Int[Array, ""]  # steps that rose since the last checkpoint
  halved: Bool[Array, ""]  # whether it halved at the last checkpoint
  best: Float[Array, ""]  # the best value at the last checkpoint


def _search(value_and_grad, start, rho, p, first_step, schedule: _Schedule):
  """(best delta, its value, values at all points); -inf if all values are NaN."""
  lowest = jnp.full_like(first_step, -jnp.inf)
  nowhere = _Point(start, lowest, start)
  zero = jnp.zeros((), jnp.int32)
  progress = _Progress(first_step, zero, jnp.array(True), lowest)

  def visit(carry, inputs):
    delta, before, best, progress = carry
    index, gap = inputs
    here = _Point(delta, *value_and_grad(delta))
    value = here.value
    rose = (index > 0) & (value > before.value)
    progress = progress._replace(improved=progress.improved + rose)
    best = _select(value > best.value, here, best)
    progress, restart = _adapt(progress, gap, best.value)
    # A fresh start from the best point has no momentum.
    here = _select(restart, best, here)
    last = _select(restart | (index == 0), here.delta, before.delta)
    if schedule.momentum:
      target = _momentum_step(here, last, progress.step, rho, p, index)
    else:
      left = (1 - index / len(schedule.gaps)).astype(first_step.dtype)
      target = _plain_step(here, progress.step * left, rho, p)
    return (target, here, best, progress), value

  carry = (start, nowhere, nowhere, progress)
  inputs = (jnp.arange(len(schedule.gaps)), schedule.gaps)
  (_, _, best, _), values = lax.scan(visit, carry, inputs)
  return best.delta, best.value, values


def _plain_step(now: _Point, step, rho, p):
  direction = _coordinates.steepest(now.grads, step, p)
  return _coordinates.project(jtu.tree_map(jnp.add, now.delta, direction), rho, p)


def _momentum_step(now: _Point, before, step, rho, p, index):
  target = _plain_step(now, step, rho, p)

  def mix(x, new, old):
    mixed = x + _MOMENTUM * (new - x) + (1 - _MOMENTUM) * (x - old)
    return jnp.where(index == 0, new, mixed)

  return _coordinates.project(jtu.tree_map(mix, now.delta, target, before), rho, p)


def _adapt(progress: _Progress, gap, best):
  """Halves the step at a checkpoint if too few steps rose or the best stalled."""
  rare = progress.improved < _SUCCESS * gap
  stalled = ~progress.halved & (best <= progress.best)
  at_checkpoint = gap > 0
  halve = at_checkpoint & (rare | stalled)
  renewed = _Progress(
      step=jnp.where(halve, progress.step / 2, progress.step),
      improved=jnp.zeros_like(progress.improved),
      halved=halve,
      best=best,
  )
  return _select(at_checkpoint, renewed, progress), halve


def _select(condition, a, b):
  return jtu.tree_map(lambda x, y: jnp.where(condition, x, y), a, b)
