"""In shard_map and pmap: whose loss it is, whose rows, and what each example weighs."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import asam_jax
from tests import devices
from tests.devices import NO_CHECK
from tests.devices import shard_map

# Newer JAX checks what varies over the mesh; what came before knows no while loops.
needs_check = pytest.mark.skipif(
    "check_vma" not in NO_CHECK, reason="this JAX checks no while loops")
in_both = pytest.mark.parametrize(
    "checked", [pytest.param(True, marks=needs_check), False])
no_pmap_warning = pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")

SIZE, SHARE, M = 4, 8, 4
ROWS = SIZE * SHARE
RNG = np.random.default_rng(0)
PARAMS: dict[str, Any] = {
    "kernel": np.float32(RNG.normal(size=(3, 5)) / 2),
    "bias": np.float32(RNG.normal(size=5) / 5),
}
X = np.float32(RNG.normal(size=(ROWS, 3)))
BATCH = X, np.sin(2 * X.sum(1))
# The first examples are real, the last device has padding alone.
WEIGHTS = np.float32(np.r_[np.ones(9), RNG.uniform(0.5, 2, 10), np.zeros(13)])


def losses(params, batch):
  x, y = batch
  return (jnp.tanh(x @ params["kernel"] + params["bias"]).sum(1) - y) ** 2


def loss(params, batch):
  return jnp.mean(losses(params, batch))


def averaged_loss(params, batch):
  return jax.lax.pmean(loss(params, batch), "data")


def own(params):
  if hasattr(jax.lax, "pcast"):
    return jax.lax.pcast(params, "data", to="varying")
  return jax.lax.pvary(params, "data")  # pyright: ignore


def run(step, *batch, checked=True, shape=(SIZE,), names=("data",), rows: Any = "data"):
  """``step(params, *batch)`` on every device, each with its rows."""
  options: Any = {} if checked else NO_CHECK
  mapped = shard_map(
      step, mesh=devices.make_mesh(shape, names, "Auto"),
      in_specs=(P(),) + (P(rows),) * len(batch), out_specs=P(), **options)
  return jax.device_get(jax.jit(mapped)(PARAMS, *batch))


def in_groups(m, fun=None, batch: Any = BATCH):
  """The mean over groups of m rows, in a Python loop on one device."""
  fun = jax.jit(fun or asam_jax.grad(loss, rho=0.3))
  results = [fun(PARAMS, jax.tree.map(lambda x, i=i: x[i : i + m], batch))
             for i in range(0, ROWS, m)]
  return jax.tree.map(lambda *xs: np.mean(xs, 0), *results)


def close(got, expected):
  chex.assert_trees_all_close(
      got, jax.device_get(expected), rtol=2e-5, atol=1e-6)


# A loss that is averaged over the devices already.

OPTIONS: dict[str, dict[str, Any]] = {
    "per device": {}, "common": {"average_ascent": True}, "per m": {"m_sharpness": M},
    "accumulated": {"accumulate": 2, "average_ascent": True},
}
ALREADY = r"the loss is the same on all devices of axis_name='data'.*pmean or psum"


@needs_check
@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_that_all_devices_share_is_refused(name):
  """Each gradient would be an N-th of the device's own, and so their mean."""
  fun = asam_jax.grad(averaged_loss, rho=0.3, axis_name="data", **OPTIONS[name])
  with pytest.raises(ValueError, match=ALREADY):
    run(fun, BATCH)


@needs_check
@pytest.mark.parametrize("m", [None, M])
def test_of_a_module_as_well(m):
  nnx = pytest.importorskip("flax.nnx")
  asam_nnx = pytest.importorskip("asam_jax.nnx")

  def step(params, batch):
    model = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})
    fun = asam_nnx.grad(
        lambda model, batch: averaged_loss(
            {name: model[name][...] for name in params}, batch),
        axis_name="data", m_sharpness=m)
    return fun(model, batch)["bias"][...]

  with pytest.raises(ValueError, match=ALREADY):
    run(step, BATCH)


@needs_check
def test_and_of_value_fn():
  tx = asam_jax.adaptive_sam(optax.sgd(1.0), 0.3, axis_name="data")

  def step(params, batch):
    return tx.update(
        jax.grad(loss)(own(params), batch), tx.init(params), params,
        value_fn=functools.partial(averaged_loss, batch=batch))[0]

  with pytest.raises(ValueError, match=ALREADY):
    run(step, BATCH)


@pytest.mark.parametrize("name", OPTIONS)
def test_unchecked_it_makes_no_difference(name):
  """There the transpose of a mean over the devices is one as well."""
  fun = asam_jax.grad(loss, rho=0.3, axis_name="data", **OPTIONS[name])
  averaged = asam_jax.grad(averaged_loss, rho=0.3, axis_name="data", **OPTIONS[name])
  if name != "accumulated":  # whose losses are averaged piece by piece
    m = {"per device": SHARE, "common": ROWS, "per m": M}[name]
    close(run(averaged, BATCH, checked=False), in_groups(m))
  close(run(averaged, BATCH, checked=False), run(fun, BATCH, checked=False))


@needs_check
def test_without_axis_name_it_is_the_whole_batch():
  close(run(asam_jax.grad(averaged_loss, rho=0.3), BATCH), in_groups(ROWS))


# Which devices have rows of their own.


@needs_check
def test_groups_need_to_know_whose_rows_they_have():
  fun = asam_jax.grad(loss, rho=0.3, m_sharpness=M)
  message = r"m_sharpness=4 with axis_name=None.*different rows along \['data'\]"
  with pytest.raises(ValueError, match=message):
    run(fun, BATCH)
  # Parameters that vary say so too.
  got = run(lambda w, batch: jax.lax.pmean(fun(own(w), batch), "data"), BATCH)
  close(got, in_groups(M))


