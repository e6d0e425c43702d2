"""What to make of the clean and the perturbed gradient, and of several ascents."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from asam_jax import _arguments
from asam_jax import _mesh
from asam_jax import _shards
from asam_jax import _trees
from asam_jax import _two_passes


def combined(
    link: optax.GradientTransformation,
    combine: Callable[[optax.Updates, optax.Updates], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
  r"""Descends along a function of the clean and the perturbed gradient.

  .. math::

    g \mapsto \mathrm{combine}\big(g,\ \nabla L(w + \hat\epsilon)\big)

  :func:`surrogate_gap` makes it GSAM, :func:`renormalized` StableSAM. The weighted mean
  :math:`(1 - \alpha) g + \alpha \nabla L(w + \hat\epsilon)` (the gradient norm
  penalty, WSAM) is a line, see the example; alpha may be above 1.

  Cost: two gradients a step; memory: none. Where the link averages over an
  ``axis_name``, ``combine`` gets both gradients averaged: one more all-reduce.

  Args:
    link: what maps the clean gradient to the perturbed one, such as
      ``perturbed_gradient(ascent(...))``.
    combine: a function of two pytrees, the clean and the perturbed gradient, that
      returns the gradient to descend along.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with the state of ``link``.

  Raises:
    ValueError: for our own combinations around an ascent with ``param_specs``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> def weighted(clean, perturbed, alpha=0.5):
    ...   return jax.tree.map(lambda g, h: g + alpha * (h - g), clean, perturbed)
    >>> link = asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.1, eta=0.0))
    >>> tx = optax.chain(asam_jax.combined(link, weighted), optax.sgd(1.0))
    >>> w, grad_fn = jnp.array([3.0, 4.0]), lambda w: 2 * w
    >>> updates, _ = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
    >>> print(updates.tolist())
    [-6.147, -8.349]

  References:
    Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization
    in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022

    Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
  """
  link = _two_passes.link(link)
  _arguments.function("combine", combine, "(clean, perturbed) -> gradient")
  if getattr(combine, _OVER_ALL_LEAVES, False):
    _shards.refuse(f"combine={combine!r}", link.param_specs, "its norm")

  def update_fn(updates, state, params=None, **extra_args):
    perturbed, state = link.update(updates, state, params, **extra_args)
    if link.axis_name is not None:  # a device's own would part the devices
      updates = _mesh.mean(updates, link.axis_name)
    result = combine(updates, perturbed)
    _arguments.tree_like(
        f"the result of combine={combine!r}", result, perturbed, same_dtype=True
    )
    return result, state

  return _two_passes.Link.over(
      link.axis_name, link.param_specs, link.init, update_fn
  )


# The attribute of a combination with sums over all leaves.
_OVER_ALL_LEAVES = "over_all_leaves"


def surrogate_gap(
    alpha: Any,
) -> Callable[[optax.Updates, optax.Updates], optax.Updates]:
  r"""The combination of GSAM, for :func:`combined`.

  .. math::

    h - \alpha g_\perp, \qquad
    g_\perp = g - \frac{\langle g, h\rangle}{\|h\|_2^2} h

  for the clean gradient g and the perturbed one h, over the whole pytree: it also
  lowers the gap :math:`L(w + \hat\epsilon) - L(w)`, without a first-order effect on
  :math:`L(w + \hat\epsilon)`.

  Args:
    alpha: the weight of the gap, a number or a traced scalar; the paper has 0.1 to
      0.7 on ImageNet.

  Returns:
    A function of (clean gradient, perturbed gradient).

  Raises:
    ValueError, TypeError: if alpha is not one finite number; in the call, if the
      gradients differ in structure, shape or dtype.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> combine = asam_jax.surrogate_gap(0.5)
    >>> print(combine(jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])).tolist())
    [2.0, -0.5]

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  _arguments.scalar("alpha", alpha, low=-math.inf)

  def combine(clean, perturbed):
    _arguments.tree_like("clean", clean, perturbed, "perturbed gradients")
    _arguments.tree_like("perturbed", perturbed, clean, "clean gradients")
    # The difference has the same orthogonal part, and is exactly zero at rho = 0.
    difference = _trees.map_floats(
        lambda g, h: _trees.f32(g) - _trees.f32(h), clean, perturbed
    )
    orthogonal = _trees.orthogonal_part(difference, perturbed)
    return _trees.map_floats(
        lambda h, part: (_trees.f32(h) - alpha * part).astype(h.dtype),
        perturbed, orthogonal,
    )

  setattr(combine, _OVER_ALL_LEAVES, True)
  return combine


