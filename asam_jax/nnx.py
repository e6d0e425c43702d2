"""ASAM for Flax NNX modules; needs Flax >= 0.12.3, which ``asam_jax`` itself does not.

``import asam_jax.nnx``. There are two doors, as for plain pytrees:
:func:`value_and_grad` in place of ``nnx.value_and_grad``, for any optimizer; and
:func:`grad_fn` for what ``nnx.Optimizer.update`` hands on to
:func:`asam_jax.adaptive_sam` and its relatives. In both, batch statistics and random
streams are those of one clean pass, and both passes draw the same dropout masks.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax

from asam_jax import _autodiff
from asam_jax import _normalization as _n

__all__ = ["grad_fn", "value_and_grad"]

# A state with arrays for variables; Flax 0.12.7 renamed it.
_as_pure = getattr(nnx, "as_pure", None) or getattr(nnx, "pure")  # noqa: B009


def value_and_grad(
    fun: Callable[..., Any],
    rho: Any = 0.5,
    eta: Any = 0.01,
    p: float = 2,
    *,
    argnums: int | nnx.DiffState = 0,
    has_aux: bool = False,
    normalization: _n.Normalization = "elementwise",
    normalize: _n.LeafSelection | None = None,
    perturb: _n.LeafSelection | None = None,
    axis_name: Any = None,
    average_ascent: bool = False,
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
    rho: the radius, >= 0; a number or a traced scalar, no schedule; see
      :func:`asam_jax.value_and_grad`.
    eta: the stabilizer, >= 0; likewise.
    p: the norm's exponent, a number in [1, inf].
    argnums: which positional argument, a module, is differentiated and perturbed,
      with respect to its ``nnx.Param``; or ``nnx.DiffState(argnum, filter)`` for
      other variables.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`asam_jax.ascent`. Paths and bools
      are over ``nnx.as_pure(nnx.state(module, nnx.Param))``.
    perturb: the leaves that are perturbed at all; likewise.
    axis_name: see :func:`asam_jax.value_and_grad`.
    average_ascent: see :func:`asam_jax.value_and_grad`.
    with_info: whether to return an :class:`asam_jax.AscentInfo` as well.

  Returns:
    A function with the arguments of ``fun`` that returns ``(value, grads)`` or
    ``((value, aux), grads)`` as ``nnx.value_and_grad`` does, for
    ``optimizer.update(module, grads)``; followed by an :class:`asam_jax.AscentInfo`
    if ``with_info``.

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
  place, wrt = _differentiated(argnums)
  passes = nnx.value_and_grad(fun, argnums=argnums, has_aux=has_aux)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    params = _params(args, place, wrt)
    copies = nnx.clone((args, kwargs))  # before the clean pass advances anything
    targets = iter([(args, kwargs), copies])
    form = None  # the gradients as NNX gives them

    def one_pass(point):
      nonlocal form
      args, kwargs = next(targets)
      if form is not None:
        nnx.update(args[place], point)
      result, form = passes(*args, **kwargs)
      return result, _pure(form, wrt)

    # The core's two passes, its arithmetic and its info, around NNX's gradient.
    result, grads, *info = _autodiff.value_and_grad(
        fun,
        rho,
        eta,
        p,
        has_aux=has_aux,
        normalization=normalization,
        normalize=normalize,
        perturb=perturb,
        axis_name=axis_name,
        average_ascent=average_ascent,
        with_info=with_info,
        accumulate=lambda _: one_pass,
    )(params)
    nnx.update(form, grads)
    return result, form, *info

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
  place, wrt = _differentiated(argnums)
  _params(args, place, wrt)  # for its errors
  start = nnx.clone((args, kwargs))

  def gradient_at(params: Any) -> Any:
    args, kwargs = nnx.clone(start)  # each call starts from the same state
    nnx.update(args[place], params)
    grads = nnx.grad(fun, argnums=argnums, has_aux=has_aux)(*args, **kwargs)
    return _pure(grads[0] if has_aux else grads, wrt)

  return gradient_at


def _differentiated(argnums: Any) -> tuple[int, Any]:
  """The argument's number, and the filter of its variables."""
  if isinstance(argnums, nnx.DiffState):
    return argnums.argnum, argnums.filter
  if isinstance(argnums, bool) or not isinstance(argnums, int):
    raise TypeError(
        f"argnums={argnums!r} must be an int or an nnx.DiffState; put several modules"
        " into one, which has one perturbation."
    )
  return argnums, nnx.Param


def _params(args: tuple[Any, ...], place: int, wrt: Any) -> Any:
  if not 0 <= place < len(args):
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
