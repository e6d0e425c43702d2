"""What the tests on several devices share: meshes, and what a program exchanges."""

import inspect
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
import numpy as np

from benchmarks.pod import program

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


def exchanges(compiled: Any, scalars: bool = False) -> dict[str, int]:
  """Bytes that a program exchanges, by kind; those of scalars apart."""
  found: dict[str, int] = {}
  for each in program.collectives(compiled.as_text()):
    if (each.bytes <= 16) == scalars:
      found[each.kind] = found.get(each.kind, 0) + each.bytes
  return found
