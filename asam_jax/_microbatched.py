"""Gradients of a batch that does not fit, piece by piece."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from asam_jax import _arguments
from asam_jax._ascent import vary_as


def microbatched(
    fun: Callable[..., Any], size: int, argnums: int | Sequence[int] = 1
) -> Callable[..., Any]:
  r"""A function of a batch, evaluated on microbatches and averaged.

  .. math:: f(w, B) = \frac{1}{k} \sum_{i=1}^{k} f(w, B_i), \quad |B_i| = size

  with one microbatch in memory at a time, by ``lax.scan``. Around a gradient this
  is gradient accumulation, and there are two ways to have it with ASAM:

  - One perturbation for the batch, the same as without microbatches: both passes
    accumulate. ``value_and_grad(loss, accumulate=32)``;
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
    ValueError: if size is below 1, or (in the call) does not divide the batch, or the
      batch axes differ.
    TypeError: if size or argnums is no integer, or (in the call) a result is neither
      float nor integer.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import asam_jax
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> whole = asam_jax.value_and_grad(loss)(w, x)[1]
    >>> exact = asam_jax.value_and_grad(loss, accumulate=1)(w, x)[1]
    >>> per_row = asam_jax.microbatched(asam_jax.value_and_grad(loss), 1)(w, x)[1]
    >>> print(whole.tolist(), exact.tolist(), per_row.tolist())
    [1.122, 5.96] [1.122, 5.96] [1.505, 6.02]
  """
  places = checked_places(fun, size, argnums)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    def on_piece(carry, piece):
      return carry, fun(*replaced(args, places, piece), **kwargs)

    return averaged(on_piece, (), chosen(args, places), size)[1]

  return wrapped


def checked_places(fun: Any, size: Any, argnums: Any) -> tuple[int, ...]:
  """The numbers of the batch arguments, all arguments checked."""
  _arguments.function("fun", fun, "of a batch")
  _arguments.count("size", size)
  _arguments.argnums(argnums)
  return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def chosen(args: Sequence[Any], places: Sequence[int]) -> list[Any]:
  """The arguments at these places; below zero they count from the end."""
  if not all(-len(args) <= place < len(args) for place in places):
    raise TypeError(
        f"argnums={tuple(places)} with {len(args)} positional arguments; pass the batch"
        " by position, and name its places."
    )
  return [args[place] for place in places]


def replaced(
    args: Sequence[Any], places: Sequence[int], values: Sequence[Any]
) -> list[Any]:
  """The arguments with other values at these places."""
  result = list(args)
  for place, value in zip(places, values, strict=True):
    result[place] = value
  return result


def averaged(
    on_piece: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batch: Any, size: int
) -> tuple[Any, Any]:
  """(last carry, mean result) of ``on_piece(carry, piece) -> (carry, result)``."""
  pieces = [_split(each, size) for each in batch]
  count = _batch_size(pieces, size)
  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(lambda carry, piece: on_piece(carry, piece)[1], carry, first)

  def body(state, piece):
    carry, sums = state
    carry, results = on_piece(carry, piece)
    return (carry, jax.tree.map(lambda s, x: s + x, sums, results)), None

  start = carry, jax.tree.map(_start, shapes)
  (carry, sums), _ = lax.scan(body, start, pieces)
  return carry, jax.tree.map(lambda s, x: _finish(s, x.dtype, count), sums, shapes)


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
