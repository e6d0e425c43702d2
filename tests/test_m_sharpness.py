"""One perturbation per m examples: the same step on any number of devices."""

import contextlib
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import asam_jax
from benchmarks.pod import program
from tests.devices import HAS_EXPLICIT
from tests.devices import make_mesh
from tests.devices import NO_CHECK
from tests.devices import NO_EXPLICIT
from tests.devices import place
from tests.devices import shard_map

ROWS = 32
RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(RNG.normal(size=(8, 16)) / 3, jnp.float32),
    "bias": jnp.zeros(16),
    "out": jnp.asarray(RNG.normal(size=(16, 1)) / 4, jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(ROWS, 8)), jnp.float32)
BATCH = X, jnp.sin(jnp.sum(X, 1, keepdims=True))
kinds = pytest.mark.parametrize("kind", ["Auto", pytest.param(
    "Explicit", marks=pytest.mark.skipif(not HAS_EXPLICIT, reason=NO_EXPLICIT))])


def loss(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
  return jnp.mean((hidden @ params["out"] - y) ** 2)


def group(i, m):
  return jax.tree.map(lambda x: x[i * m : (i + 1) * m], BATCH)


@functools.cache
def one_by_one(m):
  """The mean over the groups, in a Python loop."""
  fun = jax.jit(asam_jax.value_and_grad(loss, rho=0.3, with_info=True))
  results = [fun(PARAMS, group(i, m)) for i in range(ROWS // m)]
  return jax.tree.map(lambda *xs: np.mean(xs, 0), *results)


def compiled(fun, devices, kind):
  mesh = make_mesh((devices,), ("data",), kind)
  args = place(PARAMS, mesh, P()), jax.tree.map(
      lambda x: place(x, mesh, P("data")), BATCH)
  within: Any = jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext()
  with within:
    run = jax.jit(fun).lower(*args).compile()
    return run, jax.device_get(run(*args))


def flops(run):
  costs = run.cost_analysis()
  return (costs[0] if isinstance(costs, list) else costs)["flops"]


@kinds
@pytest.mark.parametrize("m", [2, 4, 16, 32])  # below, at and above 32 / 8 rows
def test_the_same_step_on_any_number_of_devices(kind, m):
  fun = asam_jax.value_and_grad(loss, rho=0.3, m_sharpness=m, with_info=True)
  value, grads, info = one_by_one(m)
  found = {}
  for devices in (1, 8) if m in (2, 32) else (1, 2, 4, 8):
    run, (got_value, got, got_info) = compiled(fun, devices, kind)
    found[devices] = flops(run)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    chex.assert_trees_all_close(got, grads, rtol=2e-6, atol=2.5e-7)
    chex.assert_trees_all_close(got_info, info, rtol=2e-5, atol=2e-6)
  assert found[8] < found[1] / 4


@kinds
def test_one_all_reduce_where_a_device_has_whole_groups(kind):
  plain, _ = compiled(jax.value_and_grad(loss), 8, "Auto")
  run, _ = compiled(asam_jax.value_and_grad(loss, m_sharpness=4), 8, kind)

  def exchanged(run):
    # On CPU the loop that keeps the norm in range asks whether all are done.
    return sorted((each.kind, each.bytes) for each in program.collectives(run.as_text())
                  if each.bytes > 4)

  assert sum(size for _, size in exchanged(run)) == sum(
      size for _, size in exchanged(plain))
  assert {kind for kind, _ in exchanged(run)} == {"all-reduce"}


def test_m_of_the_whole_batch_is_the_plain_step():
  fun = asam_jax.grad(loss, rho=0.3, m_sharpness=ROWS)
  chex.assert_trees_all_close(
      fun(PARAMS, BATCH), asam_jax.grad(loss, rho=0.3)(PARAMS, BATCH), rtol=1e-5,
      atol=1e-6)


@pytest.mark.parametrize("options", [{}, NO_CHECK])
def test_within_a_device_of_shard_map(options):
  if not options and "check_vma" not in NO_CHECK:
    pytest.skip("this JAX checks no while loops")
  fun = asam_jax.value_and_grad(
      loss, rho=0.3, m_sharpness=4, axis_name="data", with_info=True)
  run = shard_map(
      lambda params, batch: fun(params, batch)[1:],
      mesh=make_mesh((4,), ("data",), "Auto"),
      in_specs=(P(), P("data")), out_specs=P(), **options)
  chex.assert_trees_all_close(
      jax.jit(run)(PARAMS, BATCH), one_by_one(4)[1:], rtol=2e-5, atol=2e-6)


def test_results_of_the_groups():
  """Floats are averaged, integers added up; further arguments go to every group."""

  def with_aux(batch, params, scale, *, shift):
    value = scale * loss(params, batch) + shift
    return value, {"rows": len(batch[0]), "loss": value.astype(jnp.bfloat16)}

  fun = asam_jax.value_and_grad(with_aux, argnums=1, has_aux=True, m_sharpness=8)
  (value, aux), _ = jax.jit(fun)(BATCH, PARAMS, jnp.float32(2), shift=1.0)
  np.testing.assert_allclose(value, 2 * loss(PARAMS, BATCH) + 1, rtol=1e-5)
  assert aux["rows"] == ROWS
  assert aux["loss"].dtype == jnp.bfloat16


@pytest.mark.parametrize("argnums", [-2, (-2,)])
def test_arguments_may_be_counted_from_the_end(argnums):
  fun = asam_jax.value_and_grad(loss, argnums, rho=0.3, m_sharpness=4, with_info=True)
  value, grads, info = jax.jit(fun)(PARAMS, BATCH)
  grads = grads if argnums == -2 else grads[0]
  chex.assert_trees_all_close(
      (value, grads, info), one_by_one(4), rtol=2e-5, atol=2e-6)


def test_a_group_that_is_not_finite_counts_as_one_step():
  x, y = BATCH
  bad = x.at[jnp.array([1, 9])].set(jnp.nan), y
  fun = asam_jax.value_and_grad(loss, m_sharpness=8, with_info=True)
  assert fun(PARAMS, bad)[-1].nonfinite_steps == 1


def test_the_gradient_can_t_feed_a_second_asam():
  grads = asam_jax.grad(loss, m_sharpness=8)(PARAMS, BATCH)
  tx = asam_jax.perturbed_gradient(asam_jax.ascent())
  with pytest.raises(ValueError, match="ASAM twice"):
    tx.update(grads, tx.init(PARAMS), PARAMS,
              grad_fn=lambda w: jax.grad(loss)(w, BATCH))


def test_arguments_that_do_not_fit():
  bad: tuple[Any, ...] = (0, -1, 2.0, True)
  for m in bad:
    with pytest.raises((ValueError, TypeError), match=r"m_sharpness=.* int >= 1"):
      asam_jax.value_and_grad(loss, m_sharpness=m)
  with pytest.raises(ValueError, match=r"m_sharpness=5 does not divide .* 32 rows"):
    asam_jax.value_and_grad(loss, m_sharpness=5)(PARAMS, BATCH)
  with pytest.raises(ValueError, match=r"leaves with \[16, 32\] rows"):
    asam_jax.value_and_grad(loss, m_sharpness=4)(PARAMS, (X, X[:16]))
  with pytest.raises(ValueError, match="m_sharpness=4 and accumulate=8"):
    asam_jax.value_and_grad(loss, m_sharpness=4, accumulate=8)
  with pytest.raises(ValueError, match="m_sharpness=4 and average_ascent=True"):
    asam_jax.value_and_grad(
        loss, m_sharpness=4, axis_name="data", average_ascent=True)
  with pytest.raises(TypeError, match=r"argnums=\(1,\) with 1 positional"):
    asam_jax.value_and_grad(lambda w: jnp.sum(w["bias"]), m_sharpness=4)(PARAMS)
  split = lambda params, x, y: loss(params, (x, y))  # noqa: E731
  with pytest.raises(ValueError, match=r"another argument .* has 32 rows"):
    asam_jax.value_and_grad(split, m_sharpness=4)(PARAMS, *BATCH)
  with pytest.raises(TypeError, match="dtype bool has no mean over the groups"):
    asam_jax.value_and_grad(
        lambda w, b: (loss(w, b), loss(w, b) > 0), has_aux=True, m_sharpness=4,
    )(PARAMS, BATCH)
