"""Parameters that are sharded by hand, inside shard_map: sums over all shards.

Under ``jit`` the compiler sums over sharded arrays by itself, and nothing of this is
used. In a ``shard_map`` a device sees its shard alone, and only PartitionSpecs tell
what else there is.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
from jax import tree_util as jtu
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from asam_jax import _arguments

# The mesh axes that split each dimension of one leaf; empty if none does.
Split: TypeAlias = tuple[tuple[Any, ...], ...]


def _is_spec(node: Any) -> bool:
  return isinstance(node, PartitionSpec)


def check_specs(specs: Any) -> None:
  """Raises unless it is None or a pytree of PartitionSpecs."""
  for leaf in jtu.tree_leaves(specs, is_leaf=_is_spec):
    if not _is_spec(leaf):
      raise TypeError(
          f"param_specs has {leaf!r} among its leaves; give the"
          " jax.sharding.PartitionSpecs of the parameters, as in shard_map's in_specs:"
          " one for all leaves, or a pytree of them."
      )


def splits(specs: Any, params: Any) -> list[Split]:
  """How each leaf is split, in the order of ``jax.tree.leaves``."""
  try:
    spread = jtu.tree_map(
        lambda spec, part: [spec] * len(jtu.tree_leaves(part)),
        specs, params, is_leaf=_is_spec,
    )
  except (ValueError, TypeError) as error:
    raise ValueError(
        f"param_specs={specs!r} does not fit the parameters, which have the structure"
        f" {jtu.tree_structure(params)}; give one PartitionSpec for all leaves, or a"
        " pytree of them with this structure, as in shard_map's in_specs."
    ) from error
  each = jtu.tree_leaves(spread, is_leaf=_is_spec)
  return [
      _split(path, leaf, spec)
      for (path, leaf), spec in zip(
          jtu.tree_leaves_with_path(params), each, strict=True
      )
  ]


def _split(path: Any, leaf: Any, spec: PartitionSpec) -> Split:
  names = _names(spec)
  if len(names) > jnp.ndim(leaf):
    raise ValueError(
        f"param_specs has {spec} for params{jtu.keystr(path)} of shape"
        f" {jnp.shape(leaf)}, which has fewer dimensions."
    )
  while names and not names[-1]:
    names.pop()
  return tuple(names)


def _names(spec: PartitionSpec) -> list[tuple[Any, ...]]:
  """The mesh axes of each dimension."""
  return [
      () if entry is None else entry if isinstance(entry, tuple) else (entry,)
      for entry in spec
  ]


def axes_of(split: Split) -> tuple[Any, ...]:
  """All mesh axes that split a leaf."""
  return tuple(name for names in split for name in names)


def axes_in(specs: Any) -> list[Any]:
  """All mesh axes in a pytree of PartitionSpecs."""
  leaves = jtu.tree_leaves(specs, is_leaf=_is_spec)
  return [name for spec in leaves for names in _names(spec) for name in names]


def varying(x: Any) -> frozenset[Any]:
  """The mesh axes over which a checked ``shard_map`` sees x differ."""
  if not hasattr(jax, "typeof"):
    return frozenset()
  kind = jax.typeof(x)  # JAX 0.6 to 0.9 say `vma`, later ones `mat.varying`
  kind = getattr(kind, "mat", kind)
  return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())))


class Ascent(optax.GradientTransformationExtraArgs):
  """An ascent that knows how the parameters are sharded, for links around it."""

  param_specs: Any = None

  @classmethod
  def over(cls, param_specs: Any, init: Any, update: Any) -> "Ascent":
    tx = cls(init, update)
    tx.param_specs = param_specs
    return tx


def refuse(argument: str, param_specs: Any, what: str) -> None:
  """Raises for what has norms of its own, which would be those of a shard."""
  if param_specs is not None:
    raise ValueError(
        f"{argument} with param_specs={param_specs!r}: {what} would be that of each"
        " device's shard alone. Shard the parameters under jit, without shard_map,"
        " where nothing need be told."
    )


class Shards(NamedTuple):
  """Which mesh axes split which of some leaves.

  Each sum is one all-reduce over all these axes. A leaf of which the devices along an
  axis have copies is counted there once: each adds its part.

  Attributes:
    axes: the mesh axes that split any of the leaves.
    splits: how each leaf is split.
  """

  axes: tuple[Any, ...]
  splits: tuple[Split, ...]

  @classmethod
  def of(cls, splits: Sequence[Split]) -> "Shards | None":
    """None if no leaf is split."""
    axes = dict.fromkeys(name for split in splits for name in axes_of(split))
    return cls(tuple(axes), tuple(splits)) if axes else None

  def sums(self, sums: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums over the shards of each leaf, several [leaves], to sums over all, [1]."""
    copies = jnp.array([
        math.prod(_size(axis) for axis in self.axes if axis not in axes_of(split))
        for split in self.splits
    ])
    own = jnp.stack([jnp.sum(x / copies.astype(x.dtype)) for x in sums])
    return [total[None] for total in lax.psum(own, self.axes)]

  def largest(self, peaks: Sequence[jax.Array]) -> list[jax.Array]:
    """Likewise of the largest entries, which are >= 0."""
    own = jnp.stack([jnp.max(x) for x in peaks])
    return [peak[None] for peak in largest(own, self.axes)]

  def norm(self, leaves: Sequence[jax.Array], p: float) -> jax.Array:
    """||x||_p over all shards of the leaves; see ``_trees.norm``."""
    for axis in self.axes:
      index_along(axis)  # or it raises
    peaks = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves])
    (peak,) = self.largest([peaks])[0]
    if math.isinf(p):
      return peak
    usable = jnp.isfinite(peak) & (peak > 0)
    unit = jnp.where(usable, peak, 1)
    sums = jnp.stack([jnp.sum(jnp.abs(x / unit) ** p) for x in leaves])
    (total,) = self.sums([sums])[0]
    return jnp.where(usable, unit * total ** (1 / p), peak)

  def dot(self, tree: Any, other: Any) -> jax.Array:
    """<x, y> over all shards of the float leaves; see ``_trees.dot``."""
    products = [
        jnp.sum(_wide(x) * _wide(y)) if _arguments.is_float(x) else jnp.zeros(())
        for x, y in zip(jtu.tree_leaves(tree), jtu.tree_leaves(other), strict=True)
    ]
    (total,) = self.sums([jnp.stack(products)])[0]
    return total

  def losers(self, found: Sequence[Any], shards: Any) -> list[jax.Array]:
    """For each leaf, whether the first hit of all is elsewhere.

    ``found`` has for each leaf whether it has a hit here, and its indices in this
    shard. Leaves are in their order, entries in that of the whole arrays. A few
    numbers are exchanged, one after the other.
    """
    shapes = [shard.shape for shard in shards]
    beyond = jnp.iinfo(jnp.int32).max
    starts = map(_starts, self.splits, shapes)
    places = [
        [leaf, *(i + start for i, start in zip(indices, begin, strict=True))]
        for leaf, ((_, indices), begin) in enumerate(zip(found, starts, strict=True))
    ]
    candidates = [here for here, _ in found]
    for position in range(1 + max(map(len, shapes))):
      numbers = [place[position] if position < len(place) else 0 for place in places]
      pairs = list(zip(candidates, numbers, strict=True))
      own = jnp.stack([jnp.where(is_one, n, beyond) for is_one, n in pairs])
      lowest = lax.pmin(jnp.min(own), self.axes)
      candidates = [is_one & (n == lowest) for is_one, n in pairs]
    return [~is_first for is_first in candidates]


