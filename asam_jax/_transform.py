"""Optimizers that descend along the gradient at the perturbed point."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import optax

from asam_jax import _ascent
from asam_jax import _checks
from asam_jax import _metrics
from asam_jax import _normalization as _n


class PerturbedGradientState(NamedTuple):
  """State of :func:`perturbed_gradient`.

  Attributes:
    ascent: the state of the ascent chain; for a plain :func:`asam_jax.ascent` an
      :class:`asam_jax.AscentState` with the step count and the sharpness.
    info: an :class:`asam_jax.AscentInfo` under ``adaptive_sam(..., with_info=True)``,
      otherwise None.
  """

  ascent: optax.OptState
  info: Any = None


def gradient_at_perturbed(
    ascent_tx: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    grad_fn: Callable[[optax.Params], Any],
    **extra_args: Any,
) -> tuple[Any, Any]:
  """``grad_fn(w + epsilon)`` and the ascent's new state; both doors come here."""
  # grad_fn for the chains that ascend in several steps; the others ignore it.
  epsilon, state = ascent_tx.update(
      grads, state, params, grad_fn=grad_fn, **extra_args
  )
  return grad_fn(optax.apply_updates(params, epsilon)), state


def perturbed_gradient(
    ascent_tx: optax.GradientTransformation,
    *,
    axis_name: Any = None,
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
      the gradient at the perturbed point is averaged. Pass local gradients for an
      ascent per device (m-sharpness, one all-reduce a step), averaged ones for a
      common ascent. Under ``jit`` with sharded arrays leave it None.

  Returns:
    An ``optax.GradientTransformationExtraArgs`` with state
    :class:`PerturbedGradientState`. Extra arguments go on to ``ascent_tx``.

  Raises:
    ValueError: in ``update``, without params, or without grad_fn and value_fn.
    TypeError: in ``update``, if grad_fn's result has another structure, shape or
      dtype than params.

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
  ascent_tx = optax.with_extra_args_support(ascent_tx)

  def init_fn(params: optax.Params) -> PerturbedGradientState:
    return PerturbedGradientState(ascent=ascent_tx.init(params))

  def update_fn(updates, state, params=None, *, grad_fn=None, value_fn=None,
                **extra_args):
    if params is None:
      raise ValueError(
          "params=None: the gradient is taken at the perturbed parameters; call"
          " update(grads, state, params, grad_fn=grad_fn)."
      )
    source = "grad_fn"
    if grad_fn is None:
      if value_fn is None:
        raise ValueError(
            "grad_fn=None: the gradient at the perturbed point is missing; pass"
            " update(..., grad_fn=grad_fn) with grad_fn(params) -> grads on the same"
            " batch, or value_fn=value_fn with value_fn(params) -> loss."
        )
      source, grad_fn = "value_fn's gradient", jax.grad(value_fn)
    grad_fn = _checks.with_note_on_flat(grad_fn, params)
    grads, ascent_state = gradient_at_perturbed(
        ascent_tx, updates, state.ascent, params, grad_fn, **extra_args
    )
    _checks.descent_gradient(grads, params, source)
    if axis_name is not None:
      grads = lax.pmean(grads, axis_name)
    return grads, PerturbedGradientState(ascent=ascent_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adaptive_sam(
    base_tx: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.5,
    eta: optax.ScalarOrSchedule = 0.01,
    p: float = 2,
    *,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
    axis_name: Any = None,
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
  two gradients a step and no state but two scalars.

  Weight decay, clipping and the like belong inside ``base_tx``, where they act on
  the descent. In front of ``adaptive_sam`` in a chain they would touch the ascent
  gradient alone. ``optax.MultiSteps`` belongs inside too (one perturbation per
  micro-batch), or around a base optimizer that is fed by
  :func:`asam_jax.value_and_grad`; around ``adaptive_sam`` it would descend on the
  last micro-batch alone, because that is the one ``grad_fn`` knows.

  Args:
    base_tx: the optimizer that makes the step from the gradient at w + epsilon.
    rho: the radius; a number, a traced scalar or a schedule. It depends on which
      leaves are normalized: with the default selection 0.5 is the paper's best on
      CIFAR-10 and 1.0 on CIFAR-100; with every leaf normalized it is about 2.
    eta: the stabilizer; likewise.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`.
    perturb: the leaves that are perturbed at all; see :func:`asam_jax.ascent`.
    axis_name: see :func:`asam_jax.perturbed_gradient`.
    with_info: whether to keep an :class:`asam_jax.AscentInfo` of the last step in
      the state, for ``optax.tree_utils.tree_get(state, "info")``. Its losses are
      NaN unless ``update`` gets them: ``value`` is the clean one, and ``value_fn``
      in place of ``grad_fn`` gives the perturbed one. The gradient at w is then
      kept during the second pass, one copy of the parameters. (``sharpness`` is
      then in the state twice: take it from the info.)

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
  ascent_tx = _ascent.ascent(
      rho,
      eta,
      p,
      normalization=normalization,
      normalize=normalize,
      perturb=perturb,
  )
  link = perturbed_gradient(ascent_tx, axis_name=axis_name)
  if with_info:
    geometry = _metrics.Geometry(eta, p, normalization, normalize, perturb)
    link = _metrics.recorded(link, geometry)
  return optax.chain(link, base_tx)


def sam(
    base_tx: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    p: float = 2,
    *,
    perturb: _n.LeafSelection | None = None,
    axis_name: Any = None,
    with_info: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Sharpness-aware minimization (SAM): :func:`adaptive_sam` with T = 1.

  .. math::

    \hat\epsilon = \rho \frac{\nabla L(w)}{\|\nabla L(w)\|_2}

  Args:
    base_tx: the optimizer that makes the step from the gradient at w + epsilon.
    rho: the radius, in the unit of the weights; the paper's is 0.05 on CIFAR-10.
    p: the norm's exponent, a number in [1, inf].
    perturb: the leaves that are perturbed; see :func:`asam_jax.ascent`.
    axis_name: see :func:`asam_jax.perturbed_gradient`.
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
      axis_name=axis_name,
      with_info=with_info,
  )
