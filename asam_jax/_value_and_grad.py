"""ASAM as a function transformation, with the signatures of JAX's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.core import Tracer
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _geometry as _g
from asam_jax import _groups
from asam_jax import _info
from asam_jax import _mesh
from asam_jax import _microbatched
from asam_jax import _radius
from asam_jax import _two_passes
from asam_jax._geometry import Geometry
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization
from asam_jax._stochastic_rounding import StochasticRoundingState

RHO = 0.5
# A gradient function to the same in smaller pieces; or the number of rows in a piece.
Accumulate = int | Callable[[Callable[..., Any]], Callable[..., Any]] | None


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rho: Any = RHO,
    eta: Any = 0.01,
    p: float = 2,
    normalization: Normalization = "elementwise",
    normalize: LeafSelection | None = None,
    perturb: LeafSelection | None = None,
    param_specs: Any = None,
    ascent: optax.GradientTransformation | None = None,
    accumulate: Accumulate = None,
    axis_name: Any = None,
    average_ascent: bool = False,
    m_sharpness: int | None = None,
    with_info: bool = False,
) -> Callable[..., Any]:
  r"""``jax.value_and_grad``, but the gradient is taken at w + epsilon.

  .. math::

    w \mapsto \big(L(w),\ \nabla L(w + \hat\epsilon)\big), \qquad
    \hat\epsilon = \mathrm{ascent}(\nabla L(w), w)

  with :math:`\hat\epsilon` as in :func:`asam_jax.ascent`. Value and aux (metrics,
  batch statistics) are of the clean pass at w. ``fun`` gets the same arguments in
  both passes, and so the same batch and the same dropout keys. The optimizer needs
  no extra arguments, so this works with any of them and with an unmodified
  ``TrainState``. It costs two gradients.

  There is no state here, so rho and eta are no schedules: build the function inside
  the training step, with ``rho=schedule(step)``.

  Args:
    fun: a function with a scalar result, or ``(scalar, aux)`` with ``has_aux``.
    argnums: which positional arguments are differentiated and perturbed. With
      several, the norm is over all of them.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    rho: the radius of the perturbation, >= 0; a number or a traced scalar. Or a rule
      such as :func:`asam_jax.auto_radius`, whose state goes in by name and comes out
      behind the gradient: ``value, grad, radius = f(params, batch, radius=radius)``,
      from ``rule.init()`` on.
    eta: the stabilizer, >= 0; a number or a traced scalar.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`. Where argnums
      is a sequence, the selection is over the tuple of these arguments.
    perturb: the leaves that are perturbed at all; likewise.
    param_specs: for parameters that are sharded by hand inside ``shard_map``; see
      :func:`asam_jax.ascent`. Where argnums is a sequence, of the tuple likewise.
    ascent: an ascent chain in place of the closed form, such as ``iterated(ascent(0.5),
      3)``, or ``optax.chain(ascent(0.05), stochastic_rounding(key))`` with a new key
      at each step. It has its own rho and geometry, and must keep no state between
      steps. (With ``with_info``, eta, p and the selections say in which geometry the
      info measures.)
    accumulate: for a batch that does not fit: the number of rows of a microbatch. The
      first positional argument that is not differentiated is the batch, and both
      passes go over its microbatches: one perturbation for the whole batch. Or a
      function that takes ``jax.value_and_grad(fun, argnums, has_aux)`` to the same in
      smaller pieces, such as ``lambda f: microbatched(f, 32, argnums=(1, 2))``. See
      :func:`asam_jax.microbatched`.
    axis_name: for ``pmap`` and ``shard_map``, the mesh axis (or axes) over which the
      returned gradient is averaged; value and aux stay the device's own. Replicated
      parameters go in as they are, whether or not ``shard_map`` checks what varies.
      The loss is the device's own, too, without a ``pmean`` or ``psum`` in it.
    average_ascent: whether the ascent gradient is averaged over ``axis_name`` too:
      one perturbation for all devices, and two all-reduces. By default each device
      ascends on its own share of the batch (m-sharpness).
    m_sharpness: m, for one perturbation per m examples; by default there is one for
      the batch. The first positional argument that is not differentiated is the batch,
      and its rows 0 to m - 1 are the first m examples, and so on. Under ``jit`` the
      step is the same on any number of devices that share the rows, with one
      all-reduce where m is at most a device's share. Results are the means over the
      groups (integers in aux are added up); the random keys are the same for all
      groups. A device holds the perturbed parameters of all its groups at a time.
    with_info: whether to return an :class:`AscentInfo` as well.

  Returns:
    A function with the arguments of ``fun`` that returns ``(value, grad)`` or
    ``((value, aux), grad)`` as ``jax.value_and_grad`` does; followed by the next state
    of the radius rule if rho is one, and by an :class:`AscentInfo` if ``with_info``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` does; TypeError if rho or eta
      is a schedule; ValueError for average_ascent without axis_name, for m_sharpness
      together with average_ascent or accumulate or (in the call) with a batch that it
      does not divide, for both ascent
      and rho or geometry, and for an ascent chain with a state.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> loss = lambda w, x: jnp.sum((w * x) ** 2)
    >>> w, x = jnp.array([3.0, 4.0]), jnp.array([1.0, 1.0])
    >>> value, grad = asam_jax.value_and_grad(loss, rho=0.1, eta=0.0)(w, x)
    >>> print(float(value), grad.tolist())
    25.0 [6.294, 8.697]
    >>> value, grad, info = asam_jax.value_and_grad(
    ...     loss, rho=0.1, eta=0.0, with_info=True)(w, x)
    >>> print(f"{info.gap:.3f} {info.predicted_gap:.3f}")
    3.815 3.672

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  door = Door(
      _g.Geometry(eta, p, normalization, normalize, perturb, param_specs),
      rho, ascent, axis_name, average_ascent, with_info,
  )
  _arguments.function("fun", fun, "with a scalar result")
  argnums = _arguments.argnums(argnums)
  _arguments.flag("has_aux", has_aux)
  checked = _arguments.real_valued("fun(...)", fun, has_aux)
  clean = jax.value_and_grad(checked, argnums, has_aux)
  if m_sharpness is not None:
    m_sharpness = _groups.check(m_sharpness, accumulate, average_ascent)
    door = dataclasses.replace(door, axis_name=None)
  if accumulate is not None:
    clean = accumulated(clean, accumulate, argnums)

  def step(args, kwargs, radius):
    params = chosen(args, argnums)

    def evaluate(point):
      result, grads = clean(*with_chosen(args, argnums, point), **kwargs)
      return _two_passes.Pass(grads, result[0] if has_aux else result, result)

    return door.passes(_traced_once(evaluate), params, radius=radius)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    radius = door.radius_in(kwargs)
    step_at = functools.partial(step, radius=radius)
    if m_sharpness is None:
      return step_at(args, kwargs)
    # Averaged over the groups first, and once over the devices then.
    if axis_name is not None:
      own = _mesh.own(chosen(args, argnums), axis_name)
      args = tuple(with_chosen(args, argnums, own))
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    place = batch_argument(numbers)
    params = _microbatched.chosen(args, numbers)
    taken = {place, *(number % len(args) for number in numbers)}
    others = [None if i in taken else x for i, x in enumerate(args)], kwargs
    results = _groups.each(
        step_at, m_sharpness, args, kwargs, place, params, others, axis_name,
        param_specs,
    )
    _two_passes.mark_perturbed(results[1])
    return results

  setattr(wrapped, _two_passes.PERTURBED, True)
  return wrapped


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
    return self.rho if isinstance(self.rho, _radius.RadiusRule) else None

  def radius_in(self, kwargs: dict[str, Any]) -> Any:
    """The state of the radius rule, taken out of a call's keyword arguments."""
    if not self.rule:
      return None
    if "radius" not in kwargs:
      raise TypeError(
          "rho is a radius rule, whose state is missing: call value, grad, radius ="
          " f(params, batch, radius=radius), at the first step with rule.init()."
      )
    radius = kwargs.pop("radius")
    return _arguments.tree_like("radius", radius, self.rule.init(), "rule.init()")

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
      result = *result, jax.tree.map(lambda x, old: x.astype(old.dtype), kept, radius)
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


