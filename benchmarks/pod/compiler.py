"""The compiler of a TPU pod, on a machine without one."""

from collections.abc import Callable
import importlib.metadata
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXIS = "data"
# Leaves of fewer dimensions, such as biases and scales, are small: each device has all
# of them.
SHARDED_DIMENSIONS = 2

# What libtpu would otherwise ask of a cloud's metadata server, and the lock by which
# it keeps a TPU for one process; here is no TPU.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def missing() -> str | None:
  """Why there is no TPU compiler here, or None if there is one."""
  if importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed: pip install 'asam_jax[pod]' (Linux x86-64 only)"
  return None


def version() -> str:
  """Of libtpu."""
  return importlib.metadata.version("libtpu")


def pod_mesh(chips: int, generation: str = "v5e") -> Mesh:
  """A mesh over a square slice of a pod whose devices exist for the compiler alone."""
  side = math.isqrt(chips)
  if side**2 != chips or side % 2:
    raise ValueError(f"chips={chips}: a slice is 2 x 2, 4 x 4, 8 x 8 or 16 x 16.")
  reason = missing()
  if reason:
    raise RuntimeError(reason)
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  topology = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{generation}:{side}x{side}"
  )
  devices = mesh_utils.create_device_mesh((chips,), topology.devices)
  return Mesh(np.asarray(devices), (AXIS,))


def placed(tree: Any, mesh: Mesh, sharded: bool, parts: int = 0) -> Any:
  """Abstract arrays with their place: a copy on each device, or a part.

  A part is along the first axis that divides by ``parts`` (by default the number of
  devices), because the last one is what a TPU lays out in tiles of 128.
  """
  parts = parts or mesh.size

  def place(leaf: Any) -> jax.ShapeDtypeStruct:
    spec: list[str | None] = [None] * len(leaf.shape)
    divisible = [i for i, size in enumerate(leaf.shape) if size % parts == 0]
    if sharded and len(leaf.shape) >= SHARDED_DIMENSIONS and divisible:
      spec[divisible[0]] = AXIS
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, tree)


def bytes_per_device(tree: Any) -> int:
  """The bytes of placed arrays on one device."""
  return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
  )


def placed_batch(tree: Any, mesh: Mesh) -> Any:
  """A batch with its examples shared out."""
  sharding = NamedSharding(mesh, PartitionSpec(AXIS))
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      tree,
  )


def compile_step(step: Callable[..., Any], params: Any, state: Any, batch: Any) -> Any:
  """The step for these abstract arrays; parameters and state are donated."""
  # What comes out lies where it came in, as a training loop needs.
  out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
  jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out, None))
  return jitted.lower(params, state, batch).compile()
