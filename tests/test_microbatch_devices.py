"""Microbatches of a sharded batch: each device keeps its rows; and weights."""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asam_jax
from benchmarks.pod import program
from tests import devices
from tests.devices import Spec

DEVICES, ROWS = 8, 64
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(1024, 32)))
LARGE = {"x": X, "y": np.sin(X.sum(1))}  # the work on rows outweighs all other
LARGE_SIZE = 512
BATCH = jax.tree.map(lambda x: x[:ROWS], LARGE)
# The first examples are real, the last are padding; in between are other weights.
WEIGHTS: Any = np.float32(np.r_[np.ones(20), RNG.uniform(0.5, 2, 20), np.zeros(24)])
W = {
    "kernel": np.float32(0.2 * RNG.normal(size=(32, 16))),
    "bias": np.float32(0.1 * RNG.normal(size=16)),
}
MESHES = pytest.mark.parametrize("kind", [
    "Auto",
    pytest.param("Explicit", marks=pytest.mark.skipif(
        not devices.HAS_EXPLICIT, reason=devices.NO_EXPLICIT)),
])


def losses(w, batch):
  out = jnp.tanh(batch["x"] @ w["kernel"] + w["bias"]).sum(1)
  return (out - batch["y"]) ** 2


def loss(w, batch):
  return jnp.mean(losses(w, batch))


def weighted(w, batch, v):
  return jnp.sum(v * losses(w, batch)) / jnp.sum(v)


def total(batch, v):
  return jnp.sum(v)


def close(got, expected):
  chex.assert_trees_all_close(got, expected, rtol=2e-5, atol=1e-6)


METHODS = {
    "gradient": asam_jax.microbatched(jax.value_and_grad(loss), LARGE_SIZE),
    "one ascent": asam_jax.value_and_grad(loss, accumulate=LARGE_SIZE),
    "one ascent each": asam_jax.microbatched(asam_jax.value_and_grad(loss), LARGE_SIZE),
}


@functools.cache
def compiled(name, kind):
  """The program on one device (kind=None) or on eight, and its arguments."""
  if kind is None:
    return jax.jit(METHODS[name]).lower(W, LARGE).compile(), (W, LARGE)
  mesh = devices.make_mesh((DEVICES,), ("data",), kind)
  args = devices.place(W, mesh, Spec()), devices.place(LARGE, mesh, Spec("data"))
  return jax.jit(METHODS[name]).lower(*args).compile(), args


@MESHES
@pytest.mark.parametrize("name", METHODS)
def test_each_device_works_on_its_own_rows(name, kind):
  (one, whole), (many, shared) = compiled(name, None), compiled(name, kind)
  close(jax.device_get(many(*shared)), jax.device_get(one(*whole)))
  # What each device does for all parameters, once a pass, does not fall.
  flops = program.cost(one).flops / program.cost(many).flops
  assert flops > 0.8 * DEVICES
  # One sum of the gradients stands in each pass, and no row is sent.
  passes = 1 if name == "gradient" else 2
  sizes = [w.size for w in W.values()]
  assert devices.exchanges(many).arrays == {
      ("all-reduce", size): passes for size in sizes
  }


@pytest.mark.skipif(not devices.HAS_EXPLICIT, reason=devices.NO_EXPLICIT)
def test_a_size_that_devices_can_not_share():
  mesh = devices.make_mesh((DEVICES,), ("data",), "Explicit")
  args = devices.place(W, mesh, Spec()), devices.place(BATCH, mesh, Spec("data"))
  fun = asam_jax.microbatched(jax.grad(loss), 4)
  with pytest.raises(ValueError, match="size=4 is no multiple of the 8 devices"):
    jax.jit(fun)(*args)
  # Where nothing is said of the rows, the compiler moves them.
  auto = devices.make_mesh((DEVICES,), ("data",), "Auto")
  args = devices.place(W, auto, Spec()), devices.place(BATCH, auto, Spec("data"))
  close(jax.device_get(jax.jit(fun)(*args)), jax.jit(jax.grad(loss))(W, BATCH))


def placed(mesh, whole, spec):
  """The loss, and all its arguments, with parameters sharded as ``spec`` says."""
  if whole:  # explicit meshes want to be told that parameters are gathered
    gather = lambda w: jax.tree.map(lambda x: jax.sharding.reshard(x, Spec()), w)  # noqa: E731
    fun = lambda w, batch, v: weighted(gather(w), batch, v)  # noqa: E731
  else:
    fun = weighted
  rows = devices.place({"batch": BATCH, "v": WEIGHTS}, mesh,
                       {"batch": Spec("data"), "v": Spec("data")})
  return fun, (devices.place(W, mesh, spec), rows["batch"], rows["v"])


@MESHES
@pytest.mark.parametrize("spec", [Spec(), Spec("data")], ids=["whole", "FSDP"])
@pytest.mark.parametrize("weights", [None, total])
def test_sharded_parameters_and_weights(weights, spec, kind):
  """Sums over the microbatches are placed as the results are."""
  mesh = devices.make_mesh((DEVICES,), ("data",), kind)
  fun, args = placed(mesh, kind == "Explicit", spec)
  split = functools.partial(
      asam_jax.microbatched, size=16, argnums=(1, 2), weights=weights)
  ones = np.ones_like(WEIGHTS)
  if weights is None:
    args = *args[:2], jax.device_put(ones, args[2].sharding)
  v = ones if weights is None else WEIGHTS
  within = jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext()
  with within:
    got = jax.jit(asam_jax.value_and_grad(fun, accumulate=split))(*args)
    each = jax.jit(split(asam_jax.grad(fun)))(*args)
  close(jax.device_get(got), jax.jit(asam_jax.value_and_grad(weighted))(W, BATCH, v))
  close(jax.device_get(each), jax.jit(split(asam_jax.grad(weighted)))(W, BATCH, v))
  if kind == "Explicit":
    for grad, w in zip(*map(jax.tree.leaves, (got[1], args[0])), strict=True):
      assert grad.sharding.is_equivalent_to(w.sharding, w.ndim)


