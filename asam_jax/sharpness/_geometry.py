# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""The adaptive geometry: coordinates delta = T_w^{-1} epsilon, and balls in them.

In delta the ellipsoid ||T_w^{-1} epsilon||_p <= rho is a plain ball, so to project
onto it needs no search for a multiplier, and a weight with T = 0 is simply a
coordinate that the loss does not depend on.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PRNGKeyArray
import numpy as np
import optax

from asam_jax import _ascent
from asam_jax import _checks
from asam_jax import _normalization as _n
from asam_jax._norm import norm

# One array per perturbed leaf, in float32 at least.
Delta: TypeAlias = list[Array]
Scalar: TypeAlias = Float[Array, ""]
Loss: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """The perturbed leaves of params, and T_w for each, in broadcastable shape."""

  params: Any
  chosen: list[int]
  scales: Delta
  shapes: list[tuple[int, ...]]
  dtype: Any

  @classmethod
  def build(
      cls,
      params: Any,
      eta: Any,
      normalization: _n.Normalization,
      normalize: _n.LeafSelection | None,
      perturb: _n.LeafSelection | None,
  ) -> "Coordinates":
    number("eta", eta)
    rules = leaf_rules(params, normalization, normalize, perturb)
    dtype = _ascent.sum_dtype(rules)
    chosen = [i for i, r in enumerate(rules) if r.perturbed and jnp.size(r.leaf)]
    if not chosen:
      raise ValueError(
          f"perturb={perturb!r} leaves no parameter to perturb; select at least one"
          " leaf that is not empty."
      )
    scales = [
        jnp.asarray(rules[i].operator(jnp.asarray(rules[i].leaf, dtype), eta), dtype)
        for i in chosen
    ]
    shapes = [jnp.shape(rules[i].leaf) for i in chosen]
    return cls(params, chosen, scales, shapes, dtype)

  @property
  def size(self) -> int:
    """The number of coordinates."""
    return sum(math.prod(shape) for shape in self.shapes)

  def zeros(self) -> Delta:
    return [jnp.zeros(shape, self.dtype) for shape in self.shapes]

  def normal(self, key: PRNGKeyArray) -> Delta:
    """Independent standard normal coordinates."""
    return self._draw(jax.random.normal, key)

  def signs(self, key: PRNGKeyArray) -> Delta:
    """Independent coordinates of -1 and 1."""
    return self._draw(jax.random.rademacher, key)

  def cube(self, key: PRNGKeyArray) -> Delta:
    """Independent coordinates, uniform in [-1, 1)."""
    draw = functools.partial(jax.random.uniform, minval=-1, maxval=1)
    return self._draw(draw, key)

  def _draw(self, draw: Callable[..., Array], key: PRNGKeyArray) -> Delta:
    # One draw for all leaves: each draw of its own would take seconds to compile.
    flat = draw(key, (self.size,), self.dtype)
    ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
    parts = jnp.split(flat, ends)
    return [x.reshape(shape) for x, shape in zip(parts, self.shapes, strict=True)]

  def epsilon(self, delta: Delta) -> Any:
    """T delta as a perturbation: the structure and dtypes of params."""
    leaves, treedef = jtu.tree_flatten(self.params)
    result = [jnp.zeros_like(leaf) for leaf in leaves]
    for i, scale, d in zip(self.chosen, self.scales, delta, strict=True):
      result[i] = (scale * d).astype(result[i].dtype)
    return jtu.tree_unflatten(treedef, result)

  def delta(self, epsilon: Any) -> Delta:
    """T^{-1} epsilon: 0 where both are zero, inf where T alone is."""
    leaves = jtu.tree_leaves(epsilon)
    result = []
    for i, scale in zip(self.chosen, self.scales, strict=True):
      e = jnp.asarray(leaves[i], self.dtype)
      result.append(jnp.where(e == 0, 0, e / jnp.where(e == 0, 1, scale)))
    return result

  def pull_back(self, loss: Loss) -> Callable[[Delta], Scalar]:
    """``delta -> loss(w + T delta)``, whose Hessian at 0 is T H T."""

    def at(delta: Delta) -> Scalar:
      point = optax.apply_updates(self.params, self.epsilon(delta))
      return jnp.asarray(loss_value(loss, point), self.dtype)

    return at


def leaf_rules(
    params: Any,
    normalization: _n.Normalization,
    normalize: _n.LeafSelection | None,
    perturb: _n.LeafSelection | None,
) -> list[_n.LeafRule]:
  """The rule of every leaf, checked to be perturbable."""
  _checks.whole(params)
  rules = _n.leaf_rules(params, normalization, normalize, perturb)
  for rule in rules:
    if rule.perturbed:
      _checks.real(rule)
  return rules


