"""Directions in weight space, all of unit length in the adaptive geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from asam_jax import _arguments
from asam_jax import _trees
from asam_jax import sharpness
from asam_jax._coordinates import Coordinates
from asam_jax._coordinates import perturbation
from asam_jax._geometry import filter_axis_of
from asam_jax._geometry import Geometry

_KINDS = ("adaptive", "random", "filter", "gradient", "eigenvector")


def direction(
    kind: str,
    params: Any,
    *,
    geometry: Geometry = Geometry(),
    loss: Callable[[Any], Any] | None = None,
    key: PRNGKeyArray | None = None,
    index: int = 0,
    steps: int = 32,
    filter_axis: int = -1,
) -> Any:
  r"""A direction d with :math:`\|T_w^{-1} d\|_p = 1`.

  So rho times d ends on the boundary of the ball of radius rho, whatever the kind:

  - ``"adaptive"``: T z with normal z, the directions of the adaptive ball;
  - ``"random"``: z itself, every weight alike;
  - ``"filter"``: z with each filter scaled to the norm of the filter of w it is
    added to (Li et al.); leaves of rank below 2 (biases, norm scales) stay fixed;
  - ``"gradient"``: the ascent of :func:`asam_jax.ascent`, the direction in which
    the loss rises most to first order;
  - ``"eigenvector"``: T v with the ``index``-th eigenvector v of T H T.

  Args:
    kind: one of the above.
    params: the weights w, a pytree of real float arrays.
    geometry: T_w, the leaves that get it, the exponent p of the ball, and
      (``perturb``) the leaves that move; the others are zero in d. See
      :class:`asam_jax.Geometry`.
    loss: ``loss(params) -> scalar``, for ``"gradient"`` and ``"eigenvector"``.
    key: for z and for the start of Lanczos; ``jax.random.key(0)`` if not given.
    index: which eigenvector, from 0 for the largest eigenvalue.
    steps: the Hessian-vector products spent on it.
    filter_axis: the axis that numbers the filters of a leaf, and of a dense
      kernel's columns: -1 for Flax and Haiku, 0 for Equinox.

  Returns:
    A pytree with the structure, shapes and dtypes of params.

  Raises:
    ValueError: for an unknown kind, a missing loss, a negative index, a leaf without
      the filter axis, or a direction of no length or of infinite length (it moves a
      weight whose T is zero).
    TypeError: if a count or filter_axis is no int, geometry no ``Geometry``, or key no
      random key; if the loss is not a function or not a real scalar, or a perturbed
      leaf is not float.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> from asam_jax import landscape
    >>> geometry = asam_jax.Geometry()
    >>> w = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.array([1.0, 0.0])}
    >>> for kind in ("adaptive", "random", "filter"):
    ...   d = landscape.direction(kind, w, geometry=geometry)
    ...   print(f"{geometry.norm(d, w):.3f}")
    1.000
    1.000
    1.000

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """
  _arguments.one_of("kind", kind, _KINDS)
  _arguments.count("index", index, 0)
  _arguments.count("steps", steps)
  filter_axis_of(filter_axis, 0)
  key = _arguments.random_key(key)
  coordinates = Coordinates.build(params, geometry)

  if kind == "gradient":
    epsilon = _steepest(_needed(kind, loss), params, geometry)
  elif kind == "eigenvector":
    pairs = sharpness.hessian_eigenvalues(
        _needed(kind, loss), params, index + 1, geometry=geometry, steps=steps, key=key)
    epsilon = jtu.tree_map(lambda x: x[index], pairs.directions)
  elif kind == "adaptive":
    epsilon = coordinates.epsilon(coordinates.normal(key))
  else:
    epsilon = _normal(coordinates, key)
    if kind == "filter":
      epsilon = jtu.tree_map_with_path(
          lambda path, z, w: _like_filters(path, z, w, filter_axis), epsilon, params)
  return _to_unit_length(kind, epsilon, params, geometry)


def _needed(kind: str, loss: Any) -> Callable[[Any], Any]:
  if loss is None:
    raise ValueError(f"loss=None: kind={kind!r} needs loss(params) -> scalar.")
  return _arguments.loss(loss)


def _steepest(loss, params: Any, geometry: Geometry) -> Any:
  grads = jax.jit(jax.grad(loss, allow_int=True))(params)
  return perturbation(grads, params, geometry, 1.0)


def _normal(coordinates: Coordinates, key: PRNGKeyArray) -> Any:
  """Standard normal in the weights that are perturbed, 0 in the others."""
  leaves, treedef = jtu.tree_flatten(coordinates.params)
  result = [jnp.zeros_like(leaf) for leaf in leaves]
  for i, z in zip(coordinates.chosen, coordinates.normal(key), strict=True):
    result[i] = z.astype(result[i].dtype)
  return jtu.tree_unflatten(treedef, result)


def _like_filters(path, z, w, filter_axis: int):
  if jnp.ndim(w) < 2:
    return jnp.zeros_like(z)
  if not -w.ndim <= filter_axis < w.ndim:
    raise ValueError(
        f"filter_axis={filter_axis} is no axis of params{jtu.keystr(path)}, which has"
        f" shape {w.shape}; use -1 (Flax, Haiku) or 0 (Equinox)."
    )
  axes = tuple(a for a in range(w.ndim) if a != filter_axis % w.ndim)
  size, drawn = (_trees.root_of_squares(_trees.f32(x), axes) for x in (w, z))
  return (z * (size / jnp.where(drawn > 0, drawn, 1))).astype(z.dtype)


def _to_unit_length(kind: str, epsilon: Any, params: Any, geometry: Geometry) -> Any:
  length = geometry.norm(epsilon, params)
  if not (length > 0 and jnp.isfinite(length)):
    raise ValueError(
        f"kind={kind!r} gives a direction of length {length} in the adaptive norm: 0"
        " means that there is nothing to follow (a zero gradient), inf that a weight"
        " with T = 0 would move; choose another kind, or eta > 0."
    )
  return jtu.tree_map(lambda x: (x / length).astype(x.dtype), epsilon)