# Weights: the gradient of the real examples alone, wherever they are.


def of_real_examples(method):
  keep = WEIGHTS > 0
  real = jax.tree.map(lambda x: x[keep], BATCH)
  return jax.jit(method(weighted))(W, real, WEIGHTS[keep])


@pytest.mark.parametrize("method", [jax.value_and_grad, asam_jax.value_and_grad])
def test_weights_under_jit(method):
  mesh = devices.make_mesh((DEVICES,), ("data",), "Auto")
  args = devices.place(W, mesh, Spec()), *devices.place(
      {"batch": BATCH, "weights": WEIGHTS}, mesh,
      {"batch": Spec("data"), "weights": Spec("data")}).values()
  close(jax.device_get(jax.jit(method(weighted))(*args)), of_real_examples(method))


@pytest.mark.parametrize("accumulate", [False, True])
def test_weights_in_shard_map(accumulate):
  # The last device has padding alone.
  assert WEIGHTS[-ROWS // DEVICES :].sum() == 0

  def scaled(w, batch, v, share):
    return jnp.sum(v * losses(w, batch)) / share

  def step(w, batch, v):
    # Not the device's sum: the mean of the devices' sums, the same for all.
    share = jax.lax.pmean(jnp.sum(v), "data")
    rows = len(v)
    split = functools.partial(asam_jax.microbatched, size=2, argnums=(1, 2))
    value, grads = asam_jax.value_and_grad(
        scaled, axis_name="data", average_ascent=True,
        accumulate=split if accumulate else None,
    )(w, batch, v, share * 2 / rows if accumulate else share)
    return jax.lax.pmean(value, "data"), grads

  mesh = devices.make_mesh((DEVICES,), ("data",), "Auto")
  # The older check knows no loops.
  options = {} if devices.HAS_EXPLICIT else devices.NO_CHECK
  run = devices.shard_map(
      step, mesh=mesh, in_specs=(Spec(), Spec("data"), Spec("data")),
      out_specs=(Spec(), Spec()), **options)
  close(jax.jit(run)(W, BATCH, WEIGHTS), of_real_examples(asam_jax.value_and_grad))


@pytest.mark.parametrize("size", [1, 8])
def test_weights_of_microbatches(size):
  # At size 1, 24 microbatches have weight 0, and a loss and a gradient of 0 / 0.
  split = functools.partial(
      asam_jax.microbatched, size=size, argnums=(1, 2), weights=total)
  got = jax.jit(split(jax.value_and_grad(weighted)))(W, BATCH, WEIGHTS)
  close(got, of_real_examples(jax.value_and_grad))
  got = jax.jit(asam_jax.value_and_grad(weighted, accumulate=split))(W, BATCH, WEIGHTS)
  close(got, of_real_examples(asam_jax.value_and_grad))


def test_weights_with_an_ascent_for_each():
  split = functools.partial(
      asam_jax.microbatched, size=8, argnums=(1, 2), weights=total)
  got = jax.jit(split(asam_jax.value_and_grad(weighted)))(W, BATCH, WEIGHTS)
  one = jax.jit(asam_jax.value_and_grad(weighted))
  pieces = [jax.tree.map(lambda x, i=i: x[i::8], (BATCH, WEIGHTS)) for i in range(8)]
  weights = [v.sum() for _, v in pieces]
  expected = jax.tree.map(
      lambda *xs: np.average(np.array(xs), axis=0, weights=weights),
      *[one(W, *piece) for piece in pieces])
  close(got, expected)


def test_no_weight_at_all():
  split = functools.partial(
      asam_jax.microbatched, size=8, argnums=(1, 2), weights=total)
  got = jax.jit(split(jax.value_and_grad(weighted)))(W, BATCH, 0 * WEIGHTS)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("weight", [1, 2.5])
def test_a_weight_may_be_a_python_number(weight):
  fun = asam_jax.microbatched(jax.grad(loss), 4, weights=lambda batch: weight)
  plain = asam_jax.microbatched(jax.grad(loss), 4)
  chex.assert_trees_all_close(
      fun(W, BATCH), plain(W, BATCH), rtol=1e-5, atol=1e-6)


def test_integer_weights_and_counts():
  def counted(x):
    return x.mean(), jnp.sum(x > 0)

  x = jnp.array([1.0, 3.0, 5.0, -1.0])
  fun = asam_jax.microbatched(counted, 1, argnums=0, weights=lambda x: jnp.sum(x > 2))
  mean, count = fun(x)
  assert mean == 4
  assert count == 3  # of all rows: counts are added up as they are


def test_weights_that_are_none():
  with pytest.raises(TypeError, match=r"(?s)weights=.* must be a function"):
    asam_jax.microbatched(loss, 4, weights=WEIGHTS)
  with pytest.raises(ValueError, match=r"weights gave an array of shape \(4,\)"):
    asam_jax.microbatched(loss, 4, weights=lambda batch: batch["y"])(W, BATCH)
  with pytest.raises(TypeError, match="weights gave a result of dtype bool"):
    asam_jax.microbatched(loss, 4, weights=lambda batch: jnp.any(batch["y"]))(W, BATCH)
