"""The two passes of a step, and the link that makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
import weakref

import jax
import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _geometry as _g
from asam_jax import _info
from asam_jax import _interop
from asam_jax import _mesh
from asam_jax import _radius
from asam_jax._geometry import Geometry


class Link(optax.GradientTransformationExtraArgs):
  """A transformation from the gradient at w to the one to descend along.

  ``axis_name`` is the mesh axis over which it averages, for links around it, which
  have a use for the gradient at w; ``param_specs`` tells of shards, if any.
  """

  axis_name: Any = None
  param_specs: Any = None

  @classmethod
  def over(cls, axis_name: Any, param_specs: Any, init: Any, update: Any) -> Link:
    link = cls(init, update)
    link.axis_name, link.param_specs = axis_name, param_specs
    return link


class Optimizer(optax.GradientTransformationExtraArgs):
  """A whole optimizer that perturbs; it is no base optimizer, no link, no ascent."""

  __slots__ = ()


class Pass(NamedTuple):
  """What one pass through the model gives at one point.

  Attributes:
    grads: the gradient there.
    value: the loss, or None where the caller did not tell it.
    result: all that was returned beside the gradient.
  """

  grads: Any
  value: Any = None
  result: Any = None


class TwoPasses(NamedTuple):
  """What both passes gave, and the gradient to descend along.

  ``common`` tells whether all devices share the ascent; what ``perturbed`` has is
  a device's own all the same.
  """

  params: Any
  point: Any
  clean: Pass
  perturbed: Pass
  grads: Any
  ascent: Any
  common: bool


def two_passes(
    evaluate: Callable[[Any], Pass],
    ascent_tx: optax.GradientTransformationExtraArgs,
    ascent_state: Any,
    params: Any,
    clean: Pass | None = None,
    *,
    at_perturbed: Callable[[Any, Pass], Pass] | None = None,
    axis_name: Any = None,
    average_ascent: bool = False,
    source: str = "the function",
    extra_args: dict[str, Any] | None = None,
) -> TwoPasses:
  """Clean pass, ascent chain, perturbed pass; every door comes here.

  ``evaluate`` is called at w + epsilon, and at w unless ``clean`` is given; ``source``
  names in errors what it calls. Its gradients are each device's own. Where the
  perturbed pass is another function, which needs what the clean one gave, it is
  ``at_perturbed(point, clean)``.
  """
  if axis_name is not None:
    extra_args = {**(extra_args or {}), "axis_name": axis_name}
    at_own = evaluate
    evaluate = lambda point: at_own(_mesh.own(point, axis_name))  # noqa: E731
  ascend_along = (lambda g: _mesh.mean(g, axis_name)) if average_ascent else lambda g: g
  rules = []  # the radius rule that the ascent follows, if it follows one
  of_rules: dict[str, Any] = {"radius_rules": rules}
  if axis_name is not None and not average_ascent:
    of_rules["over_devices"] = lambda x: _mesh.mean(x, axis_name)
  try:
    clean = evaluate(params) if clean is None else clean
    clean = clean._replace(grads=ascend_along(clean.grads))
    epsilon, ascent_state = ascent_tx.update(
        clean.grads,
        ascent_state,
        params,
        # For several ascent steps.
        grad_fn=lambda point: ascend_along(evaluate(point).grads),
        **of_rules,
        **(extra_args or {}),
    )
    point = optax.apply_updates(params, epsilon)
    if at_perturbed is None:
      perturbed = evaluate(point)
    else:
      own = point if axis_name is None else _mesh.own(point, axis_name)
      perturbed = at_perturbed(own, clean)
  except Exception as error:
    _interop.explain(error, params)
    raise
  _arguments.tree_like(
      f"the result of {source}", perturbed.grads, params, same_dtype=True,
      remedy="return the gradient with respect to params, cast to their dtypes.",
  )
  if axis_name is not None and perturbed.value is not None:
    _mesh.check_own_loss(perturbed.value, axis_name)
  if rules:
    ascent_state = _radius.after_both(rules, ascent_state, params, clean, perturbed)
  grads = perturbed.grads
  if axis_name is not None:
    grads = _mesh.mean(grads, axis_name)
  return TwoPasses(
      params, point, clean, perturbed, grads, ascent_state, average_ascent
  )


class PerturbedGradientState(NamedTuple):
  """State of :func:`perturbed_gradient`.

  Attributes:
    ascent: the state of the ascent chain; for a plain :func:`asam_jax.ascent` an
      :class:`asam_jax.AscentState` with the step count and the sharpness.
    info: an :class:`asam_jax.AscentInfo` if one was asked for, otherwise None.
  """

  ascent: optax.OptState
  info: Any = None


def perturbed_gradient(
    ascent_tx: optax.GradientTransformation,
    *,
    axis_name: Any = None,
    average_ascent: bool = False,
    info: Geometry | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the gradient at w by the gradient at w + epsilon.

  .. math::

    g \mapsto \nabla L(w + \hat\epsilon), \qquad
    \hat\epsilon = \mathrm{ascent}(g, w)

  ``update(grads, state, params, grad_fn=grad_fn)`` takes the gradient at params,
  which you have anyway, and calls ``grad_fn(params) -> grads`` once, at the
  perturbed point. So a step costs two gradients. ``value_fn(params) -> loss`` may
  be passed in its place. Both passes should see the same batch and the same
  random keys: let ``grad_fn`` close over them.

  Args:
    ascent_tx: the ascent chain: any transformation that maps a gradient to the
      perturbation to add, such as :func:`asam_jax.ascent`, alone or behind other
      links.
    axis_name: for ``pmap`` and ``shard_map``, the mesh axis (or axes) over which
      the gradient at the perturbed point is averaged. The gradient at w comes in as
      the device's own, and each device ascends along it (m-sharpness, one all-reduce
      a step). In a ``shard_map`` that checks what varies, take it at parameters that
      vary: ``jax.grad(loss)(jax.lax.pcast(params, axis_name, to="varying"), batch)``.
      So with ``grad_fn``, whose parameters vary; no ``pmean`` may stand in its loss.
      What the state keeps is the mean over the devices, and the same on each. Under
      ``jit`` with sharded arrays leave it None.
    average_ascent: whether the ascent gradient is averaged over ``axis_name`` too:
      one perturbation for all devices, and two all-reduces.
    info: the :class:`asam_jax.Geometry` in which to measure an
      :class:`asam_jax.AscentInfo` of the last step, which is kept in the state; None
      for none. ``update`` then needs ``value``, the loss at w, and ``value_fn``.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state
    :class:`PerturbedGradientState`. Extra arguments go on to ``ascent_tx``.

  Raises:
    ValueError: for average_ascent without axis_name; in ``update``, without params,
      without grad_fn and value_fn, with info and without value or value_fn, or with a
      gradient that a ``shard_map`` knows to be the same on all devices of
      ``axis_name``; or where no shard_map or pmap has that axis.
    TypeError: if ascent_tx is no transformation, or one that makes whole steps; if
      axis_name is no name; in ``update``, if grad_fn's result has another structure,
      shape or dtype than params.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.1, eta=0.0))
    >>> w = jnp.array([3.0, 4.0])
    >>> grads, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(grads.tolist())  # 2 (w + epsilon)
    [6.294, 8.697]
  """
  return link_of(ascent_tx, axis_name, average_ascent, info)


