"""What the function transformations share: options, passes, places of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _geometry as _g
from asam_jax import _info
from asam_jax import _mesh
from asam_jax import _microbatched
from asam_jax import _radius
from asam_jax import _two_passes
from asam_jax._geometry import Geometry
from asam_jax._stochastic_rounding import StochasticRoundingState

RHO = 0.5
# A gradient function to the same in smaller pieces; or the number of rows in a piece.
Accumulate = int | Callable[[Callable[..., Any]], Callable[..., Any]] | None


@dataclasses.dataclass(frozen=True)
class Door:
  """The options and the two passes of a function transformation, here and for NNX."""

  geometry: Geometry
  rho: Any
  ascent: Any
  axis_name: Any
  average_ascent: bool
  with_info: bool

  def __post_init__(self):
    _arguments.flag("with_info", self.with_info)
    self.rule  # noqa: B018  (for its errors)
    for name, value in (("rho", self.rho), ("eta", self.geometry.eta)):
      if callable(value):
        raise TypeError(
            f"{name}={value!r} is a schedule, but a function transformation has no"
            f" step count; pass {name}=schedule(step) inside the training step."
        )
    _two_passes.averaging(self.axis_name, self.average_ascent)
    if self.ascent is None:
      if not self.rule:
        _arguments.scalar("rho", self.rho)
    else:
      _two_passes.ascent_chain(self.ascent)
      self._check_ascent_alone()

  def _check_ascent_alone(self):
    given = {"rho": self.rho} if self.rho is not RHO else {}
    if not self.with_info:  # which measures in this geometry
      default = _g.Geometry()
      given |= {
          field.name: getattr(self.geometry, field.name)
          for field in dataclasses.fields(default)
          if _differs(getattr(self.geometry, field.name), getattr(default, field.name))
      }
    if given:
      raise ValueError(
          f"ascent=... and {', '.join(f'{k}={v!r}' for k, v in given.items())} are both"
          " given; the ascent chain has its own: write ascent=asam_jax.ascent(rho, eta,"
          " p, ...)."
      )

  @property
  def rule(self) -> _radius.RadiusRule | None:
    return _radius.rule_of(self.rho)

  def radius_in(self, kwargs: dict[str, Any]) -> Any:
    """The state of the radius rule, taken out of a call's keyword arguments."""
    if not self.rule:
      return None
    if "radius" not in kwargs:
      raise TypeError(
          "rho is a radius rule, whose state is missing: call value, grad, radius ="
          " f(params, batch, radius=radius), at the first step with rule.init()."
      )
    radius, start = kwargs.pop("radius"), self.rule.init()
    if jax.tree.structure(radius) != jax.tree.structure(start):
      raise TypeError(
          f"radius={radius!r} is no state of the rule; give rule.init() at the first"
          " step, and then what the last one returned."
      )
    return _arguments.tree_like("radius", radius, start, "rule.init()")

  def passes(
      self,
      evaluate: Callable[[Any], _two_passes.Pass],
      params: Any,
      clean: _two_passes.Pass | None = None,
      at_perturbed: Callable[[Any, _two_passes.Pass], _two_passes.Pass] | None = None,
      radius: Any = None,
  ) -> tuple[Any, ...]:
    """(result of the clean pass, gradient to descend along, ...).

    Then the next state of the radius rule, and the info, each if there is one.
    """
    plain = self.ascent is None
    tx = _ascent.from_geometry(self.rho, self.geometry) if plain else self.ascent
    state = _stateless(tx.init(params), radius)
    passes = _two_passes.two_passes(
        evaluate,
        optax.with_extra_args_support(tx),
        state,
        params,
        clean,
        at_perturbed=at_perturbed,
        axis_name=self.axis_name,
        average_ascent=self.average_ascent,
    )
    _two_passes.mark_perturbed(passes.grads)
    result = passes.clean.result, passes.grads
    if self.rule:
      kept = passes.ascent.radius
      kept = kept if self.axis_name is None else _mesh.mean(kept, self.axis_name)
      as_before = lambda x, old: jnp.asarray(x, jnp.result_type(old))  # noqa: E731
      result = *result, jax.tree.map(as_before, kept, radius)
    if not self.with_info:
      return result
    info = _info.measured(self.geometry, passes, plain, self.axis_name)
    if self.axis_name is not None:
      info = _mesh.mean(info, self.axis_name)
    return *result, _info.finished(info)


