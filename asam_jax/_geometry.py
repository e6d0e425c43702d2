"""The geometry of a perturbation: T_w, the leaves that get it, and the norm.

T_w is diagonal, so it is described leaf by leaf: an operator takes one leaf and the
stabilizer eta and returns the diagonal of T_w for that leaf, in any shape that
broadcasts to the leaf's.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import tree_util as jtu
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax import _shards
from asam_jax import _trees

Operator: TypeAlias = Callable[[jax.Array, Any], Any]
Normalization: TypeAlias = str | Operator
# A pytree of bools with the structure of the parameters, or a predicate.
LeafSelection: TypeAlias = Callable[[Any, Any], bool] | Any

# The lowest rank of a leaf that counts as a convolution kernel: one spatial
# axis, input channels, output channels.
_CONVOLUTION_RANK = 3
_HIGHEST_RANK = 8  # no kernel has more axes, so no filter axis lies beyond


def elementwise(w: jax.Array, eta: Any) -> jax.Array:
  r"""``T = |w| + eta``, one entry per weight.

  Args:
    w: one parameter leaf, any shape, float.
    eta: the stabilizer, a scalar >= 0 in the unit of the weights.

  Returns:
    An array of the leaf's shape and dtype.

  Raises:
    TypeError: if w is not a real float array, or eta not one real number.
    ValueError: if eta is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import elementwise
    >>> print(elementwise(jnp.array([-2.0, 0.5]), 0.5))
    [2.5 1. ]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  if not isinstance(w, Tracer):  # those were checked before
    _check_leaf(w, eta)
  return jnp.abs(w) + eta


def filterwise(w: jax.Array, eta: Any, *, filter_axis: int = -1) -> jax.Array:
  r"""``T = ||f||_2 + eta`` per convolution filter, ``|w| + eta`` elsewhere.

  A leaf of rank 3 or more is taken for a convolution kernel, whose filters lie
  along ``filter_axis``. Leaves of lower rank get :func:`elementwise`. Leaves of
  rank 3 that are no kernels (say, the projections of Flax's attention) are best
  given an operator of your own; ``describe`` shows which leaf gets which.

  Args:
    w: one parameter leaf, any shape, float.
    eta: the stabilizer, a scalar >= 0 in the unit of the weights.
    filter_axis: the axis that numbers the filters: -1 for Flax and Haiku (HWIO),
      0 for Equinox (OIHW), as in
      ``functools.partial(filterwise, filter_axis=0)``.

  Returns:
    For a kernel, an array of the leaf's dtype with length 1 along every axis but
    ``filter_axis``; otherwise one of the leaf's shape.

  Raises:
    ValueError: if a kernel has no axis ``filter_axis``.
    TypeError: if ``filter_axis`` is not an int.
    ValueError, TypeError: as :func:`elementwise` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import filterwise
    >>> kernel = jnp.ones((3, 3, 1, 2))  # two filters with nine ones each
    >>> print(filterwise(kernel, 0.0).ravel())
    [3. 3.]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  if not isinstance(w, Tracer):  # those were checked before
    _check_leaf(w, eta)
  axis = filter_axis_of(filter_axis, jnp.ndim(w))
  if axis is None:
    return elementwise(w, eta)
  axes = tuple(other for other in range(w.ndim) if other != axis)
  return _trees.root_of_squares(w, axes) + eta


def filter_axis_of(axis: int, rank: int) -> int | None:
  """The axis that numbers the filters of a leaf, or None where it is no kernel."""
  if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
    raise TypeError(f"filter_axis={axis!r} must be an int.")
  is_kernel = rank >= _CONVOLUTION_RANK
  highest = rank if is_kernel else _HIGHEST_RANK
  if not -highest <= axis < highest:
    raise ValueError(
        f"filter_axis={axis} is no axis of a kernel of rank {highest}; use -1 for HWIO"
        " kernels (Flax, Haiku) or 0 for OIHW (Equinox)."
    )
  return axis % rank if is_kernel else None


def filter_axis_under(operator: Operator, rank: int) -> int | None:
  """The axis of a leaf's filters under an operator, or None where it has none."""
  if built_in(operator) != "filterwise":
    return None
  keywords = getattr(operator, "keywords", {})
  return filter_axis_of(keywords.get("filter_axis", -1), rank)


