"""One perturbation per m examples, for Flax NNX modules."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from asam_jax import _arguments
from asam_jax import _groups
from asam_jax import _microbatched


def each(
    step: Callable[[Any, Any], Any],
    m: int,
    args: Any,
    kwargs: Any,
    place: int,
    params: Any,
    axis_name: Any,
    param_specs: Any,
) -> tuple[Any, ...]:
  """The mean of ``step(args, kwargs) -> (result, grads, ...)`` over all groups.

  Modules are updated: floats with the mean of what the groups' passes leave in them,
  all else with what the first group's does. ``place`` is the batch's.
  """
  (batch,) = _microbatched.chosen(args, (place,))
  rest = _microbatched.replaced(args, (place,), [None])
  graph, state = nnx.split((rest, kwargs))
  before, treedef = jax.tree.flatten(state)
  changed: list[int] = []

  def of_group(args, _):
    leaves, group = args
    rest, kwargs = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
    args = _microbatched.replaced(rest, (place,), (group,))
    result, grads, *info = step(args, kwargs)
    after = jax.tree.leaves(nnx.state((rest, kwargs)))
    # Most variables are parameters, and as they were.
    changed[:] = [i for i, old in enumerate(leaves) if after[i] is not old]
    return (result, [_told(after[i], leaves[i]) for i in changed]), grads, *info

  others = jax.tree.map(_without_modules, [rest, kwargs], is_leaf=_is_module)
  (result, told), *others = _groups.each(
      of_group, m, [before, batch], {}, 1, params, others, axis_name, param_specs
  )
  groups = jax.tree.leaves(batch)[0].shape[0] // m
  after = list(before)
  for i, new in zip(changed, told, strict=True):
    if isinstance(new, tuple):
      mean, equal = new  # the mean of equal numbers may be another
      new = jnp.where(equal == groups, before[i], mean)
    after[i] = new
  nnx.update((rest, kwargs), jax.tree.unflatten(treedef, after))
  return result, *others


def _told(new: Any, old: Any) -> Any:
  """What a group tells of a variable: a float, and whether it is as it was."""
  if not _arguments.is_float(new):
    return _groups.First(new)
  return new, jnp.all(new == old).astype(jnp.int32)


def _is_module(node: Any) -> bool:
  return isinstance(node, nnx.Pytree)


def _without_modules(node: Any) -> Any:
  """Modules have no rows, whatever the shapes of their variables."""
  return None if _is_module(node) else node
