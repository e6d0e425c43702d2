"""Measures of parameters that are sharded over devices: the numbers of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asam_jax import Geometry
from asam_jax import sharpness

SPEC = jax.sharding.PartitionSpec
SHAPES = {"kernel": (8, 16), "bias": (16,), "last": (16, 8)}
MEASURES = {
    "worst case": lambda loss, w, g: sharpness.worst_case(
        loss, w, 0.3, geometry=g, steps=6),
    "average case": lambda loss, w, g: sharpness.average_case(
        loss, w, 0.3, geometry=g, distribution="uniform", samples=4),
    "trace": lambda loss, w, g: sharpness.hessian_trace(
        loss, w, geometry=g, samples=4),
}


def parameters():
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) / 3
          for name, shape in SHAPES.items()}


def loss(w):
  x = jnp.cos(jnp.arange(32.0)).reshape(4, 8)
  return jnp.mean(jnp.square(jnp.tanh(x @ w["kernel"] + w["bias"]) @ w["last"]))


def sharded(params):
  mesh = jax.make_mesh((jax.device_count(),), ("d",), **axis_types("Auto"))
  return jax.device_put(params, jax.sharding.NamedSharding(mesh, SPEC("d")))


def axis_types(kind):
  types = getattr(jax.sharding, "AxisType", None)
  return {} if types is None else {"axis_types": (getattr(types, kind),)}


@pytest.mark.parametrize(
    ("name", "p"),
    [("worst case", 1), ("worst case", 2), ("worst case", np.inf),
     ("average case", 2), ("trace", 2)])
def test_equals_one_device(name, p):
  run = jax.jit(lambda w: MEASURES[name](loss, w, Geometry(p=p)).value)
  params = parameters()
  compiled = run.lower(sharded(params)).compile()
  np.testing.assert_allclose(compiled(sharded(params)), run(params), rtol=1e-3)
  # Each device draws and moves its own shards; none is sent to where it belongs.
  assert not re.findall(r"collective-permute|all-to-all", compiled.as_text())


def test_equals_one_device_on_an_explicit_mesh():
  if not hasattr(jax, "set_mesh"):
    pytest.skip(f"JAX {jax.__version__} has no explicit meshes")
  mesh = jax.make_mesh((jax.device_count(),), ("d",), **axis_types("Explicit"))
  params = parameters()
  worst = MEASURES["worst case"]

  def of_whole(w):
    return loss(jax.tree.map(lambda x: jax.sharding.reshard(x, SPEC()), w))

  with jax.set_mesh(mesh):
    placed = jax.device_put(params, jax.sharding.NamedSharding(mesh, SPEC("d")))
    result = jax.jit(lambda w: worst(of_whole, w, Geometry()))(placed)
  expected = jax.jit(lambda w: worst(loss, w, Geometry()).value)(params)
  np.testing.assert_allclose(result.value, expected, rtol=1e-4)
  for x, w in zip(
      jax.tree.leaves(result.perturbation), jax.tree.leaves(placed), strict=True):
    assert x.sharding.is_equivalent_to(w.sharding, x.ndim)