def link_of(
    ascent_tx: Any,
    axis_name: Any,
    average_ascent: bool = False,
    info: Geometry | None = None,
    plain: bool = False,
) -> Link:
  """``perturbed_gradient``; ``plain`` if ascent_tx is the closed form in ``info``."""
  averaging(axis_name, average_ascent)
  ascent_tx = ascent_chain(ascent_tx)
  param_specs = getattr(ascent_tx, "param_specs", None)
  if info is not None and not isinstance(info, _g.Geometry):
    raise TypeError(f"info={info!r} must be an asam_jax.Geometry or None.")

  def init_fn(params: optax.Params) -> PerturbedGradientState:
    _arguments.all_arrays("params", params)
    state = ascent_tx.init(params)
    no_second_ascent(state)
    return PerturbedGradientState(
        state, None if info is None else _info.empty(info, params)
    )

  def update_fn(updates, state, params=None, *, grad_fn=None, value_fn=None,
                **extra_args):
    if params is None:
      raise ValueError(
          "params=None: the gradient is taken at the perturbed parameters; call"
          " update(grads, state, params, grad_fn=grad_fn)."
      )
    if grad_fn is None and value_fn is None:
      raise ValueError(
          "grad_fn=None: the gradient at the perturbed point is missing; pass"
          " update(..., grad_fn=grad_fn) with grad_fn(params) -> grads on the same"
          " batch, or value_fn=value_fn with value_fn(params) -> loss. Flax's"
          " TrainState.apply_gradients hands no such argument on: there, take the"
          " gradient with asam_jax.value_and_grad, and give it the base optimizer."
      )
    for name, function in (("grad_fn", grad_fn), ("value_fn", value_fn)):
      if not (function is None or callable(function)):
        raise TypeError(f"{name}={function!r} must be a function of the parameters.")
    seen = any(_perturbed.get(id(leaf)) is leaf for leaf in jax.tree.leaves(updates))
    if seen or hasattr(grad_fn, PERTURBED):
      raise ValueError(
          "the gradient comes from asam_jax.value_and_grad or grad, and so is one at"
          " perturbed parameters already: this would be ASAM twice. Feed the base"
          " optimizer with it, or take the gradient with jax.value_and_grad."
      )
    if grad_fn is None or (info is not None and value_fn is not None):
      source, evaluate = "value_fn's gradient", _evaluation(value_fn)
    else:
      source, evaluate = "grad_fn", lambda point: Pass(grad_fn(point))
    if axis_name is not None:
      _mesh.check_own(updates, axis_name)
    clean = Pass(updates, extra_args.get("value"))
    passes = two_passes(
        evaluate, ascent_tx, state.ascent, params, clean,
        axis_name=axis_name, average_ascent=average_ascent, source=source,
        extra_args=extra_args,
    )
    kept = PerturbedGradientState(passes.ascent)
    if info is not None:
      geometry = info.at(_info.ascent_state(state.ascent).count)
      kept = kept._replace(info=_info.measured(geometry, passes, plain, axis_name))
    if axis_name is not None:
      kept = _mesh.mean(kept, axis_name)
    if info is not None:
      kept = kept._replace(info=_info.next_info(state.info, kept.info))
    return passes.grads, kept

  return Link.over(axis_name, param_specs, init_fn, update_fn)


