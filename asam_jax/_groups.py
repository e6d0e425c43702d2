"""One perturbation per m examples, however many devices share them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from asam_jax import _arguments
from asam_jax import _mesh
from asam_jax import _microbatched


def check(m: Any, accumulate: Any, average_ascent: bool) -> int:
  """The argument m_sharpness, checked, alone and against the others."""
  m = _arguments.count("m_sharpness", m)
  if accumulate is not None:
    raise ValueError(
        f"m_sharpness={m} and accumulate={accumulate!r} are both given; accumulate has"
        " one perturbation for the whole batch. For a batch that does not fit, write"
        " microbatched(value_and_grad(fun, m_sharpness=m), size)."
    )
  if average_ascent:
    raise ValueError(
        f"m_sharpness={m} and average_ascent=True are both given; average_ascent has"
        " one perturbation for the batches of all devices."
    )
  return m


def _check_rows(m: int, batch: Any, others: Any) -> None:
  """Raises unless m divides the batch, and the batch is all that has its rows."""
  sizes = {x.shape[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(batch)}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(
        f"the batch, the first positional argument that is not differentiated, has"
        f" leaves with {sorted(sizes)} rows; all must have the same number, and there"
        " must be one: put inputs and targets into one tuple or dict."
    )
  (rows,) = sizes
  if rows % m:
    raise ValueError(f"m_sharpness={m} does not divide a batch of {rows} rows.")
  for path, x in jax.tree_util.tree_leaves_with_path(others):
    if jnp.ndim(x) and x.shape[0] == rows:
      raise ValueError(
          f"beside the batch, another argument ({jax.tree_util.keystr(path)}) has"
          f" {rows} rows: m_sharpness={m} groups those of the batch alone, which is the"
          " first positional argument that is not differentiated. Put them into one"
          " tuple or dict; or bind what is no batch with functools.partial."
      )


class First(NamedTuple):
  """What is no result but goes along with one: the first group's stands for all."""

  value: Any


def _mean(results: Any) -> Any:
  """The results of all groups as one: floats averaged, integers added up."""

  def of_groups(x):
    if isinstance(x, First):
      return jax.tree.map(lambda leaf: leaf[0], x.value)
    if jnp.issubdtype(x.dtype, jnp.integer):
      return jnp.sum(x, 0)
    if not _arguments.is_float(x):
      raise TypeError(
          f"a result of dtype {x.dtype} has no mean over the groups of m_sharpness;"
          " return floats, which are averaged, or integers, which are added up."
      )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.mean(x, 0, dtype=wide).astype(x.dtype)

  return jax.tree.map(of_groups, results, is_leaf=lambda x: isinstance(x, First))


def each(
    step: Callable[[Any, Any], Any],
    m: int,
    args: Any,
    kwargs: Any,
    place: int,
    params: Any,
    others: Any,
    axis_name: Any,
    param_specs: Any,
) -> tuple[Any, ...]:
  """The mean of ``step(args, kwargs) -> (result, grads, ...)`` over all groups.

  ``place`` is the batch's; ``params`` are what is differentiated, and ``others`` what
  must not have its rows. The gradient and the info are averaged over the devices of
  ``axis_name`` as well. The first leaf of the result is the loss.
  """
  (batch,) = _microbatched.chosen(args, (place,))
  _check_rows(m, batch, others)
  _mesh.check_own_rows(m, batch, params, axis_name, param_specs)

  def of_all(args, kwargs):
    batch = args[place]
    groups = jax.tree.map(lambda x: jnp.reshape(x, (-1, m, *x.shape[1:])), batch)

    def of_group(group):
      return step(_microbatched.replaced(args, (place,), (group,)), kwargs)

    return _mean(jax.vmap(of_group)(groups))

  if any(map(_is_explicit, jax.tree.leaves(batch))):
    of_all = _left_to_the_compiler(of_all, params)
  result, grads, *rest = of_all(args, kwargs)  # a radius rule's state, an info
  info = [one for one in rest if hasattr(one, "nonfinite_steps")]
  rest = rest[:len(rest) - len(info)]
  bad = [jnp.minimum(one.nonfinite_steps, 1) for one in info]
  if axis_name is not None:
    _mesh.check_own_loss(jax.tree.leaves(result)[0], axis_name)
    grads, rest, info = _mesh.mean((grads, rest, info), axis_name)
    bad = lax.pmax(bad, axis_name) if bad else []
  info = [one._replace(nonfinite_steps=b) for one, b in zip(info, bad, strict=True)]
  return result, grads, *rest, *info


def _is_explicit(x: Any) -> bool:
  """Whether its type tells how devices share it."""
  if not hasattr(jax, "typeof"):  # which came with these meshes
    return False
  sharding = getattr(jax.typeof(x), "sharding", None)
  return any(axes is not None for axes in getattr(sharding, "spec", ()))


def _left_to_the_compiler(fun: Callable[..., Any], params: Any) -> Callable[..., Any]:
  """On an explicit mesh, whose types can't say how devices share a group.

  Gradients come out placed as the parameters are, all else on every device.
  """
  spec = jax.sharding.PartitionSpec

  def call(*trees):
    leaves, treedef = jax.tree.flatten(trees)
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))]
    kept = []

    def inner(values):
      given = _microbatched.replaced(leaves, arrays, values)
      results, structure = jax.tree.flatten(fun(*jax.tree.unflatten(treedef, given)))
      kept[:] = [structure]
      return results

    values = [jnp.asarray(leaves[i]) for i in arrays]
    shapes = jax.eval_shape(jax.sharding.auto_axes(inner, out_sharding=spec()), values)
    form = jax.tree.unflatten(kept[0], shapes)
    placed = [jax.typeof(w).sharding.spec for w in jax.tree.leaves(params)]
    specs = [spec()] * len(jax.tree.leaves(form[0])) + placed
    specs += [spec()] * (len(shapes) - len(specs))
    results: Any = jax.sharding.auto_axes(inner, out_sharding=specs)(values)
    return jax.tree.unflatten(kept[0], results)

  return call
