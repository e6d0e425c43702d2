"""What the devices of a ``shard_map`` or ``pmap`` hold, and what they agree on."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp

from asam_jax import _arguments
from asam_jax import _ascent
from asam_jax import _shards
from asam_jax._shards import axes_in
from asam_jax._shards import varying


def checked_name(value: Any) -> Any:
  """The argument axis_name; raises unless it names an axis or several, or is None."""
  names = value if isinstance(value, (tuple, list)) else [value]
  if value is not None and not (names and all(map(_is_name, names))):
    raise TypeError(
        f"axis_name={value!r} must be the name of a mesh axis, such as 'data', a"
        " tuple of names, or None."
    )
  return value


def _is_name(value: Any) -> bool:
  """As JAX has it: any hashable object, but none that is likely a slip."""
  try:
    hash(value)
  except TypeError:
    return False
  number = isinstance(value, (int, float, complex))
  return not (value is None or callable(value) or number)


def axes_of(axis_name: Any) -> tuple[Any, ...]:
  """The names of one mesh axis or several."""
  return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def check_bound(axis_name: Any) -> None:
  """Raises unless the call is inside shard_map, pmap or vmap over these axes."""
  for axis in axes_of(axis_name):
    _shards.index_along(axis, "axis_name")


def own(tree: Any, axis_name: Any) -> Any:
  """The same values as each device's own, for gradients that are its own as well.

  A checked ``shard_map`` sums the gradient with respect to what all devices share.
  Where nothing is checked, nothing is summed, and nothing need be done.
  """
  for axis in axes_of(axis_name):
    # It varies wherever it is checked what does.
    index = _shards.index_along(axis, "axis_name")

    def cast(x, axis=axis, index=index):
      return x if axis in varying(x) else _ascent.vary_as(x, index)

    tree = jax.tree.map(cast, tree)
  return tree


def check_own(grads: Any, axis_name: Any) -> None:
  """Raises if the type tells that a gradient is no device's own."""
  for axis in axes_of(axis_name):
    if axis not in varying(_shards.index_along(axis, "axis_name")):
      continue
    for path, leaf in jtu.tree_leaves_with_path(grads):
      if _arguments.is_float(leaf) and axis not in varying(leaf):
        cast = (
            f"jax.lax.pcast(params, {axis!r}, to='varying')"
            if hasattr(lax, "pcast")
            else f"jax.lax.pvary(params, {axis!r})"
        )
        raise ValueError(
            f"gradient{jtu.keystr(path)} is the same on all devices of axis_name="
            f"{axis!r}: where parameters are replicated, shard_map sums their gradient"
            " over the devices, which is as many times too large, and no device has one"
            " of its own to ascend along. Differentiate at parameters that vary, as in"
            f" jax.grad(loss)({cast}, batch), or take asam_jax.value_and_grad, which"
            " does so. For one ascent for all devices give average_ascent=True."
        )


def check_own_loss(value: Any, axis_name: Any) -> None:
  """Raises if the type tells that a loss, taken at own parameters, is no device's own.

  The gradient of a mean over N devices is, on each of them, an N-th of its own.
  """
  for axis in axes_of(axis_name):
    if axis in varying(lax.axis_index(axis)) and axis not in varying(value):
      raise ValueError(
          f"the loss is the same on all devices of axis_name={axis!r}, so it has a"
          " jax.lax.pmean or psum in it, and each device's gradient is but a share of"
          " its own, whose mean is too small. Let the loss be of the device's own rows,"
          " and average the value behind it; or, for one ascent for all devices, leave"
          " the pmean where it is and axis_name out."
      )


def check_own_rows(
    m: int, batch: Any, params: Any, axis_name: Any, param_specs: Any
) -> None:
  """Raises if devices with rows of their own would share a group's perturbation.

  As the types tell: along an axis over which rows differ, but not the parameters, a
  checked ``shard_map`` sums gradients; and shards can't each go their own way.
  """
  named = () if axis_name is None else axes_of(axis_name)
  rows = frozenset().union(*map(varying, jax.tree.leaves(batch))) - set(named)
  shared = [rows - varying(w) for w in jax.tree.leaves(params)]
  found = frozenset().union(*shared, rows & set(axes_in(param_specs)))
  if found:
    raise ValueError(
        f"m_sharpness={m} with axis_name={axis_name!r}, inside a shard_map whose"
        f" devices have different rows along {sorted(found, key=str)}: they would share"
        f" each perturbation, which so were one for more than {m} rows. Name these axes"
        " in axis_name; where they have different shards of the parameters, shard under"
        " jit, without shard_map."
    )


def mean(tree: Any, axis_name: Any) -> Any:
  """Each float leaf's mean over the devices, with all scalars in one vector."""
  leaves, treedef = jtu.tree_flatten(tree)
  floats = [i for i, x in enumerate(leaves) if _arguments.is_float(x)]
  arrays = [i for i in floats if jnp.ndim(leaves[i])]
  scalars = [i for i in floats if not jnp.ndim(leaves[i])]
  exchanged = [leaves[i] for i in arrays]
  if scalars:
    dtype = jnp.result_type(jnp.float32, *(leaves[i] for i in scalars))
    exchanged.append(jnp.stack([jnp.asarray(leaves[i], dtype) for i in scalars]))
  means = lax.pmean(exchanged, axis_name) if exchanged else []
  if scalars:
    means = [*means[:-1], *means[-1]]
  for i, x in zip(arrays + scalars, means, strict=True):
    leaves[i] = x.astype(_arguments.dtype_of(leaves[i]))
  return jtu.tree_unflatten(treedef, leaves)


def same(x: jax.Array, axis_name: Any) -> jax.Array:
  """Whether a scalar is the same on all devices."""
  highest, lowest = lax.pmax(jnp.stack([x, -x]), axis_name)
  return highest == -lowest
