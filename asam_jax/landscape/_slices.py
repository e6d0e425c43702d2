# ruff: noqa: F722  (the shapes in jaxtyping's annotations)
"""Slices of the loss surface: along a line, in a plane, through three points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
import numpy as np

from asam_jax import _arguments
from asam_jax import _trees
from asam_jax._geometry import Geometry


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
    ValueError: if rho or extent is out of range, points below 2, or the direction not
      finite.
    TypeError: if rho or extent is not one real number, points no int, or direction no
      pytree of real arrays like params; or if the loss is not a function or not a
      real scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import landscape
    >>> loss = lambda w: jnp.sum(w**2)
    >>> w, d = jnp.array([1.0]), jnp.array([1.0])
    >>> print(landscape.line(loss, w, d, rho=0.5, points=3).values)
    [0. 1. 4.]
  """
  loss = _arguments.loss(loss)
  _arguments.fixed_scalar("rho", rho)
  x = _positions(extent, points)
  _arguments.arrays("params", params, finite=True)
  _direction("direction", direction, params)
  values = _sweep(loss, params, [direction], jnp.asarray(x * rho)[:, None])
  return Line(jnp.asarray(x), values, jnp.asarray(rho, values.dtype))


def surface(
    loss: Callable[[Any], Any],
    params: Any,
    directions: Sequence[Any],
    rho: Any = 0.5,
    *,
    geometry: Geometry = Geometry(),
    extent: float = 2.0,
    points: int = 41,
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
    geometry: the ball: T_w, the leaves that get it, those that count
      (``perturb``; the others must be zero in both directions), and the exponent p;
      see :class:`asam_jax.Geometry`.
    extent: how far to go on all sides, in units of rho, > 0.
    points: the evaluations along each axis, at least 2.

  Returns:
    A :class:`Surface`.

  Raises:
    ValueError: as :func:`line` does, and if there are not two directions, or they are
      parallel.
    TypeError: as :func:`line` does, and if geometry is no ``Geometry``.

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
  loss = _arguments.loss(loss)
  _arguments.fixed_scalar("rho", rho)
  _arguments.instance("geometry", geometry, Geometry)
  _arguments.arrays("params", params, finite=True)
  directions = _entries("directions", directions, 2)
  for i, d in enumerate(directions):
    _direction(f"directions[{i}]", d, params)
  x = _positions(extent, points)
  grid = _grid(x, x) * rho
  ball = _ball(geometry, params, directions)
  values = _sweep(loss, params, directions, grid).reshape(points, points)
  return Surface(jnp.asarray(x), jnp.asarray(x), values, ball,
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
    ValueError: if there are not three checkpoints, they are not finite, or they lie on
      a line; if margin is negative or not finite, or points below 2.
    TypeError: if they differ in structure or shapes or are not real, margin is not one
      real number, or points no int; or if the loss is not a function or not a real
      scalar.

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
  loss = _arguments.loss(loss)
  _arguments.scalar("margin", margin)
  _arguments.count("points", points, 2)
  checkpoints = _entries("checkpoints", checkpoints, 3)
  origin = checkpoints[0]
  for i, other in enumerate(checkpoints):
    name = f"checkpoints[{i}]"
    _arguments.arrays(name, other, finite=True)
    _arguments.tree_like(name, other, origin, "checkpoints[0]")
  u, v = (_trees.map_floats(jnp.subtract, c, origin) for c in checkpoints[1:])
  width = _trees.norm(u)
  if not width > 0:
    raise ValueError("checkpoints 0 and 1 are equal; give three that span a plane.")
  first = _trees.unit_vector(u)
  shift = _trees.dot(v, first)
  rest = _trees.orthogonal_part(v, first)
  height = _trees.norm(rest)
  if not height > 1e-5 * _trees.norm(v):
    raise ValueError("the three checkpoints lie on a line; use landscape.line.")
  second = _trees.unit_vector(rest)

  corners = jnp.array([[0, 0], [width, 0], [shift, height]])
  low, high = np.asarray(corners.min(0)), np.asarray(corners.max(0))
  pad = margin * (high - low)
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
        point = _trees.moved(point, a, d)
      return loss(point)

    return lax.map(at, positions)

  return run(params, directions, jnp.asarray(positions))


def _ball(geometry: Geometry, params: Any, directions: list[Any]) -> Array:
  # The norm along each ray gives the boundary; a multiple of 8 hits the corners
  # that p = 1 and inf have on the axes and diagonals.
  angles = jnp.linspace(0, 2 * jnp.pi, 361)
  rays = jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)
  first, second = directions

  def length(ray):
    along = jtu.tree_map(lambda a, b: ray[0] * a + ray[1] * b, first, second)
    return geometry.norm(along, params)

  lengths = lax.map(length, rays)
  if not bool(jnp.all((lengths > 1e-6) & jnp.isfinite(lengths))):
    raise ValueError(
        "directions are parallel, or move a weight with T = 0: the ball has no"
        " outline in their plane; give two independent ones, or eta > 0."
    )
  return rays / lengths[:, None]


def _positions(extent: Any, points: Any) -> np.ndarray:
  _arguments.positive("extent", extent)
  return np.linspace(-extent, extent, _arguments.count("points", points, 2))


def _grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """All (x, y), x running fastest."""
  return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _direction(argument: str, direction: Any, params: Any) -> None:
  _arguments.tree_like(argument, direction, params)
  _arguments.arrays(argument, direction, finite=True)


def _entries(argument: str, trees: Any, number: int) -> list[Any]:
  if not isinstance(trees, Sequence) or isinstance(trees, str):
    raise TypeError(f"{argument}={trees!r} must be a list of {number} pytrees.")
  if len(trees) != number:
    raise ValueError(f"{argument} has {len(trees)} entries; give {number}.")
  return list(trees)