def shards_of(specs: Any, rules: Sequence[Any]) -> Shards | None:
  """The shards of the leaves of some rules; None without param_specs."""
  return None if specs is None else Shards.of([rule.split for rule in rules])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
  """``lax.pmax`` of x >= 0 that has a derivative, and hands every NaN on."""
  bad = jnp.isnan(x)
  peak, any_bad = lax.pmax((jnp.where(bad, 0, x), bad.astype(x.dtype)), axes)
  return jnp.where(any_bad > 0, jnp.nan, peak)


@largest.defjvp
def _largest_jvp(axes, primals, tangents):
  (x,), (dx,) = primals, tangents
  peak = largest(x, axes)
  hit = x == peak
  hits = lax.psum(hit.astype(x.dtype), axes)
  slope = lax.psum(jnp.where(hit, dx, 0), axes)
  return peak, slope / jnp.where(hits == 0, 1, hits)


def first(hits: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
  """Keeps the first True alone, in the order of the flattened array; its indices.

  Axis by axis: only scalars cross devices, and no index exceeds an axis.
  """
  indices = []
  for axis in range(hits.ndim):
    index = lax.broadcasted_iota(jnp.int32, hits.shape, axis)
    smallest = jnp.min(jnp.where(hits, index, hits.shape[axis]))
    hits = hits & (index == smallest)
    indices.append(smallest)
  return hits, indices


def check(
    specs: Any, rules: Sequence[Any], grads: Sequence[Any], axis_name: Any
) -> None:
  """Raises where the type of a leaf tells that it is no shard, or an untold one.

  ``axis_name`` is what names the axes over which the devices have copies, if told.
  """
  copied = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
  shards = shards_of(specs, rules)
  axes = shards.axes if shards else ()
  for axis in axes:
    if axis in copied:
      raise ValueError(
          f"axis_name={axis_name!r} and param_specs both name {axis!r}: gradients are"
          " averaged over devices that have copies of the parameters, not over those"
          " that have different shards. Leave it out of axis_name; where devices along"
          " it have different rows as well (FSDP), the transpose of the loss's"
          " all_gather sums the gradients."
      )
  checked = [axis for axis in axes if axis in varying(index_along(axis))]
  for rule, g in zip(rules, grads, strict=True):
    name, own = jtu.keystr(rule.path), axes_of(rule.split)
    untold = varying(rule.leaf) - set(own)
    untold = untold & set(axes) if axis_name is None else untold - set(copied)
    if untold:
      raise ValueError(
          f"params{name} differs over {sorted(untold, key=str)}, which"
          f" {f'axis_name={axis_name!r}' if axes == () else 'its PartitionSpec'} does"
          " not name: of parameters that are sharded by hand, each device would take"
          " the norm of its shard alone. Tell how they are sharded with"
          " param_specs=..., the PartitionSpecs of shard_map's in_specs; or shard them"
          " under jit, without shard_map; or name the axis in axis_name where devices"
          " share the parameters."
      )
    same = [axis for axis in checked if axis in own and axis not in varying(rule.leaf)]
    if same:
      raise ValueError(
          f"params{name} is the same on all devices along {same}, by which param_specs"
          " says that it is sharded; give the PartitionSpecs of shard_map's in_specs."
      )
    unsummed = varying(g) & set(checked) - set(own)
    if unsummed:
      raise ValueError(
          f"gradient{name} differs over {sorted(unsummed, key=str)}, along which its"
          " parameter is replicated: each device would move its copy elsewhere. Sum it"
          " with jax.lax.psum, or differentiate at the parameters as they came into"
          " shard_map, which does so."
      )


def index_along(axis: Any, argument: str = "param_specs") -> jax.Array:
  """This device's place along the axis; raises where there is no such axis."""
  try:
    return lax.axis_index(axis)
  except NameError:
    raise ValueError(
        f"{argument} names the axis {axis!r}, which is not bound here: it is for what"
        " runs inside shard_map (or pmap) over that axis. Under jit with sharded arrays"
        f" leave {argument} out."
    ) from None


def _size(axis: Any) -> int:
  return lax.psum(1, axis)


def _starts(split: Split, shape: tuple[int, ...]) -> list[Any]:
  """Where the shard of this device begins in the whole array."""
  starts: list[Any] = [0] * len(shape)
  for i, names in enumerate(split):
    for name in names:
      starts[i] = starts[i] * _size(name) + lax.axis_index(name)
    starts[i] = starts[i] * shape[i]
  return starts


def _wide(x: Any) -> jax.Array:
  return jnp.asarray(x, jnp.promote_types(_arguments.dtype_of(x), jnp.float32))
