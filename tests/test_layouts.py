"""Methods × layouts under ``jit``: one device's numbers, and what is exchanged."""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asam_jax
from tests import devices
from tests.devices import Spec

STEPS = 10
RNG = np.random.default_rng(0)
START = {
    "in": {"kernel": np.float32(RNG.normal(size=(16, 32)) / 4), "bias": np.zeros(32)},
    "out": {"kernel": np.float32(RNG.normal(size=(32, 8)) / 6), "bias": np.zeros(8)},
}
START = jax.tree.map(np.float32, START)
X = np.float32(RNG.normal(size=(32, 16)))
BATCH = {"x": X, "y": np.sin(X[:, :8])}
LEAVES = len(jax.tree.leaves(START))


def loss(w, batch, project=jnp.matmul):
  hidden = jnp.tanh(batch["x"] @ w["in"]["kernel"] + w["in"]["bias"])
  out = project(hidden, w["out"]["kernel"]) + w["out"]["bias"]
  return jnp.mean((out - batch["y"]) ** 2)


# On explicit meshes a loss says itself what can be sharded in two ways.


def gathered_loss(w, batch):
  return loss(jax.tree.map(lambda x: jax.sharding.reshard(x, Spec()), w), batch)


def tensor_loss(w, batch):
  rows: Any = {"out_sharding": Spec("data", None)}
  return loss(w, batch, functools.partial(jnp.matmul, **rows))


class Layout(NamedTuple):
  """A mesh, and the place of each parameter on it; the batch is along "data"."""

  kind: str
  shape: dict[str, int]
  specs: Any
  loss: Any = loss


WHOLE = jax.tree.map(lambda w: Spec(), START)
SHARDED = jax.tree.map(lambda w: Spec("data"), START)
TENSOR = {
    "in": {"kernel": Spec(None, "model"), "bias": Spec("model")},
    "out": {"kernel": Spec("model"), "bias": Spec()},
}
LAYOUTS = {
    "data parallel": Layout("Auto", {"data": 8}, WHOLE),
    "data parallel, explicit": Layout("Explicit", {"data": 8}, WHOLE),
    "FSDP": Layout("Auto", {"data": 8}, SHARDED),
    "FSDP, explicit": Layout("Explicit", {"data": 8}, SHARDED, gathered_loss),
    "data x tensor": Layout("Auto", {"data": 4, "model": 2}, TENSOR),
    "data x tensor, explicit": Layout(
        "Explicit", {"data": 4, "model": 2}, TENSOR, tensor_loss),
}


class Method(NamedTuple):
  """``passes`` gradients stand in its program; it takes one of them by itself."""

  tx: Any
  passes: int
  value_and_grad: Any = jax.value_and_grad
  needs_grad_fn: bool = True


# Numbers that a step exchanges at most for each sharded leaf, if it is not 1, a norm:
# other norms and products; the largest coordinate's size, place and owner.
SCALARS = {"looksam": 12, "gsam": 4, "auto_radius": 4, "adaptive_sam, p=1": 12}


def base():
  return optax.sgd(0.1, momentum=0.9)


METHODS = {
    "SGD": Method(base(), 1, needs_grad_fn=False),
    "adaptive_sam": Method(asam_jax.adaptive_sam(base(), 0.5), 2),
    "adaptive_sam, p=1": Method(asam_jax.adaptive_sam(base(), 0.5, p=1), 2),
    "sam": Method(asam_jax.sam(base(), 0.05), 2),
    "momentum_sam": Method(asam_jax.momentum_sam(base(), 0.5), 1, needs_grad_fn=False),
    "looksam": Method(asam_jax.looksam(base(), 0.5, k=3), 2),
    "gsam": Method(asam_jax.gsam(base(), 0.5, 0.1), 2),
    "auto_radius": Method(asam_jax.adaptive_sam(base(), asam_jax.auto_radius()), 2),
    "value_and_grad": Method(base(), 2, asam_jax.value_and_grad, False),
}


