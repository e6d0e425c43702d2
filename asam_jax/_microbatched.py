"""Gradients of a batch that does not fit, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from asam_jax import _arguments
from asam_jax._ascent import vary_as


def microbatched(
    fun: Callable[..., Any],
    size: int,
    argnums: int | Sequence[int] = 1,
    weights: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
  r"""A function of a batch, evaluated on microbatches and averaged.

  .. math::

    f(w, B) = \frac{\sum_{i=1}^{k} v_i f(w, B_i)}{\sum_{i=1}^{k} v_i},
    \quad |B_i| = size, \quad v_i = 1 \text{ unless weights are given}

  with one microbatch in memory at a time, by ``lax.scan``. Around a gradient this
  is gradient accumulation, and there are two ways to have it with ASAM:

  - One perturbation for the batch, the same as without microbatches: both passes
    accumulate. ``value_and_grad(loss, accumulate=32)``;
    or with an optimizer, ``grad_fn = lambda w: microbatched(jax.grad(loss), 32)(w,
    batch)`` for the incoming gradient as for ``update(..., grad_fn=grad_fn)``.
  - One perturbation per microbatch, m-sharpness with m = ``size``:
    ``microbatched(value_and_grad(loss), 32)``.

  Both take two gradients of each microbatch. Of a batch of k microbatches, the i-th
  has the rows i, i + k, i + 2k, ...: in a batch whose rows are sharded over devices,
  each device so keeps its own, and works on its share of every microbatch. For that,
  ``size`` must be a multiple of the number of these devices. Gradients are summed over
  the devices once a microbatch, unless the compiler does it once behind the loop, as
  XLA:TPU does; inside ``shard_map`` (there ``size`` is a device's own) it is once.
  See docs/many_devices.md.

  ``optax.microbatching.microbatch`` takes the same rows and can be used in the same
  places; it adds up in the dtype of the gradients, which for bfloat16 loses the later
  microbatches. XLA's CPU backend runs convolutions slowly inside the scan.

  Args:
    fun: any function whose results are means over the batch: a gradient, a loss, a
      pytree of them. Of the results, floats are averaged, in float32 at least, and
      integers (counts) are added up.
    size: the number of rows in a microbatch; it must divide the batch.
    argnums: which positional arguments have the batch as the first axis of all
      their leaves; the others go to every microbatch as they are. A random key is
      the same for all of them, unless it is a batch of keys and named here.
    weights: a function of the batch arguments (those of argnums, in their order) that
      gives the weight >= 0 of one microbatch, a scalar. With the sum of the
      examples' weights, for a ``fun`` that is a weighted mean, the result is the
      weighted mean over the batch, whatever microbatch the examples are in: padding
      has weight 0. What ``fun`` gives for a microbatch of weight 0 is dropped, NaN
      or not. If all weights are 0, so is the result. (In ``shard_map`` the batch is
      the device's; for a weighted mean over devices see docs/many_devices.md.)

  Returns:
    A function with the arguments and results of ``fun``.

  Raises:
    ValueError: if size is below 1, or (in the call) does not divide the batch, or the
      batch axes differ, or (on an explicit mesh) the devices do not divide size; or a
      weight is no scalar.
    TypeError: if size or argnums is no integer, weights no function, or (in the call)
      a result is neither float nor integer, or a weight no real number.

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

    The last two of four rows are padding, and have weight 0:

    >>> def weighted(w, x, v):
    ...   return jnp.sum(v * (x @ w) ** 2) / jnp.sum(v)
    >>> padded, v = jnp.tile(x, (2, 1)), jnp.array([1.0, 1.0, 0.0, 0.0])
    >>> gradient = asam_jax.microbatched(
    ...     jax.grad(weighted), 2, argnums=(1, 2), weights=lambda x, v: jnp.sum(v))
    >>> print(gradient(w, padded, v).tolist(), jax.grad(loss)(w, x).tolist())
    [1.0, 4.0] [1.0, 4.0]
  """
  places = checked_places(fun, size, argnums, weights)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    def on_piece(carry, piece):
      return carry, fun(*replaced(args, places, piece), **kwargs)

    return averaged(on_piece, (), chosen(args, places), size, weights)[1]

  return wrapped


def checked_places(
    fun: Any, size: Any, argnums: Any, weights: Any = None
) -> tuple[int, ...]:
  """The numbers of the batch arguments, all arguments checked."""
  _arguments.function("fun", fun, "of a batch")
  _arguments.count("size", size)
  argnums = _arguments.argnums(argnums)
  if weights is not None:
    _arguments.function("weights", weights, "of a microbatch, or None")
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
    on_piece: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    batch: Any,
    size: int,
    weights: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
  """(last carry, mean result) of ``on_piece(carry, piece) -> (carry, result)``."""
  rows = [_split(each, size) for each in batch]
  count = _batch_size(rows, size)

  def piece_at(i):
    at = lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False)  # noqa: E731
    return jax.tree.map(at, rows)

  def evaluate(carry, i):
    piece = piece_at(i)
    weight = None if weights is None else _weight(weights(*piece))
    carry, results = on_piece(carry, piece)
    return carry, results, weight

  shapes, of_weight = jax.eval_shape(lambda c: evaluate(c, 0)[1:], carry)

  def body(state, i):
    carry, sums, total = state
    carry, results, weight = evaluate(carry, i)
    sums = jax.tree.map(lambda s, x: s + _weighted(x, weight), sums, results)
    return (carry, sums, None if weight is None else total + weight), None

  start = carry, jax.tree.map(_start, shapes), jax.tree.map(_start, of_weight)
  (carry, sums, total), _ = lax.scan(body, start, jnp.arange(count))
  # Where all weights are 0, the sums are.
  total = count if total is None else jnp.where(total == 0, 1, total)
  return carry, jax.tree.map(lambda s, x: _finish(s, x.dtype, total), sums, shapes)


def _split(tree: Any, size: int) -> Any:
  """The rows as [size, count]: a device's own stay its own, along the first axis."""
  _arguments.all_arrays("the batch", tree)

  def split(x):
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] == 0 or x.shape[0] % size:
      rows = x.shape[0] if x.ndim else "no"
      raise ValueError(
          f"size={size} does not divide a batch argument with {rows} rows; choose a"
          " divisor, or argnums without this argument."
      )
    devices = _devices_of_rows(x)
    if size % devices:
      raise ValueError(
          f"size={size} is no multiple of the {devices} devices that the rows of the"
          " batch are sharded over; choose one, so that each device keeps its own."
      )
    return x.reshape(size, x.shape[0] // size, *x.shape[1:])

  return jax.tree.map(split, tree)


def _devices_of_rows(x: jax.Array) -> int:
  """How many devices share the first axis, where the mesh is explicit; otherwise 1."""
  if not hasattr(jax, "typeof"):  # which came with these meshes
    return 1
  sharding: Any = getattr(jax.typeof(x), "sharding", None)
  axes = next(iter(getattr(sharding, "spec", ())), None)
  names = (axes,) if isinstance(axes, str) else axes
  if not isinstance(names, tuple):  # None, or left to the compiler
    return 1
  return math.prod(sharding.mesh.shape[name] for name in names)


def _batch_size(rows: Any, size: int) -> int:
  """The number of microbatches, which all leaves must share."""
  counts = {x.shape[1] for x in jax.tree.leaves(rows)}
  if len(counts) != 1:
    found = sorted(count * size for count in counts)
    raise ValueError(
        f"the batch arguments have {found} rows; all their leaves must have the same"
        " number, and there must be one."
    )
  return counts.pop()


def _weight(weight: Any) -> jax.Array:
  if not hasattr(weight, "dtype") and not isinstance(weight, (int, float, complex)):
    raise TypeError(f"weights gave {weight!r}; return one real number.")
  weight = jnp.asarray(weight)
  if weight.ndim:
    raise ValueError(
        f"weights gave an array of shape {weight.shape}; return one number for the"
        " microbatch, such as the sum of its examples' weights."
    )
  real = (jnp.integer, jnp.floating)
  if not any(jnp.issubdtype(weight.dtype, kind) for kind in real):
    raise TypeError(
        f"weights gave a result of dtype {weight.dtype}; return a real number, such as"
        " the sum of the examples' weights."
    )
  return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))


def _weighted(x: jax.Array, weight: jax.Array | None) -> jax.Array:
  if weight is None or jnp.issubdtype(x.dtype, jnp.integer):
    return x
  # Of nothing but padding a mean is 0 / 0.
  return jnp.where(weight == 0, 0, weight * x)


def _start(shape: Any) -> jax.Array:
  if jnp.issubdtype(shape.dtype, jnp.integer):
    dtype = shape.dtype
  elif jnp.issubdtype(shape.dtype, jnp.floating):
    dtype = jnp.promote_types(shape.dtype, jnp.float32)
  else:
    raise TypeError(
        f"a result of dtype {shape.dtype} has no mean over microbatches; return"
        " floats, which are averaged, or integers, which are added up."
    )
  sharding = getattr(shape, "sharding", None)  # which explicit meshes have
  placed = sharding if any(getattr(sharding, "spec", ())) else None
  return vary_as(jnp.zeros(shape.shape, dtype, device=placed), shape)


def _finish(total: jax.Array, dtype: Any, weight: Any) -> jax.Array:
  if jnp.issubdtype(dtype, jnp.integer):
    return total
  return (total / weight).astype(dtype)
