"""Normalization operators T_w, the leaves they apply to, and a table of both.

T_w is diagonal, so it is described leaf by leaf: an operator takes one leaf and
the stabilizer eta and returns the diagonal of T_w for that leaf, in any shape
that broadcasts to the leaf's.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import tree_util as jtu
import jax.numpy as jnp
import optax

Operator: TypeAlias = Callable[[jax.Array, Any], Any]
Normalization: TypeAlias = str | Operator
# A pytree of bools with the structure of the parameters, or a predicate.
LeafSelection: TypeAlias = Callable[[Any, Any], bool] | Any

# The lowest rank of a leaf that counts as a convolution kernel: one spatial
# axis, input channels, output channels.
_CONVOLUTION_RANK = 3


def elementwise(w: jax.Array, eta: Any) -> jax.Array:
  r"""T = |w| + eta, one entry per weight.

  Args:
    w: one parameter leaf, any shape, float.
    eta: the stabilizer, a scalar >= 0 in the unit of the weights.

  Returns:
    An array of the leaf's shape and dtype.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import elementwise
    >>> print(elementwise(jnp.array([-2.0, 0.5]), 0.5))
    [2.5 1. ]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  return jnp.abs(w) + eta


def filterwise(
    w: jax.Array, eta: Any, *, filter_axis: int = -1
) -> jax.Array:
  r"""T = ||f||_2 + eta per convolution filter, |w| + eta outside filters.

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

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import filterwise
    >>> kernel = jnp.ones((3, 3, 1, 2))  # two filters with nine ones each
    >>> print(filterwise(kernel, 0.0).ravel())
    [3. 3.]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  if w.ndim < _CONVOLUTION_RANK:
    return elementwise(w, eta)
  if not -w.ndim <= filter_axis < w.ndim:
    raise ValueError(
        f"filter_axis={filter_axis} is no axis of a kernel of shape {w.shape};"
        " use -1 for HWIO kernels (Flax, Haiku) or 0 for OIHW (Equinox)."
    )
  filter_axis %= w.ndim
  axes = tuple(axis for axis in range(w.ndim) if axis != filter_axis)
  return jnp.sqrt(jnp.sum(jnp.square(w), axis=axes, keepdims=True)) + eta


def layerwise(w: jax.Array, eta: Any) -> jax.Array:
  r"""T = ||w||_2 + eta, one scalar per leaf.

  Args:
    w: one parameter leaf, any shape, float.
    eta: the stabilizer, a scalar >= 0 in the unit of the weights.

  Returns:
    A scalar array of the leaf's dtype.

  Examples:
    >>> import jax.numpy as jnp
    >>> from asam_jax import layerwise
    >>> print(layerwise(jnp.array([3.0, 4.0]), 1.0))
    6.0
  """
  return jnp.sqrt(jnp.sum(jnp.square(w))) + eta


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
    return normalization
  names = ", ".join(repr(name) for name in _OPERATORS)
  raise ValueError(
      f"normalization={normalization!r} is unknown; use one of {names}, or a"
      " function (w, eta) -> T of one leaf."
  )


def is_built_in(operator: Operator) -> bool:
  """Whether it is an operator that has a name here."""
  return any(operator is known for known in _OPERATORS.values())


def _last_name(path: Any) -> str:
  """A leaf's own name, without the wrappers that NNX puts behind it."""
  for key in reversed(path):
    name = getattr(key, "key", getattr(key, "name", None))
    wrapper = name in ("value", "raw_value") or isinstance(key, jtu.FlattenedIndexKey)
    if not wrapper:
      return name if isinstance(name, str) else ""
  return ""


def is_not_bias(path: Any, leaf: Any) -> bool:
  """The official rule: every leaf is normalized but the biases.

  A bias is a leaf whose own name is ``b``, ``offset`` or ``beta`` or begins with
  ``bias``: Flax's and Equinox's ``bias``, Haiku's ``b`` and ``offset``. So the
  scale of a batch norm is normalized and its shift is not. Leaves without a name
  (lists, tuples) are normalized.

  Args:
    path: the leaf's key path, as ``jax.tree_util.tree_map_with_path`` gives it.
    leaf: the leaf; not used.

  Returns:
    True if the leaf gets T_w, False if it gets T = 1.

  Examples:
    >>> import jax
    >>> from asam_jax import is_not_bias
    >>> params = {"conv": {"kernel": 1.0, "bias": 0.0}}
    >>> print(jax.tree_util.tree_map_with_path(is_not_bias, params))
    {'conv': {'bias': False, 'kernel': True}}
  """
  del leaf
  name = _last_name(path)
  return not (name in ("b", "offset", "beta") or name.startswith("bias"))


