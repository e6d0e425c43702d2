"""The relatives of ASAM by their names: each a few lines over the links."""

from __future__ import annotations

from typing import Any

import optax

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _combined
from asam_jax import _geometry as _g
from asam_jax import _sometimes
from asam_jax import _two_passes
from asam_jax._geometry import Geometry
from asam_jax._radius import Radius

_DEFAULT = _g.Geometry()


def looksam(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.5,
    k: int = 5,
    alpha: float = 0.7,
    *,
    geometry: Geometry = _DEFAULT,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""LookSAM: the second gradient at every k-th step, its new part reused between.

  .. math::

    g \mapsto g + \alpha \frac{\|g\|_2}{\|h_\perp\|_2} h_\perp, \qquad
    h_\perp = h - \frac{\langle h, g_k\rangle}{\|g_k\|_2^2} g_k

  with the perturbed gradient h and the clean one g_k of the last perturbed step; see
  :func:`asam_jax.sometimes`, whose ``reuse`` alpha is. Its schedules of rho and eta
  count the perturbed steps.

  Cost: 1 + 1/k gradients a step; memory: one copy of the parameters.

  Args:
    base_tx: the optimizer that makes the step.
    rho: the radius; see :func:`asam_jax.ascent`.
    k: the number of steps from one second gradient to the next, >= 1; 5 in the paper.
    alpha: the weight of the reused part, >= 0; 0.7 in the paper.
    geometry: T_w and the norm; ``Geometry(normalization="none")`` is the paper's.
    axis_name: see :func:`asam_jax.perturbed_gradient`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its update takes ``grad_fn`` or
    ``value_fn``, and ``ascend``, see :func:`asam_jax.sometimes`.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and :func:`asam_jax.sometimes` do.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax
    >>> tx = asam_jax.looksam(optax.sgd(0.1), rho=0.1, k=2)
    >>> w, grad_fn = jnp.array([3.0, 4.0]), lambda w: 2 * w
    >>> updates, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)

  References:
    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022
  """
  k = _arguments.count("k", k)
  _arguments.scalar("alpha", alpha)
  link = _link(_ascent.from_geometry(rho, geometry), axis_name)
  link = _sometimes.sometimes(link, lambda step: step % k == 0, reuse=alpha)
  return _two_passes.optimizer(base_tx, link)


def ae_sam(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.5,
    threshold: optax.ScalarOrSchedule = 0.0,
    decay: float = 0.9,
    *,
    geometry: Geometry = _DEFAULT,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""AE-SAM: the second gradient where the first is larger than usual.

  .. math:: \|g_t\|_2^2 \ge \mu_t + c_t \sigma_t

  with a running mean and standard deviation of the squared norm; see
  :func:`asam_jax.above_average`. At the other steps the clean gradient is followed.

  Cost: 1 to 2 gradients a step; memory: three scalars.

  Args:
    base_tx: the optimizer that makes the step.
    rho: the radius; see :func:`asam_jax.ascent`.
    threshold: c_t, a number or a schedule of the step count. The paper falls from 1 to
      -1: ``optax.linear_schedule(1.0, -1.0, total)``.
    decay: the decay of the running mean and variance, in [0, 1).
    geometry: T_w and the norm; ``Geometry(normalization="none")`` is the paper's.
    axis_name: see :func:`asam_jax.perturbed_gradient`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its update takes ``grad_fn`` or
    ``value_fn``, and ``ascend``, see :func:`asam_jax.sometimes`.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and
      :func:`asam_jax.above_average` do.

  Examples:
    >>> import optax
    >>> import asam_jax
    >>> tx = asam_jax.ae_sam(optax.sgd(0.1), rho=0.5,
    ...                      threshold=optax.linear_schedule(1.0, -1.0, 1000))

  References:
    Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
    <https://arxiv.org/abs/2304.14647>`_, 2023
  """
  link = _link(_ascent.from_geometry(rho, geometry), axis_name)
  gate = _sometimes.above_average(threshold, decay)
  return _two_passes.optimizer(base_tx, _sometimes.sometimes(link, gate))