def _differs(value: Any, default: Any) -> bool:
  """Whether an argument was given; arrays are no defaults, and may be traced."""
  return isinstance(value, jax.Array) or (value is not default and value != default)


def _stateless(state: Any, radius: Any = None) -> Any:
  """The state of an ascent chain without step counts; raises if it keeps more.

  ``radius`` is the state of the one rule that may be in it, from the caller.
  """
  stops = (_ascent.AscentState, StochasticRoundingState)
  is_known = lambda node: isinstance(node, stops)  # noqa: E731
  leaves, treedef = jax.tree.flatten(state, is_leaf=is_known)
  ruled = any(getattr(x, "radius", None) is not None for x in leaves)
  if not all(map(is_known, leaves)) or (ruled and radius is None):
    raise ValueError(
        "ascent=... keeps a state between steps, as optax.ema, subtract_ema and radius"
        " rules do, but a function transformation has none: use"
        " perturbed_gradient(ascent_tx) in the optimizer instead."
    )
  given = {"count": None, "radius": radius}
  return jax.tree.unflatten(
      treedef,
      [x._replace(**given) if isinstance(x, _ascent.AscentState) else x for x in leaves]
  )


def traced_once(evaluate: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """The same function, which JAX traces once for both passes of a step.

  It lowers it a second time, without the results of the perturbed pass that are not
  used. To keep these would cost more: a loss is a sum over all devices.
  """
  kept = []  # what the function returns that is no array, and its structure

  @jax.jit
  def traced(point):
    leaves, treedef = jax.tree.flatten(evaluate(point))
    arrays = [isinstance(x, (jax.Array, np.ndarray)) for x in leaves]
    rest = [None if a else x for x, a in zip(leaves, arrays, strict=True)]
    kept[:] = [treedef, arrays, rest]
    return [x for x, is_array in zip(leaves, arrays, strict=True) if is_array]

  def call(point):
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(point)):
      return evaluate(point)  # without jit around the step it runs as it is written
    results = iter(traced(point))
    treedef, arrays, rest = kept
    leaves = [next(results) if a else x for x, a in zip(rest, arrays, strict=True)]
    return jax.tree.unflatten(treedef, leaves)

  return call


def accumulated(
    clean: Any,
    accumulate: Accumulate,
    argnums: Any,
    microbatched: Callable[..., Any] = _microbatched.microbatched,
) -> Any:
  """The gradient function in smaller pieces of its batch."""
  if callable(accumulate):
    return accumulate(clean)
  size = _arguments.count("accumulate", accumulate)

  def in_pieces(*args, **kwargs):
    place = batch_argument(argnums, len(args))
    return microbatched(clean, size, place)(*args, **kwargs)

  return in_pieces


def batch_argument(argnums: int | Sequence[int], count: int) -> int:
  """The first of ``count`` positional arguments that is not differentiated."""
  numbers = (argnums,) if isinstance(argnums, int) else argnums
  taken = {number % count for number in numbers}
  return next(i for i in range(len(taken) + 1) if i not in taken)


def without_value(transformed: Any, fun: Any, has_aux: bool) -> Callable[..., Any]:
  """What value_and_grad gave, with the results of ``jax.grad``."""

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    value, grads, *info = transformed(*args, **kwargs)
    result = (grads, value[1]) if has_aux else (grads,)
    return (*result, *info) if has_aux or info else grads

  setattr(wrapped, _two_passes.PERTURBED, True)
  return wrapped


def chosen(args: tuple[Any, ...], argnums: int | Sequence[int]) -> Any:
  """The arguments that are differentiated: one, or a tuple of them."""
  if isinstance(argnums, int):
    return _microbatched.chosen(args, (argnums,))[0]
  return tuple(_microbatched.chosen(args, argnums))


def with_chosen(
    args: tuple[Any, ...], argnums: int | Sequence[int], values: Any
) -> list[Any]:
  """All arguments, with other values of those that are differentiated."""
  if isinstance(argnums, int):
    argnums, values = (argnums,), (values,)
  return _microbatched.replaced(args, argnums, values)
