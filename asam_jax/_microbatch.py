"""Gradients of a batch that does not fit, piece by piece."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from asam_jax._varying import vary_as


def microbatched(
    fun: Callable[..., Any], size: int, argnums: int | Sequence[int] = 1
) -> Callable[..., Any]:
  r"""A function of a batch, evaluated on microbatches and averaged.

  .. math:: f(w, B) = \frac{1}{k} \sum_{i=1}^{k} f(w, B_i), \quad |B_i| = size

  with one microbatch in memory at a time, by ``lax.scan``. Around a gradient this
  is gradient accumulation, and there are two ways to have it with ASAM:

  - One perturbation for the batch, the same as without microbatches: both passes
    accumulate. ``value_and_grad(loss, accumulate=lambda f: microbatched(f, 32))``;
    or with an optimizer, ``grad_fn = lambda w: microbatched(jax.grad(loss), 32)(w,
    batch)`` for the incoming gradient as for ``update(..., grad_fn=grad_fn)``.
  - One perturbation per microbatch, m-sharpness with m = ``size`` on one device:
    ``microbatched(value_and_grad(loss), 32)``.

  Both take two gradients of each microbatch. ``optax.microbatching.microbatch``
  can be used in the same places; it adds up in the dtype of the gradients, which
  for bfloat16 loses the later microbatches, and mixes the rows differently.

  XLA's CPU backend runs convolutions slowly inside the scan.

  Args:
    fun: any function whose results are means over the batch: a gradient, a loss, a
      pytree of them. Of the results, floats are averaged, in float32 at least, and
      integers (counts) are added up.
    size: the number of rows in a microbatch; it must divide the batch.
    argnums: which positional arguments have the batch as the first axis of all
      their leaves; the others go to every microbatch as they are. A random key is
      the same for all of them, unless it is a batch of keys and named here.

  Returns:
    A function with the arguments and results of ``fun``.

  Raises:
    ValueError: if size is no positive integer, or (in the call) does not divide the
      batch, or the batch axes differ.
    TypeError: in the call, if a result is neither float nor integer.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import asam_jax
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> whole = asam_jax.value_and_grad(loss)(w, x)[1]
    >>> exact = asam_jax.value_and_grad(
    ...     loss, accumulate=lambda f: asam_jax.microbatched(f, 1))(w, x)[1]
    >>> per_row = asam_jax.microbatched(asam_jax.value_and_grad(loss), 1)(w, x)[1]
    >>> print(whole.tolist(), exact.tolist(), per_row.tolist())
    [1.122, 5.96] [1.122, 5.96] [1.505, 6.02]
  """
  if isinstance(size, bool) or not isinstance(size, int) or size < 1:
    raise ValueError(f"size={size!r} must be a positive integer.")
  numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    # The range check gives numbers below zero their meaning, too.
    places = [range(len(args))[number] for number in numbers]
    pieces = [_split(args[place], size) for place in places]
    count = _batch_size(pieces, size)

    def on_piece(piece):
      given = list(args)
      for place, value in zip(places, piece, strict=True):
        given[place] = value
      return fun(*given, **kwargs)

    def body(sums, piece):
      return jax.tree.map(lambda s, x: s + x, sums, on_piece(piece)), None

    shapes = jax.eval_shape(on_piece, jax.tree.map(lambda x: x[0], pieces))
    sums, _ = lax.scan(body, jax.tree.map(_start, shapes), pieces)
    return jax.tree.map(lambda s, x: _finish(s, x.dtype, count), sums, shapes)

  return wrapped


def _split(tree: Any, size: int) -> Any:
  def split(x):
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] == 0 or x.shape[0] % size:
      rows = x.shape[0] if x.ndim else "no"
      raise ValueError(
          f"size={size} does not divide a batch argument with {rows} rows; choose a"
          " divisor, or argnums without this argument."
      )
    return x.reshape(x.shape[0] // size, size, *x.shape[1:])

  return jax.tree.map(split, tree)


def _batch_size(pieces: Any, size: int) -> int:
  """The number of microbatches, which all leaves must share."""
  counts = {x.shape[0] for x in jax.tree.leaves(pieces)}
  if len(counts) != 1:
    found = sorted(count * size for count in counts)
    raise ValueError(
        f"the batch arguments have {found} rows; all their leaves must have the same"
        " number, and there must be one."
    )
  return counts.pop()


def _start(shape: Any) -> jax.Array:
  if jnp.issubdtype(shape.dtype, jnp.integer):
    return jnp.zeros(shape.shape, shape.dtype)
  if not jnp.issubdtype(shape.dtype, jnp.floating):
    raise TypeError(
        f"a result of dtype {shape.dtype} has no mean over microbatches; return"
        " floats, which are averaged, or integers, which are added up."
    )
  dtype = jnp.promote_types(shape.dtype, jnp.float32)
  return vary_as(jnp.zeros(shape.shape, dtype), shape)


def _finish(total: jax.Array, dtype: Any, count: int) -> jax.Array:
  if jnp.issubdtype(dtype, jnp.integer):
    return total
  return (total / count).astype(dtype)
