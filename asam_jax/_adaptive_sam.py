"""ASAM and SAM: a link and a base optimizer in one."""

from __future__ import annotations

from typing import Any

import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _geometry as _g
from asam_jax import _interop
from asam_jax import _two_passes
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization
from asam_jax._radius import Radius


@_interop.keeps("normalization", "normalize", "perturb", "param_specs")
def adaptive_sam(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    p: float = 2,
    *,
    normalization: Normalization = "elementwise",
    normalize: LeafSelection | None = None,
    perturb: LeafSelection | None = None,
    param_specs: Any = None,
    axis_name: Any = None,
    average_ascent: bool = False,
    with_info: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Adaptive sharpness-aware minimization (ASAM).

  Minimizes the worst loss in a ball that scales with the weights,
  :math:`\min_w \max_{\|T_w^{-1}\epsilon\|_p \le \rho} L(w + \epsilon)`, by the step

  .. math::

    \hat\epsilon = \rho \frac{T_w^2 \nabla L(w)}{\|T_w \nabla L(w)\|_2}, \qquad
    w \leftarrow \mathrm{base}\big(w, \nabla L(w + \hat\epsilon)\big)

  (at p = 2; see :func:`asam_jax.ascent` for every p). It is
  ``optax.chain(perturbed_gradient(ascent(rho, eta, p, ...)), base_tx)``, and costs
  two gradients a step and no state but three scalars.

  ``optax.tree_utils.tree_get(state, "sharpness")`` is the first-order sharpness of
  the last step.

  Weight decay, clipping and the like belong inside ``base_tx``, where they act on
  the descent. In front of ``adaptive_sam`` in a chain they would touch the ascent
  gradient alone. ``optax.MultiSteps`` belongs inside too (one perturbation per
  micro-batch), or around a base optimizer that is fed by
  :func:`asam_jax.value_and_grad`; around ``adaptive_sam`` it would descend on the
  last micro-batch alone, because that is the one ``grad_fn`` knows.

  Args:
    base_tx: the optimizer that makes the step from the gradient at w + epsilon.
    rho: the radius; a number, a traced scalar, a schedule, or a rule such as
      :func:`asam_jax.auto_radius`. Its size depends on which leaves are normalized:
      with the default selection 0.5 is the paper's best on CIFAR-10 and 1.0 on
      CIFAR-100; with every leaf normalized it is about 2.
    eta: the stabilizer; a number, a traced scalar or a schedule.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that are perturbed at all; see :func:`asam_jax.ascent`.
    param_specs: for parameters that are sharded by hand inside ``shard_map``; see
      :func:`asam_jax.ascent`.
    axis_name: see :func:`asam_jax.perturbed_gradient`.
    average_ascent: likewise.
    with_info: whether to keep an :class:`asam_jax.AscentInfo` of the last step in
      the state, for ``optax.tree_utils.tree_get(state, "info")``. ``update`` then
      needs the losses: ``value`` is the one at w, and ``value_fn`` in place of
      ``grad_fn`` gives the one at w + epsilon. The gradient at w is kept during the
      second pass, one copy of the parameters.

  Returns:
    An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes ``grad_fn``
    or ``value_fn``; these and all other extra arguments go on to ``base_tx``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and
      :func:`asam_jax.perturbed_gradient` do.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> def loss(w):
    ...   return jnp.sum(w**2)
    >>> base_tx = optax.chain(
    ...     optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-3),
    ...     optax.sgd(0.1, momentum=0.9))
    >>> tx = asam_jax.adaptive_sam(base_tx, rho=0.5)
    >>> w = jnp.array([1.0, 2.0])
    >>> state = tx.init(w)
    >>> @jax.jit
    ... def step(w, state):
    ...   value, grads = jax.value_and_grad(loss)(w)
    ...   updates, state = tx.update(grads, state, w, grad_fn=jax.grad(loss))
    ...   return optax.apply_updates(w, updates), state, value
    >>> for _ in range(3):
    ...   w, state, value = step(w, state)
    >>> print(f"{value:.3f}")
    3.791
    >>> sharpness = optax.tree_utils.tree_get(state, "sharpness")

  References:
    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks
    <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  geometry = _g.Geometry(eta, p, normalization, normalize, perturb, param_specs)
  link = _two_passes.link_of(
      _ascent.from_geometry(rho, geometry),
      axis_name,
      average_ascent,
      info=geometry if _arguments.flag("with_info", with_info) else None,
      plain=True,
  )
  return _two_passes.optimizer(base_tx, link)


@_interop.keeps("perturb", "param_specs")
def sam(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.05,
    p: float = 2,
    *,
    perturb: LeafSelection | None = None,
    param_specs: Any = None,
    axis_name: Any = None,
    average_ascent: bool = False,
    with_info: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Sharpness-aware minimization (SAM): :func:`adaptive_sam` with T = 1.

  .. math::

    \hat\epsilon = \rho \frac{\nabla L(w)}{\|\nabla L(w)\|_2}

  Args:
    base_tx: the optimizer that makes the step from the gradient at w + epsilon.
    rho: the radius, in the unit of the weights; the paper's is 0.05 on CIFAR-10. See
      :func:`asam_jax.ascent`.
    p: the norm's exponent, a number in [1, inf].
    perturb: the leaves that are perturbed; see :func:`asam_jax.ascent`.
    param_specs: for parameters that are sharded by hand inside ``shard_map``; see
      :func:`asam_jax.ascent`.
    axis_name: see :func:`asam_jax.perturbed_gradient`.
    average_ascent: likewise.
    with_info: see :func:`adaptive_sam`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``, as :func:`adaptive_sam` gives.

  Raises:
    ValueError, TypeError: as :func:`adaptive_sam` does.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> loss = lambda w: jnp.sum(w**2)
    >>> tx = asam_jax.sam(optax.sgd(0.5), rho=0.5)
    >>> w = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(
    ...     jax.grad(loss)(w), tx.init(w), w, grad_fn=jax.grad(loss))
    >>> print(updates.tolist())
    [-3.3, -4.4]

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  return adaptive_sam(
      base_tx,
      rho,
      p=p,
      normalization="none",
      perturb=perturb,
      param_specs=param_specs,
      axis_name=axis_name,
      average_ascent=average_ascent,
      with_info=with_info,
  )