def averaging(axis_name: Any, average_ascent: bool) -> None:
  """Checks the arguments axis_name and average_ascent."""
  _mesh.checked_name(axis_name)
  if _arguments.flag("average_ascent", average_ascent) and axis_name is None:
    raise ValueError(
        "average_ascent=True with axis_name=None: pass the axis_name to average"
        " the ascent gradient over."
    )


def _evaluation(value_fn: Any) -> Callable[[Any], Pass]:
  def evaluate(point):
    checked = _arguments.real_valued("value_fn(params)", value_fn)
    value, grads = jax.value_and_grad(checked)(point)
    return Pass(grads, value)

  return evaluate


# What our own function transformations returned, to see ASAM twice where it happens.
_perturbed: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
PERTURBED = "asam_jax_perturbed"  # the attribute of a function that ascends by itself


def mark_perturbed(grads: Any) -> None:
  """Remembers that these arrays are a gradient at perturbed parameters."""
  for leaf in jax.tree.leaves(grads):
    _perturbed[id(leaf)] = leaf


def ascent_chain(tx: Any) -> optax.GradientTransformationExtraArgs:
  """The argument ascent_tx, checked."""
  if isinstance(tx, (Link, Optimizer)):
    raise TypeError(
        "ascent_tx is a transformation that takes the second gradient itself, such as"
        " perturbed_gradient(...) or adaptive_sam(...); give one that maps a gradient"
        " to a perturbation, such as asam_jax.ascent(rho)."
    )
  return _arguments.transformation("ascent_tx", tx, "asam_jax.ascent(rho)")


def link(tx: Any) -> Link:
  """The argument link, checked."""
  if not isinstance(tx, Link):
    what = "a whole optimizer" if isinstance(tx, Optimizer) else f"{type(tx).__name__}"
    raise TypeError(
        f"link is {what}; give what maps the gradient at w to the one at w + epsilon"
        " and no more, such as asam_jax.perturbed_gradient(asam_jax.ascent(rho)), and"
        " chain the base optimizer (clipping, ...) behind what you get."
    )
  return tx


def base(tx: Any) -> optax.GradientTransformationExtraArgs:
  """The argument base_tx, checked."""
  if isinstance(tx, (Link, Optimizer)):
    raise TypeError(
        "base_tx perturbs by itself; give the optimizer that makes the step from a"
        " gradient, such as optax.sgd(0.1, momentum=0.9), first, and what perturbs"
        " after it."
    )
  return _arguments.transformation("base_tx", tx, "optax.sgd(0.1, momentum=0.9)")


def optimizer(base_tx: Any, link: Any) -> Optimizer:
  """``optax.chain(link, base_tx)``, checked and marked as a whole optimizer."""
  chained = optax.chain(link, base(base_tx))

  def init_fn(params):
    state = chained.init(params)
    no_ascent(state[1])  # pyright: ignore[reportIndexIssue]
    return state

  return Optimizer(init_fn, chained.update)


def no_second_ascent(state: Any) -> None:
  """Raises if a state, of an ascent chain or a base optimizer, perturbs by itself."""
  stop = lambda node: isinstance(node, PerturbedGradientState)  # noqa: E731
  if any(map(stop, jax.tree.leaves(state, is_leaf=stop))):
    raise TypeError(
        "perturbed_gradient stands inside an ascent chain or a base optimizer: this"
        " would be ASAM twice. Use it once."
    )


def no_ascent(state: Any, *others: type) -> None:
  """Raises if the state of base_tx has an ascent's in it, or one of other classes."""
  no_second_ascent(state)
  stops = (_ascent.AscentState, *others)
  stop = lambda node: isinstance(node, stops)  # noqa: E731
  if any(map(stop, jax.tree.leaves(state, is_leaf=stop))):
    raise TypeError(
        "base_tx contains an ascent, which leads uphill; give the optimizer that makes"
        " the step, such as optax.sgd(0.1), first, and what perturbs after it."
    )