def _resolve_selection(
    argument: str, selection: LeafSelection, params: optax.Params
) -> list[bool]:
  """One bool per leaf of params; ``argument`` is the name for error messages."""
  paths_and_leaves, treedef = jtu.tree_flatten_with_path(params)
  # An Equinox module of bools is callable too, so its leaves decide.
  leaves = jtu.tree_leaves(selection)
  if callable(selection) and not all(isinstance(x, bool) for x in leaves):
    chosen = [selection(path, leaf) for path, leaf in paths_and_leaves]
  elif jtu.tree_structure(selection) == treedef:
    chosen = leaves
  else:
    raise ValueError(
        f"{argument} has the structure {jtu.tree_structure(selection)}, but the"
        f" parameters have {treedef}; give a pytree of bools with one bool for"
        " each parameter leaf, or a predicate (path, leaf) -> bool."
    )
  for (path, _), value in zip(paths_and_leaves, chosen, strict=True):
    if not (isinstance(value, bool) or jnp.result_type(value) == jnp.bool_):
      raise TypeError(
          f"{argument} is {value!r} for {jtu.keystr(path)}; it must be a bool"
          " for every leaf."
      )
  return [bool(value) for value in chosen]


class LeafRule(NamedTuple):
  """What happens to one leaf: its T_w, and whether it is perturbed at all."""

  path: Any
  leaf: Any
  operator: Operator
  perturbed: bool


def leaf_rules(
    params: optax.Params,
    normalization: Normalization,
    normalize: LeafSelection | None,
    perturb: LeafSelection | None,
) -> list[LeafRule]:
  """The rule of every leaf of params, in the order of ``jax.tree.leaves``."""
  operator = resolve_operator(normalization)
  normalize = is_not_bias if normalize is None else normalize
  perturb = (lambda path, leaf: True) if perturb is None else perturb
  normalized = _resolve_selection("normalize", normalize, params)
  perturbed = _resolve_selection("perturb", perturb, params)
  paths_and_leaves, _ = jtu.tree_flatten_with_path(params)
  return [
      LeafRule(path, leaf, operator if use_operator else none, is_perturbed)
      for (path, leaf), use_operator, is_perturbed in zip(
          paths_and_leaves, normalized, perturbed, strict=True
      )
  ]


class LeafDescription(NamedTuple):
  """One row of :func:`describe`.

  Attributes:
    path: the leaf's path, as ``jax.tree_util.keystr`` writes it.
    shape: the leaf's shape.
    operator: the name of the operator that gives its T_w.
    perturbed: whether the leaf is perturbed at all.
    size: its number of parameters.
  """

  path: str
  shape: tuple[int, ...]
  operator: str
  perturbed: bool
  size: int


class Description(tuple[LeafDescription, ...]):
  """A tuple of :class:`LeafDescription` that prints as a table."""

  def __str__(self) -> str:
    header = ("path", "shape", "operator", "perturbed", "parameters")
    body = [
        (row.path, str(row.shape), row.operator,
         "yes" if row.perturbed else "no", f"{row.size:,}")
        for row in self
    ]
    total = f"{sum(row.size for row in self):,}"
    return _table([header, *body, ("total", "", "", "", total)])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
      "  ".join([cell.ljust(width) for cell, width in
                 zip(row[:-1], widths, strict=False)] + [row[-1].rjust(widths[-1])])
      for row in rows
  ]
  rule = "-" * len(lines[0])
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _operator_name(operator: Operator, leaf: Any) -> str:
  while isinstance(operator, functools.partial):
    operator = operator.func
  if operator is filterwise and len(leaf.shape) < _CONVOLUTION_RANK:
    operator = elementwise  # what filterwise itself falls back to
  return getattr(operator, "__name__", repr(operator))


def describe(
    params: optax.Params,
    *,
    normalization: Normalization = "elementwise",
    normalize: LeafSelection | None = None,
    perturb: LeafSelection | None = None,
) -> Description:
  """Which leaf gets which operator, and which leaves are perturbed.

  Which leaves are normalized is part of the meaning of rho, so look at this once
  before a long run.

  Args:
    params: the parameters; arrays or ``jax.ShapeDtypeStruct``.
    normalization: as in :func:`asam_jax.ascent`.
    normalize: as in :func:`asam_jax.ascent`.
    perturb: as in :func:`asam_jax.ascent`.

  Returns:
    A tuple with a :class:`LeafDescription` per leaf, which prints as a table.

  Raises:
    ValueError: for an unknown operator, or a selection of another structure.
    TypeError: for a selection that is not made of bools.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> print(asam_jax.describe(params))
    path                 shape   operator     perturbed  parameters
    ---------------------------------------------------------------
    ['dense']['bias']    (3,)    none         yes                 3
    ['dense']['kernel']  (4, 3)  elementwise  yes                12
    ---------------------------------------------------------------
    total                                                        15
  """
  rows = []
  for rule in leaf_rules(params, normalization, normalize, perturb):
    leaf = rule.leaf if hasattr(rule.leaf, "shape") else jnp.asarray(rule.leaf)
    rows.append(
        LeafDescription(
            path=jtu.keystr(rule.path),
            shape=tuple(leaf.shape),
            operator=_operator_name(rule.operator, leaf),
            perturbed=rule.perturbed,
            size=math.prod(leaf.shape),
        )
    )
  return Description(rows)
