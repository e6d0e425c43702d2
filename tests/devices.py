"""What the tests on several devices share: meshes, and what a program exchanges."""

import collections
import inspect
import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
import numpy as np

from benchmarks.pod import program

# Where a mesh's axes are Explicit, shardings are part of the types.
HAS_EXPLICIT = hasattr(jax, "set_mesh")
NO_EXPLICIT = f"JAX {jax.__version__} has no explicit meshes"
if hasattr(jax, "shard_map"):
  shard_map = jax.shard_map
else:
  from jax.experimental.shard_map import shard_map  # pyright: ignore
NO_CHECK = {
    name: False
    for name in ("check_vma", "check_rep")
    if name in inspect.signature(shard_map).parameters
}


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...], kind: str) -> Mesh:
  """A mesh over the first devices; ``kind`` is "Auto" or "Explicit"."""
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  if not HAS_EXPLICIT:
    assert kind == "Auto", NO_EXPLICIT
    return Mesh(devices, names)
  types = (getattr(jax.sharding.AxisType, kind),) * len(shape)
  return Mesh(devices, names, axis_types=types)


def place(tree: Any, mesh: Mesh, spec: Any) -> Any:
  """The tree on the mesh; ``spec`` is one for all leaves, or a tree of them."""
  if isinstance(spec, Spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))
  return {name: place(leaf, mesh, spec[name]) for name, leaf in tree.items()}


class Exchanges(NamedTuple):
  """What a program sends between devices.

  Attributes:
    arrays: how often each (kind, elements) is exchanged.
    scalars: how many numbers are exchanged alone, or a few at a time.
  """

  arrays: collections.Counter[tuple[str, int]]
  scalars: int


FEW = 4  # elements
_KINDS = "|".join(program.COLLECTIVES)
_EXCHANGE = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


def exchanges(compiled: Any) -> Exchanges:
  """Read from the compiled program; what stands in a loop counts once."""
  arrays, scalars = collections.Counter(), 0
  for shapes, kind in _EXCHANGE.findall(compiled.as_text()):
    for dimensions in _SHAPE.findall(shapes):
      size = math.prod(int(n) for n in dimensions.split(",") if n)
      if size > FEW:
        arrays[kind, size] += 1
      else:
        scalars += size
  return Exchanges(arrays, scalars)