def _traced_once(evaluate: Callable[[Any], Any]) -> Callable[[Any], Any]:
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
  return microbatched(clean, size, batch_argument(argnums))


def batch_argument(argnums: int | Sequence[int]) -> int:
  """The first positional argument that is not differentiated."""
  numbers = {argnums} if isinstance(argnums, int) else set(argnums)
  return next(i for i in range(len(numbers) + 1) if i not in numbers)


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rho: Any = RHO,
    eta: Any = 0.01,
    p: float = 2,
    normalization: Normalization = "elementwise",
    normalize: LeafSelection | None = None,
    perturb: LeafSelection | None = None,
    **options: Any,
) -> Callable[..., Any]:
  """``jax.grad``, but the gradient is taken at w + epsilon.

  Args:
    fun: as for :func:`value_and_grad`.
    argnums: as for :func:`value_and_grad`.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    rho: as for :func:`value_and_grad`.
    eta: as for :func:`value_and_grad`.
    p: as for :func:`value_and_grad`.
    normalization: as for :func:`value_and_grad`.
    normalize: as for :func:`value_and_grad`.
    perturb: as for :func:`value_and_grad`.
    **options: the other options of :func:`value_and_grad`.

  Returns:
    A function with the arguments of ``fun`` that returns ``grad``, or
    ``(grad, aux)`` with ``has_aux``, as ``jax.grad`` does; followed by an
    :class:`AscentInfo` if ``with_info``.

  Raises:
    ValueError, TypeError: as :func:`value_and_grad` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> print(asam_jax.grad(lambda w: w**2, rho=0.5, eta=0.0)(jnp.array(2.0)))
    6.0
  """
  transformed = value_and_grad(
      fun, argnums, has_aux, rho=rho, eta=eta, p=p, normalization=normalization,
      normalize=normalize, perturb=perturb, **options,
  )
  return without_value(transformed, fun, has_aux)


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
