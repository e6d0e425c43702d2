# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""Slices of the loss surface: along a line, in a plane, through three points."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
import numpy as np

from asam_jax import _checks
from asam_jax import _normalization as _n
from asam_jax._norm import norm
from asam_jax.sharpness import _geometry as _g


class Line(NamedTuple):
  """The loss along a direction; see :func:`line`.

  Attributes:
    x: positions in units of rho, ``[points]``; 0 is w.
    values: L(w + x rho d), ``[points]``.
    rho: the unit, a scalar.
  """

  x: Float[Array, " points"]
  values: Float[Array, " points"]
  rho: Float[Array, ""]


class Surface(NamedTuple):
  """The loss in a plane through w; see :func:`surface`.

  Attributes:
    x: positions along the first direction in units of rho, ``[points]``.
    y: positions along the second, ``[points]``.
    values: L(w + rho (x d1 + y d2)), ``[points, points]``; rows are y.
    ball: the boundary of the ball in this plane, a closed curve of (x, y) in units
      of rho, ``[vertices, 2]``.
    rho: the unit, a scalar.
  """

  x: Float[Array, " points"]
  y: Float[Array, " points"]
  values: Float[Array, "points points"]
  ball: Float[Array, "vertices 2"]
  rho: Float[Array, ""]


class Plane(NamedTuple):
  """The loss in the plane through three points; see :func:`plane`.

  Attributes:
    x: Euclidean positions from the first point towards the second, ``[points]``.
    y: Euclidean positions at right angles to it, ``[points]``.
    values: the loss, ``[points, points]``; rows are y.
    corners: the (x, y) of the three points, ``[3, 2]``.
  """

  x: Float[Array, " points"]
  y: Float[Array, " points"]
  values: Float[Array, "points points"]
  corners: Float[Array, "3 2"]


def line(
    loss: Callable[[Any], Any],
    params: Any,
    direction: Any,
    rho: Any = 0.5,
    *,
    extent: float = 2.0,
    points: int = 41,
) -> Line:
  r"""The loss along a direction, in one compiled sweep.

  .. math:: x \mapsto L(w + x \rho\, d), \qquad |x| \le \mathrm{extent}

  Args:
    loss: ``loss(params) -> scalar``, deterministic.
    params: the weights w, a pytree of real float arrays.
    direction: d, a pytree like params, such as :func:`direction` returns.
    rho: the unit of x, >= 0.
    extent: how far to go on both sides, in units of rho, > 0.
    points: the number of evaluations, at least 2; an odd number includes w.

  Returns:
    A :class:`Line`.

  Raises:
    ValueError: for a wrong rho, extent or number of points.
    TypeError: if direction and params differ in structure or shapes, or the loss is
      not a real scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import landscape
    >>> loss = lambda w: jnp.sum(w**2)
    >>> w, d = jnp.array([1.0]), jnp.array([1.0])
    >>> print(landscape.line(loss, w, d, rho=0.5, points=3).values)
    [0. 1. 4.]
  """
  _g.number("rho", rho)
  x = _positions(extent, points)
  _like(params, direction, "direction")
  values = _sweep(loss, params, [direction], jnp.asarray(x * rho)[:, None])
  return Line(jnp.asarray(x), values, jnp.asarray(rho, values.dtype))


def surface(
    loss: Callable[[Any], Any],
    params: Any,
    directions: Sequence[Any],
    rho: Any = 0.5,
    eta: Any = 0.01,
    p: float = 2,
    *,
    extent: float = 2.0,
    points: int = 41,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
) -> Surface:
  r"""The loss in the plane of two directions, in one compiled sweep.

  .. math:: (x, y) \mapsto L(w + \rho (x d_1 + y d_2))

  and the boundary of :math:`\|T_w^{-1}\epsilon\|_p \le \rho` in that plane, exact
  for every p and for directions at any angle.

  Args:
    loss: ``loss(params) -> scalar``, deterministic.
    params: the weights w, a pytree of real float arrays.
    directions: d1 and d2, pytrees like params.
    rho: the radius and the unit of both axes, >= 0.
    eta: the stabilizer of T_w, for the ball.
    p: the exponent of the ball, in [1, inf].
    extent: how far to go on all sides, in units of rho, > 0.
    points: the evaluations along each axis, at least 2.
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that count for the ball; the others must be zero in both.

  Returns:
    A :class:`Surface`.

  Raises:
    ValueError: for a wrong rho, extent, p, number of points or of directions, or
      directions that are parallel.
    TypeError: as :func:`line` does.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from asam_jax import landscape
    >>> loss = lambda w: jnp.sum(w**2)
    >>> w = jnp.array([1.0, 2.0])
    >>> ds = [landscape.direction("adaptive", w, key=jax.random.key(i))
    ...       for i in (0, 1)]
    >>> result = landscape.surface(loss, w, ds, rho=0.1, points=5)
    >>> print(result.values.shape, float(result.values[2, 2]))
    (5, 5) 5.0
  """
  _g.number("rho", rho)
  _checks.exponent(p)
  directions = list(directions)
  if len(directions) != 2:
    raise ValueError(f"directions has {len(directions)} entries; give two.")
  for i, d in enumerate(directions):
    _like(params, d, f"directions[{i}]")
  coordinates = _g.Coordinates.build(params, eta, normalization, normalize, perturb)
  deltas = [coordinates.delta(d) for d in directions]
  x = _positions(extent, points)
  grid = _grid(x, x) * rho
  values = _sweep(loss, params, directions, grid).reshape(points, points)
  return Surface(jnp.asarray(x), jnp.asarray(x), values, _ball(deltas, p),
                 jnp.asarray(rho, values.dtype))


