"""A table of the leaves: which operator each gets, and whether it is perturbed."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

from jax import tree_util as jtu
import optax

from asam_jax import _arguments
from asam_jax import _geometry as _g
from asam_jax._geometry import Geometry


class LeafDescription(NamedTuple):
  """One row of :func:`describe`.

  Attributes:
    path: the leaf's path, as ``jax.tree_util.keystr`` writes it.
    shape: the leaf's shape.
    operator: the name of the operator that gives its T_w.
    perturbed: whether the leaf is perturbed at all.
    size: its number of parameters.
    filter_axis: the axis that numbers the filters, if it is a convolution kernel under
      ``"filterwise"``; otherwise None.
    filters: the number of its filters, likewise.
  """

  path: str
  shape: tuple[int, ...]
  operator: str
  perturbed: bool
  size: int
  filter_axis: int | None = None
  filters: int | None = None


class Description(tuple[LeafDescription, ...]):
  """A tuple of :class:`LeafDescription` that prints as a table."""

  def __str__(self) -> str:
    header = ("path", "shape", "operator", "perturbed", "parameters")
    body = [
        (row.path, str(row.shape), _operator_cell(row),
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


def describe(
    params: optax.Params, geometry: Geometry | None = None, **options: Any
) -> Description:
  """Which leaf gets which operator, and which leaves are perturbed.

  Which leaves are normalized is part of the meaning of rho, so look at this once
  before a long run.

  Args:
    params: the parameters; arrays or ``jax.ShapeDtypeStruct``.
    geometry: the :class:`asam_jax.Geometry`; or
    **options: its fields, as :func:`asam_jax.adaptive_sam` takes them.

  Returns:
    A tuple with a :class:`LeafDescription` per leaf, which prints as a table. For a
    convolution kernel under ``"filterwise"`` it shows the axis of the filters, and how
    many there are.

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
  if geometry is not None and options:
    raise ValueError(
        f"both geometry and {', '.join(options)} are given; put them into the Geometry."
    )
  geometry = _g.Geometry(**options) if geometry is None else geometry
  _arguments.instance("geometry", geometry, _g.Geometry)
  return Description(map(_described, geometry.rules(params)))


def _described(rule: _g.LeafRule) -> LeafDescription:
  shape = tuple(getattr(rule.leaf, "shape", ()))
  operator = _g.built_in(rule.operator)
  axis = _g.filter_axis_under(rule.operator, len(shape))
  if operator == "filterwise" and axis is None:
    operator = "elementwise"  # what it falls back to
  return LeafDescription(
      path=jtu.keystr(rule.path),
      shape=shape,
      operator=operator or _name(rule.operator),
      perturbed=rule.perturbed,
      size=math.prod(shape),
      filter_axis=axis,
      filters=None if axis is None else shape[axis],
  )


def _operator_cell(row: LeafDescription) -> str:
  if row.filters is None:
    return row.operator
  return f"{row.operator}, {row.filters} on axis {row.filter_axis}"


def _name(operator: _g.Operator) -> str:
  while isinstance(operator, functools.partial):
    operator = operator.func
  return getattr(operator, "__name__", repr(operator))