def renormalized(clean: optax.Updates, perturbed: optax.Updates) -> optax.Updates:
  r"""The combination of StableSAM, for :func:`combined`.

  .. math:: \frac{\|g\|_2}{\|h\|_2} h

  for the clean gradient g and the perturbed one h, over the whole pytree: ASAM's
  direction with SGD's length. The perturbed gradient is longer than the clean one
  where the loss is sharp, which makes SAM need smaller learning rates than SGD; so it
  is stable at more of them. If h is zero, so is the result.

  Args:
    clean: the gradient at w, a pytree of arrays.
    perturbed: the gradient at w + epsilon, likewise.

  Returns:
    The gradient to descend along, in the dtypes of ``perturbed``.

  Raises:
    TypeError: if the two are no pytrees of real arrays of the same shapes.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> import asam_jax
    >>> print(asam_jax.renormalized(jnp.array([3.0, 4.0]), jnp.array([0.0, 7.0])))
    [0. 5.]
    >>> link = asam_jax.perturbed_gradient(asam_jax.ascent(rho=0.5))
    >>> tx = optax.chain(asam_jax.combined(link, asam_jax.renormalized), optax.sgd(0.1))

  References:
    Tan et al., `Stabilizing Sharpness-Aware Minimization Through A Simple
    Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024
  """
  _arguments.tree_like("clean", clean, perturbed, "perturbed gradients")
  _arguments.tree_like("perturbed", perturbed, clean, "clean gradients")
  length, own = _trees.norm(clean), _trees.norm(perturbed)
  factor = length / jnp.where(own == 0, 1, own)
  return _trees.map_floats(
      lambda h: (_trees.f32(h) * factor).astype(h.dtype), perturbed
  )


setattr(renormalized, _OVER_ALL_LEAVES, True)


