"""ASAM for Flax NNX modules; needs Flax >= 0.12.3, which ``asam_jax`` itself does not.

``import asam_jax.nnx``. There are two doors, as for plain pytrees:
:func:`value_and_grad` in place of ``nnx.value_and_grad``, for any optimizer; and
:func:`grad_fn` for what ``nnx.Optimizer.update`` hands on to
:func:`asam_jax.adaptive_sam` and its relatives. In both, batch statistics and random
streams are those of one clean pass, and both passes draw the same dropout masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from asam_jax import _arguments
from asam_jax import _door
from asam_jax import _geometry as _g
from asam_jax import _groups
from asam_jax import _interop
from asam_jax import _mesh
from asam_jax import _microbatched
from asam_jax import _two_passes
from asam_jax._door import Accumulate
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization

_interop.require("nnx", "flax")
from flax import nnx  # noqa: E402  (after the error that names the extra)

from asam_jax import _nnx_groups  # noqa: E402

__all__ = ["grad", "grad_fn", "microbatched", "value_and_grad", "value_fn"]

# A state with arrays for variables; Flax 0.12.7 renamed it.
_as_pure = getattr(nnx, "as_pure", None) or getattr(nnx, "pure")  # noqa: B009


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | nnx.DiffState = 0,
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
  r"""``nnx.value_and_grad``, but the gradient is taken at w + epsilon.

  .. math::

    w \mapsto \big(L(w),\ \nabla L(w + \hat\epsilon)\big), \qquad
    \hat\epsilon = \mathrm{ascent}(\nabla L(w), w)

  with :math:`\hat\epsilon` as in :func:`asam_jax.ascent`. The clean pass runs on your
  modules: value, aux, batch statistics and random counts are its, as after
  ``nnx.value_and_grad``. The perturbed pass runs on a clone of all arguments from
  before the clean pass, so it sees the same dropout masks, and what it does to the
  clone is dropped. The clone shares its arrays with yours. It costs two gradients.

  Args:
    fun: a function of modules and other arguments with a scalar result, or
      ``(scalar, aux)`` with ``has_aux``. Modules and ``nnx.Rngs`` come in as
      arguments, not by closure, as NNX wants it.
    argnums: which positional argument, a module, is differentiated and perturbed,
      with respect to its ``nnx.Param``; or ``nnx.DiffState(argnum, filter)`` for
      other variables.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    rho: the radius, >= 0; a number or a traced scalar, no schedule; or a rule, whose
      state goes in as ``radius=``; see :func:`asam_jax.value_and_grad`.
    eta: the stabilizer, >= 0; likewise.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`. Paths and bools
      are over ``nnx.as_pure(nnx.state(module, nnx.Param))``.
    perturb: the leaves that are perturbed at all; likewise.
    param_specs: for parameters that are sharded by hand; see :func:`asam_jax.ascent`.
    ascent: an ascent chain without state between steps in place of the closed form;
      see :func:`asam_jax.value_and_grad`.
    accumulate: the number of rows of a microbatch, for a batch that does not fit: the
      first positional argument but the module's; or what takes
      ``nnx.value_and_grad(fun, ...)`` to the same in smaller pieces, such as
      ``lambda f: asam_jax.nnx.microbatched(f, 32, argnums=(1, 2))``.
    axis_name: see :func:`asam_jax.value_and_grad`.
    average_ascent: see :func:`asam_jax.value_and_grad`.
    m_sharpness: see :func:`asam_jax.value_and_grad`. What the groups' passes leave in
      the modules is averaged; what is no float (random counts) is the first group's.
    with_info: whether to return an :class:`asam_jax.AscentInfo` as well.

  Returns:
    A function with the arguments of ``fun`` that returns ``(value, grads)`` or
    ``((value, aux), grads)`` as ``nnx.value_and_grad`` does, for
    ``optimizer.update(module, grads)``; followed by the next state of a radius rule,
    and by an :class:`asam_jax.AscentInfo` if ``with_info``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.value_and_grad` does; TypeError if
      argnums is neither an int nor an ``nnx.DiffState``, or (in the call) names no
      positional argument with variables to differentiate.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import asam_jax.nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(jnp.array([3.0, 4.0]))
    >>> loss = lambda model, x: jnp.sum((model.w * x) ** 2)
    >>> value, grads = asam_jax.nnx.value_and_grad(loss, rho=0.1, eta=0.0)(
    ...     Scale(), jnp.ones(2))
    >>> print(float(value), grads.w[...].tolist())
    25.0 [6.294, 8.697]

  References:
    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  door = _door.Door(
      _g.Geometry(eta, p, normalization, normalize, perturb, param_specs),
      rho, ascent, axis_name, average_ascent, with_info,
  )
  _arguments.function("fun", fun, "of modules and other arguments")
  place, wrt = _differentiated(argnums)
  _arguments.flag("has_aux", has_aux)
  checked = _arguments.real_valued("fun(...)", fun, has_aux)
  own: Any = argnums if isinstance(argnums, nnx.DiffState) else place
  passes = nnx.value_and_grad(checked, argnums=own, has_aux=has_aux)
  if m_sharpness is not None:
    m_sharpness = _groups.check(m_sharpness, accumulate, average_ascent)
    door = dataclasses.replace(door, axis_name=None)
  if accumulate is not None:
    passes = _door.accumulated(passes, accumulate, place, microbatched)

  def step(args, kwargs, radius):
    params = _params(args, place, wrt)
    start = nnx.clone((args, kwargs))  # before the clean pass advances anything
    if door.axis_name is None:
      result, form = passes(*args, **kwargs)
    else:
      nnx.update(args[place], _mesh.own(params, door.axis_name))
      result, form = passes(*args, **kwargs)
      nnx.update(args[place], params)

    def at(result, grads):
      value = result[0] if has_aux else result
      return _two_passes.Pass(_pure(grads, wrt), value, result)

    def evaluate(point):
      args, kwargs = nnx.clone(start)
      nnx.update(args[place], point)
      return at(*passes(*args, **kwargs))

    clean = at(result, form)
    result, grads, *rest = door.passes(evaluate, params, clean, radius=radius)
    nnx.update(form, grads)
    return result, form, *rest

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    step_at = functools.partial(step, radius=door.radius_in(kwargs))
    if m_sharpness is None:
      return step_at(args, kwargs)
    params, at = _params(args, place, wrt), _door.batch_argument(place, len(args))
    if axis_name is not None:
      nnx.update(args[place], _mesh.own(params, axis_name))
    results = _nnx_groups.each(
        step_at, m_sharpness, args, kwargs, at, params, axis_name, param_specs
    )
    nnx.update(args[place], params)
    _two_passes.mark_perturbed(results[1])
    return results

  setattr(wrapped, _two_passes.PERTURBED, True)
  return wrapped