def layerwise(w: jax.Array, eta: Any) -> jax.Array:
  r"""``T = ||w||_2 + eta``, one scalar per leaf.

  Args:
    w: one parameter leaf, any shape, float.
    eta: the stabilizer, a scalar >= 0 in the unit of the weights.

  Returns:
    A scalar array of the leaf's dtype.

  Raises:
    ValueError, TypeError: as :func:`elementwise` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import layerwise
    >>> print(layerwise(jnp.array([3.0, 4.0]), 1.0))
    6.0
  """
  if not isinstance(w, Tracer):  # those were checked before
    _check_leaf(w, eta)
  return _trees.root_of_squares(w, None) + eta


def _check_leaf(w: Any, eta: Any) -> None:
  if not hasattr(w, "dtype") or not _arguments.is_float(w):
    raise TypeError(f"w={w!r} must be one leaf, a real float array.")
  _arguments.scalar("eta", eta)


def none(w: jax.Array, eta: Any) -> float:
  """T = 1: the perturbation of plain SAM."""
  del w, eta
  return 1.0


_OPERATORS: dict[str, Operator] = {
    "elementwise": elementwise,
    "filterwise": filterwise,
    "layerwise": layerwise,
    "none": none,
}


def resolve_operator(normalization: Normalization) -> Operator:
  """The operator for a name, or the function itself."""
  if isinstance(normalization, str) and normalization in _OPERATORS:
    return _OPERATORS[normalization]
  if not isinstance(normalization, str) and callable(normalization):
    return _same_partial(normalization)
  names = ", ".join(repr(name) for name in _OPERATORS)
  raise (ValueError if isinstance(normalization, str) else TypeError)(
      f"normalization={normalization!r} is unknown; use one of {names}, or a"
      " function (w, eta) -> T of one leaf."
  )


def built_in(operator: Operator) -> str | None:
  """The name of one of our operators or partials of them; None if it is yours."""
  function = operator.func if isinstance(operator, functools.partial) else operator
  names = [name for name, known in _OPERATORS.items() if known is function]
  return names[0] if names else None


def _same_partial(operator: Operator) -> Operator:
  """One object for equal partials of ours, for JAX compiles anew for each object."""
  if not isinstance(operator, functools.partial) or built_in(operator) is None:
    return operator
  filter_axis_under(operator, _HIGHEST_RANK)  # for its errors
  return _cached_partial(operator.func, operator.args, *operator.keywords.items())


@functools.cache
def _cached_partial(function: Any, args: Any, *keywords: Any) -> Operator:
  return functools.partial(function, *args, **dict(keywords))


def _of_shard(operator: Operator, split: _shards.Split) -> Operator:
  """The operator for a shard of a leaf: norms are over the whole leaf or filter."""

  def of_shard(w: jax.Array, eta: Any) -> Any:
    axis = filter_axis_under(operator, jnp.ndim(w))
    if axis is None and built_in(operator) != "layerwise":
      return operator(w, eta)
    axes = None if axis is None else tuple(i for i in range(w.ndim) if i != axis)
    crossed = tuple(names for i, names in enumerate(split) if i != axis)
    return _trees.root_of_squares(w, axes, _shards.axes_of(crossed)) + eta

  return of_shard


class LeafRule(NamedTuple):
  """What happens to one leaf: its T_w, and whether it is perturbed at all."""

  path: Any
  leaf: Any
  operator: Operator
  perturbed: bool
  split: _shards.Split = ()  # by hand, inside shard_map

  def factor(self, w: jax.Array, eta: Any) -> jax.Array:
    """The diagonal of T_w, in w's dtype and a shape that broadcasts to w's."""
    if self.operator is none:
      return jnp.ones((), w.dtype)
    operator = _of_shard(self.operator, self.split) if self.split else self.operator
    t = operator(w, eta)
    shape, dtype = getattr(t, "shape", ()), getattr(t, "dtype", type(t))
    try:
      fits = np.broadcast_shapes(shape, w.shape) == w.shape
    except ValueError:
      fits = False
    is_array = hasattr(t, "dtype")
    real = _arguments.is_float(t) if is_array else isinstance(t, (int, float))
    if not (fits and real):
      raise ValueError(
          f"normalization={self.operator!r} gives T of shape {shape} and dtype"
          f" {dtype} for the leaf {jtu.keystr(self.path)} of shape {w.shape}; T must"
          " be real and broadcast to the leaf's shape."
      )
    return jnp.asarray(t, w.dtype)