def plane(
    loss: Callable[[Any], Any],
    checkpoints: Sequence[Any],
    *,
    margin: float = 0.25,
    points: int = 41,
) -> Plane:
  r"""The loss in the plane through three checkpoints, in one compiled sweep.

  The axes are Euclidean: x from the first checkpoint towards the second, y at right
  angles to it, towards the third.

  Args:
    loss: ``loss(params) -> scalar``, deterministic.
    checkpoints: three pytrees of weights with one structure.
    margin: how far to go beyond the three, in shares of their extent, >= 0.
    points: the evaluations along each axis, at least 2.

  Returns:
    A :class:`Plane`.

  Raises:
    ValueError: if there are not three checkpoints, or they lie on a line.
    TypeError: if they differ in structure or shapes.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import landscape
    >>> a, b, c = jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
    >>> result = landscape.plane(lambda w: jnp.sum(w**2), [a, b, c], points=3)
    >>> print(result.corners.tolist())
    [[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]

  References:
    Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs
    <https://arxiv.org/abs/1802.10026>`_, 2018
  """
  checkpoints = list(checkpoints)
  if len(checkpoints) != 3:
    raise ValueError(f"checkpoints has {len(checkpoints)} entries; give three.")
  origin = checkpoints[0]
  for i, other in enumerate(checkpoints[1:], 1):
    _like(origin, other, f"checkpoints[{i}]")
  u, v = (jtu.tree_map(lambda a, b: a - b, c, origin) for c in checkpoints[1:])
  width = jnp.sqrt(_dot(u, u))
  if not width > 0:
    raise ValueError("checkpoints 0 and 1 are equal; give three that span a plane.")
  first = jtu.tree_map(lambda a: a / width, u)
  shift = _dot(v, first)
  rest = jtu.tree_map(lambda a, b: a - shift * b, v, first)
  height = jnp.sqrt(_dot(rest, rest))
  if not height > 1e-5 * jnp.sqrt(_dot(v, v)):
    raise ValueError("the three checkpoints lie on a line; use landscape.line.")
  second = jtu.tree_map(lambda a: a / height, rest)

  corners = jnp.array([[0, 0], [width, 0], [shift, height]])
  low, high = np.asarray(corners.min(0)), np.asarray(corners.max(0))
  pad = margin * (high - low)
  _g.count("points", points, 2)
  x, y = (np.linspace(low[i] - pad[i], high[i] + pad[i], points) for i in (0, 1))
  values = _sweep(loss, origin, [first, second], _grid(x, y))
  return Plane(jnp.asarray(x), jnp.asarray(y), values.reshape(points, points), corners)


def _sweep(loss, params, directions, positions) -> Array:
  """``loss(params + sum_i positions[:, i] directions[i])`` for each row."""

  @jax.jit
  def run(params, directions, positions):
    def at(row):
      point = params
      for a, d in zip(row, directions, strict=True):
        point = jtu.tree_map(lambda w, e, a=a: (w + a * e).astype(w.dtype), point, d)
      return _g.loss_value(loss, point)

    return lax.map(at, positions)

  return run(params, directions, jnp.asarray(positions))


def _ball(deltas, p: float) -> Array:
  # The norm along each ray gives the boundary; a multiple of 8 hits the corners
  # that p = 1 and inf have on the axes and diagonals.
  angles = jnp.linspace(0, 2 * jnp.pi, 361)
  rays = jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)

  def length(ray):
    return norm([ray[0] * a + ray[1] * b for a, b in zip(*deltas, strict=True)], p)

  lengths = lax.map(length, rays)
  if not bool(jnp.all((lengths > 1e-6) & jnp.isfinite(lengths))):
    raise ValueError(
        "directions are parallel, or move a weight with T = 0: the ball has no"
        " outline in their plane; give two independent ones, or eta > 0."
    )
  return rays / lengths[:, None]


def _positions(extent: Any, points: Any) -> np.ndarray:
  _g.count("points", points, 2)
  if not 0 < extent < np.inf:
    raise ValueError(f"extent={extent!r} must be a positive finite number.")
  return np.linspace(-extent, extent, points)


def _grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """All (x, y), x running fastest."""
  return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _like(params: Any, other: Any, name: str) -> None:
  same = jtu.tree_structure(params) == jtu.tree_structure(other)
  if not same or any(
      jnp.shape(a) != jnp.shape(b)
      for a, b in zip(jtu.tree_leaves(params), jtu.tree_leaves(other), strict=True)
  ):
    raise TypeError(
        f"{name} has the structure {jtu.tree_structure(other)} or shapes that"
        f" params, {jtu.tree_structure(params)}, have not; give a pytree like params."
    )


def _dot(a: Any, b: Any) -> Array:
  products = jtu.tree_map(
      lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
  return jnp.sum(jnp.stack(jtu.tree_leaves(products)))