class SubtractEmaState(NamedTuple):
  """State of :func:`subtract_ema`.

  Attributes:
    count: the number of steps taken, an int32 scalar.
    ema: the moving average of the gradients before this step.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  ema: optax.Updates


def subtract_ema(
    decay: float = 0.9, sigma: float = 1.0
) -> optax.GradientTransformation:
  r"""Removes the moving average of past gradients: the link of Friendly SAM.

  .. math::

    d_t = g_t - \sigma m_{t-1}, \qquad
    m_t = \lambda m_{t-1} + (1 - \lambda) g_t, \qquad
    d_0 = m_0 = g_0

  In front of :func:`asam_jax.ascent` the perturbation follows the noise of the
  minibatch and not the full gradient that the average estimates. (At sigma = 1
  the direction is the same whether the average includes the current gradient.)

  Cost: none of its own; memory: one copy of the parameters.

  Args:
    decay: :math:`\lambda`, in [0, 1).
    sigma: the share of the average that is removed.

  Returns:
    An ``optax.GradientTransformation`` with state :class:`SubtractEmaState`.

  Raises:
    ValueError: if decay is outside [0, 1).

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> import asam_jax
    >>> ascent_tx = optax.chain(asam_jax.subtract_ema(), asam_jax.ascent(rho=0.1))
    >>> tx = optax.chain(asam_jax.perturbed_gradient(ascent_tx), optax.sgd(0.1))
    >>> link = asam_jax.subtract_ema(0.9)
    >>> _, state = link.update(jnp.array(1.0), link.init(jnp.array(0.0)))
    >>> print(link.update(jnp.array(3.0), state)[0])
    2.0

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  _arguments.scalar("decay", decay, high=1)
  _arguments.scalar("sigma", sigma, low=-math.inf)

  def init_fn(params):
    _arguments.all_arrays("params", params)
    return SubtractEmaState(
        jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
    )

  def update_fn(updates, state, params=None):
    del params
    _arguments.tree_like("the gradient", updates, state.ema)
    first = state.count == 0
    rest = _trees.map_floats(
        lambda g, m: jnp.where(first, g, g - sigma * m), updates, state.ema
    )
    ema = _trees.map_floats(
        lambda m, g: jnp.where(first, g, decay * m + (1 - decay) * g).astype(m.dtype),
        state.ema,
        updates,
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return rest, SubtractEmaState(count, ema)

  return optax.GradientTransformation(init_fn, update_fn)


def iterated(
    ascent_tx: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
  r"""Several ascent steps that stay in the ball of the first.

  .. math::

    \hat\epsilon_1 = \mathrm{ascent}(g, w), \qquad
    \hat\epsilon_{i+1} = \hat\epsilon_i + \tfrac{2}{i+2}
      \big(\mathrm{ascent}(\nabla L(w + \hat\epsilon_i), w) - \hat\epsilon_i\big)

  Each step goes toward the maximizer of the linearized loss over the ball, and the
  ball is convex, so no step leaves it (the method of Frank and Wolfe). It needs no
  projection and no division by T_w, and so holds for every p and for weights that
  are zero. Use it as the ascent chain of :func:`asam_jax.perturbed_gradient`.

  Cost: ``steps + 1`` gradients a step; memory: none in the state. The gradients
  are taken in a loop, in which XLA's CPU backend runs convolutions slowly.

  Args:
    ascent_tx: the ascent chain to iterate. Its state advances once, with the
      gradient at w.
    steps: the number of ascent steps, at least 1; 1 changes nothing.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with the state of ascent_tx. Its
    update needs ``grad_fn``, which ``perturbed_gradient`` hands on.

  Raises:
    ValueError: if steps is below 1, or (in ``update``) without params or
      grad_fn.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> loss = lambda w: jnp.sum(w**4)
    >>> tx = asam_jax.iterated(asam_jax.ascent(rho=0.5, eta=0.0), steps=3)
    >>> w = jnp.array([1.0, 1.2])
    >>> epsilon, _ = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(f"{jnp.linalg.norm(epsilon / w):.2f} {loss(w + epsilon):.2f}")
    0.50 11.60
  """
  steps = _arguments.count("steps", steps)
  ascent_tx = _two_passes.ascent_chain(ascent_tx)

  def update_fn(updates, state, params=None, *, grad_fn=None, **extra_args):
    if params is None:
      raise ValueError("params=None: call update(grads, state, params, ...).")
    if grad_fn is None:
      raise ValueError(
          "grad_fn=None: several ascent steps need the gradient on the way; use"
          " perturbed_gradient(iterated(...)), which passes it on."
      )
    _arguments.function("grad_fn", grad_fn, "of the parameters")

    def ascend(grads):
      return ascent_tx.update(grads, state, params, **extra_args)

    def body(i, epsilon):
      grads = grad_fn(optax.apply_updates(params, epsilon))
      _arguments.tree_like("the result of grad_fn", grads, params, same_dtype=True)
      target, _ = ascend(grads)
      share = 2 / (i + 2)
      return _trees.map_floats(
          lambda e, t: (e + share * (t - e)).astype(e.dtype), epsilon, target
      )

    epsilon, new_state = ascend(updates)
    return lax.fori_loop(1, steps, body, epsilon), new_state

  param_specs = getattr(ascent_tx, "param_specs", None)
  return _shards.Ascent.over(param_specs, ascent_tx.init, update_fn)
