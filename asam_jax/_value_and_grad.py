"""ASAM as a function transformation, with the signatures of JAX's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import optax

from asam_jax import _arguments
from asam_jax import _door
from asam_jax import _geometry as _g
from asam_jax import _groups
from asam_jax import _mesh
from asam_jax import _microbatched
from asam_jax import _two_passes
from asam_jax._door import Accumulate
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rho: Any = _door.RHO,
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
  door = _door.Door(
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
    clean = _door.accumulated(clean, accumulate, argnums)

  def step(args, kwargs, radius):
    params = _door.chosen(args, argnums)

    def evaluate(point):
      result, grads = clean(*_door.with_chosen(args, argnums, point), **kwargs)
      return _two_passes.Pass(grads, result[0] if has_aux else result, result)

    return door.passes(_door.traced_once(evaluate), params, radius=radius)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    radius = door.radius_in(kwargs)
    step_at = functools.partial(step, radius=radius)
    if m_sharpness is None:
      return step_at(args, kwargs)
    # Averaged over the groups first, and once over the devices then.
    if axis_name is not None:
      own = _mesh.own(_door.chosen(args, argnums), axis_name)
      args = tuple(_door.with_chosen(args, argnums, own))
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    params = _microbatched.chosen(args, numbers)
    place = _door.batch_argument(numbers, len(args))
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


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    rho: Any = _door.RHO,
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
    ``(grad, aux)`` with ``has_aux``, as ``jax.grad`` does; followed by the next
    state of a radius rule, and by an :class:`AscentInfo` if ``with_info``.

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
  return _door.without_value(transformed, fun, has_aux)