@needs_check
def test_groups_of_shards_are_refused():
  specs = {"kernel": P("data"), "bias": P()}

  def gathered(params, batch):
    kernel = jax.lax.all_gather(params["kernel"], "data", tiled=True)
    return loss({**params, "kernel": kernel}, batch) / SIZE

  fun = asam_jax.grad(gathered, m_sharpness=M, param_specs=specs)
  mapped = shard_map(fun, mesh=devices.make_mesh((3,), ("data",), "Auto"),
                     in_specs=(specs, P("data")), out_specs=specs)
  batch = jax.tree.map(lambda x: x[:24], BATCH)
  with pytest.raises(ValueError, match=r"different rows along \['data'\]"):
    jax.jit(mapped)(PARAMS, batch)


@in_both
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_over_two_axes(name, checked):
  axes = ("data", "model")
  fun = asam_jax.grad(loss, rho=0.3, axis_name=axes, **OPTIONS[name])
  got = run(fun, BATCH, checked=checked, shape=(2, 2), names=axes, rows=axes)
  m = {"per device": SHARE, "per m": M}.get(name, ROWS)
  close(got, in_groups(m))


@in_both
def test_rows_over_one_of_two_axes(checked):
  fun = asam_jax.grad(loss, rho=0.3, axis_name="data")
  got = run(fun, BATCH, checked=checked, shape=(2, 4), names=("data", "model"))
  close(got, in_groups(ROWS // 2))


@pytest.mark.skipif(not devices.HAS_EXPLICIT, reason=devices.NO_EXPLICIT)
@pytest.mark.parametrize("p", [1, 2])
def test_other_axes_may_be_left_to_the_compiler(p):
  """Data parallel by hand, with parameters that the compiler has sharded."""
  mesh = devices.make_mesh((2, 4), ("data", "model"), "Auto")
  params = devices.place(
      {**PARAMS, "kernel": PARAMS["kernel"][:, :4], "bias": PARAMS["bias"][:4]},
      mesh, {"kernel": P(None, "model"), "bias": P("model")})
  batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, P("data")))
  fun = asam_jax.grad(loss, rho=0.3, p=p, axis_name="data")
  by_hand: Any = {"axis_names": {"data"}}
  mapped = shard_map(
      fun, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), **by_hand)
  got = jax.device_get(jax.jit(mapped)(params, batch))
  one = jax.jit(asam_jax.grad(loss, rho=0.3, p=p))
  halves = jax.tree.map(lambda x: x.reshape(2, 16, *x.shape[1:]), BATCH)
  each = [one(jax.device_get(params), jax.tree.map(lambda x, i=i: x[i], halves))
          for i in range(2)]
  close(got, jax.tree.map(lambda a, b: (a + b) / 2, *each))


# What else comes out, and what an example weighs.


@in_both
@pytest.mark.parametrize("name", OPTIONS)
def test_aux_is_a_device_s_own(name, checked):
  def with_aux(params, batch):
    value = loss(params, batch)
    return value, {"positive": jnp.sum(batch[0] > 0), "value": value}

  fun = asam_jax.value_and_grad(
      with_aux, has_aux=True, rho=0.3, axis_name="data", **OPTIONS[name])

  def step(params, batch):
    (value, aux), grads = fun(params, batch)
    means = jax.lax.pmean((value, aux["value"]), "data")
    return means, jax.lax.psum(aux["positive"], "data"), grads

  (value, again), positive, grads = run(step, BATCH, checked=checked)
  np.testing.assert_allclose(value, loss(PARAMS, BATCH), rtol=1e-6)
  np.testing.assert_allclose(again, value, rtol=1e-6)
  assert positive == (X > 0).sum()
  m = {"per device": SHARE, "per m": M}.get(name, ROWS)
  close(grads, in_groups(m))


def weighted_by(total):
  """A group's share of the weighted mean, times the number of groups."""
  return lambda params, batch: jnp.sum(batch[1] * losses(params, batch[0])) / total


@in_both
@pytest.mark.parametrize("m", [None, M])
def test_weights_that_differ_with_an_ascent_each(m, checked):
  """At rho = 0, the gradient of the real examples; else an ascent for each group."""
  rows = m or SHARE

  def step(rho, params, batch):
    total = jax.lax.pmean(jnp.sum(batch[1]), "data") * rows / SHARE
    return asam_jax.grad(
        weighted_by(total), rho=rho, axis_name="data", m_sharpness=m)(params, batch)

  batch = BATCH, WEIGHTS
  total = WEIGHTS.sum() * rows / ROWS
  for rho in (0.0, 0.3):
    got = run(functools.partial(step, rho), batch, checked=checked)
    close(got, in_groups(rows, asam_jax.grad(weighted_by(total), rho=rho), batch))
    if not rho:
      whole = jax.grad(lambda w: jnp.average(losses(w, BATCH), weights=WEIGHTS))
      close(got, whole(PARAMS))


@pytest.mark.parametrize("name", OPTIONS)
@no_pmap_warning
def test_pmap(name):
  fun = asam_jax.grad(loss, rho=0.3, axis_name="data", **OPTIONS[name])
  shares = jax.tree.map(lambda x: x.reshape(SIZE, SHARE, *x.shape[1:]), BATCH)
  mapped = jax.pmap(
      fun, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:SIZE])
  got = jax.device_get(mapped(PARAMS, shares))
  m = {"per device": SHARE, "per m": M}.get(name, ROWS)
  for i in range(SIZE):
    close(jax.tree.map(lambda g, i=i: g[i], got), in_groups(m))