def grad(
    fun: Callable[..., Any],
    argnums: int | nnx.DiffState = 0,
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
  """``nnx.grad``, but the gradient is taken at w + epsilon.

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
    A function with the arguments of ``fun`` that returns ``grads``, or
    ``(grads, aux)`` with ``has_aux``, as ``nnx.grad`` does; followed by the next
    state of a radius rule, and by an :class:`asam_jax.AscentInfo` if ``with_info``.

  Raises:
    ValueError, TypeError: as :func:`value_and_grad` does.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import asam_jax.nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(jnp.array([3.0, 4.0]))
    >>> grads = asam_jax.nnx.grad(lambda m: jnp.sum(m.w**2), rho=0.1, eta=0.0)(Scale())
    >>> print(grads.w[...].tolist())
    [6.294, 8.697]
  """
  transformed = value_and_grad(
      fun, argnums, has_aux, rho=rho, eta=eta, p=p, normalization=normalization,
      normalize=normalize, perturb=perturb, **options,
  )
  return _door.without_value(transformed, fun, has_aux)


def microbatched(
    fun: Callable[..., Any],
    size: int,
    argnums: int | Sequence[int] = 1,
    weights: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  """:func:`asam_jax.microbatched` for functions of modules, such as NNX's gradients.

  The results are averaged over the microbatches. What the function does to its
  modules (batch statistics, random counts) goes on from one microbatch to the next, as
  in a loop over them, and is in the modules afterwards.

  Args:
    fun: a function of modules and other arguments, such as
      ``nnx.value_and_grad(loss_fn)``.
    size: the number of rows in a microbatch; it must divide the batch.
    argnums: which positional arguments are the batch.
    weights: a function of the batch arguments that gives the weight of one
      microbatch; see :func:`asam_jax.microbatched`.

  Returns:
    A function with the arguments and results of ``fun``.

  Raises:
    ValueError, TypeError: as :func:`asam_jax.microbatched` does.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import asam_jax.nnx
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
    >>> in_pieces = asam_jax.nnx.microbatched(nnx.value_and_grad(loss), size=2)
    >>> value, grads = in_pieces(model, jnp.ones((8, 3)))
  """
  places = _microbatched.checked_places(fun, size, argnums, weights)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    batch = _microbatched.chosen(args, places)
    rest = _microbatched.replaced(args, places, [None] * len(places))
    graph, state = nnx.split((rest, kwargs))

    def on_piece(state, piece):
      rest, kwargs = nnx.merge(graph, state)
      result = fun(*_microbatched.replaced(rest, places, piece), **kwargs)
      return nnx.state((rest, kwargs)), result

    state, result = _microbatched.averaged(on_piece, state, batch, size, weights)
    nnx.update((rest, kwargs), state)
    return result

  return wrapped


def grad_fn(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | nnx.DiffState = 0,
    has_aux: bool = False,
    **kwargs: Any,
) -> Callable[[Any], Any]:
  """The ``grad_fn`` for ``nnx.Optimizer.update``, from modules as they are now.

  Make it **before** the forward pass: it keeps a clone of the arguments, which shares
  their arrays, and so draws the dropout masks that the forward pass is going to
  draw. It never touches your modules, however often the optimizer calls it.

  Args:
    fun: the function that is given to ``nnx.value_and_grad``.
    *args: its positional arguments: the module, the batch, ...
    argnums: as given to ``nnx.value_and_grad``; it should select the variables that
      ``nnx.Optimizer(..., wrt=...)`` selects.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    **kwargs: its keyword arguments.

  Returns:
    A function ``params -> grads`` on ``nnx.as_pure(nnx.state(module, nnx.Param))``,
    which is what ``nnx.Optimizer`` gives to Optax.

  Raises:
    TypeError: as :func:`value_and_grad` does.

  Examples:
    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, optax
    >>> import asam_jax.nnx
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> tx = asam_jax.adaptive_sam(optax.sgd(0.1), rho=0.5)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> def loss_fn(model, x, y):
    ...   return jnp.mean((model(x) - y) ** 2)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y):
    ...   grad_fn = asam_jax.nnx.grad_fn(loss_fn, model, x, y)
    ...   loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    ...   optimizer.update(model, grads, grad_fn=grad_fn)
    ...   return loss
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> y = x @ jnp.array([[1.0], [-2.0], [0.5]])
    >>> losses = [train_step(model, optimizer, x, y) for _ in range(20)]
    >>> print(bool(losses[-1] < 0.1 * losses[0]))
    True
  """
  gradient = jax.grad(
      value_fn(fun, *args, argnums=argnums, has_aux=has_aux, **kwargs), has_aux=False
  )
  return gradient


def value_fn(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | nnx.DiffState = 0,
    has_aux: bool = False,
    **kwargs: Any,
) -> Callable[[Any], Any]:
  """The ``value_fn`` for ``nnx.Optimizer.update``: the loss of :func:`grad_fn`.

  For :func:`asam_jax.adaptive_sam` with ``with_info=True``, which reports the loss at
  the perturbed point:
  ``optimizer.update(model, grads, value=loss, value_fn=value_fn)``.

  Args:
    fun: as for :func:`grad_fn`; make it before the forward pass, too.
    *args: likewise.
    argnums: likewise.
    has_aux: likewise.
    **kwargs: likewise.

  Returns:
    A function ``params -> loss`` on ``nnx.as_pure(nnx.state(module, nnx.Param))``.

  Raises:
    TypeError: as :func:`value_and_grad` does.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import asam_jax.nnx
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
    >>> value_fn = asam_jax.nnx.value_fn(loss, model, jnp.ones((8, 3)))
    >>> params = nnx.as_pure(nnx.state(model, nnx.Param))
    >>> print(bool(value_fn(params) == loss(model, jnp.ones((8, 3)))))
    True
  """
  _arguments.function("fun", fun, "of modules and other arguments")
  _arguments.flag("has_aux", has_aux)
  place, wrt = _differentiated(argnums)
  own = _params(args, place, wrt)
  checked = _arguments.real_valued("fun(...)", fun, has_aux)
  start = nnx.clone((args, kwargs))

  def value_at(params: Any) -> Any:
    _arguments.tree_like("params", params, own, "the module's parameters")
    args, kwargs = nnx.clone(start)  # each call starts from the same state
    nnx.update(args[place], params)
    result = checked(*args, **kwargs)
    return result[0] if has_aux else result

  return value_at


def _differentiated(argnums: Any) -> tuple[int, Any]:
  """The argument's number, and the filter of its variables."""
  if isinstance(argnums, nnx.DiffState):
    return argnums.argnum, argnums.filter
  if isinstance(argnums, bool) or not isinstance(argnums, (int, np.integer)):
    raise TypeError(
        f"argnums={argnums!r} must be an int or an nnx.DiffState; put several modules"
        " into one, which has one perturbation."
    )
  return int(argnums), nnx.Param


def _params(args: tuple[Any, ...], place: int, wrt: Any) -> Any:
  if not -len(args) <= place < len(args):
    raise TypeError(
        f"argnums={place} with {len(args)} positional arguments; pass the module"
        " that is differentiated by position."
    )
  given = args[place]
  params = _pure(given, wrt) if isinstance(given, nnx.Pytree) else None
  if not jax.tree.leaves(params):
    raise TypeError(
        f"argnums={place} is a {type(given).__name__} without variables that match"
        f" {wrt}; name the module to differentiate, or an nnx.DiffState."
    )
  return params


def _pure(node: Any, wrt: Any) -> Any:
  return _as_pure(nnx.state(node, wrt))
