"""Directions in weight space, all of unit length in the adaptive geometry."""

from collections.abc import Callable
from typing import Any

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from asam_jax import _ascent
from asam_jax import _normalization as _n
from asam_jax._norm import norm
from asam_jax.sharpness import _curvature
from asam_jax.sharpness import _geometry as _g

_KINDS = ("adaptive", "random", "filter", "gradient", "eigenvector")


def direction(
    kind: str,
    params: Any,
    eta: Any = 0.01,
    p: float = 2,
    *,
    loss: Callable[[Any], Any] | None = None,
    key: PRNGKeyArray | None = None,
    index: int = 0,
    steps: int = 32,
    filter_axis: int = -1,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
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
    eta: the stabilizer of T_w, >= 0; a number.
    p: the exponent of the ball, in [1, inf].
    loss: ``loss(params) -> scalar``, for ``"gradient"`` and ``"eigenvector"``.
    key: for z and for the start of Lanczos; ``jax.random.key(0)`` if not given.
    index: which eigenvector, from 0 for the largest eigenvalue.
    steps: the Hessian-vector products spent on it.
    filter_axis: the axis that numbers the filters of a leaf, and of a dense
      kernel's columns: -1 for Flax and Haiku, 0 for Equinox.
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that move; the others are zero in d.

  Returns:
    A pytree with the structure, shapes and dtypes of params.

  Raises:
    ValueError: for an unknown kind, a missing loss, or a direction of no length or
      of infinite length (it moves a weight whose T is zero).
    TypeError: if the loss is not a real scalar or a perturbed leaf is not float.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import landscape, sharpness
    >>> w = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.array([1.0, 0.0])}
    >>> for kind in ("adaptive", "random", "filter"):
    ...   d = landscape.direction(kind, w)
    ...   print(f"{sharpness.adaptive_norm(d, w):.3f}")
    1.000
    1.000
    1.000

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """
  if kind not in _KINDS:
    raise ValueError(f"kind={kind!r} is unknown; use one of {_KINDS}.")
  _g.count("index", index, 0)
  selection = {
      "normalization": normalization, "normalize": normalize, "perturb": perturb}
  key = jax.random.key(0) if key is None else key
  coordinates = _g.Coordinates.build(params, eta, *selection.values())

  if kind in ("gradient", "eigenvector"):
    if loss is None:
      raise ValueError(f"kind={kind!r} with loss=None: pass loss(params) -> scalar.")
    epsilon = _of_loss(kind, loss, params, eta, p, index, steps, key, selection)
  elif kind == "adaptive":
    epsilon = coordinates.epsilon(coordinates.normal(key))
  else:
    epsilon = _normal(coordinates, key)
    if kind == "filter":
      epsilon = jtu.tree_map(
          lambda z, w: _like_filters(z, w, filter_axis), epsilon, params)
  return _to_unit_length(kind, epsilon, coordinates, p)


def _of_loss(kind, loss, params, eta, p, index, steps, key, selection):
  if kind == "gradient":
    grads = jax.grad(lambda w: _g.loss_value(loss, w))(params)
    rules = _g.leaf_rules(params, *selection.values())
    return _ascent.perturbation(grads, params, rules, 1.0, eta, p)[0]
  pairs = _curvature.hessian_eigenvalues(
      loss, params, index + 1, eta, steps=steps, key=key, **selection)
  return jtu.tree_map(lambda x: x[index], pairs.directions)


def _normal(coordinates: _g.Coordinates, key: PRNGKeyArray) -> Any:
  """Standard normal in the weights that are perturbed, 0 in the others."""
  leaves, treedef = jtu.tree_flatten(coordinates.params)
  result = [jnp.zeros_like(leaf) for leaf in leaves]
  for i, z in zip(coordinates.chosen, coordinates.normal(key), strict=True):
    result[i] = z.astype(result[i].dtype)
  return jtu.tree_unflatten(treedef, result)


def _like_filters(z, w, filter_axis: int):
  if w.ndim < 2:
    return jnp.zeros_like(z)
  axes = tuple(a for a in range(w.ndim) if a != filter_axis % w.ndim)
  norms = [jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (w, z)]
  return z * norms[0] / jnp.where(norms[1] > 0, norms[1], 1)


def _to_unit_length(kind: str, epsilon: Any, coordinates: _g.Coordinates, p: float):
  length = norm(coordinates.delta(epsilon), p)
  if not (length > 0 and jnp.isfinite(length)):
    raise ValueError(
        f"kind={kind!r} gives a direction of length {length} in the adaptive norm: 0"
        " means that there is nothing to follow (a zero gradient), inf that a weight"
        " with T = 0 would move; choose another kind, or eta > 0."
    )
  return jtu.tree_map(lambda x: (x / length).astype(x.dtype), epsilon)
