"""Methods that take the second gradient only at some of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax import _gates
from asam_jax import _mesh
from asam_jax import _shards
from asam_jax import _trees
from asam_jax import _two_passes


class SometimesState(NamedTuple):
  """State of :func:`sometimes`.

  Attributes:
    gate: the state of ``when``; for a function of the step, the step count.
    link: the state of the link.
    reused: with ``reuse``, the direction that skipped steps add, of norm 1 (or 0
      before the first perturbed step); otherwise empty.
  """

  gate: Any
  link: optax.OptState
  reused: Any


def sometimes(
    link: optax.GradientTransformation,
    when: Callable[[jax.Array], Any] | _gates.Gate,
    *,
    reuse: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes the second gradient at some steps only, to save its cost at the others.

  The steps are chosen by ``when``:

  - every k-th step: ``lambda step: step % k == 0``
  - the last part of training: :func:`late`; another window likewise: ``lambda step:
    step < 1000``
  - a random half: ``lambda step: jax.random.bernoulli(jax.random.fold_in(key,
    step), 0.5)``
  - where the gradient is larger than usual (AE-SAM): :func:`above_average`

  With ``reuse`` = :math:`\alpha > 0` it is LookSAM. At a perturbed step with clean
  gradient g and perturbed gradient h it keeps the part of h that is orthogonal to
  g, over the whole pytree, and the steps between add it, scaled to the gradient:

  .. math::

    h_\perp = h - \frac{\langle h, g\rangle}{\|g\|_2^2} g, \qquad
    g \mapsto g + \alpha \frac{\|g\|_2}{\|h_\perp\|_2} h_\perp

  The added part does not shrink with rho, so a small rho is far from the base
  optimizer; at rho = 0, where h = g but for rounding, nothing is added.

  The choice is made by ``lax.cond``, so a skipped gradient costs nothing under
  ``jit`` (under ``vmap`` both branches run). XLA's CPU backend runs convolutions
  inside ``lax.cond`` many times slower; there, make the choice outside ``jit``:
  ``update(..., ascend=True)`` or ``ascend=False`` with a Python bool compiles the
  one branch alone, and the state is the same. Where the link averages over an
  ``axis_name``, so does this with the clean gradient, wherever it decides or is
  followed: all devices choose and step alike.

  Cost: one gradient a step, and a second one at the chosen steps; memory: none, or
  one copy of the parameters with ``reuse``.

  Args:
    link: what maps the clean gradient to the perturbed one, such as
      ``perturbed_gradient(ascent(...))``. Its state, and so its schedules, advance
      at the chosen steps only.
    when: a function from the step count (an int32 scalar) to a scalar bool, or a
      :class:`Gate`.
    reuse: LookSAM's alpha, >= 0; the paper has 0.7 with every fifth step.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state :class:`SometimesState`.
    Its update takes ``ascend`` (None: ask ``when``; a bool, also a traced one:
    obey) and hands all other extra arguments on.

  Raises:
    TypeError: if ``when`` is no function and no Gate, or does not decide by a
      scalar bool.
    ValueError: if reuse is negative, or (in ``update``) without params; for reuse or a
      Gate around an ascent with ``param_specs``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> looksam = optax.chain(
    ...     asam_jax.sometimes(
    ...         asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.1, eta=0.0)),
    ...         when=lambda step: step % 5 == 0, reuse=0.7),
    ...     optax.sgd(0.1))
    >>> loss = lambda w: jnp.sum(w**2)
    >>> w = jnp.array([3.0, 4.0])
    >>> state = looksam.init(w)
    >>> for _ in range(2):
    ...   updates, state = looksam.update(
    ...       jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))
    ...   w = optax.apply_updates(w, updates)
    >>> print(w.tolist())
    [2.336, 2.174]

  References:
    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022
  """
  _arguments.scalar("reuse", reuse)
  gate = when if isinstance(when, _gates.Gate) else _gates.gate_of_step(when)
  for part, name in zip(gate, gate._fields, strict=True):
    _arguments.function(f"when.{name}", part, "as that of a Gate")
  link = _two_passes.link(link)
  if reuse or isinstance(when, _gates.Gate):
    what = "reuse" if reuse else "a Gate"
    _shards.refuse(what, link.param_specs, "the gradient's norm or projection")
  # The mean over the devices is wanted at every step, or else at skipped ones only.
  always = bool(reuse) or isinstance(when, _gates.Gate)

  def mean(grads):
    return grads if link.axis_name is None else _mesh.mean(grads, link.axis_name)

  def init_fn(params):
    _arguments.all_arrays("params", params)
    reused = jax.tree.map(jnp.zeros_like, params) if reuse else ()
    return SometimesState(gate.init(params), link.init(params), reused)

  def update_fn(updates, state, params=None, *, ascend=None, **extra_args):
    if params is None:
      raise ValueError(
          "params=None: call update(grads, state, params, grad_fn=grad_fn)."
      )
    _arguments.tree_like("the gradient", updates, params)
    clean = mean(updates) if always else updates
    decision, gate_state = gate.update(clean, state.gate)

    def perturbed():
      grads, link_state = link.update(updates, state.link, params, **extra_args)
      if not reuse:
        return grads, link_state, ()
      return grads, link_state, _new_direction(clean, grads, state.reused)

    def skipped():
      grads = clean if always else mean(updates)
      if reuse:
        grads = _add_direction(grads, state.reused, reuse)
      return grads, state.link, state.reused

    chosen = decision if ascend is None else ascend
    if isinstance(chosen, (bool, np.bool_)):  # nothing to choose in the program
      grads, *rest = perturbed() if chosen else skipped()
    else:
      grads, *rest = lax.cond(_scalar_bool(chosen), perturbed, skipped)
    return grads, SometimesState(gate_state, *rest)

  return _two_passes.Link.over(link.axis_name, link.param_specs, init_fn, update_fn)


def _scalar_bool(decision: Any) -> jax.Array:
  is_one = isinstance(decision, (bool, np.bool_)) or (
      isinstance(decision, (jax.Array, np.ndarray))
      and jnp.shape(decision) == () and decision.dtype == jnp.bool_
  )
  if not is_one:
    raise TypeError(
        f"when (or ascend) gave {decision!r}; it must be a scalar bool, such as"
        " step % 5 == 0."
    )
  return jnp.asarray(decision)


def _new_direction(clean: Any, perturbed: Any, reused: Any) -> Any:
  """The unit vector along the part of the perturbed gradient orthogonal to clean."""
  # From the difference, which is exactly zero where the gradients are equal.
  difference = _trees.map_floats(
      lambda h, g: _trees.f32(h) - _trees.f32(g), perturbed, clean
  )
  part = _trees.orthogonal_part(difference, clean)
  # What is left of two equal gradients after rounding is no direction.
  eps = max(
      [float(jnp.finfo(g.dtype).eps) for g in jax.tree.leaves(clean)
       if _arguments.is_float(g)], default=0.0
  )
  real = _trees.norm(part) > 8 * eps * _trees.norm(clean)
  return _trees.map_floats(
      lambda old, u: jnp.where(real, u, 0).astype(old.dtype),
      reused, _trees.unit_vector(part),
  )


def _add_direction(grads: Any, direction: Any, alpha: float) -> Any:
  length = alpha * _trees.norm(grads)
  return _trees.map_floats(
      lambda g, v: (_trees.f32(g) + length * _trees.f32(v)).astype(g.dtype),
      grads, direction,
  )
