"""Functional SAM: the model is perturbed, the loss of its outputs is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import optax

from asam_jax import _arguments
from asam_jax import _door
from asam_jax import _geometry as _g
from asam_jax import _two_passes
from asam_jax._door import Accumulate
from asam_jax._geometry import LeafSelection
from asam_jax._geometry import Normalization


def functional_value_and_grad(
    model: Callable[..., Any],
    loss: Callable[..., Any],
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
    with_info: bool = False,
) -> Callable[..., Any]:
  r"""Functional SAM: :func:`value_and_grad` for a model and its loss taken apart.

  .. math::

    w \mapsto \big(L(w),\ J(w + \hat\epsilon)^\top \ell'(f(w))\big), \qquad
    L(w) = \ell(f(w)), \quad J = \partial f / \partial w, \quad
    \hat\epsilon = \mathrm{ascent}(\nabla L(w), w)

  with :math:`\hat\epsilon` as in :func:`asam_jax.ascent`. The gradient at
  :math:`w + \hat\epsilon` differs from the one at w in the Jacobian of the model and in
  the derivative of the loss with respect to the outputs. Of these this method keeps
  the first change alone. The second lowers sharpness by making the outputs less
  confident, and prevails in language models, where plain SAM does nothing or harm
  (Singh et al.). Of a model that is linear in its parameters it is the plain gradient.

  Value and aux are of the clean pass. Both passes get the same arguments, and so the
  same dropout keys. It costs two forward and two backward passes, as
  :func:`value_and_grad` does, and keeps the derivative with respect to the outputs
  (one copy of them) during the second. With ``accumulate`` it is computed again, by a
  third forward pass.

  Args:
    model: a function ``(params, batch) -> outputs``, say logits: a pytree of float
      arrays; or ``(outputs, aux)`` with ``has_aux``.
    loss: a function ``(outputs, batch) -> scalar``. It is given the outputs, and then
      the positional arguments of ``model`` that are not differentiated.
    argnums: which positional arguments of ``model`` are differentiated and perturbed;
      see :func:`value_and_grad`.
    has_aux: whether ``model`` returns ``(outputs, aux)``.
    rho: the radius of the perturbation, >= 0; a number or a traced scalar.
    eta: the stabilizer, >= 0; a number or a traced scalar.
    p: the norm's exponent, a number in [1, inf].
    normalization: the operator T_w; see :func:`asam_jax.ascent`.
    normalize: the leaves that get T_w; see :func:`value_and_grad`.
    perturb: the leaves that are perturbed at all; likewise.
    param_specs: for parameters that are sharded by hand; see :func:`value_and_grad`.
    ascent: an ascent chain in place of the closed form; see :func:`value_and_grad`.
      Gradients on its way, as of ``iterated``, are those of the whole loss.
    accumulate: for a batch that does not fit: the number of rows of a microbatch, or a
      function; see :func:`value_and_grad`. (One perturbation for each microbatch is
      ``microbatched(functional_value_and_grad(model, loss), size)``.)
    axis_name: for ``pmap`` and ``shard_map``; see :func:`value_and_grad`.
    average_ascent: likewise.
    with_info: whether to return an :class:`AscentInfo` as well. Its losses are those at
      w and at w + epsilon, its cosine is of the angle between the gradient at w and the
      one returned.

  Returns:
    A function with the arguments of ``model`` that returns ``(value, grad)`` or
    ``((value, aux), grad)``, followed by an :class:`AscentInfo` if ``with_info``.
    Keyword arguments go to ``model`` alone.

  Raises:
    ValueError, TypeError: as :func:`value_and_grad` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import asam_jax
    >>> model = lambda w, x, y: w**2 * x
    >>> loss = lambda outputs, x, y: jnp.mean((outputs - y) ** 2) / 2
    >>> fun = asam_jax.functional_value_and_grad(model, loss, rho=0.5, eta=0.0)
    >>> value, grad = fun(jnp.array(2.0), jnp.array([1.0]), jnp.array([3.0]))
    >>> print(value, grad)  # at w + epsilon = 3: 2 (w + epsilon) (w^2 - y)
    0.5 6.0

  References:
    Singh et al., `Avoiding spurious sharpness minimization broadens applicability of
    SAM <https://arxiv.org/abs/2502.02407>`_, 2025
  """
  door = _door.Door(
      _g.Geometry(eta, p, normalization, normalize, perturb, param_specs),
      rho, ascent, axis_name, average_ascent, with_info,
  )
  if door.rule:
    raise ValueError(
        f"rho={rho!r} is a radius rule, which compares two gradients of one loss; the"
        " second one here is of another. Give rho a number."
    )
  _arguments.function("model", model, "with the outputs that loss is given")
  _arguments.function("loss", loss, "(outputs, batch) with a scalar result")
  split = _Split(
      model,
      _arguments.real_valued("loss(outputs, ...)", loss),
      _arguments.argnums(argnums),
      _arguments.flag("has_aux", has_aux),
  )
  in_pieces = lambda fun: (  # noqa: E731
      fun if accumulate is None
      else _door.accumulated(fun, accumulate, split.argnums)
  )

  @functools.wraps(model)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    params = _door.chosen(args, split.argnums)

    def at(point):
      return _door.with_chosen(args, split.argnums, point)

    def evaluate(point):
      if accumulate is None:
        value, aux, derivative, grads = split.pull_back(at(point), kwargs)
        result = value, aux
      else:  # the derivatives of all rows would be more than fits
        result, grads = in_pieces(split.value_aux_and_grad)(*at(point), **kwargs)
        derivative = None
      return _two_passes.Pass(grads, result[0], (result, derivative))

    def at_perturbed(point, clean):
      _, derivative = clean.result

      def second(*args, **kwargs):
        kept = derivative
        if kept is None:
          there = _door.with_chosen(args, split.argnums, params)
          kept = split.derivative(there, kwargs)
        value, _, _, grads = split.pull_back(args, kwargs, kept)
        return value, grads

      value, grads = in_pieces(second)(*at(point), **kwargs)
      return _two_passes.Pass(grads, value)

    (result, _), grads, *info = door.passes(
        evaluate, params, at_perturbed=at_perturbed
    )
    return result if has_aux else result[0], grads, *info

  setattr(wrapped, _two_passes.PERTURBED, True)
  return wrapped


class _Split(NamedTuple):
  """A model and the loss of its outputs, and what of the model is differentiated."""

  model: Callable[..., Any]
  loss: Callable[..., Any]
  argnums: int | Sequence[int]
  has_aux: bool

  def outputs(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """(outputs, aux), checked; aux is None where there is none."""
    result = self.model(*args, **kwargs)
    if not self.has_aux:
      result = result, None
    elif not (isinstance(result, tuple) and len(result) == 2):
      raise TypeError(
          f"model(...) returned a {type(result).__name__}; with has_aux=True it must"
          " return a pair (outputs, aux)."
      )
    _check_outputs(result[0])
    return result

  def loss_of(self, args: Any) -> Callable[[Any], Any]:
    """The loss as a function of the outputs."""
    numbers = [self.argnums] if isinstance(self.argnums, int) else self.argnums
    taken = {number % len(args) for number in numbers}
    rest = [x for i, x in enumerate(args) if i not in taken]
    return lambda outputs: self.loss(outputs, *rest)

  def derivative(self, args: Any, kwargs: Any) -> Any:
    """l'(f(w)), like the outputs."""
    return jax.grad(self.loss_of(args))(self.outputs(args, kwargs)[0])

  def pull_back(
      self, args: Any, kwargs: Any, derivative: Any = None
  ) -> tuple[Any, Any, Any, Any]:
    """(value, aux, derivative, J^T derivative); by default the derivative here."""
    outputs, pull, aux = jax.vjp(
        lambda point: self.outputs(
            _door.with_chosen(args, self.argnums, point), kwargs
        ),
        _door.chosen(args, self.argnums),
        has_aux=True,
    )
    value, own = jax.value_and_grad(self.loss_of(args))(outputs)
    derivative = own if derivative is None else derivative
    return value, aux, derivative, pull(derivative)[0]

  def value_aux_and_grad(self, *args: Any, **kwargs: Any) -> Any:
    """((value, aux), gradient), of one microbatch."""
    value, aux, _, grads = self.pull_back(args, kwargs)
    return (value, aux), grads


def _check_outputs(outputs: Any) -> None:
  """Raises unless the loss can be differentiated with respect to the outputs."""
  leaves = jax.tree_util.tree_leaves_with_path(outputs)
  if not leaves:
    raise TypeError(f"model(...) returned {outputs!r}; it must return float arrays.")
  for path, x in leaves:
    if not (hasattr(x, "dtype") and _arguments.is_float(x)):
      kind = f"dtype {x.dtype}" if hasattr(x, "dtype") else type(x).__name__
      raise TypeError(
          f"model(...){jax.tree_util.keystr(path)} has {kind}; the loss is"
          " differentiated with respect to it: return float arrays, and all else as aux"
          " with has_aux=True."
      )