@dataclasses.dataclass(frozen=True)
class Geometry:
  r"""T_w, which leaves get it, which are perturbed, and the norm.

  The ball of a perturbation is :math:`\|T_w^{-1}\epsilon\|_p \le \rho`, over the whole
  pytree. One geometry serves optimizers and measures, so that what is trained and
  what is measured can't differ.

  Attributes:
    eta: the stabilizer, >= 0, added to the diagonal of T_w, in the unit of the
      weights: a number, a traced scalar, or (for optimizers) a schedule of the step
      count. The official code's class has 0.01, its script for CIFAR 0.
    p: the norm's exponent, a Python number in [1, inf].
    normalization: the operator T_w: ``"elementwise"``, ``"filterwise"``,
      ``"layerwise"``, ``"none"`` (T = 1, plain SAM), or a function
      ``(w, eta) -> T`` of one leaf (in float32 at least), whose result broadcasts
      to the leaf.
    normalize: the leaves that get T_w, a pytree of bools or a predicate
      ``(path, leaf) -> bool`` with JAX's key paths; the others get T = 1, but are
      perturbed under the same norm. By default every leaf but biases
      (:func:`asam_jax.is_not_bias`).
    perturb: the leaves that are perturbed at all, given likewise; by default all.
    param_specs: for parameters that are sharded by hand inside ``shard_map`` (FSDP,
      tensor parallel), the PartitionSpecs that ``shard_map`` got as their in_specs:
      one for all leaves, or a pytree of them. Norms are then over all shards, and what
      the devices have copies of counts once. By default each device's parameters are
      whole, and under ``jit`` with sharded arrays nothing need be told.

  Raises:
    ValueError: if eta is negative or not finite, p is below 1, or the operator is
      unknown.
    TypeError: if eta is not one real number or a schedule, p is no Python number,
      normalization is neither a name nor a function, or param_specs is no pytree of
      PartitionSpecs.

  Examples:
    >>> import asam_jax, optax
    >>> geometry = asam_jax.Geometry(eta=0.0, normalization="filterwise")
    >>> tx = asam_jax.ae_sam(optax.sgd(0.1), rho=0.5, geometry=geometry)

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """

  eta: optax.ScalarOrSchedule = 0.01
  p: float = 2
  normalization: Normalization = "elementwise"
  normalize: LeafSelection | None = None
  perturb: LeafSelection | None = None
  param_specs: Any = None

  def __post_init__(self):
    _arguments.scalar_or_schedule("eta", self.eta)
    _arguments.exponent(self.p)
    if self.param_specs is not None:
      _shards.check_specs(self.param_specs)
    self.is_built_in  # noqa: B018  (for the operator's errors)

  @functools.cached_property
  def _operator(self) -> Operator:
    return resolve_operator(self.normalization)

  @functools.cached_property
  def is_built_in(self) -> bool:
    """Whether the operator is one of ours, or a partial of one."""
    return built_in(self._operator) is not None

  @property
  def q(self) -> float:
    """The exponent q of the dual norm, with 1/p + 1/q = 1."""
    if math.isinf(self.p):
      return 1.0
    return math.inf if self.p == 1 else self.p / (self.p - 1)

  def at(self, count: Any) -> Geometry:
    """The same at one step: a schedule eta becomes its value.

    Args:
      count: the step, which the schedule is called with.

    Returns:
      A geometry whose eta is no schedule.

    Raises:
      ValueError, TypeError: if the schedule returns no finite number >= 0.

    Examples:
      >>> import asam_jax
      >>> print(asam_jax.Geometry(eta=lambda step: 0.1 * step).at(2).eta)
      0.2
    """
    if not callable(self.eta):
      return self
    return dataclasses.replace(self, eta=self.eta(count))

  def rules(self, params: optax.Params) -> list[LeafRule]:
    """The rule of every leaf, in the order of ``jax.tree.leaves``, checked."""
    rules = [
        LeafRule(path, leaf, self._operator if normalized else none, perturbed)
        for path, leaf, normalized, perturbed in _arguments.leaves(
            params, normalize=self.normalize, perturb=self.perturb
        )
    ]
    if self.param_specs is None:
      return rules
    splits = _shards.splits(self.param_specs, params)
    return [r._replace(split=s) for r, s in zip(rules, splits, strict=True)]

  def norm(self, epsilon: Any, params: optax.Params) -> jax.Array:
    r"""The length of a perturbation, :math:`\|T_w^{-1}\epsilon\|_p`.

    With 0/0 = 0: a weight that T holds fixed and that is not perturbed adds nothing;
    one that is perturbed all the same makes the norm inf.

    Args:
      epsilon: the perturbation, a pytree of the structure and shapes of params.
      params: the weights w, real float arrays.

    Returns:
      A float32 scalar (float64 if a parameter is). Leaves that ``perturb`` leaves out
      do not count.

    Raises:
      TypeError: if epsilon is not a pytree like params, or eta is a schedule.

    Examples:
      >>> import jax.numpy as jnp
      >>> from asam_jax import Geometry
      >>> print(Geometry(eta=0.0).norm(jnp.array([0.5, 0.0]), jnp.array([2.0, 0.0])))
      0.25
    """
    _arguments.tree_like("epsilon", epsilon, params)
    scaled = []
    for e, w, t in self._triples(epsilon, params):
      e = e.astype(w.dtype)
      scaled.append(jnp.where(e == 0, 0, e / jnp.where(e == 0, 1, t)))
    return self._norm(scaled, self.p, params)

  def dual_norm(self, grads: Any, params: optax.Params) -> jax.Array:
    r"""The length of a gradient, :math:`\|T_w g\|_q` with 1/p + 1/q = 1.

    rho times it is the first-order sharpness, the largest :math:`\langle g,
    \epsilon\rangle` in the ball.

    Args:
      grads: the gradient, a pytree of the structure and shapes of params.
      params: the weights w, real float arrays.

    Returns:
      A float32 scalar (float64 if a parameter is).

    Raises:
      TypeError: if grads is not a pytree like params, or eta is a schedule.

    Examples:
      >>> import jax.numpy as jnp
      >>> from asam_jax import Geometry
      >>> geometry = Geometry(eta=0.0)
      >>> print(geometry.dual_norm(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0])))
      6.0
    """
    _arguments.tree_like("grads", grads, params)
    scaled = [t * g.astype(w.dtype) for g, w, t in self._triples(grads, params)]
    return self._norm(scaled, self.q, params)

  def _norm(self, scaled: list[jax.Array], p: float, params: optax.Params) -> jax.Array:
    rules = [rule for rule in self.rules(params) if rule.perturbed]
    shards = _shards.shards_of(self.param_specs, rules)
    return _trees.norm(scaled, p) if shards is None else shards.norm(scaled, p)

  def _triples(self, tree: Any, params: optax.Params):
    """(leaf of the tree, w, T) for each perturbed leaf, w in the dtype of sums."""
    if callable(self.eta):
      raise TypeError(
          f"eta={self.eta!r} is a schedule, but a measure has no step count; use"
          " geometry.at(step)."
      )
    rules = self.rules(params)
    dtype = perturbed_dtype(rules)
    for rule, x in zip(rules, jtu.tree_leaves(tree), strict=True):
      if rule.perturbed:
        w = jnp.asarray(rule.leaf, dtype)
        yield jnp.asarray(x), w, rule.factor(w, self.eta)


def perturbed_dtype(rules: list[LeafRule]) -> Any:
  """The dtype of sums over the perturbed leaves."""
  return _trees.sum_dtype([rule.leaf for rule in rules if rule.perturbed])