def loss_value(loss: Loss, params: Any) -> Any:
  """``loss(params)``, checked to be a real scalar."""
  value = loss(params)
  shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
  if isinstance(value, tuple) or shape != () or not jnp.issubdtype(
      jnp.result_type(dtype), jnp.floating
  ):
    what = f"shape {shape} and dtype {dtype}" if shape is not None else f"{value!r}"
    raise TypeError(
        f"loss(params) returned {what}; it must return one real number, the mean"
        " over the batch, and no aux."
    )
  return value


def number(argument: str, value: Any) -> None:
  """Raises unless ``value`` is a number >= 0, or traced."""
  if callable(value):
    raise TypeError(
        f"{argument}={value!r} is a schedule, but a measure has no step count; pass"
        f" {argument}=schedule(step)."
    )
  _checks.scalar(argument, value)


def count(argument: str, value: Any, least: int) -> None:
  """Raises unless ``value`` is an int of at least ``least``."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"{argument}={value!r} must be an int >= {least}.")


def project(delta: Delta, rho: Any, p: float) -> Delta:
  """The Euclidean projection onto the ball ||delta||_p <= rho, p in {1, 2, inf}."""
  if math.isinf(p):
    return [jnp.clip(d, -rho, rho) for d in delta]
  if p == 2:
    length = norm(delta, 2)
    factor = jnp.where(length > rho, rho / jnp.where(length > rho, length, 1), 1)
    return [d * factor for d in delta]
  return optax.projections.projection_l1_ball(delta, rho)


def uniform_in_ball(
    coordinates: Coordinates, key: PRNGKeyArray, rho: Any, p: float
) -> Delta:
  """A uniform draw from the ball ||delta||_p <= rho, p in {1, 2, inf}."""
  if math.isinf(p):
    return [rho * d for d in coordinates.cube(key)]
  key, radius_key = jax.random.split(key)
  draw = jax.random.normal if p == 2 else jax.random.laplace
  draws = coordinates._draw(draw, key)
  radius = jax.random.uniform(radius_key, (), coordinates.dtype)
  scale = rho * radius ** (1 / coordinates.size) / norm(draws, p)
  return [d * scale for d in draws]


def searchable(p: float) -> None:
  """Raises unless the ball of exponent ``p`` has an exact projection here."""
  _checks.exponent(p)
  if p not in (1, 2) and not math.isinf(p):
    raise ValueError(
        f"p={p!r}: only the balls of p = 1, 2 and inf have a projection in closed"
        ' form; use one of these, or method="one_step", which takes every p.'
    )


def ascent_direction(grads: Delta, length: Any, p: float) -> Any:
  """The maximizer of <grads, d> over ||d||_p <= length: the ascent with T = 1."""
  rules = [_n.LeafRule((), g, _n.none, True) for g in grads]
  return _ascent.perturbation(grads, grads, rules, length, 0.0, p)[0]


def adaptive_norm(
    epsilon: Any,
    params: Any,
    eta: Any = 0.01,
    p: float = 2,
    *,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
) -> Scalar:
  r"""The length of a perturbation in the adaptive geometry.

  .. math:: \|T_w^{-1}\epsilon\|_p

  over the whole pytree, with 0/0 = 0: a weight that T holds fixed and that is not
  perturbed adds nothing; one that is perturbed all the same makes the norm inf.

  Args:
    epsilon: the perturbation, a pytree with the structure and shapes of params.
    params: the weights w, real float arrays.
    eta: the stabilizer of T_w, >= 0; see :func:`asam_jax.ascent`.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that count; the others are left out.

  Returns:
    A float32 scalar (float64 if a parameter is).

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import sharpness
    >>> w, epsilon = jnp.array([2.0, 0.0]), jnp.array([0.5, 0.0])
    >>> print(sharpness.adaptive_norm(epsilon, w, eta=0.0))
    0.25

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  _checks.exponent(p)
  coordinates = Coordinates.build(params, eta, normalization, normalize, perturb)
  if jtu.tree_structure(epsilon) != jtu.tree_structure(params):
    raise TypeError(
        f"epsilon has the structure {jtu.tree_structure(epsilon)}, but params have"
        f" {jtu.tree_structure(params)}; give one array per parameter leaf."
    )
  return norm(coordinates.delta(epsilon), p)
