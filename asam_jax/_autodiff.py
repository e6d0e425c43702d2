"""ASAM as a function transformation, with the signatures of JAX's own."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax

from asam_jax import _ascent
from asam_jax import _metrics
from asam_jax import _normalization as _n
from asam_jax import _transform


def value_and_grad(
    fun: Callable[..., Any],
    rho: Any = 0.5,
    eta: Any = 0.01,
    p: float = 2,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
    axis_name: Any = None,
    average_ascent: bool = False,
    with_info: bool = False,
    accumulate: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
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
    rho: the radius of the perturbation, >= 0; a number or a traced scalar.
    eta: the stabilizer, >= 0; a number or a traced scalar.
    p: the norm's exponent, a number in [1, inf].
    argnums: which positional arguments are differentiated and perturbed. With
      several, the norm is over all of them.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`. Where argnums
      is a sequence, the selection is over the tuple of these arguments.
    perturb: the leaves that are perturbed at all; likewise.
    axis_name: for ``pmap`` and ``shard_map``, the mesh axis over which the returned
      gradient is averaged; the value stays local.
    average_ascent: whether the ascent gradient is averaged over ``axis_name`` too:
      one perturbation for all devices, and two all-reduces. By default each device
      ascends on its own share of the batch (m-sharpness).
    with_info: whether to return an :class:`AscentInfo` as well.
    accumulate: for a batch that does not fit, what takes
      ``jax.value_and_grad(fun, argnums, has_aux)`` to the same function in smaller
      pieces, such as ``lambda f: microbatched(f, 32)``; both passes go through it.
      See :func:`asam_jax.microbatched`.

  Returns:
    A function with the arguments of ``fun`` that returns ``(value, grad)`` or
    ``((value, aux), grad)`` as ``jax.value_and_grad`` does; followed by an
    :class:`AscentInfo` if ``with_info``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.ascent` does; TypeError if rho or eta
      is a schedule; ValueError for average_ascent without axis_name.

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
    >>> print(f"{info.gap:.3f} {info.sharpness:.3f}")
    3.815 3.672

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  for name, value in (("rho", rho), ("eta", eta)):
    if callable(value):
      raise TypeError(
          f"{name}={value!r} is a schedule, but a function transformation has no"
          f" step count; pass {name}=schedule(step) inside the training step."
      )
  if average_ascent and axis_name is None:
    raise ValueError(
        "average_ascent=True with axis_name=None: pass the axis_name to average"
        " the ascent gradient over."
    )
  ascent_tx = _ascent.ascent(
      rho,
      eta,
      p,
      normalization=normalization,
      normalize=normalize,
      perturb=perturb,
  )
  clean = jax.value_and_grad(fun, argnums, has_aux)
  if accumulate is not None:
    clean = accumulate(clean)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    value, grads = clean(*args, **kwargs)
    params = _get(args, argnums)

    def at_perturbed(point):
      perturbed, grads = clean(*_set(args, argnums, point), **kwargs)
      return (perturbed[0] if has_aux else perturbed), grads, point

    if average_ascent:
      grads = lax.pmean(grads, axis_name)
    clean_grads = grads
    (perturbed_value, grads, point), state = _transform.gradient_at_perturbed(
        ascent_tx, clean_grads, ascent_tx.init(params), params, at_perturbed
    )
    local_grads = grads
    if axis_name is not None:
      grads = lax.pmean(grads, axis_name)
    if not with_info:
      return value, grads
    loss = value[0] if has_aux else value
    passes = _metrics.Passes(
        loss, clean_grads, params, perturbed_value, local_grads, point
    )
    geometry = _metrics.Geometry(eta, p, normalization, normalize, perturb)
    info = _metrics.measured(geometry, state.count, state.sharpness, passes)
    return value, grads, info

  return wrapped


def grad(
    fun: Callable[..., Any],
    rho: Any = 0.5,
    eta: Any = 0.01,
    p: float = 2,
    *,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
  """``jax.grad``, but the gradient is taken at w + epsilon.

  Args:
    fun: as for :func:`value_and_grad`.
    rho: as for :func:`value_and_grad`.
    eta: as for :func:`value_and_grad`.
    p: as for :func:`value_and_grad`.
    has_aux: whether ``fun`` returns ``(value, aux)``.
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
  transformed = value_and_grad(fun, rho, eta, p, has_aux=has_aux, **options)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    value, grads, *info = transformed(*args, **kwargs)
    result = (grads, value[1]) if has_aux else (grads,)
    return (*result, *info) if has_aux or info else grads

  return wrapped


def _get(args: tuple[Any, ...], argnums: int | Sequence[int]) -> Any:
  if isinstance(argnums, int):
    return args[argnums]
  return tuple(args[index] for index in argnums)


def _set(args: tuple[Any, ...], argnums: int | Sequence[int], values: Any) -> list[Any]:
  if isinstance(argnums, int):
    argnums, values = (argnums,), (values,)
  result = list(args)
  for index, value in zip(argnums, values, strict=True):
    result[index] = value
  return result
