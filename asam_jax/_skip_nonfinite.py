"""Skip the steps whose gradients are not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from asam_jax import _info
from asam_jax import _mesh
from asam_jax import _shards
from asam_jax import _trees
from asam_jax import _two_passes


class SkipNonfiniteState(NamedTuple):
  """State of :func:`skip_nonfinite`.

  Attributes:
    skipped: the number of steps skipped so far, an int32 scalar.
    link: the state of the link that perturbs.
    base: the state of the base optimizer.
  """

  skipped: jax.Array
  link: optax.OptState
  base: optax.OptState


def skip_nonfinite(
    base_tx: optax.GradientTransformation,
    link: optax.GradientTransformation,
    *,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """``optax.chain(link, base_tx)`` that skips steps with NaN or inf in a gradient.

  Both gradients are looked at: the one that comes in, at w, and the one that
  ``link`` hands on, at w + epsilon. If either has a NaN or an inf, the updates are
  zero and the states of ``link`` and ``base_tx`` stay as they were, and the step
  is counted. (An :class:`asam_jax.AscentInfo` in the state is of the skipped step,
  so that the log shows what happened.)

  ``optax.apply_if_finite`` around an optimizer with two gradients does not do this:
  it looks at the incoming gradient alone. Around the optimizers with one gradient
  (:func:`asam_jax.carried`), or around one that is fed by
  :func:`asam_jax.value_and_grad`, it does.

  Cost: one look at each gradient and a select for each entry of the states.

  Args:
    base_tx: the optimizer that makes the step.
    link: what maps the gradient at w to the one at w + epsilon, such as
      ``perturbed_gradient(ascent(...))``.
    axis_name: for ``pmap`` and ``shard_map``, the mesh axis (or axes) over which the
      devices agree to skip; by default the link's. Those over which ``param_specs``
      say that parameters are sharded come in addition.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state
    :class:`SkipNonfiniteState`; extra arguments go on to ``link`` and ``base_tx``.

  Raises:
    TypeError: if base_tx is no base optimizer (in ``init``: if it has an ascent in
      it), link no link, or axis_name no name.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> link = asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.5, eta=0.0))
    >>> tx = asam_jax.skip_nonfinite(optax.adam(0.1), link)
    >>> loss = lambda w: jnp.where(w < 1.4, w**2, jnp.inf * w)
    >>> w = jnp.array(1.0)  # is finite, but 1.5 is not
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates, state.skipped)
    0.0 1
  """
  base_tx, link = _two_passes.base(base_tx), _two_passes.link(link)
  given = _mesh.checked_name(axis_name)
  axis_name = link.axis_name if given is None else given
  axes = () if axis_name is None else _mesh.axes_of(axis_name)
  axes = tuple(dict.fromkeys([*axes, *_shards.axes_in(link.param_specs)]))

  def init_fn(params):
    base = base_tx.init(params)
    _two_passes.no_ascent(base)
    return SkipNonfiniteState(jnp.zeros((), jnp.int32), link.init(params), base)

  def update_fn(updates, state, params=None, **extra_args):
    if given is not None:
      _mesh.check_bound(given)
    grads, link_state = link.update(updates, state.link, params, **extra_args)
    finite = _trees.all_finite((updates, grads))
    if axes:
      finite = lax.pmin(finite.astype(jnp.int32), axes) == 1
    # base_tx gets zeros in place of a NaN: some search until they are content.
    grads = _select(finite, grads, jax.tree.map(jnp.zeros_like, grads))
    steps, base_state = base_tx.update(grads, state.base, params, **extra_args)
    steps = _select(finite, steps, jax.tree.map(jnp.zeros_like, steps))
    return steps, SkipNonfiniteState(
        skipped=jnp.where(
            finite, state.skipped, optax.safe_increment(state.skipped)
        ),
        link=_select(finite, link_state, state.link),
        base=_select(finite, base_state, state.base),
    )

  return _two_passes.Optimizer(init_fn, update_fn)


def _select(finite: jax.Array, new: Any, old: Any) -> Any:
  """The new where finite, else the old; but what is for the log is always new."""
  is_info = lambda node: isinstance(node, _info.AscentInfo)  # noqa: E731
  return jax.tree.map(
      lambda n, o: n if is_info(n) else jnp.where(finite, n, o),
      new,
      old,
      is_leaf=is_info,
  )