def gsam(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.5,
    alpha: Any = 0.4,
    *,
    geometry: Geometry = _DEFAULT,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""GSAM: also lowers the gap between perturbed and clean loss.

  .. math::

    h - \alpha g_\perp, \qquad
    g_\perp = g - \frac{\langle g, h\rangle}{\|h\|_2^2} h

  for the clean gradient g and the perturbed one h; see
  :func:`asam_jax.surrogate_gap`.

  Cost: two gradients a step; memory: none.

  Args:
    base_tx: the optimizer that makes the step.
    rho: the radius; see :func:`asam_jax.ascent`.
    alpha: the weight of the gap, a number or a traced scalar; 0.1 to 0.7 in the paper.
    geometry: T_w and the norm; ``Geometry(normalization="none")`` is the paper's.
    axis_name: see :func:`asam_jax.perturbed_gradient`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its update takes ``grad_fn`` or
    ``value_fn``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and
      :func:`asam_jax.surrogate_gap` do.

  Examples:
    >>> import optax
    >>> import asam_jax
    >>> tx = asam_jax.gsam(optax.adamw(1e-3), rho=0.5, alpha=0.4)

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  link = _link(_ascent.from_geometry(rho, geometry), axis_name)
  gap = _combined.surrogate_gap(alpha)
  return _two_passes.optimizer(base_tx, _combined.combined(link, gap))


def friendly_sam(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.5,
    sigma: float = 1.0,
    decay: float = 0.9,
    *,
    geometry: Geometry = _DEFAULT,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Friendly SAM: ascends along the gradient without its moving average.

  .. math::

    \hat\epsilon = \mathrm{ascent}(g_t - \sigma m_{t-1}), \qquad
    m_t = \lambda m_{t-1} + (1 - \lambda) g_t

  so along the noise of the minibatch; see :func:`asam_jax.subtract_ema`.

  Cost: two gradients a step; memory: one copy of the parameters.

  Args:
    base_tx: the optimizer that makes the step.
    rho: the radius; see :func:`asam_jax.ascent`.
    sigma: the share of the average that is removed; 1 in the paper.
    decay: lambda, in [0, 1).
    geometry: T_w and the norm; ``Geometry(normalization="none")`` is the paper's.
    axis_name: see :func:`asam_jax.perturbed_gradient`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its update takes ``grad_fn`` or
    ``value_fn``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` and
      :func:`asam_jax.subtract_ema` do.

  Examples:
    >>> import optax
    >>> import asam_jax
    >>> tx = asam_jax.friendly_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  ascent_tx = optax.chain(
      _combined.subtract_ema(decay, sigma), _ascent.from_geometry(rho, geometry)
  )
  return _two_passes.optimizer(base_tx, _link(ascent_tx, axis_name))


def vasso(
    base_tx: optax.GradientTransformation,
    rho: Radius = 0.5,
    decay: float = 0.6,
    *,
    geometry: Geometry = _DEFAULT,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""VaSSO: ascends along a moving average of the gradients.

  .. math::

    \hat\epsilon = \mathrm{ascent}(d_t), \qquad
    d_t = \lambda d_{t-1} + (1 - \lambda) g_t

  (``optax.ema`` in front of the ascent, with its correction of the first steps, which
  changes the length of d and so nothing in :math:`\hat\epsilon`).

  Cost: two gradients a step; memory: one copy of the parameters.

  Args:
    base_tx: the optimizer that makes the step.
    rho: the radius; see :func:`asam_jax.ascent`.
    decay: lambda, in [0, 1); the paper's theta is 1 - lambda.
    geometry: T_w and the norm; ``Geometry(normalization="none")`` is the paper's.
    axis_name: see :func:`asam_jax.perturbed_gradient`.

  Returns:
    An ``optax.GradientTransformationExtraArgs``; its update takes ``grad_fn`` or
    ``value_fn``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` does; ValueError if decay is
      outside [0, 1).

  Examples:
    >>> import optax
    >>> import asam_jax
    >>> tx = asam_jax.vasso(optax.sgd(0.1, momentum=0.9), rho=0.5)

  References:
    Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
    Suppression <https://arxiv.org/abs/2309.15639>`_, 2023
  """
  _arguments.scalar("decay", decay, high=1)
  ascent_tx = optax.chain(optax.ema(decay), _ascent.from_geometry(rho, geometry))
  return _two_passes.optimizer(base_tx, _link(ascent_tx, axis_name))


def _link(ascent_tx: Any, axis_name: Any) -> _two_passes.Link:
  return _two_passes.link_of(ascent_tx, axis_name)