def step_of(method, loss):
  def step(params, state, batch):
    value, grads = method.value_and_grad(loss)(params, batch)
    extra = {"grad_fn": lambda w: jax.grad(loss)(w, batch)}
    updates, state = method.tx.update(
        grads, state, params, **extra if method.needs_grad_fn else {}
    )
    return optax.apply_updates(params, updates), state, value

  return step


def rows():
  """Every pair of a layout and a method, skipped where this JAX lacks the mesh."""
  for layout, (kind, *_) in LAYOUTS.items():
    lacks = kind == "Explicit" and not devices.HAS_EXPLICIT
    marks = pytest.mark.skipif(lacks, reason=devices.NO_EXPLICIT)
    for name in METHODS:
      yield pytest.param(layout, name, marks=marks)


TABLE = pytest.mark.parametrize(("layout", "name"), list(rows()))


class Result(NamedTuple):
  """The compiled step, its first parameters and state, and where ten steps lead."""

  compiled: Any
  start: Any
  end: Any


def train(method, params, batch, loss=loss):
  state = method.tx.init(params)
  step = jax.jit(step_of(method, loss), donate_argnums=(0, 1))
  compiled = step.lower(params, state, batch).compile()
  start = jax.tree.map(jnp.copy, (params, state))
  values = []
  for _ in range(STEPS):
    before = params
    params, state, value = compiled(params, state, batch)
    values.append(float(value))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  return Result(compiled, start, (params, state, values))


@functools.cache
def on_one_device(name):
  return train(METHODS[name], jax.tree.map(jnp.array, START), BATCH)


@functools.cache
def on(layout, name):
  kind, shape, specs, loss = LAYOUTS[layout]
  mesh = devices.make_mesh(tuple(shape.values()), tuple(shape), kind)
  with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
    params = devices.place(START, mesh, specs)
    batch = devices.place(BATCH, mesh, Spec("data"))
    return train(METHODS[name], params, batch, loss)


def arrays(tree):
  """The leaves that may be sharded."""
  return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]


@TABLE
def test_the_numbers_are_those_of_one_device(layout, name):
  got, expected = jax.device_get((on(layout, name).end, on_one_device(name).end))
  chex.assert_trees_all_close(got, expected, rtol=0, atol=2e-6)
  values = expected[-1]
  assert values[-1] < 0.9 * values[0]  # the steps are no small ones


@TABLE
def test_states_are_sharded_like_their_parameters(layout, name):
  result = on(layout, name)
  kind = LAYOUTS[layout]
  specs = jax.tree.leaves(kind.specs, is_leaf=lambda x: isinstance(x, Spec))
  # By shape; no two parameters have the same.
  specs = dict(zip(map(np.shape, jax.tree.leaves(START)), specs, strict=True))
  for params, state in (result.start, result.end[:2]):
    leaves = arrays((params, state))
    assert len(leaves) >= 2 * LEAVES  # momentum at least
    for leaf in leaves:
      place = jax.sharding.NamedSharding(leaf.sharding.mesh, specs[leaf.shape])
      assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@TABLE
def test_exchanges_are_multiples_of_those_of_sgd(layout, name):
  if (layout, name) == ("FSDP", "looksam") and not devices.HAS_EXPLICIT:
    pytest.skip(f"JAX {jax.__version__} gathers activations in LookSAM's branch")
  passes = METHODS[name].passes
  found = devices.exchanges(on(layout, name).compiled)
  of_sgd = devices.exchanges(on(layout, "SGD").compiled)
  assert {kind for kind, _ in of_sgd.arrays} <= {"all-reduce", "all-gather",
                                                 "reduce-scatter"}
  expected = {key: passes * n for key, n in of_sgd.arrays.items()}
  assert found.arrays == expected
  # Where all parameters are on all devices, so are their norms.
  sharded = 0 if "parallel" in layout else LEAVES
  assert found.scalars - of_sgd.scalars <= sharded * SCALARS.get(name, 1)


@TABLE
def test_arrays_are_donated(layout, name):
  result = on(layout, name)
  # Per device.
  shards = [
      leaf.sharding.shard_shape(leaf.shape) for leaf in arrays(result.end[:2])
  ]
  memory = result.compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= 4 * sum(map(math.prod, shards))
